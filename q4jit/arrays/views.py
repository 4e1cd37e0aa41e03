"""`DeviceView`: an array in a GPU's memory, whoever owns it, and what is asked of one."""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from q4jit.arrays.dtypes import F32
from q4jit.errors import ArgumentError, DeviceError
from q4jit.runtime.devices import drivers, why_none
from q4jit.runtime.driver import Device

# library → how its users convert an array, and make it contiguous
_CONVERSIONS: Final = {
    "torch": ("{}.float()", "{}.contiguous()"),
    "cupy": ("{}.astype(cupy.float32)", "cupy.ascontiguousarray({})"),
    "": ("an array of float32", "a C-contiguous copy"),
}


class DeviceView(NamedTuple):
    """An array in a device's memory, whoever owns it.

    `strides` count elements and are None where the array is C-contiguous; `device` is the index
    that the `platform`'s driver uses; `library` is torch, cupy or empty; `stream` is where, as the
    owner says, its values are made (None: it does not say); `owner` keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    platform: str
    device: int
    readonly: bool
    library: str
    stream: int | None
    owner: object

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} on {self.platform} device {self.device}"


def device_of(view: DeviceView) -> Device:
    """The device that holds `view`. Raises DeviceError where its driver cannot be used here."""
    driver = drivers().get(view.platform)
    if driver is None:
        raise DeviceError(f"found an array on {view.platform} device {view.device}: {why_none()}")
    return driver.devices[view.device]


def require_f32(view: DeviceView, name: str) -> None:
    """Raise ArgumentError unless the elements are f32, with the way to convert them."""
    if view.dtype != F32:
        convert = _CONVERSIONS[view.library][0].format(name)
        raise ArgumentError(f"found {name}, {view}: accepted is float32, as {convert} gives")


def require_contiguous(view: DeviceView, name: str) -> None:
    """Raise ArgumentError unless the array is C-contiguous, with the way to make it so."""
    if view.strides is not None:
        copy = _CONVERSIONS[view.library][1].format(name)
        raise ArgumentError(
            f"found {name}, {view}, with strides of {list(view.strides)} elements: accepted is a "
            f"C-contiguous array, as {copy} gives"
        )


def common_device(views: Sequence[DeviceView | None], names: Sequence[str]) -> tuple[str, int]:
    """Platform and index of the one device that holds all arrays; a view of None is on the host.

    Raises ArgumentError, which names two of them, where they are not on one device.
    """
    places: dict[tuple[str, int] | None, str] = {}
    for view, name in zip(views, names, strict=True):
        places.setdefault(None if view is None else (view.platform, view.device), name)
    if len(places) == 1:
        (place,) = places
        if place is not None:
            return place
    found = " and ".join(
        f"{name} " + ("in the host's memory" if place is None else "on {} device {}".format(*place))
        for place, name in places.items()
    )
    raise ArgumentError(
        f"found {found or 'no array'}: accepted are arrays that are all on one device, or that are "
        "all NumPy's"
    )


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def significant_strides(
    shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Strides in elements, or None where they are those of a C-contiguous array."""
    if strides is None or 0 in shape:
        return None
    expected = contiguous_strides(shape)
    same = all(d == 1 or s == e for d, s, e in zip(shape, strides, expected, strict=True))
    return None if same else strides


def named_dtype(dtype: str, name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a name. Raises ArgumentError, which calls the array `name`."""
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(
            f"found {name} of {dtype}: accepted is float32; convert it first (in PyTorch by "
            ".float())"
        ) from error
