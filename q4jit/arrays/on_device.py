"""Checks of the arrays that a call gives on a device, and of `out=` there."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from q4jit.arrays.call_shapes import CallShapes, Result
from q4jit.arrays.dtypes import F32
from q4jit.arrays.libraries import as_device_array
from q4jit.arrays.views import DeviceView, require_contiguous, require_f32
from q4jit.errors import ArgumentError
from q4jit.plan.kernels import Slot
from q4jit.runtime.driver import Device

Apart = tuple[int, int, int, int]
"""Of an output and another array: place among the pointers, and bytes, of each."""


def refuse_spreading(shapes: CallShapes, names: Sequence[str]) -> None:
    """Raise ArgumentError for shapes that arrays on a device cannot have."""
    spread = [i for i, shape in shapes.arrays if shape is not None]
    spread += [i for i, shape, _ in shapes.ids if shape is not None]
    lead = list(shapes.lead)
    if spread:
        raise ArgumentError(
            f"argument {names[spread[0]]!r} on a device has fewer leading dimensions "
            f"than {lead}: accepted are arrays that have them all, contiguous"
        )
    if shapes.picks:
        raise ArgumentError(
            f"found a result that lacks some of the leading dimensions {lead}: accepted, for "
            "arrays on a device, are results that have all of them or none"
        )


def check_views(shapes: CallShapes, names: Sequence[str], args: Sequence[Any]) -> None:
    """Raise ArgumentError unless kernels can read the arrays and the ids where they are."""
    for i, _ in shapes.arrays:
        require_f32(args[i], names[i])
        require_contiguous(args[i], names[i])
    for i, _, _ in shapes.ids:
        if args[i].dtype != np.int64:
            raise ArgumentError(
                f"argument {names[i]!r} is {args[i]}: accepted are int64 for ids on a device"
            )
        require_contiguous(args[i], names[i])


def output_views(
    shapes: CallShapes, device: Device, owners: tuple[Any, ...], out: object
) -> list[DeviceView]:
    """Return the arrays that results go to. Raises ArgumentError where those of `out` do not fit.

    owners: the arrays of `out`, or new ones where it is None.
    """
    results, returns_tuple = shapes.results, shapes.returns_tuple
    if out is not None and (isinstance(out, tuple) != returns_tuple or len(owners) != len(results)):
        wanted = f"a tuple of {len(results)} arrays" if returns_tuple else "an array"
        raise ArgumentError(f"out= is {type(out).__name__}: accepted is {wanted}")
    return [_output_view(device, o, r) for o, r in zip(owners, results, strict=True)]


def _output_view(device: Device, owner: object, result: Result) -> DeviceView:
    view = as_device_array(owner, "out")
    if (
        view is None
        or (view.platform, view.device) != (device.platform, device.index)
        or view.dtype != F32
        or view.shape != result.shape
        or view.strides is not None
        or view.readonly
    ):
        found = type(owner).__name__ if view is None else _show(view)
        raise ArgumentError(
            f"out= is {found}: accepted is a writable, contiguous float32 "
            f"{list(result.shape)} on {device}"
        )
    return view


def _show(view: DeviceView) -> str:
    how = f", strides {list(view.strides)}" if view.strides is not None else ""
    return f"{'read-only ' if view.readonly else ''}{view}{how}"


# --- overlaps -------------------------------------------------------------------------------------


def pairs_apart(shapes: CallShapes, given: Sequence[Slot], args: Sequence[Any]) -> list[Apart]:
    """Return the arrays that must not overlap.

    given: the arrays of the arguments, whose pointers come first; those of the outputs follow.
    """
    used = {i for i, _ in shapes.arrays} | {i for i, _, _ in shapes.ids}
    views = ((place, args[slot.index]) for place, slot in enumerate(given) if slot.index in used)
    sizes = {place: _bytes(view) for place, view in views if isinstance(view, DeviceView)}
    pairs = []
    for place, result in enumerate(shapes.results, len(given)):
        size = math.prod(result.buffer) * F32.itemsize
        pairs += [(place, size, other, others) for other, others in sizes.items()]
        sizes[place] = size
    return pairs


def overlap_error() -> ArgumentError:
    """Return the error of two arrays that share memory."""
    return ArgumentError(
        "out= overlaps an argument, which is read while out is written, or another "
        "array of out=: accepted are arrays of their own memory"
    )


def _bytes(view: DeviceView) -> int:
    return math.prod(view.shape) * view.dtype.itemsize
