"""Reading AMD code objects, whole and damaged ones."""

import functools
import importlib.util
import random
import re
import struct
import sys
import tempfile
from pathlib import Path

import msgpack
import pytest

from q4jit.compilers import codeobject, llvm
from q4jit.compilers.codeobject import code_object_arch, disassemble, kernel_infos
from q4jit.compilers.find import find_compiler
from q4jit.errors import CompileError, TargetError
from q4jit.targets import HIP_ARCHS, Target, host_target
from tests.support.hip_texts import hip_text
from tests.support.tools import lack, require_tool

AMD = [name for name, arch in HIP_ARCHS.items() if not arch.is_nvidia]


@functools.cache
def compiled(arch: str) -> tuple[bytes, str]:
    """Return a code object compiled by ziglang, and its assembly."""
    if importlib.util.find_spec("ziglang") is None:
        lack("ziglang is missing: pip install 'q4jit[cross]'")
    target = Target("hip", arch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("Q4JIT_HIP_COMPILER", "ziglang")
        compiler = find_compiler(target)
    text = hip_text(target)
    return compiler.compile_object(text, target), compiler.compile_assembly(text, target)


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", AMD)
def test_a_code_object_names_its_arch(arch: str) -> None:
    data, assembly = compiled(arch)
    assert code_object_arch(data) == arch
    assert f'amdgcn-amd-amdhsa--{arch}"' in assembly
    assert kernel_infos(data)["gemv"].wave == HIP_ARCHS[arch].wave


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201"])
def test_the_metadata_agrees_with_the_assembly(arch: str) -> None:
    data, assembly = compiled(arch)
    infos = kernel_infos(data)
    assert list(infos) == (["gemv", "tile"] if arch == "gfx90a" else ["gemv"])
    # the assembly has the same numbers as text, kernel after kernel
    for key, field in {
        "group_segment_fixed_size": "lds_bytes",
        "kernarg_segment_size": "kernarg_bytes",
        "max_flat_workgroup_size": "max_block_size",
        "private_segment_fixed_size": "scratch_bytes",
        "sgpr_count": "sgprs",
        "sgpr_spill_count": "sgpr_spills",
        "vgpr_count": "vgprs",
        "vgpr_spill_count": "vgpr_spills",
        "wavefront_size": "wave",
    }.items():
        words = re.findall(rf"(?m)^ +(?:- )?\.{key}: +(\d+)$", assembly)
        assert [getattr(info, field) for info in infos.values()] == list(map(int, words)), key
    gemv = infos["gemv"]
    assert gemv.symbol == "gemv.kd"
    assert gemv.max_block_size == 256
    assert gemv.lds_bytes == 256 // HIP_ARCHS[arch].wave * 4
    assert gemv.scratch_bytes == gemv.vgpr_spills == gemv.sgpr_spills == 0
    assert gemv.vgprs > 0
    assert [(a.offset_bytes, a.size_bytes) for a in gemv.arguments] == [
        *((8 * i, 8) for i in range(5)),
        (40, 4),
    ]
    assert [a.kind for a in gemv.arguments] == ["global_buffer"] * 5 + ["by_value"]


def test_scratch_memory_is_counted() -> None:
    target = Target("hip", "gfx90a")
    text = """extern "C" __attribute__((global)) void f(int* p, int n) {
        volatile int table[100];
        for (int i = 0; i < n; ++i) table[i % 100] = p[i];
        p[0] = table[n % 100];
    }\n"""
    compiled("gfx90a")  # skips the test if ziglang is missing
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("Q4JIT_HIP_COMPILER", "ziglang")
        data = find_compiler(target).compile_object(text, target)
    assert kernel_infos(data)["f"].scratch_bytes >= 400


# --- damage ---------------------------------------------------------------------------------------


def refused(data: bytes) -> bool:
    """Return whether the bytes raise CompileError; otherwise they must be readable."""
    try:
        code_object_arch(data)
        kernel_infos(data)
    except CompileError:
        return True
    return False


def test_a_cut_code_object_is_refused() -> None:
    data, _ = compiled("gfx1100")
    assert not refused(data)
    end = data.index(b"amdhsa.target")  # after the metadata only the cache's checksum sees a cut
    assert all(refused(data[:size]) for size in range(end))


def test_damaged_bytes_are_read_or_refused() -> None:
    data, _ = compiled("gfx1100")
    chance = random.Random(0)
    notes = data.index(b"AMDGPU\0")
    outcomes = {refused(data)}
    for _ in range(3000):
        bad = bytearray(data)
        start, end = chance.choice([(0, 0x40 + 8 * 0x38), (notes - 12, notes + 1500)])
        for _ in range(chance.choice([1, 1, 4])):
            bad[chance.randrange(start, min(end, len(data)))] = chance.choice(
                [0, 1, 0x7F, 0x80, 0xDD, 0xDF, 0xFF, chance.randrange(256)]
            )
        outcomes.add(refused(bytes(bad)))
    assert outcomes == {False, True}


def with_metadata(metadata: bytes) -> bytes:
    """Return a code object that contains only its note."""
    note = struct.pack("<III", 7, len(metadata), 32) + b"AMDGPU\0\0" + metadata
    note += bytes(-len(note) % 4)
    start = 0x40 + 0x38
    header = b"\x7fELF\x02\x01\x01\x40" + bytes(8)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 224, 1, 0, 0x40, 0, 0x41, 0x40, 0x38, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(note), len(note), 4) + note


