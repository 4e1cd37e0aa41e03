"""Arrays of any other library, in place: the CUDA array interface and DLPack."""

from typing import Any, Final

import numpy as np

from q4jit.arrays import dlpack
from q4jit.arrays.views import DeviceView, named_dtype, significant_strides
from q4jit.errors import ArgumentError, DeviceError
from q4jit.runtime.devices import drivers, why_none

_DEFAULT_STREAM: Final = 0
LEGACY_STREAM: Final = 1  # how the array interface spells stream 0


def interface_view(interface: dict[str, Any], owner: object) -> DeviceView:
    """See an object of the CUDA array interface, versions 2 and 3, in place."""
    if interface.get("mask") is not None:
        raise ArgumentError(
            f"found a masked {type(owner).__name__}: accepted are arrays without a mask"
        )
    missing = {"typestr", "shape", "data"} - interface.keys()
    if missing:
        raise ArgumentError(
            f"found a {type(owner).__name__} whose __cuda_array_interface__ lacks "
            f"{', '.join(sorted(missing))}: accepted are versions 2 and 3 of it"
        )
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)
    pointer, readonly = interface["data"]
    platform, device = _place_of(pointer)
    return DeviceView(
        pointer,
        shape,
        significant_strides(shape, strides),
        dtype,
        platform,
        device,
        bool(readonly),
        "",
        _DEFAULT_STREAM if interface.get("stream") == LEGACY_STREAM else interface.get("stream"),
        owner,
    )


def _place_of(pointer: int) -> tuple[str, int]:
    """Platform and index of the device that holds `pointer`: the interface does not say."""
    for platform, driver in drivers().items():
        device = driver.device_of(pointer) if pointer else 0  # 0: an array without elements
        if device is not None:
            return platform, device
    raise DeviceError(
        f"found a device array at {pointer:#x} that no device here knows"
        + (f": {reason}" if (reason := why_none()) else "")
    )


def dlpack_view(array: Any, name: str) -> DeviceView | None:
    """See an object that exports itself by DLPack in place; None if it is not on a GPU."""
    kind, _ = array.__dlpack_device__()
    if int(kind) not in dlpack.PLATFORMS:
        return None
    tensor = dlpack.consume(array)
    dtype = named_dtype(tensor.dtype, name)
    return DeviceView(
        tensor.pointer,
        tensor.shape,
        significant_strides(tensor.shape, tensor.strides),
        dtype,
        dlpack.PLATFORMS[int(kind)],
        tensor.device,
        tensor.readonly,
        "",
        None,
        tensor,
    )
