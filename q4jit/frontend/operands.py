"""The operands of traced operations: their nodes, and the types by which NumPy promotes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.floats import FloatType, is_float, promoted, type_of_number
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node
from q4jit.frontend.ids import SymbolicIds, refuse_ids
from q4jit.frontend.kinds import Kind, kind_of_constant
from q4jit.frontend.operations import constant
from q4jit.frontend.refusals import USE_PRODUCT, cure_for, refuse, refuse_other_trace
from q4jit.frontend.refused_operators import (
    WEIGHT_ALONE,
    RefusedOperators,
    RefusedWeightOperators,
)
from q4jit.frontend.row_counts import ROWS_AS_NUMBER, RowCount
from q4jit.frontend.shapes import show_shape


def _traced_array(value: object) -> Any:
    """Return a traced array; None for other values. The module of its class imports this one."""
    return value if isinstance(value, RefusedOperators) else None


def operand(builder: Builder, value: object, function: str) -> Node:
    """Return an operand of `function`, such as "+" or "np.exp", as a node."""
    array = _traced_array(value)
    if array is not None:
        if array._builder is not builder:
            refuse_other_trace()
        node: Node = array._node
        return node
    if isinstance(value, RowCount):
        refuse(*ROWS_AS_NUMBER)
    if isinstance(value, bool | int | float | np.number | np.bool_) or is_float(value):
        if isinstance(value, np.complexfloating):
            raise TraceError(expected("a real number", repr(value), where=f"operand of {function}"))
        return constant(builder, value, function)
    if isinstance(value, RefusedWeightOperators):
        refuse(WEIGHT_ALONE, USE_PRODUCT)
    if isinstance(value, SymbolicIds):
        refuse_ids(value, f"use {function} with {{}}")
    if isinstance(value, np.ndarray):
        if value.ndim == 0 and (value.dtype.kind in "biuf" or type_of_number(value)):
            return constant(builder, value, function)
        refuse(
            f"use a captured array ({value.dtype} {show_shape(value.shape)}) in {function}",
            "pass it as an argument",
        )
    raise TraceError(
        expected(
            "an array that is an argument, or a real number",
            type(value).__name__,
            where=f"operand of {function}",
            cure=cure_for(value, "np.asarray(x, np.float32)"),
        )
    )


def promoted_type(values: Sequence[object]) -> FloatType | None:
    """Return the float type of a result of `values`, as NumPy promotes arrays and scalars."""
    return promoted(*map(_float_type, values))


def _float_type(value: object) -> FloatType | None:
    array = _traced_array(value)
    if array is not None:
        of_array: FloatType | None = array._float_type
        return of_array
    return type_of_number(value)


def is_truth(value: object) -> bool:
    """Return whether NumPy takes an operand for a truth value."""
    array = _traced_array(value)
    if array is not None:
        return bool(array._node.is_bool)
    if type(value) is np.ndarray:
        return value.ndim == 0 and value.dtype == np.bool_
    return isinstance(value, bool | np.bool_)


def kinds_of(values: Sequence[object]) -> list[Kind]:
    """Return the kinds of operands."""
    pairs = ((value, _traced_array(value)) for value in values)
    return [kind_of_constant(value) if array is None else array._kind for value, array in pairs]
