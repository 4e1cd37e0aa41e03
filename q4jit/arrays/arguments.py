"""Check the array arguments of a call, and convert ids and numbers for kernels."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.dtypes import F32, FLOATS, IDS
from q4jit.arrays.views import DeviceView
from q4jit.conversions import as_float32
from q4jit.errors import ArgumentError, expected
from q4jit.floats import float_type_of

_F32_MAX: Final = float(np.finfo(np.float32).max)


def f32(value: Any) -> float:
    """Return a number for a kernel: infinite if it exceeds f32's range."""
    number = float(value)
    if -_F32_MAX <= number <= _F32_MAX:
        return number
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def plain(value: Any) -> Any:
    """Return an array of a subclass as NumPy's own, with the shape and memory that it really has.

    A subclass may report other ones. Masked arrays and matrices are returned as they are, because
    `check_array` refuses them; so is every other object.
    """
    kind = type(value)  # traced arrays report ndarray as their class, but have no memory
    if kind is not np.ndarray and issubclass(kind, np.ndarray):
        if isinstance(value, np.ma.MaskedArray | np.matrix):
            return value
        return np.ndarray.view(value, np.ndarray)
    return value


def holds_ids(array: NDArray[Any] | DeviceView) -> bool:
    """Return whether an array argument has row ids, not activations."""
    if isinstance(array, DeviceView):
        return array.dtype.startswith(("int", "uint"))
    return array.dtype.kind in "iu"


def check_ids(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument is int32 or int64 in native byte order."""
    if array.dtype not in IDS:
        dtypes = "int32 or int64 for ids, or float32 for numbers"
        cure = f"use {name}.astype(np.int64) or {name}.astype(np.float32)"
        raise ArgumentError(expected(dtypes, _show(array), where=f"argument {name!r}", cure=cure))
    _check_kind(name, array)


def checked_ids(
    name: str,
    array: NDArray[Any],
    shape: tuple[int, ...] | None,
    count: int,
) -> NDArray[np.int64]:
    """Return a copy of ids, broadcast to `shape`.

    Raises ArgumentError unless all ids are from 0 to `count` - 1.
    """
    # a copy, so that no other thread can change an id between this check and the kernel
    ids = np.array(array, np.int64, order="C")
    # as uint64, negative ids exceed every count
    if ids.size and ids.view(np.uint64).max() >= count:
        at = np.unravel_index(ids.argmin() if ids.min() < 0 else ids.argmax(), ids.shape)
        what, place = f"ids from 0 to {count - 1}", f"argument {name!r}"
        place += f" at {list(map(int, at))}" if ids.ndim else ""
        raise ArgumentError(expected(what, str(ids[at]), where=place))
    return ids if shape is None else np.ascontiguousarray(np.broadcast_to(ids, shape))


def check_array(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument has floats in native byte order, and columns."""
    if array.dtype != F32 and float_type_of(array.dtype) is None:
        cure = f"use {as_float32(name, array.dtype)}"
        raise ArgumentError(expected(FLOATS, _show(array), where=f"argument {name!r}", cure=cure))
    _check_kind(name, array)
    if array.ndim and array.shape[-1] == 0:
        shape = f"shape {list(array.shape)}"
        raise ArgumentError(
            expected("a last dimension of at least 1", shape, where=f"argument {name!r}")
        )


def _show(array: NDArray[Any]) -> str:
    order = "" if array.dtype.isnative else " in foreign byte order"
    return f"{array.dtype.newbyteorder('=')}{order} {list(array.shape)}"


def _check_kind(name: str, array: NDArray[Any]) -> None:
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray | np.matrix):
        where, cure = f"argument {name!r}", f"use np.asarray({name})"
        raise ArgumentError(
            expected("a plain array", f"a {type(array).__name__}", where=where, cure=cure)
        )
