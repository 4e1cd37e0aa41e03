"""The self-test's cases with arrays in f16 and bf16: coverage, judgement, kernels on the host."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.arrays.call_shapes import lead_shape
from q4jit.floats import FloatType, half_ulp
from q4jit.frontend.trace import trace
from q4jit.hip import harness
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.targets import Target, find_target
from q4jit.tools.selftest.cases import Case, schedules
from q4jit.tools.selftest.cpu import CpuBench
from q4jit.tools.selftest.halves import (
    between,
    conversion_cases,
    cpu_half_cases,
    half_cases,
    missing_types,
)
from q4jit.tools.selftest.run import judge
from q4jit.weights.formats import FORMATS
from tests.support.halves import DTYPES, LEAST_EXPONENT
from tests.support.hip import hip_plan, run_on_host

MOST_KERNELS = 66  # besides those of the other cases, which have up to 160

every_half = pytest.mark.parametrize("dtype", ["f16", "bf16"])


def products(selected: list[Case], dtype: str) -> list[Case]:
    return [
        c
        for c in selected
        if c.group.startswith(("products", "special")) and f" {dtype}," in c.group
    ]


@every_half
@pytest.mark.parametrize("arch", ["gfx1030", "gfx1100", "sm_90"])
def test_every_schedule_and_format_meets_each_type(arch: str, dtype: str) -> None:
    target = find_target(f"hip:{arch}")
    selected = products(list(half_cases(target)), dtype)
    assert {case.args[0].dtype for case in selected} == {DTYPES[dtype]}
    forced = {(c.plan_options.schedule, c.plan_options.precision) for c in selected}
    assert forced >= set(schedules(target))
    assert {case.args[1].format for case in selected} == set(FORMATS)
    special = {c.plan_options.schedule for c in selected if not c.must_be_finite}
    assert special == {c.plan_options.schedule for c in selected}


def test_formats_meet_other_schedules_with_the_other_type() -> None:
    selected = list(half_cases(find_target("hip:sm_90")))
    pairs = [
        {(c.plan_options.schedule, c.args[1].format) for c in products(selected, dtype)}
        for dtype in ("f16", "bf16")
    ]
    assert all(schedule is None for schedule, _ in pairs[0] & pairs[1])


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_90"])
def test_kernels_are_not_too_many(arch: str) -> None:
    target = find_target(f"hip:{arch}")
    texts = set()
    for case in half_cases(target):
        graph = trace(case.function, tuple(map(harness._spec, case.args)))
        plan = make_plan(
            graph, target, math.prod(lead_shape(case.args, graph.signature)), case.plan_options
        )
        texts |= {render(plan, kernel).text for kernel in plan.kernels}
    assert 20 < len(texts) < MOST_KERNELS


def on_host(case: Case, target: Target) -> tuple[Case, list[Any]]:
    args = list(case.args)
    if case.group.startswith("stores"):  # one NaN for all: another would look like the poison
        args[0] = np.where(np.isnan(args[0]), np.float32(np.nan), args[0])
    plan = hip_plan(case.function, str(target), args, case.plan_options)
    return dataclasses.replace(case, args=tuple(args)), run_on_host(plan, args)


@pytest.mark.parametrize(("arch", "dtype"), [("gfx1100", "f16"), ("sm_90", "bf16")])
def test_kernels_of_gpus_pass(arch: str, dtype: str) -> None:
    target = find_target(f"hip:{arch}")
    selected = [c for c in half_cases(target) if c.args[0].dtype == DTYPES[dtype]]
    selected += [c for c in half_cases(target) if c.group == f"stores of {dtype}"]
    for case in selected:
        outcome = judge(*on_host(case, target))
        assert outcome.passed, outcome


def test_kernels_of_the_cpu_pass() -> None:
    bench = CpuBench()
    selected = list(cpu_half_cases())
    for dtype in ("f16", "bf16"):
        assert {case.args[1].format for case in products(selected, dtype)} == set(FORMATS)
    for case in selected:
        outcome = judge(case, bench.run(case))
        assert outcome.passed, outcome


# --- judgement ------------------------------------------------------------------------------------


def special_cases(dtype: str) -> list[Case]:
    selected = half_cases(find_target("hip:sm_90"))
    return [c for c in products(list(selected), dtype) if not c.must_be_finite]


def correct(case: Case) -> NDArray[Any]:
    """Return what IEEE arithmetic and one rounding give."""
    x, w = case.args
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) @ w.dequantize().astype(np.float64)
        rounded: NDArray[Any] = exact.astype(x.dtype)
    return rounded


@every_half
def test_special_cases_hold_every_kind_of_result(dtype: str) -> None:
    tiny = 2.0 ** LEAST_EXPONENT[dtype]
    selected = special_cases(dtype)
    assert len({case.args[1].format for case in selected}) == len(FORMATS)
    for case in selected:
        y = correct(case)
        assert judge(case, [y]).passed, case
        wide, x = y.astype(np.float64), case.args[0].astype(np.float64)
        assert np.isnan(wide).any()
        assert ((wide != 0) & (np.abs(wide) < tiny)).any()
        assert np.isinf(x).any()
        overflows = np.isinf(wide[np.isfinite(x).all(axis=1)]).any()
        assert overflows == (dtype == "f16")


def flushed(y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(y) < 2e-5, 0, y)  # results of f16 are denormal below 6e-5


INACCURATE = "exceeds the bound 2e-06"
MISPLACED = " of 185 results are not the NaN, Inf or number that they must be, first ["
Fault = Callable[[NDArray[np.float64]], NDArray[np.float64]]
FAULTS: list[tuple[Fault, str]] = [
    (flushed, INACCURATE),
    (lambda y: y * 1.01, INACCURATE),
    (lambda y: np.where(np.isnan(y), 0, y), MISPLACED),
    (lambda y: np.where(np.isinf(y), np.nan, y), MISPLACED),
    (lambda y: np.where(np.isinf(y), np.copysign(65504, y), y), MISPLACED),
    (lambda y: np.where(np.abs(y) > 1000, np.copysign(np.inf, y), y), MISPLACED),
    (lambda y: np.where(np.isinf(y), -y, y), MISPLACED),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_wrong_special_results_fail(fault: Fault, message: str) -> None:
    case = special_cases("f16")[0]
    y = correct(case)
    changed = fault(y.astype(np.float64)).astype(y.dtype)
    outcome = judge(case, [changed])
    assert outcome.passed is False
    assert message in outcome.message


@every_half
def test_results_of_another_type_fail(dtype: FloatType) -> None:
    case = special_cases(dtype)[0]
    wider = correct(case).astype(np.float32)
    wanted = f"expected results in {DTYPES[dtype]}, got float32"
    assert judge(case, [wider]).message == wanted
    for case in conversion_cases(dtype):
        (x,) = case.args
        with np.errstate(all="ignore"):
            right = case.function(x)
            wider = right.astype(np.float64)
        assert judge(case, [right]).passed
        assert not judge(case, [wider]).passed


@every_half
def test_wrong_rounding_fails(dtype: FloatType) -> None:
    _, store = conversion_cases(dtype)
    (x,) = store.args
    with np.errstate(all="ignore"):
        right = store.function(x)
        toward_zero = np.nextafter(x, np.float32(0)).astype(right.dtype)
    bits = right.view(np.uint16)
    negative_zero = np.where(bits == 0x8000, 0, bits).astype(np.uint16).view(right.dtype)
    infinite = np.isinf(right.astype(np.float32))
    largest = np.where(infinite, bits - 1, bits).astype(np.uint16).view(right.dtype)
    for wrong in (toward_zero, negative_zero, largest):
        outcome = judge(store, [wrong])
        assert outcome.passed is False
        assert " results are not the NaN, Inf or number that they must be" in outcome.message


@every_half
def test_stores_hold_every_number_and_tie(dtype: FloatType) -> None:
    x = between(dtype)
    with np.errstate(all="ignore"):
        y = x.astype(DTYPES[dtype])
    bits = y.view(np.uint16)[np.isfinite(x)]
    finite = np.isfinite(np.arange(1 << 16, dtype=np.uint16).view(y.dtype).astype(np.float32))
    assert set(np.flatnonzero(finite)) <= set(bits)
    exact = x[np.isfinite(x)].astype(np.float64)
    errors = np.abs(exact - y[np.isfinite(x)].astype(np.float64))
    ties = errors == half_ulp(exact, dtype)
    assert ties.sum() >= np.count_nonzero(finite) - 2  # not between two zeros


def test_without_ml_dtypes_bf16_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(missing_types()) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {case.args[0].dtype for case in cpu_half_cases(quick=True)} <= {
        DTYPES["f16"],
        DTYPES["f32"],
    }
    (outcome,) = missing_types()
    assert outcome.passed is None
    assert outcome.message == "not run: needs ml_dtypes; run pip install ml_dtypes"
