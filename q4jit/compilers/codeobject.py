"""What an AMD code object says of itself: its arch, and what each kernel needs.

Layout: the ELF-64 object file format, and "Code Object" in LLVM's "User Guide for AMDGPU Backend":
e_flags, and the note NT_AMDGPU_METADATA, which is MessagePack. A code object may come from a cache
or a file: every offset is checked, and damaged bytes raise CompileError.
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

from q4jit.compilers.steps import execute
from q4jit.errors import CompileError, TargetError

_IDENT: Final = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian
_EM_AMDGPU: Final = 224
_EF_AMDGPU_MACH: Final = 0xFF
_PT_NOTE: Final = 4
_NT_AMDGPU_METADATA: Final = 32
_DAMAGE: Final = (struct.error, ValueError, OverflowError)  # the last: an offset beyond 2⁶³
_MOST: Final = 4096  # entries of an array or a map, and bytes of a name: ample for any kernel

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
    """One argument of a kernel: offset and size in bytes, and its kind (`by_value`, …)."""

    offset_bytes: int
    size_bytes: int
    kind: str


@dataclass(frozen=True)
class KernelInfo:
    """What one kernel needs, in the words of its code object.

    Registers are per lane (VGPRs, AGPRs) or per wave (SGPRs); scratch_bytes are per lane, lds_bytes
    per block. Spills are registers that did not fit.
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
    """The arch that a code object is for: `gfx1100`. Raises CompileError for damaged bytes."""
    try:
        flags = struct.unpack_from("<I", _checked(data), 0x30)[0]
        return _ARCHS[flags & _EF_AMDGPU_MACH]
    except KeyError as error:
        raise _damaged(f"no known arch has the number {error}") from error
    except _DAMAGE as error:
        raise _damaged(error) from error


def kernel_infos(data: bytes) -> dict[str, KernelInfo]:
    """What each kernel of a code object needs, by name.

    Raises CompileError for damaged bytes, and TargetError where msgpack is missing.
    """
    unpack = unpacker()
    try:
        kernels = _metadata(_checked(data), unpack)["amdhsa.kernels"]
        infos = [_info(kernel) for kernel in _typed(kernels, list)]
    except (*_DAMAGE, KeyError, TypeError) as error:
        raise _damaged(repr(error)) from error
    return {info.name: info for info in infos}


def unpacker() -> Callable[..., Any]:
    """MessagePack's reader, an extra's package. Raises TargetError where it is missing."""
    try:
        import msgpack  # late: an extra's package
    except ImportError as error:
        raise TargetError("reading metadata needs msgpack: pip install q4jit[cross]") from error
    unpack: Callable[..., Any] = msgpack.unpackb
    return unpack


def _damaged(reason: object) -> CompileError:
    return CompileError("code object", (), f"damaged code object: {reason}", "")


def _checked(data: bytes) -> bytes:
    if not data.startswith(_IDENT):
        raise ValueError("not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", data, 0x12)
    if machine != _EM_AMDGPU:
        raise ValueError(f"made for machine {machine}, not for AMD's GPUs ({_EM_AMDGPU})")
    return data


def _metadata(data: bytes, unpack: Callable[..., Any]) -> dict[str, Any]:
    for name, kind, description in _notes(data):
        if name == b"AMDGPU\0" and kind == _NT_AMDGPU_METADATA:
            limits = dict.fromkeys(("max_array_len", "max_map_len", "max_str_len"), _MOST)
            value = unpack(description, max_bin_len=0, max_ext_len=0, **limits)
            found: dict[str, Any] = _typed(value, dict)
            return found
    raise ValueError("without the note NT_AMDGPU_METADATA")


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, type and description of each note: Elf64_Phdr of type PT_NOTE, Elf64_Nhdr in them."""
    (headers_at,) = struct.unpack_from("<Q", data, 0x20)
    header_bytes, count = struct.unpack_from("<HH", data, 0x36)
    for at in range(headers_at, headers_at + count * header_bytes, header_bytes or 1):
        kind, start, size_bytes = struct.unpack_from("<I4xQ16xQ", data, at)
        if kind == _PT_NOTE:
            if start + size_bytes > len(data):
                raise ValueError("a note reaches beyond the file")
            yield from _notes_in(data[start : start + size_bytes])


def _notes_in(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at < len(data):
        name_bytes, text_bytes, kind = struct.unpack_from("<III", data, at)
        name_at = at + 12
        text_at = name_at + _padded(name_bytes)
        at = text_at + _padded(text_bytes)
        if at > len(data):
            raise ValueError("a note reaches beyond its segment")
        yield data[name_at:][:name_bytes], kind, data[text_at:][:text_bytes]


def _padded(size_bytes: int) -> int:
    return (size_bytes + 3) & ~3


def _typed(value: Any, kind: type) -> Any:  # a value of MessagePack
    if type(value) is not kind:
        raise ValueError(f"found {type(value).__name__} where {kind.__name__} belongs")
    return value


def _info(kernel: Any) -> KernelInfo:  # a value of MessagePack
    _typed(kernel, dict)

    def number(key: str, default: int | None = None) -> int:
        value = int(_typed(kernel.get(key, default), int))
        if value < 0:
            raise ValueError(f"{key} is {value}")
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
    """The instructions of a code object, by an llvm-objdump that knows its arch.

    Raises TargetError where there is none, and CompileError for damaged bytes.
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
    looked = ", ".join(_objdumps()) or "none in PATH"
    raise TargetError(f"no llvm-objdump that knows {arch} (found: {looked}): install a newer LLVM")


def _objdumps() -> list[str]:
    """Every llvm-objdump in PATH, the newest version first."""
    names = {
        path.name
        for folder in os.get_exec_path()
        for path in Path(folder).glob("llvm-objdump*")
        if re.fullmatch(r"llvm-objdump(-\d+)?", path.name)
    }
    newest = sorted(names, key=lambda name: int(name.partition("objdump-")[2] or 0), reverse=True)
    return [path for name in newest if (path := shutil.which(name))]
