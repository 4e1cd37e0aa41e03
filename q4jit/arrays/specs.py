"""The spec of an argument, and the part of it that selects the compiled call."""

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Final

import numpy as np

from q4jit.arrays.arguments import check_array, check_ids, holds_ids
from q4jit.arrays.dtypes import F32
from q4jit.arrays.views import DeviceView, require_float
from q4jit.conversions import AS_LEAVES
from q4jit.errors import ArgumentError, expected
from q4jit.floats import float_type_of, is_float, type_of_number
from q4jit.frontend.containers import Apart, Misfit, together
from q4jit.frontend.specs import (
    ScalarSpec,
    Signature,
    Spec,
    StaticSpec,
    StructureSpec,
    WeightSpec,
    array_spec,
    ids_spec,
    with_inner_axes,
)
from q4jit.frontend.structures import Structure
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor, TransposedTensor

_KINDS: Final = (
    "a float array, QuantizedTensor, ExpertTensor, number, bool, str or None, or a list, tuple, "
    "dict, dataclass or NamedTuple of these"
)


def shape_key(value: object) -> object:
    """Return the part of an argument that selects the launch of a call."""
    kind = type(value)
    if kind is np.ndarray:
        shape, dtype = value.shape, value.dtype  # type: ignore[attr-defined]  # just tested
        # other dtypes are those of ids or numbers (rank 0), or `spec_of` refuses them
        return shape if dtype is F32 else (shape, dtype)
    if kind is QuantizedTensor:
        return value.signature  # type: ignore[attr-defined]  # just tested
    if kind is ExpertTensor:
        return value.signature  # type: ignore[attr-defined]  # just tested
    if kind is float or is_float(value):
        return kind
    if kind is Structure:
        return value
    if kind is DeviceView:
        view: Any = value
        return view.shape, view.dtype, view.platform, view.device, view.is_aligned
    if isinstance(value, np.ndarray):  # `spec_of` checks a subclass when its launch is made
        return kind, value.shape, value.dtype
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    try:
        hash(value)
    except Exception:  # noqa: BLE001 - memoryviews raise ValueError, other objects anything
        return kind  # `spec_of` refuses it
    return type(value), value


def spec_of(name: str, value: object, sized: bool = False) -> Spec:
    """Return the spec of an argument. Raises ArgumentError if a function cannot take it."""
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if isinstance(value, ExpertTensor):
        fmt, experts, k, n, finite, suits_f16 = value.signature
        return WeightSpec(fmt, k, n, finite, suits_f16, experts=experts)
    if isinstance(value, DeviceView):
        if not value.shape or not value.shape[-1]:
            what = "at least one dimension, the last of at least 1"
            cure = f"use float({name}) for a number"
            raise ArgumentError(expected(what, str(value), where=f"argument {name!r}", cure=cure))
        if holds_ids(value):
            return replace(ids_spec(value.shape, sized), is_narrow=value.dtype == "int32")
        spec = array_spec(value.shape, sized, require_float(value, name))
        return replace(spec, is_aligned=value.is_aligned)
    if isinstance(value, np.ndarray):
        float_type = type_of_number(value)
        if value.ndim == 0 and (value.dtype.kind in "fiu" or float_type):
            return ScalarSpec(np.ndarray, float_type)
        if holds_ids(value):
            check_ids(name, value)
            return ids_spec(value.shape, sized)
        check_array(name, value)
        return array_spec(value.shape, sized, float_type_of(value.dtype) or "f32")
    if is_float(value):
        return ScalarSpec(type(value), type_of_number(value))
    if isinstance(value, float):
        return ScalarSpec()
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return StaticSpec(type(value), value)
    if isinstance(value, Structure):
        return StructureSpec(value)
    raise ArgumentError(
        expected(_KINDS, type(value).__name__, where=f"argument {name!r}", cure=_cure(name, value))
    )


def signature_of(names: Sequence[str], args: Sequence[object], sized: bool = False) -> Signature:
    """Return the specs of arguments. Raises ArgumentError for one that a function cannot take."""
    signature = tuple(spec_of(name, v, sized) for name, v in zip(names, args, strict=True))
    return with_inner_axes(signature, [getattr(value, "shape", ()) for value in args])


def _cure(name: str, value: object) -> str:
    """Return how to convert an argument; empty if NumPy makes no array of numbers of it."""
    if isinstance(value, TransposedTensor):
        return "pass w, and write w.T in the function"
    if hasattr(type(value), "register_buffer"):  # a module of PyTorch, the self of a method
        return AS_LEAVES
    if isinstance(value, complex | np.complexfloating):
        return f"use {name}.real"
    if isinstance(value, np.generic) and _is_number(value):
        return f"use float({name})"
    kinds = {Mapping: "dict", tuple: "tuple", list | deque | Set: "list"}
    for kind, container in kinds.items():
        if isinstance(value, kind):
            return f"use {container}({name})"
    try:
        array = np.asarray(value)
    except Exception:  # noqa: BLE001 - other libraries raise anything
        return ""
    is_bf16 = float_type_of(array.dtype) == "bf16"
    if not (array.dtype.kind in "fiub" or is_bf16) or not array.ndim or not array.size:
        return ""
    if array.dtype.kind in "iu":
        ids, numbers = f"np.asarray({name}, np.int64)", f"np.asarray({name}, np.float32)"
        return f"use {ids} for ids, or {numbers} for numbers"
    return f"use np.asarray({name}, dtype=np.float32)"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):  # times and strings
        return False
    return True


def stand_in(value: object) -> object:
    """Return an argument of `warmup`: an array for a tuple of ints (its shape), else the value.

    So are the leaves of containers.
    """
    apart = Apart(whole=_is_shape)
    try:
        tree = apart.tree(value)
    except Misfit:  # refused when the arguments are taken apart
        return value
    return together(tree, map(_stand_in, apart.leaves))


def _stand_in(value: Any) -> Any:
    if not _is_shape(value):
        return value
    try:
        return np.broadcast_to(np.float32(0), tuple(map(int, value))).view()
    except ValueError as error:
        got = f"{value} ({error})"
        raise ArgumentError(expected("the shape of an array", got, where="warmup")) from None


def _is_shape(value: object) -> bool:
    return type(value) is tuple and bool(value) and all(map(_is_size, value))


def _is_size(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
