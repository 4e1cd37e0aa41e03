"""Arithmetic that several decorated functions of this package share."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from q4jit.dispatcher import Specialized, specialize
from q4jit.floats import FloatType, numpy_dtype
from q4jit.precision import BOUNDS

SILU: Final = "silu"
GELU_TANH: Final = "gelu_tanh"
RELU: Final = "relu"
ACTIVATIONS: Final = (SILU, GELU_TANH, RELU)


def affine(x: Any, w: Any, bias: Any) -> Any:
    """Return x @ w + bias; bias may be None."""
    y = x @ w
    return y if bias is None else y + bias


def activated(g: Any, activation: str) -> Any:
    """Return one of `ACTIVATIONS` of each element."""
    if activation == SILU:
        return g / (1 + np.exp(-g))
    if activation == GELU_TANH:
        return g / 2 * (1 + np.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))  # √(2/π)
    return np.maximum(g, 0)


def looked_up(ids: Any, w: Any, float_type: FloatType) -> Any:
    """Return rows of a table in a float type."""
    return w.rows(ids).astype(numpy_dtype(float_type))


LOOKED_UP: Final = specialize(looked_up)


def of_each_precision(function: Callable[..., Any]) -> dict[str, Specialized[Any, Any]]:
    """Return a decorated function for each precision.

    They are in a dict, because PyTorch's compiler can look up there.
    """
    return {precision: specialize(function, precision=precision) for precision in BOUNDS}
