"""How NumPy's operations on values become nodes of the graph, and which are refused."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder, refuse_arithmetic
from q4jit.frontend.cures import cure_of
from q4jit.frontend.graph import Node
from q4jit.frontend.refusals import USE_SLICE, refuse, show_value, unsupported
from q4jit.frontend.shapes import has_columns, show_shape
from q4jit.frontend.vectors import expand, fixed_axes, inner_sum, with_axis

_MAX_EXPONENT: Final = 16

_UFUNCS: Final = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "negative": "neg",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "sqrt": "sqrt",
    "absolute": "abs",
    "fabs": "abs",
    "maximum": "maximum",
    "minimum": "minimum",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "invert": "not",
}

_HALF_OF_TRUTH: Final = frozenset({"exp", "log", "tanh", "sqrt"})
"""Functions that NumPy computes in float16 if they get truth values."""


def constant(builder: Builder, value: Any, function: str) -> Node:  # Any: a type with __float__
    """Return a number, an operand of `function`, as a node.

    Raises TraceError for a whole number that is too large for float().
    """
    try:
        return builder.const(float(value))
    except OverflowError:
        raise TraceError(
            expected(
                "a number that float() takes",
                show_value(int(value)),
                where=f"operand of {function}",
                cure="use np.inf",
            )
        ) from None


def elementwise(builder: Builder, ufunc: str, operands: Sequence[Node]) -> Node:
    """Return NumPy's `ufunc` of operands. Raises TraceError if it cannot be compiled."""
    match ufunc:
        case "reciprocal" if operands[0].is_bool:
            refuse_arithmetic("take np.reciprocal of")
        case "square":
            return builder.apply("mul", operands[0], operands[0])
        case "reciprocal":
            return builder.apply("div", builder.const(1.0), operands[0])
        case "positive":
            if operands[0].is_bool:
                refuse_arithmetic("unary + of")
            return operands[0]
        case "clip":
            value, low, high = operands
            return builder.apply("minimum", builder.apply("maximum", value, low), high)
    if ufunc in _HALF_OF_TRUTH and operands[0].is_bool:
        refuse(
            f"compute np.{ufunc} of truth values, whose result has few digits in NumPy",
            "use np.where(condition, a, b)",
        )
    if ufunc not in _UFUNCS:
        unsupported(f"np.{ufunc}", cure_of(ufunc))
    return builder.apply(_UFUNCS[ufunc], *operands)


def power(builder: Builder, base: Node, exponent: object, function: str) -> Node:
    """Return `base` to a small whole exponent. Raises TraceError for every other exponent.

    function: what the user called: `**`, `np.power` or `np.float_power`.
    """
    if isinstance(exponent, float | np.floating) and float(exponent).is_integer():
        exponent = int(exponent)
    if not isinstance(exponent, int | np.integer) or abs(int(exponent)) > _MAX_EXPONENT:
        if isinstance(exponent, int):
            cure = "multiply smaller powers"
        else:
            cure = "use np.sqrt" if exponent == 0.5 else "use np.exp and np.log"
        raise TraceError(
            expected(
                f"a whole number from -{_MAX_EXPONENT} to {_MAX_EXPONENT}",
                show_value(exponent),
                where=f"exponent of {function}",
                cure=cure,
            )
        )
    return builder.power(base, int(exponent))


# --- reductions -----------------------------------------------------------------------------


def check_reduction(function: str, options: dict[str, object]) -> None:
    """Raise TraceError for an option of a reduction other than axis=, keepdims= and dtype=float32.

    function: what the user called, for example `np.sum`. options: the others, by name.
    """
    for name, given in options.items():
        if given is np._NoValue or given is None:
            continue
        if name == "dtype" and np.dtype(given) == np.float32:  # type: ignore[call-overload]  # any object
            continue
        unsupported(f"{function} with {name}=", "leave it out")


def reduced(
    builder: Builder, op: str, node: Node, function: str, axis: object, keepdims: bool
) -> Node:
    """Return the reduction `op` over the last axis. Raises TraceError for another axis.

    function: what the user called, for example `np.mean`.
    """
    rank = len(node.shape)
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    if (
        builder.has_experts
        and op == "sum"
        and rank > 1
        and isinstance(axis, int)
        and axis in {-2, rank - 2}
    ):
        return inner_sum(builder, node, keepdims)
    last = axis is None and rank == 1
    last = last or (isinstance(axis, int | np.integer) and int(axis) in {-1, rank - 1})
    if not last:
        raise TraceError(
            expected(
                "the last axis, axis=-1",
                f"axis={axis!r} for {show_shape(node.shape)}",
                where=function,
            )
        )
    if not has_columns(node.shape):
        refuse(
            f"compute {function} of {show_shape(node.shape)}",
            "only the last axis of a value can be reduced, and only once",
        )
    if builder.has_experts and fixed_axes(node.shape) > 1 and not keepdims:
        refuse(
            f"remove the last axis of {show_shape(node.shape)}",
            "use keepdims=True where a row has several vectors",
        )
    return builder.reduce(op, node, keepdims)


