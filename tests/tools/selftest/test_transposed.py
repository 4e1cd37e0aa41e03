"""The self-test's cases of products with `w.T`: coverage, judgement, kernels on the host."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from q4jit.hip.kernel import (
    ADD_SPLITS,
    ELEMENT_TRANSPOSED,
    GEMV_TRANSPOSED,
    ROWS,
    TILE_HALVES_TRANSPOSED,
    TILE_TRANSPOSED,
    UNIT_ELEMENTS,
)
from q4jit.hip.render import render
from q4jit.targets import find_target
from q4jit.tools.selftest import run
from q4jit.tools.selftest.cases import Case
from q4jit.tools.selftest.cpu import CpuBench, cpu_cases
from q4jit.tools.selftest.findings import Findings
from q4jit.tools.selftest.run import judge
from q4jit.tools.selftest.transposed import cpu_transposed_cases, transposed_cases
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR, TILES16
from tests.support.halves import DTYPES
from tests.support.hip import hip_plan, run_on_host

MOST_CASES, MOST_KERNELS = 70, 90  # besides those of the other cases
ARCHS = ("gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_80", "sm_90")


def assert_special_rows(case: Case) -> None:
    """Check that one of the last rows holds an Inf, one a NaN, and one a large number."""
    y = case.args[0].astype(np.float64)
    if case.rows > 3:
        large = 65504 if case.args[0].dtype == DTYPES["f16"] else 1e38
        np.testing.assert_allclose(y[-3:, -1], [np.inf, np.nan, large], rtol=1e-2)
        y = y[:-3]
        assert (np.abs(y) < 100).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_schedule_meets_each_of_its_formats(arch: str) -> None:
    formats: dict[tuple[str, str], set[str]] = {}
    layouts: dict[str, set[str]] = {}
    texts: set[str] = set()
    selected = list(transposed_cases())
    for case in selected:
        plan = hip_plan(case.function, f"hip:{arch}", case.args, case.plan_options)
        texts |= {render(plan, kernel).text for kernel in plan.kernels}
        (schedule,) = {kernel.schedule for kernel in plan.kernels} - {ROWS, ADD_SPLITS}
        assert case.plan_options.schedule in {None, schedule}
        key = schedule, case.plan_options.precision
        formats.setdefault(key, set()).add(case.args[1].format)
        layouts.setdefault(schedule, set()).add(plan.kernels[-1].layout)
        if schedule == GEMV_TRANSPOSED:
            layouts[schedule].add(plan.kernels[0].layout)
            assert plan.kernels[0].splits > 1
    for schedule in (ELEMENT_TRANSPOSED, GEMV_TRANSPOSED, TILE_TRANSPOSED):
        assert formats[schedule, "f32"] == set(FORMATS)
        assert layouts[schedule] >= {PLANAR, GGUF}
    if arch.startswith("sm_"):
        for precision in ("f32", "f16"):
            assert formats[TILE_HALVES_TRANSPOSED, precision] == {"Q4_0"}
    assert (TILES16 in layouts[GEMV_TRANSPOSED]) == (arch != "gfx1030")
    assert len(selected) <= MOST_CASES
    assert len(texts) < MOST_KERNELS


def test_shapes_rows_types_and_numbers_of_gpus() -> None:
    selected = list(transposed_cases())
    assert {case.rows for case in selected} >= {1, 2, 4, 8, 16, 33, 128, 600}
    assert {str(case.args[0].dtype) for case in selected} == {"float32", "float16", "bfloat16"}
    for case in selected:
        k, n = case.args[1].shape
        assert n % 16
        assert k // UNIT_ELEMENTS % 2 or FORMATS[case.args[1].format].block_elements > k // 2
        assert_special_rows(case)
    alone = {str(case.args[0][0, -1]) for case in selected if case.rows == 1}
    assert alone >= {"inf", "nan", "1e+38"}


def test_cases_of_the_cpu() -> None:
    selected = list(cpu_transposed_cases())
    for is_few in (True, False):
        assert {c.args[1].format for c in selected if (c.rows <= 16) is is_few} == set(FORMATS)
    assert {str(case.args[0].dtype) for case in selected} == {"float32", "float16", "bfloat16"}
    assert {case.plan_options.precision for case in selected} == {"f32", "f16"}
    for case in selected:
        assert_special_rows(case)
    names = {str(case) for case in cpu_cases(quick=True)}
    assert names >= {str(case) for case in cpu_transposed_cases(quick=True)}


def test_the_command_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []

    def plan(bench: Any, selected: list[Case]) -> list[Any]:
        planned.extend(map(str, selected))
        return []

    monkeypatch.setattr(run, "outcomes", plan)
    monkeypatch.setattr(run, "checks", lambda quick: [])
    monkeypatch.setattr(run, "time_products", lambda *args: None)
    bench: Any = SimpleNamespace(target=find_target("hip:sm_90"))
    run.run_all(bench, False, Findings())
    assert set(planned) >= set(map(str, transposed_cases()))


def test_quick_runs_a_subset() -> None:
    quick, every = ({str(case) for case in transposed_cases(quick)} for quick in (True, False))
    assert quick < every
    assert len(quick) < len(every) / 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda z: np.where(np.isnan(z), 0, z), " results are not the NaN, Inf or number"),
        (lambda z: np.where(np.isinf(z), -z, z), " results are not the NaN, Inf or number"),
        (lambda z: np.where(np.abs(z) > 1e37, np.inf, z), " results are not the NaN, Inf or"),
        (lambda z: z * (1 + 1e-5), "exceeds the bound 2e-06"),
        (lambda z: z[:, ::-1], " results are not the NaN, Inf or number"),
    ],
)
def test_wrong_results_fail(fault: Callable[[Any], Any], message: str) -> None:
    case = next(case for case in transposed_cases() if case.args[1].format == "Q4_1")
    y, w = case.args
    with np.errstate(all="ignore"):
        z = y.astype(np.float64) @ w.dequantize().astype(np.float64).T
        assert judge(case, [z.astype(np.float32)]).passed
        outcome = judge(case, [fault(z).astype(np.float32)])
    assert outcome.passed is False
    assert message in outcome.message


@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
def test_kernels_of_gpus_pass(arch: str) -> None:
    for case in transposed_cases():
        if (arch, case.rows, case.plan_options.precision) == ("sm_90", 600, "f32"):
            continue  # as slow as 20 others; M = 128 has the same tile
        plan = hip_plan(case.function, f"hip:{arch}", case.args, case.plan_options)
        outcome = judge(case, run_on_host(plan, case.args))
        assert outcome.passed, outcome


def test_kernels_of_the_cpu_pass() -> None:
    bench = CpuBench()
    for case in cpu_transposed_cases():
        outcome = judge(case, bench.run(case))
        assert outcome.passed, outcome
