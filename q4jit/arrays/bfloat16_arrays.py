"""Arrays of bfloat16 for functions that NumPy runs: they promote each other as kernels do.

In NumPy a float16 array times 0.5 is float16, but a bfloat16 array of ml_dtypes times 0.5 is
float32, and np.where and np.linalg.norm give it yet other types.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import float_type_of, numpy_dtype, promoted, type_of_number


class Bfloat16Array(np.ndarray[Any, Any]):
    """An array of bfloat16 whose operations are computed in float32 and rounded once."""

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **rest: Any
    ) -> Any:
        """Return the result of a ufunc's method, as NumPy asks for it."""
        result = _computed(getattr(ufunc, method), inputs, rest)
        if out is None:
            return result
        (array,) = out
        np.asarray(array)[...] = result
        return array

    def __array_function__(
        self, function: Callable[..., Any], types: object, args: Any, kwargs: Any
    ) -> Any:
        """Return the result of a function of NumPy's, as NumPy asks for it."""
        return _computed(function, args, kwargs)


def promoting(value: Any) -> Any:
    """Return an array of bfloat16 as one that promotes by q4jit's rule, and others unchanged."""
    if isinstance(value, np.ndarray) and float_type_of(value.dtype) == "bf16":
        return value.view(Bfloat16Array)
    return value


def plain(value: Any) -> Any:
    """Return NumPy's own array of a `Bfloat16Array`, and other values unchanged."""
    return value.view(np.ndarray) if isinstance(value, Bfloat16Array) else value


def _computed(function: Callable[..., Any], args: Sequence[Any], rest: dict[str, Any]) -> Any:
    """Call a function with float32 in place of bfloat16, and round its result if it is so."""
    result = function(*map(_widened, args), **{name: _widened(v) for name, v in rest.items()})
    is_number = isinstance(result, np.ndarray | np.floating) and result.dtype.kind == "f"
    if is_number and promoted(*map(type_of_number, args)) == "bf16":
        rounded: NDArray[Any] = np.asarray(result).astype(numpy_dtype("bf16"))
        return rounded.view(Bfloat16Array)
    return result


def _widened(value: Any) -> Any:
    return np.asarray(value, np.float32) if isinstance(value, Bfloat16Array) else value
