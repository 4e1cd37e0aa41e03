"""Run the text of a HIP kernel on this machine, in a child process that finds hidden faults.

The text uses the host prelude, and `hip_host.cpp` executes its grid: see there and `Program.run`.
"""

import functools
import re
import signal
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.targets import host_target
from tests.support.builds import built
from tests.support.tools import require_tool

Argument = NDArray[Any] | np.integer[Any] | np.floating[Any] | int | float

_COMPILER: Final = ("clang++-15", "clang-15")
_SOURCE: Final = Path(__file__).with_name("hip_host.cpp")
_FAULT: Final = 3  # the program's exit status
_OUTPUT_POISON: Final = 0x7FF7  # of 16 bits

_FLAGS: Final = (
    "-std=c++17",
    "-O1",
    "-march=native",  # fma as an instruction
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
)
_TEXT_FLAGS: Final = (
    *_FLAGS,
    # Calls where lanes meet differ by their addresses: see MEETING in the prelude.
    *("-mllvm", "-disable-tail-duplicate", "-mllvm", "-disable-early-taildup"),
    # A local variable that is read before it is written must not happen to be 0.
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero,return,unreachable",
    "-fsanitize=signed-integer-overflow,float-cast-overflow",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # functions with the same parameters, not all used
    "-Werror",
)


class KernelFaultError(Exception):
    """A fault that a GPU may hide; the message says what happened, where and in which thread."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel as its text declares it."""

    type: str
    name: str

    @property
    def is_array(self) -> bool:
        return "*" in self.type

    @property
    def is_output(self) -> bool:
        """Whether the kernel may write to the array."""
        return self.is_array and "const" not in self.type.partition("*")[0]


@dataclass(frozen=True)
class Program:
    """An executable that runs one kernel."""

    executable: Path
    parameters: tuple[Parameter, ...]

    def run(
        self,
        grid: Sequence[int],
        block_size: int,
        arguments: Sequence[Argument],
        *,
        seeds: Sequence[int] = (1, 2),
        low_guard: bool = False,
        alignments: Mapping[str, int] | None = None,
        complete: bool = True,
        timeout_s: float = 60.0,
    ) -> list[NDArray[Any]]:
        """Run the kernel over `grid` (up to 3 numbers) and return the output arrays in order.

        Arrays of parameters that point to const are inputs. The others are outputs: their shape
        and dtype count, and their contents are poisoned. The grid runs once per seed, each time in
        another order of threads and blocks. Arrays end right before an unreadable page, as far as
        their alignment allows (16 bytes, or `alignments` by name); with `low_guard` they begin
        right after one. `complete`: every element of the outputs must be written.

        Raises KernelFaultError.
        """
        names = [parameter.name for parameter in self.parameters]
        if len(arguments) != len(names):
            raise ValueError(f"{len(arguments)} arguments for {len(names)} parameters: {names}")
        sizes = [*grid, 1, 1][:3]
        job = _encode(self.parameters, arguments, sizes, block_size, seeds, low_guard, alignments)
        with tempfile.TemporaryDirectory(prefix="q4jit-hip-host-") as folder:
            source, result = Path(folder, "job"), Path(folder, "result")
            source.write_bytes(job)
            _run([str(self.executable), str(source), str(result), *names], timeout_s)
            raw = result.read_bytes()
        outputs = {
            parameter.name: argument
            for parameter, argument in zip(self.parameters, arguments, strict=True)
            if parameter.is_output and isinstance(argument, np.ndarray)
        }
        results = _decode(raw, outputs)
        if complete:
            for name, array in results.items():
                _check_written(name, array)
        return list(results.values())


def compile_host(text: str, symbol: str) -> Program:
    """Compile a program that runs kernel `symbol` of `text`, which includes the host prelude.

    The trampoline `<symbol>_host(void **arguments)`, each pointing to an argument's value, is made
    from the kernel's declaration unless the text has it. The same text is compiled once.
    """
    return _compile_cached(text, symbol)


@functools.cache
def _compile_cached(text: str, symbol: str) -> Program:
    parameters = declared_parameters(text, symbol)
    if f"{symbol}_host" not in text:
        text += _trampoline(symbol, parameters)
    harness = _harness()

    def compile_(kernel: Path) -> None:
        source = kernel.with_name("kernel.hip")
        source.write_text(text, encoding="utf-8")
        _build([*_TEXT_FLAGS, "-x", "c++", "-c", str(source), "-o", str(kernel)])

    def link(executable: Path) -> None:
        # The kernel comes first, so that the guard of shared memory follows its arrays.
        objects = [str(kernel), str(harness), f"-Wl,--defsym=host_entry={symbol}_host"]
        _build(["-no-pie", *objects, "-lm", "-o", str(executable)])

    kernel = built(f"{symbol}.o", _compiler_key(), *_TEXT_FLAGS, text, build=compile_)
    return Program(built(symbol, kernel.name, harness.name, build=link), parameters)


