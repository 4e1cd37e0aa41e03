"""The precision contract: the precisions, their bounds, and the error measure."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

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
    result: NDArray[np.float32], exact: NDArray[np.float64], scale: NDArray[np.float64]
) -> float | None:
    """Return the largest rms error of a row of [M, N], relative to `scale`; None if it is NaN.

    Half a unit in the last place of f32 is no error: correct rounding takes up to that.
    """
    with np.errstate(all="ignore"):  # wrong results may be NaN or Inf
        half_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        errors = np.maximum(np.abs(result - exact) - half_ulp, 0) / scale
        rms = np.sqrt(np.mean(errors**2, axis=-1))
    return float(rms.max()) if np.isfinite(rms).all() else None
