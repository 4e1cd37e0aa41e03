"""Views of other libraries' arrays by the CUDA array interface and DLPack."""

from typing import Any, Final

import numpy as np

from q4jit.arrays import dlpack
from q4jit.arrays.views import DeviceView, named_dtype, significant_strides
from q4jit.errors import ArgumentError, DeviceError, expected
from q4jit.runtime.devices import drivers, why_none

_DEFAULT_STREAM: Final = 0
LEGACY_STREAM: Final = 1  # the interface's number of stream 0


def interface_view(interface: dict[str, Any], owner: object) -> DeviceView:
    """Return the view of an object with the CUDA array interface, version 2 or 3."""
    kind = type(owner).__name__
    if interface.get("mask") is not None:
        raise ArgumentError(expected("an array without a mask", f"a masked {kind}"))
    missing = {"typestr", "shape", "data"} - interface.keys()
    if missing:
        got = f"one without {', '.join(sorted(missing))}"
        versions = "__cuda_array_interface__ of version 2 or 3"
        raise ArgumentError(expected(versions, got, where=kind))
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)
    pointer, readonly = interface["data"]
    platform, device = _device_of(pointer)
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


def _device_of(pointer: int) -> tuple[str, int]:
    """Return platform and index of a pointer's device, which the interface does not tell."""
    for platform, driver in drivers().items():
        device = driver.device_of(pointer) if pointer else 0  # 0: an empty array
        if device is not None:
            return platform, device
    reason = why_none()
    raise DeviceError(
        f"no GPU of this machine holds the array at {pointer:#x}"
        + (f": {reason}" if reason else "")
    )


def dlpack_view(array: Any, name: str) -> DeviceView | None:
    """Return the view of an object with DLPack's methods; None if it is not on a GPU."""
    kind, _ = array.__dlpack_device__()
    if int(kind) not in dlpack.PLATFORMS:
        return None
    tensor = dlpack.consume(array)
    dtype = named_dtype(tensor.dtype, f"argument {name!r}")
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
