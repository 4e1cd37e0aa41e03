"""Read an AMD code object: its arch, and the resources of each kernel.

Layout: the ELF-64 object file format, and "Code Object" in LLVM's "User Guide for AMDGPU Backend":
e_flags, and the note NT_AMDGPU_METADATA, which is MessagePack. A code object may come from a cache
or a file, so every offset is checked; damaged bytes raise CompileError.
"""

import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.programs import execute
from q4jit.errors import CompileError, TargetError, expected

_IDENT: Final = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian
_EM_AMDGPU: Final = 224
_EF_AMDGPU_MACH: Final = 0xFF
_PT_NOTE: Final = 4
_NT_AMDGPU_METADATA: Final = 32
_DAMAGE: Final = (struct.error, ValueError, OverflowError)  # OverflowError: an offset beyond 2⁶³
_MOST: Final = 4096  # entries of an array or a map, bytes of a name: more than any kernel needs

# EF_AMDGPU_MACH_AMDGCN_*, from GCN 5 on
_ARCHS: Final = {
    0x2C: "gfx900", 0x2D: "gfx902", 0x2E: "gfx904", 0x2F: "gfx906", 0x30: "gfx908", 0x31: "gfx909",
    0x32: "gfx90c", 0x33: "gfx1010", 0x34: "gfx1011", 0x35: "gfx1012", 0x36: "gfx1030",
    0x37: "gfx1031", 0x38: "gfx1032", 0x39: "gfx1033", 0x3D: "gfx1035", 0x3E: "gfx1034",
    0x3F: "gfx90a", 0x40: "gfx940", 0x41: "gfx1100", 0x42: "gfx1013", 0x43: "gfx1150",
    0x44: "gfx1103", 0x45: "gfx1036", 0x46: "gfx1101", 0x47: "gfx1102", 0x48: "gfx1200",
    0x49: "gfx1250", 0x4A: "gfx1151", 0x4B: "gfx941", 0x4C: "gfx942", 0x4E: "gfx1201",
    0x4F: "gfx950", 0x55: "gfx1152", 0x58: "gfx1153",
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        offset_bytes: where it begins among the arguments.
        size_bytes: its size.
        kind: `by_value`, `global_buffer`, …
    """

    offset_bytes: int
    size_bytes: int
    kind: str


@dataclass(frozen=True)
class KernelInfo:
    """The resources of one kernel, as its code object lists them.

    Attributes:
        name: the kernel's name.
        symbol: the symbol of its descriptor.
        vgprs: vector registers per lane.
        agprs: accumulation registers per lane.
        sgprs: scalar registers per wave.
        vgpr_spills: vector registers that did not fit.
        sgpr_spills: scalar registers that did not fit.
        scratch_bytes: private memory per lane.
        lds_bytes: shared memory per thread block.
        kernarg_bytes: memory of the arguments.
        wave: threads per wave.
        max_block_size: most threads per thread block.
        arguments: the arguments in order.
    """

    name: str
    symbol: str
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    kernarg_bytes: int
    wave: int
    max_block_size: int
    arguments: tuple[Argument, ...]


def code_object_arch(data: bytes) -> str:
    """Return the arch of a code object, e.g. `gfx1100`. Raises CompileError for damaged bytes."""
    try:
        flags = struct.unpack_from("<I", _checked(data), 0x30)[0]
        return _ARCHS[flags & _EF_AMDGPU_MACH]
    except KeyError as error:
        raise _damaged(f"unknown arch number {error}") from error
    except _DAMAGE as error:
        raise _damaged(error) from error


def kernel_infos(data: bytes) -> dict[str, KernelInfo]:
    """Return the resources of each kernel in a code object, by name.

    Raises CompileError for damaged bytes, and TargetError if msgpack is missing.
    """
    unpack = unpacker()
    try:
        kernels = _metadata(_checked(data), unpack)["amdhsa.kernels"]
        infos = [_info(kernel) for kernel in _typed(kernels, list)]
    except (*_DAMAGE, KeyError, TypeError) as error:
        raise _damaged(repr(error)) from error
    return {info.name: info for info in infos}


def unpacker() -> Callable[..., Any]:
    """Return MessagePack's reader. Raises TargetError if the package is missing."""
    try:
        import msgpack  # late: only an extra installs it
    except ImportError as error:
        raise TargetError(
            "cannot read a kernel's metadata: the Python package msgpack is not installed; "
            "pip install 'q4jit[cross]'"
        ) from error
    unpack: Callable[..., Any] = msgpack.unpackb
    return unpack


def _damaged(reason: object) -> CompileError:
    return CompileError("code object", (), f"damaged code object: {reason}", "")


def _checked(data: bytes) -> bytes:
    if not data.startswith(_IDENT):
        raise ValueError("not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", data, 0x12)
    if machine != _EM_AMDGPU:
        raise ValueError(expected(f"{_EM_AMDGPU} (an AMD GPU)", str(machine), where="ELF machine"))
    return data


def _metadata(data: bytes, unpack: Callable[..., Any]) -> dict[str, Any]:
    for name, kind, description in _notes(data):
        if name == b"AMDGPU\0" and kind == _NT_AMDGPU_METADATA:
            limits = dict.fromkeys(("max_array_len", "max_map_len", "max_str_len"), _MOST)
            value = unpack(description, max_bin_len=0, max_ext_len=0, **limits)
            metadata: dict[str, Any] = _typed(value, dict)
            return metadata
    raise ValueError("the note NT_AMDGPU_METADATA is missing")


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield name, type and description of each note.

    The segments of type PT_NOTE (Elf64_Phdr) contain the notes (Elf64_Nhdr).
    """
    (headers_at,) = struct.unpack_from("<Q", data, 0x20)
    header_bytes, count = struct.unpack_from("<HH", data, 0x36)
    for at in range(headers_at, headers_at + count * header_bytes, header_bytes or 1):
        kind, start, size_bytes = struct.unpack_from("<I4xQ16xQ", data, at)
        if kind == _PT_NOTE:
            if start + size_bytes > len(data):
                raise ValueError("a note segment extends beyond the end of the file")
            yield from _notes_in(data[start : start + size_bytes])


def _notes_in(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at < len(data):
        name_bytes, text_bytes, kind = struct.unpack_from("<III", data, at)
        name_at = at + 12
        text_at = name_at + _padded(name_bytes)
        at = text_at + _padded(text_bytes)
        if at > len(data):
            raise ValueError("a note extends beyond the end of its segment")
        yield data[name_at:][:name_bytes], kind, data[text_at:][:text_bytes]


def _padded(size_bytes: int) -> int:
    return (size_bytes + 3) & ~3


def _typed(value: Any, kind: type) -> Any:  # a value of MessagePack
    if type(value) is not kind:
        raise ValueError(expected(kind.__name__, type(value).__name__))
    return value


def _info(kernel: Any) -> KernelInfo:  # a value of MessagePack
    _typed(kernel, dict)

    def number(key: str, default: int | None = None) -> int:
        value = int(_typed(kernel.get(key, default), int))
        if value < 0:
            raise ValueError(expected("0 or more", str(value), where=key))
        return value

    return KernelInfo(
        name=str(_typed(kernel[".name"], str)),
        symbol=str(_typed(kernel[".symbol"], str)),
        vgprs=number(".vgpr_count"),
        agprs=number(".agpr_count", 0),  # only where the arch has them
        sgprs=number(".sgpr_count"),
        vgpr_spills=number(".vgpr_spill_count", 0),
        sgpr_spills=number(".sgpr_spill_count", 0),
        scratch_bytes=number(".private_segment_fixed_size"),
        lds_bytes=number(".group_segment_fixed_size"),
        kernarg_bytes=number(".kernarg_segment_size"),
        wave=number(".wavefront_size"),
        max_block_size=number(".max_flat_workgroup_size"),
        arguments=tuple(_argument(a) for a in _typed(kernel.get(".args", []), list)),
    )


def _argument(value: Any) -> Argument:  # a value of MessagePack
    _typed(value, dict)
    return Argument(
        offset_bytes=_typed(value[".offset"], int),
        size_bytes=_typed(value[".size"], int),
        kind=_typed(value[".value_kind"], str),
    )


def disassemble(data: bytes) -> str:
    """Return the instructions of a code object, from an llvm-objdump that knows its arch.

    Raises TargetError if no llvm-objdump does, and CompileError for damaged bytes.
    """
    arch = code_object_arch(data)
    show = "--disassemble --no-show-raw-insn --triple=amdgcn-amd-amdhsa".split()
    with tempfile.TemporaryDirectory(prefix="q4jit-") as name:
        folder, file = Path(name), "kernel.hsaco"
        (folder / file).write_bytes(data)
        for program in _objdumps():
            if arch in execute((program, *show, "--mcpu=help", file), folder).text().split():
                log = execute((program, *show, f"--mcpu={arch}", file), folder)
                if log.problem:
                    raise _damaged(log.text())
                return log.output
    programs = ", ".join(_objdumps()) or "no llvm-objdump at all"
    raise TargetError(
        expected(
            f"an llvm-objdump in PATH that knows {arch}", programs, cure="install a newer LLVM"
        )
    )


def _objdumps() -> list[str]:
    """Return every llvm-objdump in PATH, the newest version first."""
    names = {
        path.name
        for folder in os.get_exec_path()
        for path in Path(folder).glob("llvm-objdump*")
        if re.fullmatch(r"llvm-objdump(-\d+)?", path.name)
    }
    newest = sorted(names, key=lambda name: int(name.partition("objdump-")[2] or 0), reverse=True)
    return [path for name in newest if (path := shutil.which(name))]
