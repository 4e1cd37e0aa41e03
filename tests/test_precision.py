"""The error measure of the precision contract, and the bound of products of one sign."""

import numpy as np
import pytest

from q4jit.floats import FLOAT_BYTES, FloatType, half_ulp
from q4jit.precision import error_scale, one_sign_bound, relative_error
from tests.support.halves import DTYPES, LEAST_EXPONENT, MANTISSA_BITS

every_type = pytest.mark.parametrize("kind", FLOAT_BYTES)


@every_type
def test_half_an_ulp_is_half_the_distance_to_the_next_number(kind: FloatType) -> None:
    tiny = 2.0 ** LEAST_EXPONENT[kind]
    values = [0, 1, 1.5, 2, -1000, 1e-3, tiny, tiny / 2, tiny * 2.0 ** -MANTISSA_BITS[kind]]
    numbers = np.array(values).astype(DTYPES[kind])
    spacing = np.abs(np.spacing(numbers)).astype(np.float64)
    np.testing.assert_array_equal(half_ulp(numbers.astype(np.float64), kind), spacing / 2)


@every_type
def test_rounding_to_a_type_is_no_error(kind: FloatType) -> None:
    exact = np.random.default_rng(0).standard_normal((3, 64))
    scale = np.ones_like(exact)
    rounded = exact.astype(DTYPES[kind])
    assert relative_error(rounded, exact, scale) == 0
    assert relative_error(rounded.astype(np.float32), exact, scale, kind) == 0
    others = [exact.astype(np.float32).astype(DTYPES[t]) for t in DTYPES if t != kind]
    assert kind != "f32" or all(relative_error(y, exact, scale, "f32") for y in others)
    assert relative_error(rounded * DTYPES[kind].type(1.5), exact, scale)


def test_correct_rounding_is_no_error() -> None:
    exact = np.random.default_rng(0).uniform(1, 2, (3, 64))
    scale = np.full_like(exact, 1e-3)
    rounded = exact.astype(np.float32)
    assert relative_error(rounded, exact, scale) == 0
    error = relative_error(np.nextafter(rounded, np.float32(3)), exact, scale)
    assert error is not None
    assert 0 < error < 2**-23 / 1e-3


def test_the_worst_row_counts_and_nan_is_no_number() -> None:
    exact = np.ones((2, 4))
    result = np.array([[1.0] * 4, [1.0, 1.0, 1.0, 1.5]], np.float32)
    assert relative_error(result, exact, np.ones((2, 4))) == pytest.approx(0.25)
    result[0, 0] = np.nan
    assert relative_error(result, exact, np.ones((2, 4))) is None


def test_the_bound_of_one_sign_grows_like_the_sum() -> None:
    assert one_sign_bound(14336) == pytest.approx(9.1e-6, rel=0.01)
    assert one_sign_bound(4096) == pytest.approx(5.8e-6, rel=0.01)
    assert error_scale(np.array([4.0]), 3)[0] == pytest.approx(2)
