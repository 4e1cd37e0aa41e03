"""`gemv_matrix` with every block format in `tiles16`, executed without a GPU."""

from typing import Any, Final

import numpy as np
import pytest

from q4jit.hip.kernel import GEMV_MATRIX
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.targets import HIP_ARCHS
from q4jit.weights.formats import FORMATS
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
    distributions,
    joined_products,
    not_finite_rows,
    one_product,
    random_x,
    weight,
)
from tests.support.pairs import in_turn

ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_90")  # each kind of matrix unit
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
N: Final = 37  # two panels and five columns

CLASSES: Final = ((1, "f32"), (2, "f16"), (4, "f32"), (16, "f32"), (8, "f32"))
# Each format twice: on NVIDIA, and on one arch of AMD. Tests that share them share their texts.
some_cases = in_turn("name arch way", 2 * BLOCK_FORMATS, 13 * ("sm_90",) + 4 * ARCHS[:-1], CLASSES)


def k_of(name: str) -> int:
    """Return a K of several quads, the last of them a part where blocks are small."""
    return 512 if FORMATS[name].block_elements > 32 else 416


def product(
    x: Floats, *ws: Weight, arch: str, precision: str = "f32", rows: int | None = None
) -> list[Floats]:
    """Return x @ w by `gemv_matrix`: the products with each w, and of several also their sum.

    rows: that the kernel is planned for; all of x unless given.
    """
    if rows == 1 < len(x):  # one row is a kernel of its own
        parts = [product(row[np.newaxis], *ws, arch=arch, precision=precision) for row in x]
        return [np.concatenate(ys) for ys in zip(*parts, strict=True)]
    args: list[Any] = [x[:rows], *(w.tensor for w in ws)]
    function = one_product if len(ws) == 1 else joined_products(len(ws))
    options = PlanOptions(precision, 2 * HIP_ARCHS[arch].wave, GEMV_MATRIX)
    plan = hip_plan(function, f"hip:{arch}", args, options)
    assert {kernel.schedule for kernel in plan.kernels} == {GEMV_MATRIX}
    return run_on_host(plan, [x, *args[1:]])


@some_cases
def test_every_format(name: str, arch: str, way: tuple[int, str]) -> None:
    m, precision = way
    x, w = random_x(m, k_of(name)), weight(name, k_of(name), N)
    (y,) = product(x, w, arch=arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])


@some_cases
def test_distributions_and_not_finite_rows(name: str, arch: str, way: tuple[int, str]) -> None:
    m, precision = way
    w = weight(name, k_of(name), N, "mixed")
    rows = not_finite_rows(k_of(name))
    rows = rows[[0, 1, 17, 33, 49, 96]] if m == 1 else rows
    (y,) = product(rows, w, arch=arch, precision=precision, rows=m)
    assert_ieee(y, rows, w, BOUNDS[precision])
    x = np.stack([*distributions(k_of(name)).values()])
    (y,) = product(x, w, arch=arch, precision=precision, rows=m)
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values)
    inside = sizes.max(1) <= np.finfo(F32).max
    assert_contract(y[inside], x[inside], w, BOUNDS[precision])


@some_cases
def test_rough_units(name: str, arch: str, way: tuple[int, str]) -> None:
    m, precision = way
    x, w = random_x(m, k_of(name)), weight(name, k_of(name), N)
    x[0, 5], x[m - 1, 100] = 1e30, 3e-38
    (y,) = product(x, w, arch=arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])
    x = random_x(2, k_of(name)) * F32(1e38)
    (y,) = product(x, w, arch=arch, precision=precision, rows=m)
    assert_ieee(y, x, w, BOUNDS[precision])


@pytest.mark.parametrize(("m", "arch"), [(1, "sm_90"), (4, "sm_90"), (1, "gfx90a"), (4, "gfx1201")])
def test_scale_times_code_and_minimum_that_cancel(m: int, arch: str) -> None:
    x, w = only_zeros(256), cancelling(256, N)
    for first in range(0, 4, m):
        (y,) = product(x[first : first + m], w, arch=arch)
        assert not y[:, 0::3].any()
        assert not y[:, 1::3].any()
    x, w = random_x(m, 256), nearly_cancelling(256, N)
    (y,) = product(x, w, arch=arch)
    assert_contract(y, x, w)


@in_turn(
    "names arch m",
    2 * ["Q4_0+Q4_K", "Q2_K+Q4_K", "Q6_K+IQ4_XS", "MXFP4+Q4_1"],
    ARCHS,
    [1, 3, 3],
)
def test_formats_that_share_x(names: str, arch: str, m: int) -> None:
    ws = [weight(name, 512, N, seed=i) for i, name in enumerate(names.split("+"))]
    x = random_x(m, 512)
    *parts, both = product(x, *ws, arch=arch)
    for y, w in zip(parts, ws, strict=True):
        assert_contract(y, x, w)
    np.testing.assert_array_equal(both, parts[0] + parts[1])


def test_units_beside_each_other_are_for_few_rows() -> None:
    """Only where an instruction has rows for four units; blocks as in Q4_0 keep their text."""
    for name, m, precision, is_beside in (
        ("Q4_K", 1, "f32", True),
        ("Q4_K", 2, "f16", True),
        ("Q4_K", 2, "f32", False),
        ("Q4_0", 1, "f32", False),
    ):
        args = [random_x(m, 512), weight(name, 512, N).tensor]
        plan = hip_plan(one_product, "hip:sm_90", args, PlanOptions(precision))
        assert ("own_unit" in render(plan, plan.kernels[0]).text) == is_beside
