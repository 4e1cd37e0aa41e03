"""Sums over many elements: products of one sign, large K, sums of long rows."""

from typing import Any

import numpy as np
import pytest

from q4jit.weights.formats import FORMATS
from tests.support.kernels import (
    F32,
    Guarded,
    assert_ieee,
    every_guarded_cpu,
    in_step,
    not_finite_rows,
    on,
    one_product,
    products,
    run_guarded,
    spoiled_weights,
    weights_in_turn,
)
from tests.support.long_sums import LONG_K, LONGEST_K, assert_long_product, long_product
from tests.support.pairs import pairwise

TARGETS = ("cpu", "cpu:x86-64")  # products of integers, products of floats
ODD_K = 33 * 256  # the last stretch is shorter
STRETCHES_K = 2560  # two and a half stretches


def check(target: str, name: str, m: int, k: int, n: int, *, one_sign: bool) -> None:
    x, w = long_product(name, m, k, n, one_sign)
    assert_long_product(on(target, one_product)(x, w), x, w)


@pairwise("name target m", [*FORMATS], TARGETS, [1, 17])
def test_products_of_one_sign(name: str, target: str, m: int) -> None:
    check(target, name, m, LONG_K, 16, one_sign=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "n"), [("Q4_0", 16), ("F32", 1)])  # panels, dot products
@pytest.mark.parametrize("one_sign", [False, True])
def test_products_of_largest_k(target: str, name: str, n: int, one_sign: bool) -> None:
    check(target, name, 1, LONGEST_K if one_sign else 4 * LONGEST_K, n, one_sign=one_sign)


@every_guarded_cpu
def test_long_products_beside_guard_pages(cpu: Guarded) -> None:
    shapes = ("Q4_0", 16), ("Q4_1", 1), ("Q6_K", 16), ("F16", 1)
    pairs = [long_product(name, 2, ODD_K, n, one_sign=True) for name, n in shapes]
    x, factors = pairs[0][0], [w for _, w in pairs]
    results = run_guarded(products(len(factors)), cpu, [x, *factors])
    for y, w in zip(results, factors, strict=True):
        assert_long_product(y, x, w)


@pytest.mark.parametrize("target", TARGETS)
def test_not_finite_products_of_several_stretches(target: str) -> None:
    x, factors = not_finite_rows(STRETCHES_K), weights_in_turn(STRETCHES_K, (37, 1), "mixed")
    results = on(target, products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        assert_ieee(y, x, w)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_not_finite_scales_in_several_stretches(target: str, value: float) -> None:
    factors = spoiled_weights(STRETCHES_K, (37, 1), value)[::3]  # of both widths
    x = in_step(spoiled_weights(STRETCHES_K, (1, 37), 1.0)[0])
    results = on(target, products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        assert_ieee(y, x, w)


def row_sums(x: Any) -> Any:
    return np.sum(x, axis=-1), np.mean(x * x, axis=-1)


@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_long_rows(target: str) -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, (3, LONGEST_K + 5)).astype(F32)
    wide = x.astype(np.float64)
    for got, exact in zip(on(target, row_sums)(x), row_sums(wide), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1.5e-7)


def test_sums_of_long_rows_with_inf() -> None:
    x = np.ones((2, LONGEST_K), F32)
    x[0, 5] = np.inf
    np.testing.assert_array_equal(on("cpu", row_sums)(x)[0], [np.inf, LONGEST_K])