KERNEL = {
    ".name": "f",
    ".symbol": "f.kd",
    ".vgpr_count": 5,
    ".sgpr_count": 6,
    ".private_segment_fixed_size": 0,
    ".group_segment_fixed_size": 0,
    ".kernarg_segment_size": 8,
    ".wavefront_size": 32,
    ".max_flat_workgroup_size": 256,
}


def test_the_smallest_metadata_is_read() -> None:
    data = with_metadata(msgpack.packb({"amdhsa.kernels": [KERNEL]}))
    assert code_object_arch(data) == "gfx1100"
    info = kernel_infos(data)["f"]
    assert (info.vgprs, info.agprs, info.vgpr_spills, info.arguments) == (5, 0, 0, ())


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # an array of 2³²-1
        b"\xdf\xff\xff\xff\xff",  # a map of 2³²-1
        b"\xdb\xff\xff\xff\xff",  # a string of 2³²-1 bytes
        b"\x91" * 100_000,  # nested arrays
        b"\xc7\xff\x01" + bytes(255),  # an extension type
        b"\xa4\xff\xff\xff\xff",  # a string that is not UTF-8
        msgpack.packb([]),
        msgpack.packb({}),
        msgpack.packb({"amdhsa.kernels": 7}),
        msgpack.packb({"amdhsa.kernels": [7]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".vgpr_count": "5"}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".vgpr_count": -5}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".vgpr_count": True}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".name": None}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".name": "f" * 5000}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL | {".args": [{".offset": 0}]}]}),
        msgpack.packb({"amdhsa.kernels": [KERNEL]}) + b"\x00",
        msgpack.packb({1: 2, "amdhsa.kernels": [KERNEL]}),
    ],
)
def test_bad_metadata_is_refused(metadata: bytes) -> None:
    with pytest.raises(CompileError, match="damaged code object"):
        kernel_infos(with_metadata(metadata))


def test_other_files_are_refused() -> None:
    cpu_object = llvm.compile_object("define void @f() {\n  ret void\n}\n", host_target())
    for read in (code_object_arch, kernel_infos):
        with pytest.raises(CompileError, match=r"ELF machine: expected 224 \(an AMD GPU\), got \d"):
            read(cpu_object)
        with pytest.raises(CompileError, match="not a 64-bit little-endian ELF file"):
            read(b"MZ")
    unknown = bytearray(with_metadata(b"\x80"))
    unknown[0x30] = 0xFE
    with pytest.raises(CompileError, match="unknown arch number 254"):
        code_object_arch(bytes(unknown))


def test_an_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(TargetError, match=r"msgpack is not .*; pip install 'q4jit\[cross\]'"):
        kernel_infos(with_metadata(b"\x80"))


# --- disassembly ----------------------------------------------------------------------------------


def test_disassembly_shows_the_instructions() -> None:
    require_tool("llvm-objdump-15", "llvm-15")
    text = disassemble(compiled("gfx90a")[0])
    for instruction in ("v_dot4c_i32_i8", "v_mfma_f32_16x16x16bf16_1k", "s_barrier", "ds_bpermute"):
        assert instruction in text
    assert "global_load_dwordx4" in text


def test_an_error_lists_the_disassemblers_that_lack_the_arch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, _ = compiled("gfx1201")
    old = require_tool("llvm-objdump-15", "llvm-15")
    (tmp_path / "llvm-objdump-15").symlink_to(old)
    (tmp_path / "llvm-objdump-c").symlink_to(old)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert codeobject._objdumps() == [str(tmp_path / "llvm-objdump-15")]
    with pytest.raises(TargetError, match=r"expected an llvm-objdump .* gfx1201, got .*objdump-15"):
        disassemble(data)


def test_disassembly_removes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_tool("llvm-objdump-15", "llvm-15")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    disassemble(compiled("gfx1030")[0])
    assert list(tmp_path.iterdir()) == []
