"""Sums over many elements on GPUs, by the host prelude: products of one sign, large K, Inf."""

from dataclasses import dataclass

import numpy as np
import pytest

from q4jit.hip.kernel import GEMV, GEMV_MATRIX, TILE_FMA, TILE_HALVES, TILE_MATRIX
from q4jit.hip.long_sums import LongSums, long_sums
from q4jit.plan.options import PlanOptions
from q4jit.weights.tensor import QuantizedTensor
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import F32, Floats, exact_products, kinds, one_product
from tests.support.long_sums import LONG_K, LONGEST_K, assert_long_product, long_product

MANY_STRETCHES_K = 40960


@dataclass(frozen=True)
class Way:
    """A product of k elements, computed in a way that divides its sums as `sums` says."""

    arch: str
    schedule: str
    format: str
    m: int
    k: int
    sums: LongSums
    block_size: int | None = None

    def __str__(self) -> str:
        return f"{self.schedule}-{self.format}-{self.m}-{self.k}-{self.arch}"

    def run(self, x: Floats, w: QuantizedTensor) -> Floats:
        plan_options = PlanOptions("f32", self.block_size, self.schedule)
        plan = hip_plan(one_product, f"hip:{self.arch}", (x, w), plan_options)
        assert long_sums(plan, plan.kernels[-1]) == self.sums
        (y,) = run_on_host(plan, (x, w), seeds=(1,))
        return y


PLAIN = LongSums()
WAYS = (
    Way("gfx1100", GEMV, "Q6_K", 1, LONG_K, PLAIN),
    Way("gfx1100", GEMV, "F16", 2, LONG_K, PLAIN),
    Way("gfx1100", GEMV, "F16", 1, LONGEST_K, LongSums(1)),
    Way("gfx1100", GEMV, "Q4_1", 1, LONGEST_K, PLAIN),
    Way("sm_90", GEMV_MATRIX, "Q4_K", 8, LONG_K, PLAIN),
    Way("sm_90", GEMV_MATRIX, "Q4_0", 4, LONG_K, LongSums(32, keeps_lost=True), 32),
    Way("gfx942", GEMV_MATRIX, "Q4_0", 16, LONG_K, LongSums(32, keeps_lost=True), 64),
    Way("gfx1100", GEMV_MATRIX, "Q2_K", 1, LONG_K, LongSums(32, keeps_lost=True), 32),
    Way("gfx1030", TILE_FMA, "F16", 17, LONG_K, LongSums(16)),
    Way("gfx942", TILE_FMA, "F16", 17, MANY_STRETCHES_K, LongSums(16, keeps_lost=True)),
    Way("gfx942", TILE_MATRIX, "Q6_K", 17, LONG_K, LongSums(32)),
    Way("gfx1201", TILE_MATRIX, "Q4_1", 17, MANY_STRETCHES_K, LongSums(32, keeps_lost=True)),
    Way("gfx942", TILE_HALVES, "Q4_1", 17, LONG_K, LongSums(32)),
    Way("gfx1100", TILE_HALVES, "Q4_K", 33, LONG_K, LongSums(32)),
    Way("gfx1100", TILE_HALVES, "Q4_0", 17, MANY_STRETCHES_K, LongSums(32, keeps_lost=True)),
)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_products_of_one_sign(way: Way) -> None:
    x, w = long_product(way.format, way.m, way.k, 16, one_sign=True)
    assert_long_product(way.run(x, w), x, w)


def test_products_of_mixed_signs() -> None:
    way = Way("gfx1100", GEMV, "F16", 1, 4 * LONGEST_K, LongSums(1))
    x, w = long_product(way.format, way.m, way.k, 16, one_sign=False)
    assert_long_product(way.run(x, w), x, w)


@pytest.mark.parametrize("way", [w for w in WAYS if w.sums.keeps_lost], ids=str)
def test_inf_and_sums_beyond_f32(way: Way) -> None:
    x, w = long_product(way.format, way.m, way.k, 16, one_sign=True)
    x = x.copy()
    x[0, 5] = np.inf
    if way.m > 1:
        x[1] = 1e38
    with np.errstate(over="ignore"):
        wanted = kinds(exact_products(x, w.dequantize().astype(np.float64)).astype(F32))
    assert np.isinf(wanted[:2]).any(axis=1).all()
    np.testing.assert_array_equal(kinds(way.run(x, w)), wanted)
