"""How NumPy's operations on a value become nodes of the graph, and which are accepted."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from q4jit.errors import TraceError
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node
from q4jit.frontend.refusals import unsupported
from q4jit.frontend.shapes import show_shape

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


def constant(builder: Builder, value: Any) -> Node:  # Any: whatever has a __float__
    """Return a number as a node. Raises TraceError for one that float() does not take."""
    try:
        return builder.const(float(value))
    except OverflowError:
        raise TraceError(
            f"found a whole number of {int(value).bit_length()} bits: accepted are numbers that "
            "float() takes; write np.inf for more"
        ) from None


def elementwise(builder: Builder, ufunc: str, operands: Sequence[Node]) -> Node:
    """Return NumPy's `ufunc` of operands. Raises TraceError where it cannot be compiled."""
    match ufunc:
        case "square":
            return builder.apply("mul", operands[0], operands[0])
        case "reciprocal":
            return builder.apply("div", builder.const(1.0), operands[0])
        case "positive":
            return operands[0]
        case "clip":
            value, low, high = operands
            return builder.apply("minimum", builder.apply("maximum", value, low), high)
    if ufunc not in _UFUNCS:
        unsupported(f"np.{ufunc}")
    return builder.apply(_UFUNCS[ufunc], *operands)


def power(builder: Builder, base: Node, exponent: object) -> Node:
    """Return `base` to a small whole exponent. Raises TraceError for every other exponent."""
    if isinstance(exponent, float | np.floating) and float(exponent).is_integer():
        exponent = int(exponent)
    if not isinstance(exponent, int | np.integer) or abs(int(exponent)) > _MAX_EXPONENT:
        # repr() refuses whole numbers of thousands of digits
        short = isinstance(exponent, int) and exponent.bit_length() <= 64
        shown = repr(exponent) if short or isinstance(exponent, float) else "something else"
        raise TraceError(
            f"found ** with the exponent {shown}: accepted are whole numbers from "
            f"-{_MAX_EXPONENT} to {_MAX_EXPONENT} known while tracing (np.sqrt for 0.5)"
        )
    return builder.power(base, int(exponent))


# --- reductions -----------------------------------------------------------------------------


def check_reduction(options: dict[str, object]) -> None:
    """Raise TraceError where an argument of a reduction asks for more than a sum or mean in f32."""
    for name, given in options.items():
        if given is np._NoValue or given is None:
            continue
        if name == "dtype" and np.dtype(given) == np.float32:  # type: ignore[call-overload]  # any object
            continue
        unsupported(f"the argument {name}= of a reduction")


def total(builder: Builder, node: Node, axis: object, keepdims: bool) -> Node:
    """Return the sum over the last axis. Raises TraceError where `axis` names another."""
    rank = len(node.shape)
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    last = axis is None and rank == 1
    last = last or (isinstance(axis, int | np.integer) and int(axis) in {-1, rank - 1})
    if not last:
        raise TraceError(
            f"found a reduction of {show_shape(node.shape)} over axis={axis!r}: accepted is "
            "the last axis, axis=-1"
        )
    return builder.sum(node, keepdims)


def mean(builder: Builder, node: Node, axis: object, keepdims: bool) -> Node:
    """Return the mean over the last axis. Raises TraceError where `axis` names another."""
    summed = total(builder, node, axis, keepdims)
    return builder.apply("div", summed, builder.const(float(node.width)))


# --- indices --------------------------------------------------------------------------------


def sliced(builder: Builder, node: Node, index: object) -> Node:
    """Return `node[index]`: columns of the last axis, or the value with a new last axis.

    Raises TraceError for every other index.
    """
    parts = _without_ellipsis(index, len(node.shape))
    axes = [p for p in parts if p is not None]
    axes += [slice(None)] * (len(node.shape) - len(axes))
    if len(axes) > len(node.shape) or not all(isinstance(p, slice) for p in axes):
        raise TraceError(f"found the index {index!r}: accepted are slices of the last axis")
    for dim, part in zip(node.shape[:-1], axes[:-1], strict=True):
        if part != slice(None):
            raise TraceError(
                f"found the slice {part!r} of the leading axis {dim}: accepted are slices of the "
                "last axis, as in y[..., a:b]"
            )
    if None in parts:
        if parts[-1] is not None or parts.count(None) > 1:
            raise TraceError("found a new axis that is not the last: accepted is v[..., None]")
        return builder.add_last(node)
    if not node.shape:
        return node
    last, part = node.shape[-1], axes[-1]
    assert isinstance(part, slice)
    if isinstance(last, int):
        return builder.slice(node, *_columns(part, last))
    if part != slice(None):
        raise TraceError(f"found a slice of the leading axis {last}")
    return node


def _without_ellipsis(index: object, rank: int) -> list[object]:
    """The parts of an index, with whole axes for an ellipsis among them."""
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [i for i, p in enumerate(parts) if p is Ellipsis]
    if places:
        missing = rank - sum(p is not None and p is not Ellipsis for p in parts)
        parts[places[0] : places[0] + 1] = [slice(None)] * missing
    return parts


def _columns(part: slice, width: int) -> tuple[int, int]:
    """The first column of a slice and the one after its last."""
    try:
        start, stop, step = part.indices(width)
    except TypeError:
        raise TraceError(f"found the slice {part!r}: accepted are whole numbers") from None
    if step != 1 or stop <= start:
        raise TraceError(
            f"found the slice {part!r} of {width} columns: accepted are slices of at least one "
            "column with a step of 1"
        )
    return start, stop
