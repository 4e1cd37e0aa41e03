"""The types of floats in arrays, and NumPy's rule for a result of several types.

Kernels compute in f32 whatever the types of their arrays are: elements are converted where they are
loaded, and results are rounded once, where they are stored.
"""

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

FloatType = Literal["f32", "f16", "bf16"]

FLOAT_BYTES: Final[dict[FloatType, int]] = {"f32": 4, "f16": 2, "bf16": 2}
_FRACTION_BITS: Final[dict[FloatType, int]] = {"f32": 23, "f16": 10, "bf16": 7}
_LEAST_EXPONENT: Final[dict[FloatType, int]] = {"f32": -126, "f16": -14, "bf16": -126}

FLOAT_TYPES: Final[dict[str, FloatType]] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""By the names of NumPy, ml_dtypes and PyTorch."""
FLOAT_NAMES: Final[dict[FloatType, str]] = {short: name for name, short in FLOAT_TYPES.items()}


def float_type_of(dtype: np.dtype[Any]) -> FloatType | None:
    """Return the float type of a dtype in native byte order; None if kernels do not take it."""
    return FLOAT_TYPES.get(dtype.name) if dtype.isnative else None


def type_of_number(value: object) -> FloatType | None:
    """Return the float type of a number of NumPy's or ml_dtypes', in any byte order.

    None for other values, and for numbers that adapt to arrays: those in float64, and integers.
    """
    if not isinstance(value, np.generic | np.ndarray):
        return None
    return FLOAT_TYPES.get(value.dtype.name)  # a name has no byte order


def is_float(value: object) -> bool:
    """Return whether a value is a scalar in a float type of NumPy's, or in ml_dtypes' bfloat16."""
    if isinstance(value, np.floating):
        return True
    return isinstance(value, np.generic) and value.dtype.name in FLOAT_TYPES


def numpy_dtype(float_type: FloatType) -> np.dtype[Any]:
    """Return NumPy's dtype of a float type.

    Raises ImportError for bfloat16 without the package ml_dtypes, which gives it to NumPy.
    """
    if float_type != "bf16":
        return np.dtype(FLOAT_NAMES[float_type])
    import ml_dtypes  # late: optional

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def promoted(*types: FloatType | None) -> FloatType | None:
    """Return the type of a result of several values, as NumPy promotes arrays.

    None is a value that adapts to the others, such as a number of Python's.
    """
    named = {kind for kind in types if kind is not None}
    if len(named) > 1:
        return "f32"
    return next(iter(named), None)


def half_ulp(values: NDArray[Any], float_type: FloatType) -> NDArray[np.float64]:
    """Return half the distance of adjacent numbers of a type, at each value.

    Correct rounding of a value in the type's range costs at most as much.
    """
    _, exponents = np.frexp(np.asarray(values, np.float64))  # fractions from 0.5: one too large
    least = _LEAST_EXPONENT[float_type]
    exponents = np.where(values == 0, least, np.maximum(exponents - 1, least))
    halves: NDArray[np.float64] = np.ldexp(1.0, exponents - _FRACTION_BITS[float_type] - 1)
    return halves