def declared_parameters(text: str, symbol: str) -> tuple[Parameter, ...]:
    """Return the parameters of kernel `symbol`, read from its definition in `text`."""
    found = re.search(rf"\bvoid\s+{re.escape(symbol)}\s*\(([^)]*)\)\s*\{{", text)
    if found is None:
        raise ValueError(f"the text defines no kernel `void {symbol}(...)`")
    parameters = []
    for declaration in filter(None, map(str.strip, found[1].split(","))):
        parts = re.fullmatch(r"(.*?)(\w+)", declaration, re.DOTALL)
        assert parts is not None, declaration
        parameters.append(
            Parameter(" ".join(parts[1].replace("__restrict__", "").split()), parts[2])
        )
    return tuple(parameters)


def _trampoline(symbol: str, parameters: Sequence[Parameter]) -> str:
    values = [f"*({parameter.type}*)a[{i}]" for i, parameter in enumerate(parameters)]
    return f'\nextern "C" void {symbol}_host(void** a) {{\n    {symbol}({", ".join(values)});\n}}\n'


def _encode(
    parameters: Sequence[Parameter],
    arguments: Sequence[Argument],
    grid: Sequence[int],
    block_size: int,
    seeds: Sequence[int],
    low_guard: bool,
    alignments: Mapping[str, int] | None,
) -> bytes:
    """Return the contents of the job file that `hip_host.cpp` describes."""
    head = [*grid, block_size, int(low_guard), len(seeds), *seeds, len(arguments)]
    offset = 8 * (len(head) + 4 * len(arguments))
    rows, arrays = [], []
    for parameter, argument in zip(parameters, arguments, strict=True):
        if not parameter.is_array:
            rows.append(struct.pack("<q8sqq", 0, _encode_value(parameter, argument), 1, 0))
            continue
        if not isinstance(argument, np.ndarray):
            raise TypeError(f"{parameter.name} is an array of the kernel, not {argument!r}")
        alignment = (alignments or {}).get(parameter.name, 16)
        kind = 2 if parameter.is_output else 1
        rows.append(struct.pack("<4q", kind, argument.nbytes, alignment, offset))
        if not parameter.is_output:
            arrays.append(argument.tobytes())
            offset += argument.nbytes
    return b"".join([struct.pack(f"<{len(head)}q", *head), *rows, *arrays])


def _encode_value(parameter: Parameter, value: Argument) -> bytes:
    """Return eight bytes that begin with the value in the parameter's type."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"{parameter.name} is a {parameter.type} of the kernel, not an array")
    if "float" in parameter.type:
        return struct.pack("<fxxxx", value)
    return struct.pack("<q", value)


def _decode(raw: bytes, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    results, at = {}, 0
    for name, array in outputs.items():
        values = np.frombuffer(raw, array.dtype, array.size, at)
        results[name] = values.reshape(array.shape).copy()
        at += array.nbytes
    assert at == len(raw), "the harness wrote another number of bytes than it was given"
    return results


def _check_written(name: str, array: NDArray[Any]) -> None:
    if array.itemsize == 1:  # any byte may be a result
        return
    halves = np.frombuffer(array.tobytes(), np.uint16).reshape(array.size, -1)
    unwritten = np.flatnonzero((halves == _OUTPUT_POISON).all(axis=1))
    if unwritten.size:
        raise KernelFaultError(
            f"{unwritten.size} of {array.size} elements of {name} were never written,"
            f" first [{', '.join(map(str, np.unravel_index(unwritten[0], array.shape)))}]"
        )


def _run(command: Sequence[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelFaultError(f"the kernel did not end within {timeout_s} s") from error
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode < 0:
        raise KernelFaultError(f"{signal.Signals(-done.returncode).name} {message}".strip())
    if done.returncode == _FAULT:
        raise KernelFaultError(message)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {message}")


@functools.cache
def _harness() -> Path:
    flags = [*_FLAGS, "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    return built(
        "hip_host.o",
        _compiler_key(),
        *flags,
        _SOURCE.read_bytes(),
        build=lambda path: _build([*flags, "-c", str(_SOURCE), "-o", str(path)]),
    )


@functools.cache
def _compiler_key() -> str:
    """Return the compiler's version and the CPU that -march=native means."""
    command = [require_tool(*_COMPILER), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"{version}{host_target().key()}"


def _build(arguments: Sequence[str]) -> None:
    command = [require_tool(*_COMPILER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
