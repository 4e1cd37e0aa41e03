"""Arguments of calls: which values are accepted, and the form in which kernels take them."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.dtypes import F32, IDS
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError

_F32_MAX: Final = float(np.finfo(np.float32).max)


def f32(value: Any) -> float:
    """A number as a kernel takes it: beyond f32's range it is infinite."""
    number = float(value)
    if -_F32_MAX <= number <= _F32_MAX:
        return number
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def holds_ids(array: NDArray[Any] | DeviceView) -> bool:
    """Whether an array argument is one of row numbers, not of activations."""
    return array.dtype.kind in "iu"


def check_ids(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument is int32 or int64 in native byte order."""
    if array.dtype not in IDS:
        raise ArgumentError(
            f"argument {name!r} is {_show(array)}: accepted are int32 and int64 for the ids of "
            f"w.rows(ids), {name}.astype(np.int64), and float32 for numbers, "
            f"{name}.astype(np.float32)"
        )
    _check_kind(name, array)


def checked_ids(
    name: str, array: NDArray[Any], shape: tuple[int, ...] | None, count: int
) -> NDArray[np.int64]:
    """A copy of row numbers, spread to `shape`; ArgumentError unless all are below `count`."""
    # a copy: nobody can change it between the check and the kernel, which reads where it says
    ids = np.array(array, np.int64, order="C")
    if ids.size and ids.view(np.uint64).max() >= count:  # below 0 is above every count
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ArgumentError(f"rows: found id {wrong} in {name!r}, accepted are 0 to {count - 1}")
    return ids if shape is None else np.ascontiguousarray(np.broadcast_to(ids, shape))


def check_array(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument is f32 in native byte order, and not empty."""
    if array.dtype != F32:
        raise ArgumentError(
            f"argument {name!r} is {_show(array)}: accepted is float32; convert it with "
            f"{name}.astype(np.float32)"
        )
    _check_kind(name, array)
    if array.ndim and array.shape[-1] == 0:
        raise ArgumentError(
            f"argument {name!r} has the shape {list(array.shape)}: accepted is a last dimension of "
            "at least 1"
        )


def _show(array: NDArray[Any]) -> str:
    order = "" if array.dtype.isnative else " in foreign byte order"
    return f"{array.dtype.newbyteorder('=')}{order} {list(array.shape)}"


def _check_kind(name: str, array: NDArray[Any]) -> None:
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray | np.matrix):
        raise ArgumentError(
            f"argument {name!r} is a {type(array).__name__}: accepted is a plain array, "
            f"np.asarray({name})"
        )
