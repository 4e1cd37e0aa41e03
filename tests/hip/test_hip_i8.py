"""Precision `i8` on GPUs: `gemv_dot` keeps its contract, and rough rows are exact."""

from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.errors import TargetError
from q4jit.hip.kernel import (
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    ROWS,
    TILE_HALVES,
    HipPlan,
)
from q4jit.hip.memory import scratch
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF
from tests.support.cancelling import cancelling, nearly_cancelling, only_zeros
from tests.support.hip import Floats, hip_plan, rows_of, run_on_host
from tests.support.hip_host import compile_host
from tests.support.kernels import (
    F32,
    Weight,
    around,
    block,
    errors,
    one_product,
    random_x,
    relative_error,
    weight,
)
from tests.support.pairs import in_turn

BOUND: Final = 2e-2  # of `precision="i8"`
EXACT: Final = 2e-6  # of rough rows, which int8 cannot hold
NORMAL: Final = 9e-3
K: Final = 512
N: Final = 37
BLOCK_FORMATS: Final = tuple(f.name for f in FORMATS.values() if f.float_type is None)
I8: Final = PlanOptions(precision="i8")
I8_DOT: Final = PlanOptions(precision="i8", schedule=GEMV_DOT)

every_format = pytest.mark.parametrize("name", BLOCK_FORMATS)
WAVES: Final = ("gfx1030", "gfx90a")  # of 32 and 64 lanes
every_wave = pytest.mark.parametrize("arch", WAVES)


def planned(
    x: Floats, w: Weight, arch: str = "gfx1030", plan_options: PlanOptions = I8_DOT
) -> HipPlan:
    """Return the plan of x @ w, which must use `gemv_dot`."""
    plan = hip_plan(one_product, f"hip:{arch}", [x, w.tensor], plan_options)
    assert [k.schedule for k in plan.kernels] == [ROWS, GEMV_DOT]
    return plan


def product(
    x: Floats, w: Weight, arch: str = "gfx1030", plan_options: PlanOptions = I8_DOT
) -> Floats:
    (y,) = run_on_host(planned(x, w, arch, plan_options), [x, w.tensor])
    return y


def row_errors(y: Floats, x: Floats, w: Weight) -> NDArray[np.float64]:
    """Return the rms error of every row as the contract measures it; NaN for a wrong NaN."""
    assert y.shape == (len(x), w.values.shape[1])
    return np.asarray(np.sqrt(np.mean(errors(y, x, w.values) ** 2, axis=-1)))


