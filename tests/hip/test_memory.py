"""The shared memory that Python counts is what the texts state and what compilers allocate."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from q4jit.hip.candidates import candidates
from q4jit.hip.gemv_matrix_sizes import sizes_of
from q4jit.hip.kernel import GEMV_MATRIX, HipKernel, HipPlan
from q4jit.hip.memory import shared_bytes
from q4jit.hip.render import render
from q4jit.targets import HIP_ARCHS
from tests.support.hip import hip_plan, rows_of
from tests.support.hip_cases import GOLDEN, RECORDED, Case
from tests.support.hip_objects import assembly, in_parallel, stated
from tests.support.tools import require_tool

ARCHS: Final = ("gfx906", "gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_80", "sm_90")
CONSTANT: Final = re.compile(r"^constexpr (?:int|bool|float) .*?;", re.MULTILINE | re.DOTALL)
SHARED: Final = re.compile(r"^ +SHARED(?:_AT_512)? (\w+) \w+((?:\[[^]]*\])?);", re.MULTILINE)
ROW_VALUES: Final = re.compile(r"^struct RowValues \{.*?^\};", re.MULTILINE | re.DOTALL)
TYPES: Final = (
    "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned long long u64;"
    "struct u32x4 { unsigned elements[4]; };"
)
EVERY: Final = 7  # candidate


def kernels(arch: str) -> Iterator[tuple[HipPlan, HipKernel]]:
    """Every kernel on record, and some candidates of each."""
    for case in (*RECORDED, *(case for _, case in GOLDEN)):
        if not isinstance(case, Case) or not suits(arch, case):
            continue
        plan = hip_plan(case.function, f"hip:{arch}", case.args, case.plan_options)
        for kernel in plan.kernels:
            yield plan, kernel
            if kernel.work.sections:
                variants = candidates(plan.target, kernel, rows_of(case.args))
                yield from ((plan, variant) for variant in variants[1::EVERY])


def suits(arch: str, case: Case) -> bool:
    return HIP_ARCHS[arch].matrix is not None or case.plan_options.schedule != "tile_matrix"


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_what_the_arrays_of_a_text_take(arch: str, tmp_path: Path) -> None:
    spaces: dict[str, None] = {}
    for plan, kernel in kernels(arch):
        text = render(plan, kernel, "host").text
        arrays = [f"sizeof({type_}{size})" for type_, size in SHARED.findall(text)]
        at_least = " + ".join(["0ul", *arrays])
        at_most = " + ".join(["16ul", *(f"({array} + 15) / 16 * 16" for array in arrays)])
        checks = [
            f"static_assert(LDS_BYTES == {shared_bytes(plan, kernel)});",
            f'static_assert({at_least} <= LDS_BYTES, "{kernel.work.name}, {kernel.rows_class}");',
            f'static_assert(LDS_BYTES <= {at_most}, "{kernel.work.name}, {kernel.rows_class}");',
        ]
        spaces["\n".join([*CONSTANT.findall(text), *ROW_VALUES.findall(text), *checks])] = None
    assert len(spaces) > 20
    texts = [f"namespace n{i} {{\n{space}\n}}" for i, space in enumerate(spaces)]
    source = tmp_path / "constants.cpp"
    source.write_text("\n".join([TYPES, *texts]), encoding="utf-8")
    command = [require_tool("clang++-15", "clang-15"), "-std=c++17", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100"])
def test_compilers_allocate_what_python_counts(arch: str) -> None:
    planned = [
        (plan, kernel)
        for case in RECORDED
        if isinstance(case, Case)
        for plan in [hip_plan(case.function, f"hip:{arch}", case.args, case.plan_options)]
        for kernel in plan.kernels
    ]
    texts = in_parallel(assembly, [render(plan, kernel) for plan, kernel in planned])
    for (plan, kernel), text in zip(planned, texts, strict=True):
        counted = shared_bytes(plan, kernel)
        # numbers such as `any_rough` count as the 16 bytes that they are aligned to
        rest = counted - stated(text, "group_segment_fixed_size")
        assert 0 <= rest < 32, (kernel.work.name, kernel.rows_class, counted, rest)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_80", "sm_90"])
def test_a_gemv_matrix_is_divided_without_rest(arch: str) -> None:
    facts, checked = HIP_ARCHS[arch], 0
    for _, kernel in kernels(arch):
        if kernel.schedule != GEMV_MATRIX:
            continue
        sizes, checked = sizes_of(facts, kernel), checked + 1
        assert sizes.waves_n * sizes.waves_k * facts.wave == sizes.threads
        assert sizes.steps * sizes.used_rows * sizes.turns == sizes.rows * sizes.terms
        assert sizes.owned * sizes.splits == sizes.rows * sizes.columns
        assert 0 < sizes.stage_quads <= sizes.split_quads
        assert sizes.stages == 1 or sizes.stage_quads % sizes.round_quads == 0
        assert sizes.used_bytes <= facts.lds_bytes
    assert checked > 3
