"""`DeviceView`: an array in a GPU's memory, whoever owns it, and checks of it."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from q4jit.arrays.dtypes import FLOATS
from q4jit.errors import ArgumentError, DeviceError, expected
from q4jit.floats import FLOAT_BYTES, FLOAT_TYPES, FloatType
from q4jit.runtime.devices import drivers, why_none
from q4jit.runtime.driver import Device

# library → its expressions for a float32, a contiguous array, and one on the device of another
_CONVERSIONS: Final = {
    "torch": ("{}.float()", "{}.contiguous()", "torch.as_tensor({}, device={}.device)"),
    "cupy": (
        "{}.astype(cupy.float32)",
        "cupy.ascontiguousarray({})",
        "cupy.asarray({}) under `with {}.device:`",
    ),
    "": ("a float32 array", "a C-contiguous copy", "a copy of {} on the device of {}"),
}


_FOUR_HALVES_BYTES: Final = 8


class DeviceView(NamedTuple):
    """An array in a device's memory, whoever owns it.

    Attributes:
        strides: in elements; None: C-contiguous.
        dtype: the name that NumPy, ml_dtypes and PyTorch give to the type of its elements.
        platform: `amd` or `nvidia`.
        device: the index that the platform's driver uses.
        library: `torch`, `cupy` or empty.
        stream: the stream that writes its values; None: unknown.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    platform: str
    device: int
    readonly: bool
    library: str
    stream: int | None
    owner: object

    @property
    def is_aligned(self) -> bool:
        """Whether kernels can load four elements at once, or test its address when they run."""
        return self.dtype == "float32" or self.pointer % _FOUR_HALVES_BYTES == 0

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        float_type = FLOAT_TYPES.get(self.dtype)
        size = FLOAT_BYTES[float_type] if float_type else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * size

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} on {self.platform} device {self.device}"


def device_of(view: DeviceView) -> Device:
    """Return the device of a view. Raises DeviceError if its driver is not usable."""
    driver = drivers().get(view.platform)
    if driver is None:
        where = f"{view.platform} device {view.device}"
        raise DeviceError(f"no driver for the array on {where}: {why_none()}")
    return driver.devices[view.device]


def require_float(view: DeviceView, name: str) -> FloatType:
    """Return the float type of the elements. Raises ArgumentError if kernels do not take it."""
    float_type = FLOAT_TYPES.get(view.dtype)
    if float_type is None:
        is_complex = view.dtype.startswith("complex") and view.library
        convert = _CONVERSIONS[view.library][0].format(f"{name}.real" if is_complex else name)
        raise ArgumentError(
            expected(FLOATS, str(view), where=f"argument {name!r}", cure=f"use {convert}")
        )
    return float_type


def require_contiguous(view: DeviceView, name: str) -> None:
    """Raise ArgumentError unless the array is C-contiguous."""
    if view.strides is not None:
        copy = _CONVERSIONS[view.library][1].format(name)
        got = f"{view} with strides of {list(view.strides)} elements"
        raise ArgumentError(
            expected("a C-contiguous array", got, where=f"argument {name!r}", cure=f"use {copy}")
        )


def common_device(views: Sequence[DeviceView | None], names: Sequence[str]) -> tuple[str, int]:
    """Return platform and index of the device of all arrays. A view of None is on the host.

    Raises ArgumentError, which names an array of each device, if there are several.
    """
    named: dict[tuple[str, int] | None, str] = {}  # an array of each device
    libraries: dict[str, str] = {}  # of these arrays
    for view, name in zip(views, names, strict=True):
        device = None if view is None else (view.platform, view.device)
        if device not in named:
            named[device] = name
            libraries[name] = "" if view is None else view.library
    if len(named) == 1:
        (device,) = named
        if device is not None:
            return device
    listed = " and ".join(
        f"{name} on " + ("the host" if device is None else "{} device {}".format(*device))
        for device, name in named.items()
    )
    what = "arrays that are all on one device, or all NumPy's"
    kept = next((name for device, name in named.items() if device is not None), "")
    moved = [name for name in named.values() if kept and name != kept]
    copy = _CONVERSIONS[libraries.get(kept, "")][2]
    cure = f"use {copy.format(moved[0], kept)}" if moved else ""
    raise ArgumentError(expected(what, listed or "no array", cure=cure))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a C-contiguous array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def significant_strides(
    shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Return strides in elements, or None if the array is C-contiguous."""
    if strides is None or 0 in shape:
        return None
    contiguous = contiguous_strides(shape)
    same = all(d == 1 or s == c for d, s, c in zip(shape, strides, contiguous, strict=True))
    return None if same else strides
