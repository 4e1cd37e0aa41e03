"""The precision contract: the precisions, their bounds, and the error measure."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

BOUNDS: Final = {"f32": 2e-6, "f16": 5e-4, "i8": 2e-2}
"""The bound of each precision: rms error of a row of y, relative to √Σ(xw)²."""
PRECISIONS: Final = tuple(BOUNDS)
FUNCTION_BOUND: Final = 3e-6
"""The bound of a whole function in f32, on well-conditioned data: relative rms error."""


def error_scale(squares: NDArray[np.float64], terms: int) -> NDArray[np.float64]:
    """Return the scale that errors of products are divided by: √Σ(xw)² + terms·2⁻¹⁴⁹."""
    scale: NDArray[np.float64] = np.sqrt(squares) + terms * 2.0**-149  # the smallest f32 above 0
    return scale


def relative_error(
    result: NDArray[np.float32], exact: NDArray[np.float64], scale: NDArray[np.float64]
) -> float | None:
    """Return the largest rms error of a row of [M, N], relative to `scale`; None if it is NaN."""
    with np.errstate(all="ignore"):  # wrong results may be NaN or Inf
        rms = np.sqrt(np.mean(((result - exact) / scale) ** 2, axis=-1))
    return float(rms.max()) if np.isfinite(rms).all() else None
