"""Compiled kernels: recorded registers, no spills, and the expected instructions.

tests/golden/hip_objects.txt records the resources of each kernel's code object, compiled by one
version of ziglang. A kernel that needs more fails. A kernel that needs less fails too, until
`--update-golden` records it; otherwise a later change could undo the gain unnoticed.
"""

import importlib.metadata
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from q4jit.errors import CompileError
from q4jit.hip.explain import remarks
from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    GEMV_DOT,
    TILE_FMA,
    TILE_MATRIX,
)
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.targets import HIP_ARCHS, find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.tiles import suits_tiles16
from tests.support.compilers import compiler_for
from tests.support.golden import check_golden
from tests.support.hip import hip_plan
from tests.support.hip_cases import (
    AMD_ARCHS,
    BLOCK_FORMATS,
    RECORDED,
    Case,
    Generic,
    case,
    gated,
    lookup,
    normed,
    product,
    softcap,
    tensor,
    transposed,
    transposed_norm,
    values,
    zeros,
)
from tests.support.hip_chosen import FAMILIES, choices
from tests.support.hip_objects import (
    LOAD_16,
    assembly,
    faults,
    frame_bytes,
    in_parallel,
    instructions,
    matching,
    pinned,
    stated,
)
from tests.support.pairs import in_turn
from tests.support.paths import GOLDEN
from tests.support.tools import lack

pytestmark = pytest.mark.ratchet

RECORD: Final = GOLDEN / "hip_objects.txt"
COLUMNS: Final = ("VGPRs", "AGPRs", "SGPRs", "LDS", "scratch", "spills")

Numbers = tuple[int, ...]
Table = dict[tuple[str, str], Numbers]  # by kernel and arch, in the order of COLUMNS


# --- the record -----------------------------------------------------------------------------------


def written(table: Table) -> str:
    """Return the text of the record."""
    rows = [("kernel", "arch", *COLUMNS), *((*key, *map(str, table[key])) for key in table)]
    lines = [
        f"{name:24}{arch:8}" + "".join(f"{number:>8}" for number in numbers)
        for name, arch, *numbers in rows
    ]
    return "\n".join([f"ziglang {pinned()}; LDS and scratch in bytes", "", *lines, ""])


def recorded() -> Table:
    """Read the record."""
    rows = RECORD.read_text("utf-8").splitlines()[3:]
    cells = [re.split(r" {2,}", row) for row in rows]
    return {(name, arch): tuple(map(int, numbers)) for name, arch, *numbers in cells}


def part_of(source: Source) -> str:
    """Return what tells a kernel from the last one of its case."""
    parts = (part for part in ("rows", "splits") if source.symbol.endswith(f"_{part}"))
    return "".join(f" {part}" for part in parts)


def needs(source: Source) -> Numbers:
    """Return the resources of a kernel, in the order of COLUMNS."""
    text = assembly(source)
    has_agprs = source.target.arch in {"gfx90a", "gfx942"}
    spills = stated(text, "vgpr_spill_count") + stated(text, "sgpr_spill_count")
    return (
        stated(text, "vgpr_count"),
        stated(text, "agpr_count") if has_agprs else 0,
        stated(text, "sgpr_count"),
        stated(text, "group_segment_fixed_size"),
        stated(text, "private_segment_fixed_size"),
        spills,
    )


def test_the_record_names_the_pinned_compiler() -> None:
    assert RECORD.read_text("utf-8").startswith(f"ziglang {pinned()};")


def test_no_kernel_needs_more_than_recorded(request: pytest.FixtureRequest) -> None:
    installed = importlib.metadata.version("ziglang")
    if installed != pinned():
        lack(f"registers are recorded for ziglang {pinned()}, got {installed}: pip install it")
    named = {
        (f"{kernel.name}{part_of(source)}", arch): source
        for kernel in RECORDED
        for arch in AMD_ARCHS
        for source in kernel.sources(arch)
    }
    table = dict(zip(named, in_parallel(needs, named.values()), strict=True))
    update = bool(request.config.getoption("--update-golden"))
    if not update and RECORD.exists():
        worse = list(grown(recorded(), table))
        assert not worse, "\n".join(["these kernels need more than recorded:", *worse])
    check_golden(RECORD, written(table), update=update)