def rough_rows(x: Floats) -> NDArray[np.bool_]:
    """Return which rows of x the `rows` kernel marks as rough, by NaN in all their scales."""
    plan = planned(x, weight("Q4_0", x.shape[1], 16))
    first = plan.kernels[0]
    sizes = scratch(first, len(x))
    types = {"x_quants": np.uint32, "x_scales": np.float32, "x_sums": np.int16}
    made = [np.zeros(size // 4 * 4, np.uint8).view(types[s.kind]) for s, size in sizes.items()]
    program = compile_host(render(plan, first, "host").text, first.work.symbol)
    outputs = program.run((1, len(x)), first.block_size, [x, *made, len(x)])
    scales = outputs[[s.kind for s in sizes].index("x_scales")].reshape(len(x), -1)
    rough = np.isnan(scales)
    np.testing.assert_array_equal(rough.all(1), rough.any(1))
    return np.asarray(rough.all(1))


# --- the contract ---------------------------------------------------------------------------------


@in_turn("name m arch", BLOCK_FORMATS, [1, 3, 16], WAVES)
def test_normal_rows(name: str, m: int, arch: str) -> None:
    x, w = random_x(m, K), weight(name, K, N)
    by_row = row_errors(product(x, w, arch), x, w)
    assert np.max(by_row) < BOUND
    assert 1e-3 < np.sqrt(np.mean(by_row**2)) < NORMAL  # not exact, so int8 was used


@every_format
def test_blocks_in_the_layout_of_gguf(name: str) -> None:
    x, w = random_x(2, K), weight(name, K, N)
    y = product(x, w, plan_options=PlanOptions(precision="i8", layout=GGUF))
    assert np.max(row_errors(y, x, w)) < NORMAL


@pytest.mark.parametrize("k", [32, 96, 1184])  # fewer units than lanes; more than a block's threads
def test_other_values_of_k(k: int) -> None:
    x, w = random_x(3, k), weight("Q4_0", k, N)
    assert np.max(row_errors(product(x, w), x, w)) < BOUND


@in_turn("name m arch", BLOCK_FORMATS, [1, 3, 16], WAVES)
def test_whole_numbers_up_to_127_are_exact(name: str, m: int, arch: str) -> None:
    rng = np.random.default_rng(3)
    x, w = rng.integers(-127, 128, (m, K)).astype(F32), weight(name, K, N)
    x[:, ::32] = 127
    assert np.max(row_errors(product(x, w, arch), x, w)) < EXACT


def distributions() -> dict[str, Floats]:
    """Return a row of x for each distribution of the contract, and rows that are hard for int8."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(K)
    at = np.arange(K)
    rows = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, K),
        "lognormal": rng.lognormal(0, 1, K) * rng.choice([-1, 1], K),
        "wide lognormal": rng.lognormal(0, 3, K) * rng.choice([-1, 1], K),
        "outliers": np.where(rng.random(K) < 0.02, 100 * normal, normal),
        "two huge elements": np.where((at == 300) | (at == 301), 1e6, normal),
        "zero": 0 * normal,
        "half zero": np.maximum(normal, 0),
        "one element": np.where(at == 300, 3.0, 0),
        "small": normal * 1e-30,
        "large": normal * 1e30,
        "denormal": normal * 1e-40,
        "one number, denormals": np.where(at == 300, 1.0, normal * 1e-40),
        "mixed magnitudes": normal * 10.0 ** rng.uniform(-20, 20, K),
    }
    for size in (1e2, 1e4, 1e10, 1e20, 1e34):
        rows[f"one element of {size:.0e}"] = np.where(at == 300, size, normal)
    return {name: row.astype(F32) for name, row in rows.items()}


@in_turn("name arch", BLOCK_FORMATS, WAVES)
def test_distributions(name: str, arch: str) -> None:
    rows, w = distributions(), weight(name, K, N)
    names, x = [*rows], np.stack([*rows.values()])
    for first in (0, 10):  # of the same class of M, so that one program serves both
        part = x[first : first + 10]
        for row, error in zip(
            names[first:], row_errors(product(part, w, arch), part, w), strict=False
        ):
            assert error < BOUND, row


def test_denormal_activations_with_the_largest_scales() -> None:
    x, w = (random_x(2, K) * 1e-40).astype(F32), weight("Q4_0", K, N, "largest")
    assert np.max(row_errors(product(x, w), x, w)) < EXACT


# --- rough rows -----------------------------------------------------------------------------------


def test_only_unusual_rows_are_rough() -> None:
    rows = distributions()
    is_rough = dict(zip(rows, rough_rows(np.stack([*rows.values()])[:16]), strict=False))
    usual = ("normal", "uniform", "lognormal", "zero", "half zero")
    assert [name for name in usual if is_rough[name]] == []
    unusual = ("outliers", "two huge elements", "small", "large", "denormal", "mixed magnitudes")
    assert [name for name in unusual if not is_rough[name]] == []


def test_one_huge_element_makes_a_row_rough() -> None:
    x = random_x(16, 2048)
    x[3, 5], x[7, 2000], x[9, 64], x[11, 0] = 1e3, -1e6, np.inf, np.nan
    assert np.flatnonzero(rough_rows(x)).tolist() == [3, 7, 9, 11]


@in_turn("name m", BLOCK_FORMATS, [1, 2, 5, 16])
def test_rough_rows_are_exact_and_do_not_change_other_rows(name: str, m: int) -> None:
    x, w = random_x(m, K), weight(name, K, N)
    smooth = product(x, w)
    spoiled = x.copy()
    spoiled[m - 1, 300] = 1e30
    y = product(spoiled, w)
    assert row_errors(y, spoiled, w)[m - 1] < EXACT
    np.testing.assert_array_equal(y[: m - 1], smooth[: m - 1])


@in_turn("name arch", BLOCK_FORMATS, WAVES)
def test_nan_and_inf_follow_ieee_754(name: str, arch: str) -> None:
    values = [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.inf, np.inf], [np.nan, np.inf]]
    values += [[1e38]]
    x, w = random_x(2 * len(values) + 1, K), weight(name, K, N, "mixed")
    for i, pair in enumerate(values):
        for j, value in enumerate(pair):
            x[2 * i + 1, (31 * i + 33 * j) % K] = value
    y = product(x, w, arch)
    with np.errstate(all="ignore"):  # not by a BLAS, which may skip zeros
        exact = np.stack([(row[:, np.newaxis] * w.values).sum(0) for row in x.astype(np.float64)])
        kept = exact.astype(F32)  # 1e38 may overflow
    np.testing.assert_array_equal(
        np.where(np.isfinite(y), 0, y), np.where(np.isfinite(kept), 0, kept)
    )
    assert np.isfinite(y[::2]).all()


@every_wave
@pytest.mark.parametrize("m", [1, 3, 16])
def test_scales_and_minimums_that_cancel(m: int, arch: str) -> None:
    x, w = random_x(m, K), cancelling(K, N)
    y = product(x, w, arch)
    np.testing.assert_array_equal(y[:, ::3], 0)
    assert np.max(row_errors(y, x, w)) < BOUND
    near = nearly_cancelling(K, N)
    assert np.max(row_errors(product(x, near, arch), x, near)) < BOUND
    x = only_zeros(K)
    np.testing.assert_array_equal(product(x, w, arch)[:, 1::3], 0)


# --- functions ------------------------------------------------------------------------------------


@every_wave
@pytest.mark.parametrize("m", [1, 3, 16])
def test_a_fused_function(m: int, arch: str) -> None:
    gate, up = weight("Q4_0", K, N, seed=1), weight("Q6_K", K, N, seed=2)
    x = random_x(m, K)
    x[m - 1, 7] = 1e4  # a rough row in a kernel with prologue and epilogue
    args, exact = around(x, gate, up)
    plan = hip_plan(block, f"hip:{arch}", args, I8_DOT)
    assert [k.schedule for k in plan.kernels] == [ROWS, GEMV_DOT]
    (y,) = run_on_host(plan, args)
    assert relative_error(y, exact) < BOUND
    assert relative_error(y[-1], exact[-1]) < 1e-5


def test_products_with_different_schedules() -> None:
    def function(x: Any, w: Any, floats: Any) -> Any:
        h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return h @ w, h @ floats

    x, w, floats = random_x(3, K), weight("Q8_0", K, N), weight("F16", K, 5)
    args = [x, w.tensor, floats.tensor]
    plan = hip_plan(function, "hip:gfx1030", args, I8)
    assert [k.schedule for k in plan.kernels] == [ROWS, GEMV_DOT, GEMV]
    h = (x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-5)).astype(F32)
    y, z = run_on_host(plan, args)
    assert np.max(row_errors(y, h, w)) < NORMAL
    assert np.max(row_errors(z, h, floats)) < EXACT


def test_a_slice_of_a_product() -> None:
    x, w = random_x(2, K), weight("Q6_K", K, N)
    x[1, 0] = np.inf
    plan = hip_plan(lambda x, w: (x @ w)[..., 5:], "hip:gfx90a", [x, w.tensor], I8_DOT)
    assert plan.kernels[-1].schedule == GEMV_DOT
    (y,) = run_on_host(plan, [x, w.tensor])
    np.testing.assert_array_equal(y, product(x, w, "gfx90a")[:, 5:])


# --- the choice of the schedule -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_other_precisions_do_not_round_to_int8(precision: str) -> None:
    args = [random_x(1, K), weight("Q8_0", K, N).tensor]
    plan = hip_plan(one_product, "hip:gfx1030", args, PlanOptions(precision=precision))
    assert [k.schedule for k in plan.kernels] == [GEMV]
    with pytest.raises(TargetError, match=r"'gemv_dot' cannot compute .* needs precision 'i8' and"):
        hip_plan(
            one_product, "hip:gfx1030", args, PlanOptions(precision=precision, schedule=GEMV_DOT)
        )


def test_int8_is_for_gpus_without_matrix_units_by_rule() -> None:
    args = [random_x(1, K), weight("Q8_0", K, N).tensor]
    for arch, schedules in (("gfx1030", [ROWS, GEMV_DOT]), ("gfx1100", [GEMV_MATRIX])):
        plan = hip_plan(one_product, f"hip:{arch}", args, I8)
        assert [k.schedule for k in plan.kernels] == schedules


def test_products_that_int8_does_not_suit_take_other_schedules() -> None:
    x = random_x(1, K)
    spoiled = weight("Q4_0", K, N, "bits").tensor  # NaN and Inf among the scales
    for tensor in (weight("F16", K, N).tensor, spoiled):
        plan = hip_plan(one_product, "hip:gfx1100", [x, tensor], I8)
        assert plan.kernels[-1].schedule == GEMV
    many = hip_plan(one_product, "hip:gfx1100", [random_x(17, K), weight("Q8_0", K, N).tensor], I8)
    assert many.kernels[-1].schedule == TILE_HALVES


def test_the_scratch_memory_of_int8_activations() -> None:
    x, w = random_x(5, K), weight("Q4_0", K, N)
    first, second = planned(x, w).kernels
    sizes = {s.kind: size for s, size in scratch(first, rows_of([x])).items()}
    assert sizes == {"x_quants": 5 * K, "x_scales": 5 * K // 8, "x_sums": 5 * K // 8}
    assert scratch(second, 5).keys() == scratch(first, 5).keys()
