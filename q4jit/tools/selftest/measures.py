"""Numerical errors of results, compared with float64 or with decoded values."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import expected
from q4jit.precision import beyond_rounding, error_scale, relative_error
from q4jit.weights.decode import decode
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[Any]
Measure = Callable[[Sequence[Any], Sequence[Any]], float]


class WrongResultsError(Exception):
    """Results have another type, or are not the NaN, Inf or number that they must be."""


@functools.cache
def _values(w: QuantizedTensor) -> Floats:
    """Return the values of a weight [K, N], decoded by NumPy and not by a kernel."""
    return decode(w.block_format, w.raw).T


def contract_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """Return the largest rms error of a row of y = x @ w, relative to √(Σ(xw)² + K·2⁻¹⁴⁹)."""
    x, w = args
    return _contract(results[0], x, _values(w))


def against_values(args: Sequence[Any], results: Sequence[Any]) -> float:
    """Return the contract error of y, given results (y, values of w as the device decoded them)."""
    y, values = results
    return _contract(y, args[0], values)


def values_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """Return the largest error of decoded values; the bound is 0."""
    return difference(results[1], _values(args[1]))


def lookup_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """Return the largest error of looked-up columns; the bound is 0."""
    ids, w = args
    return difference(results[0], _values(w).T[ids])


def function_error(
    function: Callable[..., Any], args: Sequence[Any], results: Sequence[Any]
) -> float:
    """Return the relative rms error of a function's result, compared with NumPy in float64."""
    exact = function(*map(_in_float64, args))
    return float(np.linalg.norm(beyond_rounding(results[0], exact)) / np.linalg.norm(exact))


def _contract(y: Floats, x: Floats, values: Floats) -> float:
    exact, scale = _exact(x, values)
    error = relative_error(y, exact, scale)
    return math.nan if error is None else error


def _exact(x: Floats, values: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x @ w in float64 and the scale of its errors."""
    wide, w = x.astype(np.float64), values.astype(np.float64)
    return wide @ w, error_scale(wide**2 @ w**2, x.shape[-1])


def special_error(
    bound: float, args: Sequence[Any], results: Sequence[Any], *, transposed: bool = False
) -> float:
    """Return the contract error of the finite results of x @ w, or x @ w.T.

    Raises WrongResultsError if NaN and Inf are not where they must be. Where an error within the
    bound decides whether a result exceeds the range of its type, Inf and a finite one are right.
    """
    (y,), (x, w) = results, args
    _require_dtype(y, x.dtype)
    with np.errstate(all="ignore"):
        exact, scale = _exact(x, _values(w).T if transposed else _values(w))
        margin = np.where(np.isfinite(scale), bound * scale, 0)
        least, most = (_widened((exact + side).astype(y.dtype)) for side in (-margin, margin))
        known, wide = np.isfinite(exact), _widened(y)
        wrong = np.isnan(wide) != np.isnan(exact)
        wrong |= ~np.isnan(wide) & np.isinf(wide) & (wide != least) & (wide != most)
        wrong |= np.isfinite(wide) & np.isinf(least) & np.isinf(most)
        _require_none(wrong)
        counted = known & np.isfinite(wide)
        errors = np.where(counted, beyond_rounding(y, exact) / scale, 0)
        rms = np.sqrt((errors**2).sum(-1) / np.maximum(counted.sum(-1), 1))
    return float(rms.max())


def rounding_error(
    function: Callable[..., Any], args: Sequence[Any], results: Sequence[Any]
) -> float:
    """Return 0. Raises WrongResultsError if a result differs from NumPy's, NaN apart."""
    with np.errstate(all="ignore"):
        wanted = function(*args)
    (y,) = results
    _require_dtype(y, wanted.dtype)
    a, b = _widened(y), _widened(wanted)
    same = (a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b)
    _require_none(~same)
    return 0.0


def _require_dtype(y: NDArray[Any], dtype: np.dtype[Any]) -> None:
    if y.dtype != dtype:
        raise WrongResultsError(expected(f"results in {dtype}", str(y.dtype)))


def _require_none(wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        first = [int(i) for i in np.argwhere(wrong)[0]]
        raise WrongResultsError(
            f"{wrong.sum():,} of {wrong.size:,} results are not the NaN, Inf or number that they "
            f"must be, first {first}"
        )


def _widened(array: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # for signalling NaN
        return array.astype(np.float64)


def difference(actual: Floats, wanted: Floats) -> float:
    """Return the largest absolute difference between two arrays."""
    return float(np.abs(actual.astype(np.float64) - wanted).max())


def _in_float64(value: Any) -> Any:
    if isinstance(value, QuantizedTensor):
        return _values(value).astype(np.float64)
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value


def larger(a: float, b: float) -> float:
    """Return the larger number, or NaN if one is NaN (`max` may drop a NaN)."""
    return float(np.maximum(a, b))