def grown(before: Table, now: Table) -> Iterator[str]:
    """Yield a line for each resource that a kernel needs more of."""
    for key in before.keys() & now.keys():
        for name, old, new in zip(COLUMNS, before[key], now[key], strict=True):
            # more scalar registers cost nothing unless they spill
            if new > old and name != "SGPRs":
                yield f"{' on '.join(key)}: {new} {name}, recorded: {old}"


def test_remarks_name_the_plan_options_that_do_not_apply() -> None:
    asked = PlanOptions(precision="i8", block_size=128)
    args = [(zeros(m, 512), tensor("Q8_0", 512, 64)) for m in (4, 64)]
    few, many = (hip_plan(product, "hip:gfx1030", a, asked) for a in args)
    assert remarks(few, asked) == []
    precision, block_size = remarks(many, asked)
    assert precision.text.startswith("precision='i8' is an upper bound: tile_fma computes ")
    assert precision.text.endswith(" in the more exact 'f32'")
    assert block_size.text.startswith("block_size=128 does not apply to ")
    assert block_size.text.endswith(": tile_fma has 256 threads")


def test_a_kernel_that_needs_more_is_named() -> None:
    before: Table = {("a", "gfx1100"): (8, 0, 6, 0, 0, 0), ("b", "gfx1100"): (8, 0, 6, 0, 0, 0)}
    now: Table = {("a", "gfx1100"): (7, 0, 6, 0, 0, 0), ("b", "gfx1100"): (8, 0, 5, 0, 4, 1)}
    assert list(grown(before, now)) == [
        "b on gfx1100: 4 scratch, recorded: 0",
        "b on gfx1100: 1 spills, recorded: 0",
    ]


EXACT_LDS: Final = (  # a kernel of each schedule; in `gemv_matrix` x fills all the room
    "element Q4_0",
    "gemv 1 Q4_0",
    "gemv_dot 16 Q6_K",
    "tile_fma Q4_0",
    "tile Q4_0",
    "tile Q6_K gguf",
    "w.T 1 Q4_0",
    "w.T 70 Q4_0",
)


@pytest.mark.parametrize("name", EXACT_LDS)
def test_a_kernel_beyond_the_limit_of_shared_memory_does_not_compile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = "gfx1100"
    compiler, facts = compiler_for(arch), HIP_ARCHS[arch]
    (kernel,) = (kernel for kernel in RECORDED if kernel.name == name)
    needed = recorded()[name, arch][COLUMNS.index("LDS")]
    monkeypatch.setitem(HIP_ARCHS, arch, replace(facts, lds_bytes=needed))
    assembly(kernel.sources(arch)[-1])
    monkeypatch.setitem(HIP_ARCHS, arch, replace(facts, lds_bytes=needed - 1))
    source = kernel.sources(arch)[-1]
    with pytest.raises(CompileError, match=f"has {needed - 1} bytes of shared memory"):
        compiler.compile_assembly(source.text, source.target)


# --- no scratch, no spills ------------------------------------------------------------------------

K, N = 4096, 4096  # as in the record, whose texts are compiled once for both
FULLY_COMPILED: Final = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K")


def plain(fmt: str, m: int, k: int = K, **plan_options: Any) -> Case:
    """Return a case of one product."""
    name = " ".join(
        [fmt, f"M={m}", f"K={k}", *(f"{key}={plan_options[key]}" for key in plan_options)]
    )
    return case(name, product, zeros(m, k), tensor(fmt, k, N), **plan_options)


def turned(fmt: str, m: int, **plan_options: Any) -> Case:
    """Return a case of one product with `w.T`."""
    name = " ".join([f"{fmt}.T", f"M={m}", *(f"{key}={plan_options[key]}" for key in plan_options)])
    return case(name, transposed, zeros(m, N), tensor(fmt, K, N), **plan_options)


