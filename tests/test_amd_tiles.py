"""Many rows of x by Q4_0 on AMD's matrix units, in f16 terms, executed without a GPU."""

from typing import Any, Final

import numpy as np
import pytest

from q4jit.layouts import TILES16
from q4jit.render import render
from q4jit.schedule_hip import ROWS, TILE_HALVES, Tuning
from tests.hip import hip_plan, run_on_host
from tests.hip_cases import gated, tensor, zeros
from tests.kernels import (
    BOUND,
    F32,
    Floats,
    assert_contract,
    assert_ieee,
    distributions,
    joined_products,
    not_finite_rows,
    one_product,
    random_x,
    weight,
)
from tests.test_gemv_matrix import without_weight
from tests.test_hip_objects import faults, in_parallel

ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_80")
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
K, N = 416, 37  # three quads and a quarter; two tiles of columns and a bit

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_precision = pytest.mark.parametrize("precision", BOUNDS)


def run(function: Any, args: list[Any], arch: str, precision: str = "f32") -> list[Floats]:
    plan = hip_plan(function, f"hip:{arch}", args, Tuning(precision))
    assert [kernel.schedule for kernel in plan.kernels] == [ROWS, TILE_HALVES]
    assert plan.kernels[-1].layout == TILES16
    return run_on_host(plan, args)


@every_arch
@every_precision
@pytest.mark.parametrize("m", [17, 33, 70])
def test_every_class_of_rows(m: int, precision: str, arch: str) -> None:
    x, w = random_x(m, K), weight("Q4_0", K, N)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    assert_contract(y, x, w, BOUNDS[precision])


@every_arch
def test_two_products(arch: str) -> None:
    x, found = random_x(40, K), [weight("Q4_0", K, N, seed=seed) for seed in (1, 2)]
    first, second, both = run(joined_products(2), [x, *(w.tensor for w in found)], arch)
    assert_contract(first, x, found[0])
    assert_contract(second, x, found[1])
    np.testing.assert_array_equal(both, first + second)


@every_arch
@every_precision
@pytest.mark.parametrize("scales", ["normal", "zero", "denormal", "largest", "mixed"])
def test_distributions_and_scales(scales: str, precision: str, arch: str) -> None:
    w = weight("Q4_0", K, N, scales)
    rows = [*distributions(K).values()]
    x = np.stack([*rows, *rows, *rows])
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values)
    inside = sizes.max(1) <= np.finfo(F32).max
    assert inside[:5].all()
    assert_contract(y[inside], x[inside], w, BOUNDS[precision])


@every_arch
@every_precision
def test_an_outlier_that_a_weight_of_0_hides(precision: str, arch: str) -> None:
    """What stands beside it must be as exact as if it stood alone."""
    x, w = random_x(48, K), without_weight(100)
    x[:, 100] = F32(2) ** np.arange(48)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    for row in range(48):
        one = slice(row, row + 1)
        assert_contract(y[one], x[one], w, BOUNDS[precision])


@every_arch
@every_precision
def test_not_finite_activations(precision: str, arch: str) -> None:
    rows = not_finite_rows(K)
    x, w = np.concatenate([rows] * (1 + 20 // len(rows))), weight("Q4_0", K, N, "mixed")
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    assert_ieee(y, x, w, BOUNDS[precision])


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("gfx")])
def test_amds_compiler_keeps_all_in_registers(arch: str) -> None:
    w = tensor("Q4_0", 4096, 4096)
    plans = [
        hip_plan(function, f"hip:{arch}", [zeros(m, 4096), *more], Tuning(precision))
        for m in (32, 64, 512)
        for precision in BOUNDS
        for function, more in ((one_product, [w]), (gated, [w, w, zeros(4096)]))
    ]
    found = [render(plan, kernel) for plan in plans for kernel in plan.kernels]
    assert not any(in_parallel(faults, found))
