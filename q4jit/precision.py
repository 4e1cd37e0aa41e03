"""The precision contract: the precisions, their bounds, and the error measure."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, float_type_of, half_ulp

BOUNDS: Final = {"f32": 2e-6, "f16": 5e-4, "i8": 2e-2}
"""The bound of each precision: rms error of a row of y, relative to √Σ(xw)²."""
ONE_SIGN: Final = 2.0**-24
"""Where all products have one sign, √K times this is added to the bound of `f32`."""
PRECISIONS: Final = tuple(BOUNDS)
FUNCTION_BOUND: Final = 3e-6
"""The bound of a whole function in f32, on well-conditioned data: relative rms error."""


def one_sign_bound(k: int) -> float:
    """Return the bound of `f32` where all k products of an output have the same sign."""
    return BOUNDS["f32"] + ONE_SIGN * math.sqrt(k)


def error_scale(squares: NDArray[np.float64], terms: int) -> NDArray[np.float64]:
    """Return the scale that errors of products are divided by: √Σ(xw)² + terms·2⁻¹⁴⁹."""
    scale: NDArray[np.float64] = np.sqrt(squares) + terms * 2.0**-149  # the smallest f32 above 0
    return scale


def relative_error(
    result: NDArray[Any],
    exact: NDArray[np.float64],
    scale: NDArray[np.float64],
    float_type: FloatType | None = None,
) -> float | None:
    """Return the largest rms error of a row of [M, N], relative to `scale`; None if it is NaN.

    float_type: as for `beyond_rounding`.
    """
    with np.errstate(all="ignore"):  # wrong results may be NaN or Inf
        errors = beyond_rounding(result, exact, float_type) / scale
        rms = np.sqrt(np.mean(errors**2, axis=-1))
    return float(rms.max()) if np.isfinite(rms).all() else None


def beyond_rounding(
    result: NDArray[Any], exact: NDArray[np.float64], float_type: FloatType | None = None
) -> NDArray[np.float64]:
    """Return the absolute error of each element beyond half a unit in the last place.

    Correct rounding takes up to that, so it is no error. float_type: the type that a result was
    rounded to, if it is not that of the array.
    """
    of = float_type or float_type_of(result.dtype) or "f32"
    errors: NDArray[np.float64] = np.maximum(np.abs(result - exact) - half_ulp(exact, of), 0)
    return errors