def everything(arch: str) -> Iterator[Case | Generic]:
    """Yield every schedule with every structure of blocks, and other functions with some.

    Each case that is rarely chosen is compiled for two or three of the five archs.
    """
    turn = AMD_ARCHS.index(arch) % 2
    for i, fmt in enumerate(fmt for fmt in FORMATS if fmt not in FULLY_COMPILED):
        yield from (plain(fmt, 1), plain(fmt, 70))
        if i % 2 == turn:
            yield from (plain(fmt, 16), plain(fmt, 1, precision="i8"))
            yield from (turned(fmt, 1), turned(fmt, 4))
            yield plain(fmt, 16, precision="i8", schedule=GEMV_DOT if fmt != "BF16" else None)
    for i, fmt in enumerate(FULLY_COMPILED):
        yield from (plain(fmt, m) for m in (1, 4, 16, 70))
        yield from (turned(fmt, m) for m in ((1, 4) if i % 2 == turn else (2, 70)))
        if i % 2 == turn:
            yield from rare(fmt)
            if HIP_ARCHS[arch].matrix and fmt in BLOCK_FORMATS:
                yield plain(fmt, 70, precision="f16", schedule=TILE_MATRIX, layout="gguf")
        elif fmt in BLOCK_FORMATS:
            yield from (plain(fmt, m, precision="i8", schedule=GEMV_DOT) for m in (1, 4, 16))
    for fmt in ("F16", "F32"):
        yield from (plain(fmt, m, k=1000) for m in (1, 70))
        yield case(f"{fmt}.T K=1000", transposed, zeros(1, N), tensor(fmt, 1000, N))
    two, square = (tensor("Q4_0", K, N), tensor("Q8_0", K, N)), tensor("Q6_K", K, K)
    for m, precision in ((1, "f32"), (1, "i8"), (16, "i8"), (70, "f32")):
        yield case("gated", gated, zeros(m, K), *two, zeros(N), precision=precision)
        yield case("normed", normed, zeros(m, K), zeros(K), square, precision=precision)
        yield case("softcap", softcap, zeros(m, K), square, 30.0, precision=precision)
    for fmt in ("Q2_K", "Q4_K"):  # a second set of sums
        yield plain(fmt, 4, k=28672, precision="f16")
    for fmt, n in (("Q6_K", N), ("Q8_0", 64)):
        pair = [tensor(fmt, K, n)] * 2
        yield case(f"gated {fmt}", gated, zeros(64, K), *pair, zeros(n), precision="f16")
    for m in (1, 16, 70):
        yield case("transposed norm", transposed_norm, zeros(m, N), zeros(N), two[0], zeros(m, K))


def rare(fmt: str) -> Iterator[Case | Generic]:
    """Yield cases that are rarely chosen."""
    yield from (plain(fmt, m, layout="gguf") for m in (1, 16))
    yield from (plain(fmt, 1, schedule=ELEMENT), plain(fmt, 70, schedule=TILE_FMA))
    yield from (turned(fmt, m, layout="gguf") for m in (1, 16))
    yield case(f"values of {fmt}", values, tensor(fmt, K, N))
    yield case(f"lookup in {fmt}", lookup, np.arange(2), tensor(fmt, K, N), layout="gguf")
    if suits_tiles16(FORMATS[fmt]):
        table = tensor(fmt, K, N)
        yield case(f"lookup in tiles of {fmt}", lookup, np.arange(2), table, layout="tiles16")
    yield Generic(f"generic {fmt}", fmt)


def sources_of(kernels: Iterable[Case | Generic], arch: str) -> dict[str, tuple[str, Source]]:
    """Return every text once, with the name of a case that has it."""
    sources = [(kernel.name, s) for kernel in kernels for s in kernel.sources(arch)]
    return {source.text: (name, source) for name, source in sources}