def mean(builder: Builder, node: Node, function: str, axis: object, keepdims: bool) -> Node:
    """Return the mean over the last axis. Raises TraceError for another axis."""
    summed = reduced(builder, "sum", node, function, axis, keepdims)
    is_inner = (summed.operands[0] if summed.op == "expand" else summed).op == "inner_sum"
    count = node.copies if is_inner else node.width
    return builder.apply("div", summed, builder.const(float(count)))


def variance(
    builder: Builder, node: Node, function: str, axis: object, keepdims: bool, ddof: float
) -> Node:
    """Return the variance over the last axis, as NumPy computes it: the mean is subtracted first.

    ddof: the divisor is the number of elements − ddof.
    """
    centred = builder.apply("sub", builder.number(node), mean(builder, node, function, axis, True))
    squares = builder.apply("mul", centred, centred)
    summed = reduced(builder, "sum", squares, function, axis, keepdims)
    return builder.apply("div", summed, builder.const(max(float(node.width) - ddof, 0.0)))


def largest(builder: Builder, node: Node, function: str, axis: object, keepdims: bool) -> Node:
    """Return the largest element along the last axis; of truth values, whether there is a True."""
    most = reduced(builder, "max", node, function, axis, keepdims)
    return builder.apply("ne", most, builder.const(0.0)) if node.is_bool else most


def smallest(builder: Builder, node: Node, function: str, axis: object, keepdims: bool) -> Node:
    """Return the smallest element along the last axis: −max(−x), which is exact."""
    if node.is_bool:
        negated = builder.apply("not", node)
        return builder.apply("not", largest(builder, negated, function, axis, keepdims))
    most = reduced(builder, "max", builder.apply("neg", node), function, axis, keepdims)
    return builder.apply("neg", most)


# --- indices --------------------------------------------------------------------------------


def sliced(builder: Builder, node: Node, index: object) -> tuple[Node, int]:
    """Return `node[index]`, columns of the last axis or the value with a new last axis.

    The second value is the first column. Raises TraceError for every other index.
    """
    rank = len(node.shape)
    parts = _without_ellipsis(index, rank)
    parts += [slice(None)] * (rank - sum(p is not None for p in parts))
    axes = [p for p in parts if p is not None]
    if len(axes) > len(node.shape) or not all(isinstance(p, slice) for p in axes):
        raise TraceError(
            expected(
                "slices of the last axis, as in y[..., a:b]", _show_index(index), where="index"
            )
        )
    sliceable = has_columns(node.shape)
    leading = len(node.shape) - sliceable
    for dim, part in zip(node.shape[:leading], axes[:leading], strict=True):
        if part != slice(None):
            refuse(f"slice the leading axis {dim} with {_show_index(index)}", USE_SLICE)
    if None in parts:
        if builder.has_experts and parts[-1] is not None and parts.index(None) == rank - 1:
            columns, start = sliced(builder, node, (..., parts[-1]))
            return expand(builder, columns), start
        if parts[-1] is not None or parts.count(None) > 1:
            refuse(f"add axes with {_show_index(index)}", "use v[..., None], one axis at the end")
        return (with_axis if builder.has_experts else Builder.add_last)(builder, node), 0
    if not sliceable:
        return node, 0
    part, width = axes[-1], node.shape[-1]
    assert isinstance(part, slice)
    assert isinstance(width, int)
    start, stop = _columns(part, width)
    return builder.slice(node, start, stop), start


def _without_ellipsis(index: object, rank: int) -> list[object]:
    """Return the parts of an index, with whole axes in place of an ellipsis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipses = [i for i, p in enumerate(parts) if p is Ellipsis]
    if ellipses:
        missing = rank - sum(p is not None and p is not Ellipsis for p in parts)
        parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * missing
    return parts


def _columns(part: slice, width: int) -> tuple[int, int]:
    """Return the first column of a slice and the one after its last."""
    try:
        start, stop, step = part.indices(width)
    except TypeError:
        raise TraceError(expected("whole numbers", _show_part(part), where="slice")) from None
    if step != 1 or stop <= start:
        raise TraceError(
            expected(
                "at least one column and a step of 1",
                f"{_show_part(part)} of {width} columns",
                where="slice",
            )
        )
    return start, stop


def _show_index(index: object) -> str:
    """Return an index as the user writes it: [:, None] for (slice(None), None)."""
    parts = index if isinstance(index, tuple) else (index,)
    return f"[{', '.join(map(_show_part, parts))}]"


def _show_part(part: object) -> str:
    if isinstance(part, slice):
        bounds = [part.start, part.stop] + [part.step] * (part.step is not None)
        return ":".join("" if bound is None else show_value(bound) for bound in bounds)
    return "..." if part is Ellipsis else show_value(part)
