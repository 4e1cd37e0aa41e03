"""CuPy's arrays. CuPy is never imported here: if there is an array, it is imported already."""

import sys
from typing import Any

from q4jit.arrays.views import DeviceView
from q4jit.floats import FLOAT_NAMES, FloatType


def cupy_view(cupy: Any, array: Any) -> DeviceView:
    """Return the view of a CuPy array."""
    memory, dtype = array.data, array.dtype
    strides = None
    if not array.flags.c_contiguous:
        strides = tuple(stride // dtype.itemsize for stride in array.strides)
    platform = "amd" if cupy.cuda.runtime.is_hip else "nvidia"
    return DeviceView(
        memory.ptr,
        array.shape,
        strides,
        dtype.name,
        platform,
        memory.device_id,
        False,
        "cupy",
        None,
        array,
    )


def cupy_stream(device: int) -> int:
    """Return CuPy's current stream on a device."""
    return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)


def new_cupy_array(device: int, shape: tuple[int, ...], float_type: FloatType) -> Any:
    """Return a new array of a float type on a device."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype=FLOAT_NAMES[float_type])