def faulty(named: Iterable[tuple[str, Source]]) -> list[tuple[str, ...]]:
    """Return the name, the symbol and the faults of each kernel that has any."""
    names, sources = zip(*named, strict=True)
    compiler_for(sources[0].target.arch)  # in this thread: a missing compiler skips the test
    return [
        (name, source.symbol, *problems)
        for name, source, problems in zip(names, sources, in_parallel(faults, sources), strict=True)
        if problems
    ]


# An array with indices that are known only at run time cannot be in registers.
_INDEXED: Final = """
{kernel} void k(int* p) {{
    int local[64];
    for (int i = 0; i < 64; ++i) local[i * p[1] & 63] = p[i];
    p[0] = local[p[2] & 63];
}}"""


def indexed(arch: str, kernel: str) -> Source:
    return Source("k", find_target(f"hip:{arch}"), _INDEXED.format(kernel=kernel), ".hip")


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_faults_include_scratch_memory(arch: str) -> None:
    names = faults(indexed(arch, 'extern "C" __attribute__((global))'))
    assert names[0].startswith("private_segment_fixed_size ")
    assert any(re.match("scratch_|buffer_", name) for name in names)


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_no_kernel_has_scratch_or_spills(arch: str) -> None:
    named = sources_of(everything(arch), arch)
    assert len(named) > 90
    assert not faulty(named.values())


@pytest.mark.parametrize(
    ("place", "arch"), [(place, arch) for family in FAMILIES for place, arch in enumerate(family)]
)
def test_no_chosen_kernel_has_scratch_or_spills(place: int, arch: str) -> None:
    cases = [choice.case() for choice in choices() if choice.place == place]
    named = sources_of(cases, arch)
    assert len(named) > 30
    assert not faulty(named.values())


def test_every_pair_of_values_is_chosen() -> None:
    chosen = [(c.place, c.format, c.m, c.shape, c.function) for c in choices()]
    for a, b in itertools.combinations(range(len(chosen[0])), 2):
        values = {each[a] for each in chosen}, {each[b] for each in chosen}
        assert {(each[a], each[b]) for each in chosen} == set(itertools.product(*values))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_frame_bytes_counts_the_stack(arch: str) -> None:
    source = indexed(arch, 'extern "C" __global__')
    assert frame_bytes(compiler_for(arch).compile_object(source.text, source.target)) == 256


