"""NumPy's functions (not ufuncs) of traced arrays.

Each takes the traced array that NumPy asked, and then NumPy's own arguments.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np

from q4jit.frontend.operations import check_reduction, mean, total
from q4jit.frontend.refusals import unsupported

_Array = Any  # a SymbolicArray, whose module imports this one


def keywords(names: Iterable[str]) -> str:
    """Return the names of keyword arguments as an error shows them: `axis=, out=`."""
    return ", ".join(f"{name}=" for name in sorted(names))


def _sum(
    symbol: _Array,
    a: _Array,
    axis: object = None,
    dtype: object = None,
    out: object = None,
    **rest: object,
) -> _Array:
    keepdims = _take_keepdims(rest)
    check_reduction("np.sum", {"dtype": dtype, "out": out, **rest})
    return symbol._of(total(symbol._builder, a._node, "np.sum", axis, keepdims), np.float32)


def _mean(
    symbol: _Array,
    a: _Array,
    axis: object = None,
    dtype: object = None,
    out: object = None,
    **rest: object,
) -> _Array:
    keepdims = _take_keepdims(rest)
    check_reduction("np.mean", {"dtype": dtype, "out": out, **rest})
    return symbol._of(mean(symbol._builder, a._node, axis, keepdims), np.float32)


def _take_keepdims(rest: dict[str, object]) -> bool:
    """Remove keepdims= from a reduction's arguments and return it."""
    keepdims = rest.pop("keepdims", False)
    return keepdims is not np._NoValue and bool(keepdims)


def _clip(
    symbol: _Array,
    a: object,
    a_min: object = None,
    a_max: object = None,
    out: object = None,
    **rest: object,
) -> _Array:
    low, high = rest.pop("min", a_min), rest.pop("max", a_max)
    if out is not None or any(v is not None for v in rest.values()):
        unsupported("np.clip with out=, where= or dtype=", "leave them out")
    result = a
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None and bound is not np._NoValue:
            result = symbol._ufunc(op, "np.clip", result, bound)
    return symbol._ufunc("positive", "np.clip", result)


def _where(symbol: _Array, condition: object, *values: object) -> _Array:
    if len(values) != 2:
        unsupported("np.where without both values", "use np.where(condition, a, b)")
    nodes = symbol._nodes(values, "np.where")
    node = symbol._builder.apply("where", symbol._operand(condition, "np.where"), *nodes)
    return symbol._of(node, np.ndarray)


def _copy(symbol: _Array, a: _Array, order: object = "K", subok: bool = False) -> _Array:
    return symbol._of(a._node, np.ndarray)


# Any: NumPy's functions have many signatures
FUNCTIONS: Final[dict[Callable[..., object], Callable[..., Any]]] = {
    np.sum: _sum,
    np.mean: _mean,
    np.clip: _clip,
    np.where: _where,
    np.copy: _copy,
}
