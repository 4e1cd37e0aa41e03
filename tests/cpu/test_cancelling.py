"""Q4_1 on CPUs: scale · code and minimum cancel each other, exactly or almost."""

from typing import Final

import numpy as np
import pytest

from q4jit import specialize
from q4jit.cpu.schedule import is_integer
from q4jit.targets import find_target
from tests.support.cancelling import cancelling, nearly_cancelling, only_zeros
from tests.support.kernels import (
    F32,
    Floats,
    Guarded,
    Weight,
    assert_contract,
    each_guarded,
    lowered,
    one_product,
    products,
    random_x,
    require_target,
    run_guarded,
    weight,
)

K: Final = 512
N: Final = 40
BOUNDS: Final = {"f32": 2e-6, "i8": 2e-2}
BY_DIGITS: Final = (
    ("cpu:x86-64-v4+avx512vnni", "f32"),
    ("cpu:x86-64-v4+avx512vnni", "i8"),
    ("cpu:x86-64-v3", "i8"),
)
BY_FLOATS: Final = (("cpu:x86-64-v3", "f32"), ("cpu:x86-64", "f32"))

every_target = pytest.mark.parametrize(("target", "precision"), [*BY_DIGITS, *BY_FLOATS])


def product(target: str, precision: str, x: Floats, w: Weight) -> Floats:
    """Return x @ w by digits or by floats, as the target should."""
    plan = lowered(one_product, find_target(target), [x, w.tensor], precision)
    (kernel,) = plan.kernels
    (section,) = kernel.work.sections
    by_digits = is_integer(plan, kernel, section, section.products[0])
    assert by_digits == ((target, precision) in BY_DIGITS)
    function = specialize(one_product, target=require_target(target), precision=precision)
    y: Floats = function(x, w.tensor)
    return y


@every_target
@pytest.mark.parametrize("m", [1, 3, 8, 17, 40])
def test_products_that_are_exactly_0(target: str, precision: str, m: int) -> None:
    x, w = random_x(m, K), cancelling(K, N)
    y = product(target, precision, x, w)
    np.testing.assert_array_equal(y[:, ::3], 0)
    assert_contract(y, x, w, BOUNDS[precision])


@every_target
def test_an_x_that_is_0_wherever_weights_are_not(target: str, precision: str) -> None:
    y = product(target, precision, only_zeros(K), cancelling(K, N))
    np.testing.assert_array_equal(y[:, 1::3], 0)


@every_target
@pytest.mark.parametrize("m", [1, 8, 40])
def test_blocks_that_cancel_beside_tiny_ones(target: str, precision: str, m: int) -> None:
    x, w = random_x(m, K), nearly_cancelling(K, N)
    assert_contract(product(target, precision, x, w), x, w, BOUNDS[precision])


@every_target
def test_single_elements_of_x(target: str, precision: str) -> None:
    """Check each element of a column by itself: some weights are much smaller than the minimum."""
    x, w = (np.eye(K) * 1.7).astype(F32), weight("Q4_1", K, N)
    assert_contract(product(target, precision, x, w), x, w, BOUNDS[precision])


@each_guarded([Guarded("cpu:aarch64+dotprod")])
@pytest.mark.parametrize("precision", ["f32", "i8"])
@pytest.mark.parametrize("m", [1, 5, 17])
def test_beside_guard_pages(precision: str, m: int, cpu: Guarded) -> None:
    x, w = random_x(m, 96), nearly_cancelling(96, 37)
    (y,) = run_guarded(products(1), cpu, [x, w.tensor], precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])
