"""The error measure of the precision contract, and the bound of products of one sign."""

import numpy as np
import pytest

from q4jit.precision import error_scale, one_sign_bound, relative_error


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
