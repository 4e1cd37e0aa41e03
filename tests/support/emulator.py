"""Run a generated kernel in a child process: on this CPU, or for another one in QEMU.

A kernel is an ELF object with one entry `void NAME(void *args)`; `args` points to 8-byte slots.
A crash, a hang or a stray access ends the child, and the test fails with the reason.
"""

import functools
import platform
import re
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support.builds import built
from tests.support.tools import require_tool

Slot = NDArray[Any] | np.integer[Any] | np.floating[Any] | int | float

X86_64_CPUS: Final = {"x86-64": "Opteron_G1", "x86-64-v2": "Nehalem", "x86-64-v3": "Haswell"}
"""QEMU's models with exactly the features of a level; QEMU has no AVX-512 (x86-64-v4)."""

_HOST_SOURCE: Final = Path(__file__).with_name("emulator_host.c")
_STRAY_ACCESS: Final = 3  # the host's exit status
_ALLOWED: Final = ("memcpy", "memmove", "memset")  # LLVM may insert calls of these


class KernelCrashError(Exception):
    """The kernel accessed memory outside its arrays, used an unsupported instruction, or hung."""


@dataclass(frozen=True)
class _Machine:
    """How tests link and run objects of one CPU family."""

    name: str
    cross_compiler: tuple[str, str]  # the program and its Debian package
    emulator: str
    default_cpu: str

    @property
    def native(self) -> bool:
        return platform.machine() == self.name

    def compiler(self) -> str:
        return require_tool("gcc", "gcc") if self.native else require_tool(*self.cross_compiler)

    def runner(self, cpu: str | None) -> list[str]:
        """Return the command before the executable; empty if this machine runs it directly."""
        if self.native and cpu is None:
            return []
        return [require_tool(self.emulator, "qemu-user"), "-cpu", cpu or self.default_cpu]


_MACHINES: Final = {
    # Cortex-A57 has the features of every aarch64 CPU and no later ones.
    "aarch64": _Machine(
        "aarch64", ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"), "qemu-aarch64", "cortex-a57"
    ),
    "x86-64": _Machine(
        "x86_64", ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"), "qemu-x86_64", "max"
    ),
}


def run_kernel(
    target: str,
    object_bytes: bytes,
    symbol: str,
    slots: Sequence[Slot],
    *,
    cpu: str | None = None,
    gap_bytes: int = 0,
    timeout_s: float = 60.0,
) -> list[NDArray[Any]]:
    """Run a kernel on copies of the arrays among `slots`, and return these in order.

    Args:
        target: "aarch64" or "x86-64".
        object_bytes: the ELF object.
        symbol: the entry.
        slots: an int becomes an int64, a float an f32 in the slot's low bytes.
        cpu: a model of QEMU (`X86_64_CPUS`).
        gap_bytes: between the end of each array and an unreadable page. 0 catches any read beyond
            the end, and an odd number makes the arrays unaligned.
        timeout_s: when the kernel counts as hung.
    """
    machine = _MACHINES[target]
    runner = machine.runner(cpu)
    executable = _link(machine, object_bytes, symbol)
    arrays = [np.ascontiguousarray(slot) for slot in slots if isinstance(slot, np.ndarray)]
    with tempfile.TemporaryDirectory(prefix="q4jit-emulator-") as folder:
        source, result = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(_encode(slots, arrays, gap_bytes))
        _run([*runner, str(executable), str(source), str(result)], timeout_s)
        return _decode(result.read_bytes(), slots)


def _encode(slots: Sequence[Slot], arrays: Sequence[NDArray[Any]], gap_bytes: int) -> bytes:
    """Return the input file for `emulator_host.c`."""
    header = b"".join(map(_encode_slot, slots))
    return b"".join(
        [struct.pack("<QQ", len(slots), gap_bytes), header, *(a.tobytes() for a in arrays)]
    )


def _encode_slot(slot: Slot) -> bytes:
    if isinstance(slot, np.ndarray):
        return struct.pack("<QQ", 1, slot.nbytes)
    if isinstance(slot, float | np.floating):
        return struct.pack("<Qfxxxx", 0, float(slot))
    return struct.pack("<Qq", 0, int(slot))


def _decode(raw: bytes, slots: Sequence[Slot]) -> list[NDArray[Any]]:
    results, at = [], 0
    for slot in slots:
        if isinstance(slot, np.ndarray):
            values = np.frombuffer(raw, slot.dtype, slot.size, at)
            results.append(values.reshape(slot.shape).copy())
            at += slot.nbytes
    assert at == len(raw), "the host wrote as many bytes as it got"
    return results


def _run(command: Sequence[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelCrashError(f"the kernel did not end within {timeout_s} s") from error
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode < 0:
        raise KernelCrashError(f"{signal.Signals(-done.returncode).name} {message}".strip())
    if done.returncode == _STRAY_ACCESS:
        raise KernelCrashError(message)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {message}")


def _link(machine: _Machine, object_bytes: bytes, symbol: str) -> Path:
    """Return a static executable of the host and the kernel, linked once per object."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", symbol):
        raise ValueError(f"{symbol!r} is not the symbol of a kernel")
    alone = ["-nostdlib", f"-Wl,--entry={symbol}", *(f"-Wl,--defsym={n}=0" for n in _ALLOWED)]
    strict = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-DKERNEL={symbol}"]

    def build(executable: Path) -> None:
        kernel = executable.with_name("kernel.o")
        kernel.write_bytes(object_bytes)
        # The first link has no libraries: libc and libgcc would hide forbidden calls of the kernel.
        _compile(machine, [*alone, str(kernel), "-o", str(executable)])
        _compile(machine, [*strict, str(_HOST_SOURCE), str(kernel), "-o", str(executable)])

    sources = (_HOST_SOURCE.read_bytes(), object_bytes)
    key = [_compiler_key(machine), *alone, *strict]
    return built(f"{machine.name}-{symbol}", *key, *sources, build=build)


@functools.cache
def _compiler_key(machine: _Machine) -> str:
    command = [machine.compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(machine: _Machine, arguments: Sequence[str]) -> None:
    command = [machine.compiler(), "-static", "-no-pie", "-Wl,-z,noexecstack", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the kernel cannot be linked:\n{done.stderr}")
