"""What several commands take: types of arguments, and checks of what they name."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from q4jit import config
from q4jit.errors import FormatError, TargetError
from q4jit.precision import PRECISIONS
from q4jit.runtime.devices import find_device
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS
from q4jit.weights.formats import Format, find_format


def positive(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 1 << 63:
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted are whole numbers from 1")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1, which have commas between them."""
    return tuple(dict.fromkeys(map(positive, text.split(","))))


def thread_counts(text: str) -> tuple[int, ...]:
    """Return numbers of threads, which have commas between them."""
    numbers = positives(text)
    if max(numbers) > config.MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are 1 to {config.MOST_THREADS} threads"
        )
    return numbers


def precision_names(text: str) -> tuple[str, ...]:
    """Return precisions, which have commas between them."""
    given = tuple(dict.fromkeys(text.split(",")))
    if not set(given) <= set(PRECISIONS):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are {', '.join(PRECISIONS)}, with a comma between them"
        )
    return given


def weight_shape(text: str) -> tuple[int, int]:
    """Return K and N of a weight."""
    k, _, n = text.lower().partition("x")
    try:
        return positive(k), positive(n)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are K and N as 4096x14336"
        ) from None


def shapes_in_words(shapes: Iterable[tuple[int, int]]) -> str:
    """Return shapes as `weight_shape` reads them, for a help text."""
    return ", ".join(f"{k}x{n}" for k, n in shapes)


def block_format(text: str) -> Format:
    """Return the format of a name, in capitals or not."""
    try:
        return find_format(text.upper())
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_out(command: argparse.ArgumentParser, what: str) -> None:
    """Add --out, the place where files go, and --force."""
    command.add_argument("--out", type=Path, metavar=what, required=True)
    command.add_argument(
        "--force", action="store_true", help="replace files that q4jit did not write"
    )


def checked(options: argparse.Namespace, check: Callable[..., object], *arguments: Any) -> None:
    """End the command where a check refuses a number: that is a wrong command line."""
    try:
        check(*arguments)
    except (FormatError, TargetError) as error:
        options.parser.error(str(error))


def check_folder(options: argparse.Namespace, name: str) -> None:
    """End the command where a file cannot be written: before what goes there is measured."""
    path: Path | None = getattr(options, name)
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        options.parser.error(f"--{name} {path}: accepted is a file in a folder that can be written")


def check_shape(options: argparse.Namespace, fmt: Format, k: int, n: int) -> None:
    """End the command unless a weight [k, n] is whole blocks that a kernel can count."""
    checked(options, _check_shape, fmt, k, n)


def _check_shape(fmt: Format, k: int, n: int) -> None:
    fmt.column_bytes(k)
    if not (0 < n < 1 << 31 and k < 1 << 31):
        raise FormatError(f"found K = {k}, N = {n}: accepted are sizes from 1 to {(1 << 31) - 1}")


def open_device(name: str) -> Device:
    """Return a device by its name, as a target or an arch alone. Raises DeviceError."""
    return find_device(f"hip:{name}" if name in HIP_ARCHS else name)
