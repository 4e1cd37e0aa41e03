"""The types that NumPy and Python give to numbers: values without axes.

`isinstance(s, float)` in a traced function must answer as it does in NumPy, and Python's truth
values add up where NumPy's do not. A kind is a type, or None where it is not known.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.floats import FLOAT_NAMES, FloatType, float_type_of, numpy_dtype
from q4jit.frontend.graph import BOOLEAN, Node
from q4jit.frontend.refusals import refuse

Kind = type | None

PYTHON: Final = frozenset({bool, int, float})

NUMBER_KINDS: Final[dict[FloatType, Kind]] = {"f32": np.float32, "f16": np.float16, "bf16": None}
"""The kinds of a number in NumPy, by its float type."""


def type_of_value(node: Node, float_type: FloatType | None) -> FloatType | None:
    """Return the float type that a value gives to results, from that of its operands.

    Truth values have none. An array has one, even if it was made of numbers that adapt.
    """
    if node.is_bool:
        return None
    return float_type or ("f32" if node.shape else None)


def kind_of_constant(value: object) -> Kind:
    """Return the kind of a number that is known while tracing."""
    if isinstance(value, np.generic | np.ndarray):
        return type(value)
    return next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)


def kind_of_operator(op: str, kinds: Sequence[Kind]) -> Kind:
    """Return the kind of an operator's result, from its operands' kinds."""
    if not PYTHON.issuperset(kinds):
        return kind_of_ufunc(op, kinds)
    if op in BOOLEAN:
        return bool
    return float if op == "div" or float in kinds else int


def kind_of_ufunc(op: str, kinds: Sequence[Kind]) -> Kind:
    """Return the kind of a ufunc's result, from its operands' kinds."""
    if op in BOOLEAN:
        return np.bool_
    if any(kind not in PYTHON and not _is_numpys(kind) for kind in kinds):
        return None
    weak: dict[Kind, Any] = {bool: False, int: 0, float: 0.0}  # numbers take NumPy's type
    result = np.result_type(*(weak.get(kind, kind) for kind in kinds)).type
    return result if issubclass(result, np.floating) else None


def _is_numpys(kind: Kind) -> bool:
    """Return whether a kind is a scalar type of NumPy's; ml_dtypes' promote by rules of their own.

    The dtype of an array without axes is not known.
    """
    return kind is not None and issubclass(kind, np.number | np.bool_)


def dtype_of(float_type: FloatType) -> np.dtype[Any]:
    """Return NumPy's dtype of a float type. Raises TraceError if ml_dtypes is missing for it."""
    try:
        return numpy_dtype(float_type)
    except ImportError:
        refuse(f"name NumPy's dtype of {FLOAT_NAMES[float_type]}", "install ml_dtypes")


def float_type_named(dtype: object, where: str) -> FloatType:
    """Return the float type of an object that names a dtype. Raises TraceError for other dtypes."""
    try:
        wanted = np.dtype(dtype)  # type: ignore[call-overload]  # any object
    except TypeError:  # of another library, or "bfloat16" without ml_dtypes
        shown, float_type = str(dtype), None
    else:
        shown, float_type = str(wanted), float_type_of(wanted)
    if float_type is None:
        types = "np.float32, np.float16 or ml_dtypes.bfloat16"
        cure = "convert the result outside" if shown == "float64" else ""
        raise TraceError(expected(types, shown, where=where, cure=cure))
    return float_type
