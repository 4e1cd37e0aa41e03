"""`tile_halves` with every block format in `tiles16`, executed without a GPU."""

from typing import Any, Final

import numpy as np
import pytest

from q4jit.errors import TargetError
from q4jit.hip.kernel import GEMV, ROWS, TILE_HALVES
from q4jit.plan.options import PlanOptions
from q4jit.weights.layouts import TILES16
from tests.support.cancelling import cancelling, nearly_cancelling, only_zeros
from tests.support.hip import hip_plan, run_on_host
from tests.support.hip_cases import BLOCK_FORMATS
from tests.support.kernels import (
    BOUND,
    F32,
    Floats,
    Weight,
    assert_contract,
    assert_ieee,
    joined_products,
    not_finite_rows,
    one_product,
    random_x,
    weight,
)
from tests.support.pairs import pairwise

ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_90")  # each kind of matrix unit
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
K, N = 512, 37


def product(x: Floats, *ws: Weight, arch: str, precision: str = "f32") -> list[Floats]:
    """Return x @ w by `tile_halves`: the products with each w, and of several also their sum."""
    args: list[Any] = [x, *(w.tensor for w in ws)]
    function = one_product if len(ws) == 1 else joined_products(len(ws))
    options = PlanOptions(precision, schedule=TILE_HALVES)
    plan = hip_plan(function, f"hip:{arch}", args, options)
    assert [kernel.schedule for kernel in plan.kernels] == [ROWS, TILE_HALVES]
    return run_on_host(plan, args)


@pairwise("name arch way", BLOCK_FORMATS, ARCHS, [(20, "f32"), (5, "f32"), (33, "f16")])
def test_every_format(name: str, arch: str, way: tuple[int, str]) -> None:
    m, precision = way
    x, w = random_x(m, K), weight(name, K, N)
    (y,) = product(x, w, arch=arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])


@pairwise("name arch precision", ["Q4_K", "Q6_K", "Q2_K", "MXFP4"], ARCHS[2:], ["f32"])
def test_not_finite_rows(name: str, arch: str, precision: str) -> None:
    x, w = not_finite_rows(K), weight(name, K, N, "mixed")
    (y,) = product(x, w, arch=arch, precision=precision)
    assert_ieee(y, x, w)


@pytest.mark.parametrize("arch", ["gfx90a", "sm_90"])
def test_formats_that_share_sums_of_x(arch: str) -> None:
    """A unit has one sum for Q4_K and two for Q2_K."""
    ws = [weight(name, K, N, seed=i) for i, name in enumerate(("Q4_K", "Q2_K"))]
    x = random_x(20, K)
    for y, w in zip(product(x, *ws, arch=arch), ws, strict=False):
        assert_contract(y, x, w)


@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
def test_scale_times_code_and_minimum_that_cancel(arch: str) -> None:
    single = (np.eye(K)[::29] * 1.7).astype(F32)
    x, w = np.concatenate([only_zeros(K), random_x(4, K), single]), cancelling(K, N)
    (y,) = product(x, w, arch=arch)
    assert not y[:, 0::3].any()
    assert not y[:4, 1::3].any()
    assert_contract(y, x, w)
    w = nearly_cancelling(K, N)
    (y,) = product(x, w, arch=arch)
    assert_contract(y, x, w)


@pytest.mark.parametrize(("arch", "schedule"), [("gfx1030", None), ("sm_90", GEMV)])
def test_vector_units_do_not_read_tiles(arch: str, schedule: str | None) -> None:
    args = [random_x(1, K), weight("Q4_K", K, N).tensor]
    options = PlanOptions(schedule=schedule, layout=TILES16)
    with pytest.raises(TargetError, match=r"layout 'tiles16' of Q4_K suits products with w on"):
        hip_plan(one_product, f"hip:{arch}", args, options)
