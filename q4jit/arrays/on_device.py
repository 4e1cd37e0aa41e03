"""Check array arguments and `out=` on a device."""

from collections.abc import Sequence
from typing import Any

from q4jit.arrays.call_shapes import CallShapes, Result
from q4jit.arrays.libraries import as_device_array
from q4jit.arrays.views import DeviceView, require_contiguous, require_float
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_NAMES
from q4jit.plan.kernels import Slot
from q4jit.runtime.driver import Device

Apart = tuple[int, int, int, int]
"""Two arrays that must not overlap: the position among the pointers and the bytes of each."""


def refuse_broadcasting(shapes: CallShapes, names: Sequence[str]) -> None:
    """Raise ArgumentError for shapes that q4jit broadcasts on the host only."""
    broadcast = [i for i, shape in shapes.arrays if shape is not None]
    broadcast += [i for i, shape, _ in shapes.ids if shape is not None]
    lead = list(shapes.lead)
    if broadcast:
        name = names[broadcast[0]]
        what = f"all leading dimensions {lead}, as the array is on a device"
        cure = f"broadcast {name} to a contiguous array"
        raise ArgumentError(expected(what, "fewer", where=f"argument {name!r}", cure=cure))
    if shapes.picks:
        what = f"all leading dimensions {lead} or none, as the arrays are on a device"
        raise ArgumentError(expected(what, "some of them", where="a result"))


def check_views(shapes: CallShapes, names: Sequence[str], args: Sequence[Any]) -> None:
    """Raise ArgumentError unless kernels can read the arrays and the ids in place."""
    for i, _ in shapes.arrays:
        require_float(args[i], names[i])
        require_contiguous(args[i], names[i])
    for i, _, _ in shapes.ids:
        wanted = "int32" if i in shapes.narrow_ids else "int64"
        if args[i].dtype != wanted:
            where, what = f"argument {names[i]!r}", "int32 or int64 for ids on a device"
            raise ArgumentError(expected(what, str(args[i]), where=where))
        require_contiguous(args[i], names[i])


def output_views(
    shapes: CallShapes, device: Device, owners: tuple[Any, ...], out: object
) -> list[DeviceView]:
    """Return the views of the arrays for results. Raises ArgumentError if `out` does not fit.

    owners: the arrays of `out`, or new arrays if it is None.
    """
    results, returns_tuple = shapes.results, shapes.returns_tuple
    if out is not None and (isinstance(out, tuple) != returns_tuple or len(owners) != len(results)):
        wanted = f"a tuple of {len(results)} arrays" if returns_tuple else "an array"
        raise ArgumentError(expected(wanted, type(out).__name__, where="out="))
    return [_output_view(device, o, r) for o, r in zip(owners, results, strict=True)]


def _output_view(device: Device, owner: object, result: Result) -> DeviceView:
    view, dtype = as_device_array(owner, "out"), FLOAT_NAMES[result.float_type]
    if (
        view is None
        or (view.platform, view.device) != (device.platform, device.index)
        or view.dtype != dtype
        or view.shape != result.shape
        or view.strides is not None
        or view.readonly
    ):
        got = type(owner).__name__ if view is None else _show(view)
        what = f"a writable, contiguous {dtype} {list(result.shape)} on {device}"
        raise ArgumentError(expected(what, got, where="out="))
    return view


def _show(view: DeviceView) -> str:
    strides = f", strides {list(view.strides)}" if view.strides is not None else ""
    return f"{'read-only ' if view.readonly else ''}{view}{strides}"


# --- overlaps -------------------------------------------------------------------------------------


def pairs_apart(shapes: CallShapes, given: Sequence[Slot], args: Sequence[Any]) -> list[Apart]:
    """Return the pairs of arrays that must not overlap.

    given: the slots of the array arguments, whose pointers precede those of the results.
    """
    used = {i for i, _ in shapes.arrays} | {i for i, _, _ in shapes.ids}
    views = ((at, args[slot.index]) for at, slot in enumerate(given) if slot.index in used)
    sizes = {at: view.nbytes for at, view in views if isinstance(view, DeviceView)}
    pairs = []
    for at, result in enumerate(shapes.results, len(given)):
        size = result.buffer_bytes
        pairs += [(at, size, other, other_size) for other, other_size in sizes.items()]
        sizes[at] = size
    return pairs


def overlap_error() -> ArgumentError:
    """Return the error for two arrays that share memory."""
    return ArgumentError(
        "out= overlaps an argument, which is read while out is written, or another array of out=; "
        "use separate memory"
    )
