"""The cases of a self-test: coverage and judgement."""

import math

import numpy as np
import pytest

from q4jit.arrays.call_shapes import lead_shape
from q4jit.frontend.trace import trace
from q4jit.hip import harness
from q4jit.hip.kernel import HipPlan
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, one_sign_bound
from q4jit.targets import Target, find_target
from q4jit.tools.selftest import measures
from q4jit.tools.selftest.cases import Case, cases, one_sign_cases, product
from q4jit.tools.selftest.run import judge
from q4jit.weights.formats import FORMATS
from q4jit.weights.reference import random_weight, random_x

MOST_KERNELS = 290  # at a second each, on a few cores, a self-test takes four minutes


def plan_of(case: Case, target: Target) -> HipPlan:
    graph = trace(case.function, tuple(map(harness._spec, case.args)))
    return make_plan(
        graph, target, math.prod(lead_shape(case.args, graph.signature)), case.plan_options
    )


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_90"])
def test_every_case_uses_its_schedule_and_kernels_are_not_too_many(arch: str) -> None:
    target = find_target(f"hip:{arch}")
    texts = set()
    for case in cases(target):
        plan = plan_of(case, target)
        texts |= {render(plan, kernel).text for kernel in plan.kernels}
        used = {kernel.schedule for kernel in plan.kernels}
        assert case.plan_options.schedule is None or case.plan_options.schedule in used
    assert 80 < len(texts) < MOST_KERNELS


def test_every_combination_of_interest_is_covered() -> None:
    selected = cases(find_target("hip:gfx1100"))
    groups = {case.group for case in selected}
    for schedule in ("element", "gemv", "tile_fma", "tile_matrix"):
        assert {f"{schedule} {layout} f32" for layout in ("planar", "gguf")} <= groups
    for group in ("tile_fma planar f32", "tile_matrix planar f32", "tile_matrix planar f16"):
        used = {case.measure for case in selected if case.group == group}
        assert used == {measures.against_values}
    assert {"gemv_dot planar i8", "gemv_dot gguf i8", "tile_matrix planar f16"} <= groups
    for start in (
        "element ",
        "gemv ",
        "tile_fma ",
        "tile_matrix ",
        "gemv_dot ",
        "default schedule f32",
    ):
        mine = [case.args[1].format for case in selected if case.group.startswith(start)]
        wanted = {
            n
            for n, f in FORMATS.items()
            if ("mat" not in start and "dot" not in start) or not f.float_type
        }
        assert set(mine) == wanted, start
    for layout in ("planar", "gguf"):
        mine = [case.args[1].format for case in selected if f" {layout} " in case.group]
        assert set(mine) == set(FORMATS), layout
    products = [case for case in selected if case.function is product]
    assert {case.rows for case in products} == {1, 2, 3, 8, 16, 17, 64, 100}
    assert {case.args[1].shape[0] for case in products} == {256, 576, 4096, 14336}
    assert {1, 37} < {case.args[1].shape[1] for case in products}
    assert {case.bound for case in products} == {2e-6, 5e-4, 2e-2, one_sign_bound(14336)}


def test_products_of_one_sign_have_no_negative_elements() -> None:
    every = list(one_sign_cases((name, 2) for name in FORMATS))
    assert len(every) == len(FORMATS)
    for case in every:
        x, w = case.args
        assert x.min() >= 0
        values = w.dequantize()
        assert values.min() >= 0
        assert (values > 0).mean() > 0.7  # a quarter of Q2_K's codes are 0
        assert not judge(case, [(x @ values) * np.float32(1 + 5e-7)]).passed
        assert judge(case, [(x.astype(np.float64) @ values).astype(np.float32)]).passed


def test_an_arch_without_matrix_units_has_no_cases_for_them() -> None:
    assert not any("matrix" in case.group for case in cases(find_target("hip:gfx1030")))


def test_quick_runs_a_subset() -> None:
    target = find_target("hip:gfx1100")
    quick = {str(case) for case in cases(target, quick=True)}
    assert len(quick) < len(cases(target)) / 2
    assert quick < {str(case) for case in cases(target)}


def product_case(precision: str = "f32") -> Case:
    args = (random_x(3, 256), random_weight("Q4_0", 256, 37))
    bound = BOUNDS[precision]
    measure = measures.contract_error
    return Case("g", product, args, PlanOptions(precision), bound, measure)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1 + 1e-5, False)])
def test_a_case_passes_within_its_bound(factor: float, passed: bool) -> None:
    case = product_case()
    x, w = case.args
    outcome = judge(case, [(x @ w) * np.float32(factor)])
    assert outcome.passed is passed
    assert ("exceeds the bound 2e-06" in outcome.message) is not passed


def test_a_result_that_is_not_written_fails() -> None:
    case = product_case()
    x, w = case.args
    y = x @ w
    y[2, 36] = np.nan
    outcome = judge(case, [y])
    assert (outcome.passed, outcome.error) == (False, None)
    assert "1 of 111 results is NaN or Inf" in outcome.message


def test_one_wrong_row_fails_although_the_others_are_right() -> None:
    case = product_case("f16")
    x, w = case.args
    y = x @ w
    y[1] *= 1.001  # the mean over all three rows would pass
    assert not judge(case, [y]).passed
