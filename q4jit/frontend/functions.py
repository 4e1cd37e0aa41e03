"""NumPy's functions (not ufuncs) of traced arrays.

Each takes the traced array that NumPy asked, and then NumPy's own arguments.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np

from q4jit.floats import FloatType
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node
from q4jit.frontend.kinds import NUMBER_KINDS
from q4jit.frontend.operands import promoted_type
from q4jit.frontend.operations import check_reduction, largest, mean, reduced, smallest, variance
from q4jit.frontend.refusals import unsupported

_Array = Any  # a SymbolicArray, whose module imports this one


def keywords(names: Iterable[str]) -> str:
    """Return the names of keyword arguments as an error shows them: `axis=, out=`."""
    return ", ".join(f"{name}=" for name in sorted(names))


def _reduction(name: str, reduce: Callable[..., Node]) -> Callable[..., Any]:
    """Return NumPy's reduction `name`, whose node `reduce` makes."""

    def function(
        symbol: _Array,
        a: _Array,
        axis: object = None,
        dtype: object = None,
        out: object = None,
        **rest: object,
    ) -> _Array:
        keepdims = _take_keepdims(rest)
        check_reduction(name, {"dtype": dtype, "out": out, **rest})
        node = reduce(symbol._builder, a._node, name, axis, keepdims)
        is_asked = dtype is not None and dtype is not np._NoValue
        return _reduced(symbol, node, "f32" if is_asked else a._float_type)

    return function


def _reduced(symbol: _Array, node: Node, float_type: FloatType | None) -> _Array:
    """Return a reduction that a node computes; float_type: that of its operand, or as asked for."""
    float_type = float_type or "f32"
    return symbol._of(node, NUMBER_KINDS[float_type], float_type)


def _extreme(name: str, reduce: Callable[..., Node]) -> Callable[..., Any]:
    """Return np.max or np.min, which take no dtype."""
    reduction = _reduction(name, reduce)

    def function(
        symbol: _Array, a: _Array, axis: object = None, out: object = None, **rest: object
    ) -> _Array:
        if "dtype" in rest:
            unsupported(f"{name} with dtype=", "leave it out")
        return reduction(symbol, a, axis, None, out, **rest)

    return function


def _sum(builder: Builder, node: Node, function: str, axis: object, keepdims: bool) -> Node:
    return reduced(builder, "sum", node, function, axis, keepdims)


def _spread(name: str, root: bool) -> Callable[..., Any]:
    """Return np.var, or np.std with the root."""

    def function(
        symbol: _Array,
        a: _Array,
        axis: object = None,
        dtype: object = None,
        out: object = None,
        ddof: float = 0,
        **rest: object,
    ) -> _Array:
        def reduce(builder: Builder, node: Node, name: str, axis: object, keepdims: bool) -> Node:
            squared = variance(builder, node, name, axis, keepdims, ddof)
            return builder.apply("sqrt", squared) if root else squared

        return _reduction(name, reduce)(symbol, a, axis, dtype, out, **rest)

    return function


def _norm(
    symbol: _Array,
    x: _Array,
    ord: object = None,  # noqa: A002 - NumPy's name
    axis: object = None,
    keepdims: object = False,
) -> _Array:
    if ord is not None and not (type(ord) in {int, float} and ord == 2):
        sizes = {"1": "use np.sum(np.abs(x), -1)", "inf": "use np.max(np.abs(x), -1)"}
        cure = sizes.get(str(ord), "use the norm of order 2")
        unsupported(f"np.linalg.norm with ord={ord!r}", cure)
    number = symbol._builder.number(x._node)
    squares = symbol._builder.apply("mul", number, number)
    summed = reduced(symbol._builder, "sum", squares, "np.linalg.norm", axis, bool(keepdims))
    return _reduced(symbol, symbol._builder.apply("sqrt", summed), x._float_type)


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
    return symbol._of(node, np.ndarray, promoted_type(values))


def _copy(symbol: _Array, a: _Array, order: object = "K", subok: bool = False) -> _Array:
    return symbol._of(a._node, np.ndarray, a._float_type)


# Any: NumPy's functions have many signatures
FUNCTIONS: Final[dict[Callable[..., object], Callable[..., Any]]] = {
    np.sum: _reduction("np.sum", _sum),
    np.mean: _reduction("np.mean", mean),
    np.max: _extreme("np.max", largest),
    np.min: _extreme("np.min", smallest),
    np.amax: _extreme("np.amax", largest),
    np.amin: _extreme("np.amin", smallest),
    np.var: _spread("np.var", root=False),
    np.std: _spread("np.std", root=True),
    np.linalg.norm: _norm,
    np.clip: _clip,
    np.where: _where,
    np.copy: _copy,
}
