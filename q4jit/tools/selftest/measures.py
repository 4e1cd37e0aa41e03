"""Numerical errors of results, compared with float64 or with decoded values."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.precision import error_scale, relative_error
from q4jit.weights.formats import decode
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Measure = Callable[[Sequence[Any], Sequence[Any]], float]


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
    return float(np.linalg.norm(results[0] - exact) / np.linalg.norm(exact))


def _contract(y: Floats, x: Floats, values: Floats) -> float:
    wide, w = x.astype(np.float64), values.astype(np.float64)
    error = relative_error(y, wide @ w, error_scale(wide**2 @ w**2, x.shape[-1]))
    return math.nan if error is None else error


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
