"""What an argument of a call is: its spec, and what of it selects the compiled call."""

from typing import Any

import numpy as np

from q4jit.arrays.arguments import check_array, check_ids, holds_ids
from q4jit.arrays.dtypes import F32
from q4jit.arrays.views import DeviceView, require_f32
from q4jit.errors import ArgumentError
from q4jit.frontend.specs import (
    ScalarSpec,
    Spec,
    StaticSpec,
    WeightSpec,
    array_spec,
    ids_spec,
)
from q4jit.weights.tensor import QuantizedTensor


def shape_key(value: object) -> object:
    """What of an argument decides which launch serves a call."""
    kind = type(value)
    if kind is np.ndarray:
        shape, dtype = value.shape, value.dtype  # type: ignore[attr-defined]  # just tested
        # another dtype is that of ids, of a number (rank 0), or refused when its spec is made
        return shape if dtype is F32 else (shape, dtype)
    if kind is QuantizedTensor:
        return value.signature  # type: ignore[attr-defined]  # just tested
    if kind is float or isinstance(value, np.floating):
        return kind
    if kind is DeviceView:
        view: Any = value
        return view.shape, view.dtype, view.platform, view.device
    if isinstance(value, np.ndarray):  # a subclass is looked at when its own launch is made
        return kind, value.shape, value.dtype
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    try:
        hash(value)
    except TypeError:
        return kind  # refused when its spec is made
    return type(value), value


def spec_of(name: str, value: object, sized: bool = False) -> Spec:
    """The spec of an argument; raises ArgumentError for what a function cannot take."""
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if isinstance(value, DeviceView):
        if not value.shape or not value.shape[-1]:
            raise ArgumentError(
                f"argument {name!r} is {value}: accepted are arrays of one dimension or more, the "
                f"last at least 1, and float({name}) for a number"
            )
        if value.dtype.kind == "i":
            return ids_spec(value.shape, sized)
        require_f32(value, name)
        return array_spec(value.shape, sized)
    if isinstance(value, np.ndarray):
        if value.ndim == 0 and value.dtype.kind in "fiu" and type(value) is np.ndarray:
            return ScalarSpec(np.ndarray)
        if holds_ids(value):
            check_ids(name, value)
            return ids_spec(value.shape, sized)
        check_array(name, value)
        return array_spec(value.shape, sized)
    if isinstance(value, float | np.floating):
        return ScalarSpec(type(value) if isinstance(value, np.floating) else float)
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return StaticSpec(type(value), value)
    arrays = ("__len__", "__array__", "__dlpack__")
    hint = ""
    if any(hasattr(value, attribute) for attribute in arrays):
        hint = f"; np.asarray({name}, dtype=np.float32) makes one"
    raise ArgumentError(
        f"argument {name!r} is {type(value).__name__}: accepted are float32 arrays, "
        f"QuantizedTensor, numbers, bool, str and None{hint}"
    )


def stand_in(value: object) -> object:
    """Return an array of a shape for a tuple of ints, as `warmup` takes it, else the value."""
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        try:
            return np.broadcast_to(np.float32(0), value).view()
        except ValueError as error:
            raise ArgumentError(
                f"warmup: found the shape {value}, accepted is that of an array ({error})"
            ) from None
    return value
