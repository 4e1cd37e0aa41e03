"""The shared memory that Python counts is what the arrays of the texts take."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from q4jit.hip.candidates import candidates
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.memory import shared_bytes
from q4jit.hip.render import render
from q4jit.targets import HIP_ARCHS
from tests.support.hip import hip_plan, rows_of
from tests.support.hip_cases import GOLDEN, RECORDED, Case
from tests.support.tools import require_tool

ARCHS: Final = ("gfx906", "gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_80", "sm_90")
CONSTANT: Final = re.compile(r"^constexpr (?:int|bool|float) .*?;", re.MULTILINE | re.DOTALL)
SHARED: Final = re.compile(r"^ +SHARED(?:_AT_512)? (\w+) \w+((?:\[[^]]*\])?);", re.MULTILINE)
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
        spaces["\n".join([*CONSTANT.findall(text), *checks])] = None
    assert len(spaces) > 20
    texts = [f"namespace n{i} {{\n{space}\n}}" for i, space in enumerate(spaces)]
    source = tmp_path / "constants.cpp"
    source.write_text("\n".join([TYPES, *texts]), encoding="utf-8")
    command = [require_tool("clang++-15", "clang-15"), "-std=c++17", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
