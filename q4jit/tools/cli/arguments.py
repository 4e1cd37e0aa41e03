"""Argument types and checks that several commands share."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.errors import FormatError, TargetError, expected, short_name
from q4jit.floats import FLOAT_BYTES, FloatType
from q4jit.precision import PRECISIONS
from q4jit.runtime.devices import find_device
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS
from q4jit.tools.text import counted, visible
from q4jit.weights.formats import Format, find_format

_SHOWN_NAMES: Final = 3
_MAX_SIZE: Final = (1 << 31) - 1  # of K and N: kernels count them in i32


# --- argument types ------------------------------------------------------------------------------


def output_path(text: str) -> Path:
    """Return the path of a file or folder to write."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(expected("a path", repr(text)))
    return Path(text)


def positive(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 1 << 63:
        raise argparse.ArgumentTypeError(expected("a whole number from 1", repr(text)))
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1, given with commas between them."""
    return tuple(dict.fromkeys(map(positive, text.split(","))))


def thread_counts(text: str) -> tuple[int, ...]:
    """Return numbers of threads, given with commas between them."""
    numbers = positives(text)
    if max(numbers) > config.MOST_THREADS:
        raise argparse.ArgumentTypeError(
            expected(f"1 to {config.MOST_THREADS} threads", repr(text))
        )
    return numbers


def precision_names(text: str) -> tuple[str, ...]:
    """Return names of precisions, given with commas between them."""
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(PRECISIONS):
        known = ", ".join(PRECISIONS)
        raise argparse.ArgumentTypeError(expected(f"{known}, separated by commas", repr(text)))
    return names


def dtype_names(text: str) -> tuple[FloatType, ...]:
    """Return names of float types that NumPy has here, given with commas between them."""
    names: list[FloatType] = []
    for name in dict.fromkeys(text.split(",")):
        if name not in FLOAT_BYTES:
            known = ", ".join(FLOAT_BYTES)
            raise argparse.ArgumentTypeError(expected(f"{known}, separated by commas", repr(text)))
        names.append(name)
    if "bf16" in names and importlib.util.find_spec("ml_dtypes") is None:
        raise argparse.ArgumentTypeError(
            "NumPy has no bfloat16 without ml_dtypes; run pip install ml_dtypes"
        )
    return tuple(names)


def weight_shape(text: str) -> tuple[int, int]:
    """Return (K, N) of a weight, given as KxN."""
    k, _, n = text.lower().partition("x")
    try:
        return positive(k), positive(n)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            expected("K and N, for example 4096x14336", repr(text))
        ) from None


def shapes_in_words(shapes: Iterable[tuple[int, int]]) -> str:
    """Return shapes for a help text, each as `weight_shape` reads it."""
    return ", ".join(f"{k}x{n}" for k, n in shapes)


def block_format(text: str) -> Format:
    """Return the block format with a name in upper or lower case."""
    try:
        return find_format(text)
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def block_formats(text: str) -> tuple[Format, ...]:
    """Return block formats, given by their names with commas between them."""
    return tuple({fmt.name: fmt for fmt in map(block_format, text.split(","))}.values())


# --- reports ------------------------------------------------------------------------------------


def report_left_out(command: str, left_out: Mapping[str, str]) -> None:
    """Print one line to standard error about the matrices of a file that a command left out."""
    if not left_out:
        return
    names = list(left_out.items())[:_SHOWN_NAMES]
    shown = "; ".join(f"{short_name(name)[1:-1]}: {reason}" for name, reason in names)
    more = f"; and {len(left_out) - len(names)} more" if len(left_out) > len(names) else ""
    count = counted(len(left_out), "matrix", "matrices")
    print(visible(f"q4jit {command}: left out {count}: {shown}{more}"), file=sys.stderr)


# --- options and checks --------------------------------------------------------------------------


def add_output(command: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """Add the options --out, where `what` is written, and --force."""
    output = command.add_argument_group("output")
    output.add_argument("--out", type=output_path, metavar=metavar, required=True, help=what)
    output.add_argument(
        "--force", action="store_true", help="overwrite files that q4jit did not write"
    )


def checked(options: argparse.Namespace, check: Callable[..., object], *arguments: Any) -> None:
    """Call `check`, and end the command with status 2 if it refuses the arguments."""
    try:
        check(*arguments)
    except (FormatError, TargetError) as error:
        options.parser.error(str(error))


def check_output_file(options: argparse.Namespace, name: str) -> None:
    """End the command before its work if the file of option `name` cannot be written."""
    path: Path | None = getattr(options, name)
    if path is None:
        return
    special = path.exists() and not path.is_file()  # a folder, or a device that would be replaced
    if special or not path.name or not os.access(path.parent, os.W_OK):
        options.parser.error(expected("a file in a writable folder", str(path), where=f"--{name}"))


def check_shape(options: argparse.Namespace, fmt: Format, k: int, n: int) -> None:
    """End the command unless kernels can index a weight [k, n] and k fits the format's blocks."""
    checked(options, _check_shape, fmt, k, n)


def _check_shape(fmt: Format, k: int, n: int) -> None:
    fmt.column_bytes(k)
    if not (0 < n <= _MAX_SIZE and k <= _MAX_SIZE):
        raise FormatError(expected(f"K and N from 1 to {_MAX_SIZE}", f"K = {k}, N = {n}"))


def open_device(name: str, without: str) -> Device:
    """Return a device by its name, or by its arch alone.

    without: what a machine without a GPU can do; the end of the DeviceError then.
    """
    return find_device(f"hip:{name}" if name in HIP_ARCHS else name, without)
