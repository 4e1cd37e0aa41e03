"""Read compiled kernels for GPUs: instructions, registers, stacks, and faults."""

import functools
import os
import re
import struct
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from q4jit.plan.kernels import Source
from tests.support.builds import built
from tests.support.compilers import compiler_for
from tests.support.paths import ROOT

LOAD_16: Final = "global_load_(dwordx4|b128)"
_INSTRUCTION: Final = re.compile(r"^\t(?:@%p\d+ )?([a-z]\w*(?:[.:]+\w+)*)", re.MULTILINE)

Item = TypeVar("Item")
Result = TypeVar("Result")


def pinned() -> str:
    """Return the version of ziglang that pyproject.toml requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (pin,) = (p for p in project["optional-dependencies"]["test"] if p.startswith("ziglang"))
    return str(pin.removeprefix("ziglang=="))


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results in order; threads suffice, because compilers are processes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


@functools.cache
def assembly(source: Source) -> str:
    """Return the assembly of a text, PTX for NVIDIA's GPUs."""
    compiler = compiler_for(source.target.arch)

    def compile_(path: Path) -> None:
        path.write_text(compiler.compile_assembly(source.text, source.target), "utf-8")

    fingerprint = compiler.fingerprint(source.target)
    return built(f"{source.symbol}.s", fingerprint, source.text, build=compile_).read_text("utf-8")


def stated(text: str, name: str) -> int:
    """Return a number from the metadata of the only kernel, which follow its instructions."""
    (number,) = re.findall(rf"^[ -]+\.{name}: +(\d+)$", text, re.MULTILINE)
    return int(number)


def faults(source: Source) -> list[str]:
    """Return what a kernel should not have: scratch, spills, too much shared memory."""
    text = assembly(source)
    bad = ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    found = [f"{name} {stated(text, name)}" for name in bad if stated(text, name)]
    lds_bytes = stated(text, "group_segment_fixed_size")
    if lds_bytes > source.target.hip.lds_bytes:
        found.append(f"{lds_bytes} bytes of LDS")
    return found + [name for name in instructions(text) if re.match("(scratch|buffer)_(l|s)", name)]


def instructions(text: str) -> Counter[str]:
    """Count each instruction of an assembly, without encodings and the vector sizes of PTX."""
    return Counter(re.sub("_(e32|e64|sdwa|dpp)$", "", name) for name in _INSTRUCTION.findall(text))


def matching(counts: Counter[str], pattern: str) -> int:
    """Return the number of instructions whose name matches."""
    return sum(count for name, count in counts.items() if re.fullmatch(pattern, name))


def frame_bytes(cubin: bytes) -> int:
    """Return the bytes of stack of a cubin's only kernel.

    Layout: ELF-64; `.nv.info` holds entries of a format, an attribute and a size, as `cuobjdump
    -elf` shows them. EIATTR_FRAME_SIZE is of a symbol and its bytes.
    """
    headers_at, size_bytes, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [
        struct.unpack_from("<II16xQQ", cubin, at)
        for at in range(headers_at, headers_at + count * size_bytes, size_bytes)
    ]
    for name, _, start, length in sections:
        if cubin[sections[names][2] + name :].startswith(b".nv.info\0"):
            at, end = start, start + length
            while at < end:
                kind, attribute, size_or_value = struct.unpack_from("<BBH", cubin, at)
                if (kind, attribute) == (0x04, 0x11):
                    return int(struct.unpack_from("<4xI", cubin, at + 4)[0])
                at += 4 + (size_or_value if kind == 0x04 else 0)
    raise AssertionError("a cubin without .nv.info")