# NVRTC 13.0 keeps a few values in memory, outside the inner loop. Other variants were slower.
NVRTC_FRAME_BYTES = {
    ("sm_90", "chosen 1 Q8_0"): 16,
    ("sm_90", "chosen 8 Q6_K"): 8,
    ("sm_90", "chosen 8 Q8_0"): 8,
    ("sm_90", "gemv 16 Q8_0"): 8,
    ("sm_90", "gemv 16 Q4_K"): 16,
    ("sm_90", "tile Q4_0"): 32,
    ("sm_90", "tile Q4_1 f16"): 24,
    ("sm_90", "tile Q2_K"): 16,
    ("sm_90", "tile Q6_K"): 16,
    ("sm_90", "tile normed Q6_K"): 16,
    ("sm_90", "tile IQ4_XS"): 16,
    ("sm_90", "tile Q8_0"): 8,
    ("sm_80", "chosen 8 Q6_K"): 16,
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_keeps_every_schedule_in_registers(arch: str) -> None:
    kernels: Iterable[Case | Generic] = RECORDED
    if arch == "sm_80":  # whose other texts are those of sm_90
        kernels = [each for each in kernels if re.match(r"chosen|tile|w\.T", each.name)]
    named = [*sources_of(kernels, arch).values()]
    compiler = compiler_for(arch)
    cubins = in_parallel(lambda s: compiler.compile_object(s.text, s.target), [s for _, s in named])
    frames = {
        (arch, name): bytes_
        for (name, _), bytes_ in zip(named, map(frame_bytes, cubins), strict=True)
        if bytes_
    }
    assert not {key: n for key, n in frames.items() if n > NVRTC_FRAME_BYTES.get(key, 0)}


# --- instructions ---------------------------------------------------------------------------------


def of(kernel: Case, arch: str) -> Counter[str]:
    """Count the instructions of a case's last kernel, the product."""
    return instructions(assembly(kernel.sources(arch)[-1]))


@in_turn("fmt arch", 2 * [*FORMATS], AMD_ARCHS)
def test_quants_are_loaded_16_bytes_at_a_time(arch: str, fmt: str) -> None:
    wide = [4 * plane.bits for plane in FORMATS[fmt].planes if plane.bits >= 4]
    unit_bytes = sum(wide) if FORMATS[fmt].planes else 32 * FORMATS[fmt].block_bytes
    columns = 2  # LLVM merges the loads before the loop with those in it for the next round
    counts = of(plain(fmt, 1, schedule=GEMV), arch)
    assert matching(counts, LOAD_16) == columns * unit_bytes // 16


@in_turn("fmt arch", 2 * BLOCK_FORMATS, AMD_ARCHS)
def test_one_instruction_converts_a_byte_to_a_float(arch: str, fmt: str) -> None:
    counts = of(plain(fmt, 1, schedule=GEMV), arch)
    # of two columns; and a few of one value, where results are computed again, and of factors
    bytes_ = [matching(counts, f"v_cvt_f32_ubyte{i}") for i in range(4)]
    assert min(bytes_) == 16
    assert max(bytes_) <= 16 + 12
    assert matching(counts, "v_(bfe|cvt_f32_[iu]32).*") < 32, "none for quants"


@in_turn("fmt arch", 2 * BLOCK_FORMATS, AMD_ARCHS)
def test_int8_is_multiplied_by_dot_instructions(arch: str, fmt: str) -> None:
    dot = "v_dot4c?_i32_i8" if HIP_ARCHS[arch].dot == "sdot4" else "v_dot4_i32_iu8"
    counts = of(plain(fmt, 1, precision="i8", schedule=GEMV_DOT), arch)
    assert matching(counts, dot) == 8 * 4  # words × columns


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_tiles_are_multiplied_by_matrix_units(arch: str, precision: str) -> None:
    matrix = "v_mfma_f32_16x16x16_?bf16(_1k)?|v_wmma_f32_16x16x16_bf16"
    counts = of(plain("Q4_0", 70, precision=precision, schedule=TILE_MATRIX), arch)
    terms = {"f32": 3, "f16": 2}[precision]
    waves = 256 // HIP_ARCHS[arch].wave
    assert matching(counts, matrix) == terms * 2 * (4 * 4) // waves  # two k of 16, 4 × 4 fragments
    # wide loads read fragments from shared memory: two of 8 bytes a lane for MFMA, else 16 bytes
    wide = "ds_(read_b128|read2(st64)?_b64)" if waves == 4 else "ds_load_b128"
    assert matching(counts, wide) >= terms * 2
    assert matching(counts, "ds_(read|load)_[ui](8|16).*") == 0


def test_ptx_has_the_expected_instructions() -> None:
    gemv, dot, matrix, tile = (
        of(plain("Q4_0", m, precision=precision, schedule=schedule), "sm_90")
        for m, precision, schedule in (
            (1, "f32", "gemv"),
            (1, "i8", "gemv_dot"),
            (8, "f32", "gemv_matrix"),
            (70, "f32", "tile_matrix"),
        )
    )
    streamed = "ld.global.nc.L1::no_allocate.v4.u32"
    assert gemv[streamed] == 2 * 2  # two columns, before the loop and in it
    assert dot[streamed] == 4 + 1  # four columns; one at a time for rough rows
    assert matching(dot, r"dp4a\.s32\.s32") == 8 * 4
    assert matching(matrix, r"mma\.sync\.aligned\.m16n8k16.*f16.*") % (2 * 2 * 4) == 0, "a quad"
    assert matrix[streamed] > 0
    assert matching(tile, r"mma\.sync\.aligned\.m16n8k16.*bf16.*") == 3 * 2 * 2 * 2
    assert matching(tile, r"ldmatrix\.sync\.aligned\.m8n8\.x4.*") >= 3 * 2
    assert matching(gemv, r"ld\.shared\.v4\.f32") == 8, "x is read 16 bytes at a time"
