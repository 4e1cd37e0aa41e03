"""CuPy's arrays, in place; CuPy is not imported, for its arrays exist only where it is already."""

import sys
from typing import Any

from q4jit.arrays.dtypes import F32
from q4jit.arrays.views import DeviceView


def cupy_view(cupy: Any, array: Any) -> DeviceView:
    """See an array of CuPy in place."""
    memory, dtype = array.data, array.dtype
    strides = None
    if not array.flags.c_contiguous:
        strides = tuple(stride // dtype.itemsize for stride in array.strides)
    platform = "amd" if cupy.cuda.runtime.is_hip else "nvidia"
    return DeviceView(
        memory.ptr,
        array.shape,
        strides,
        dtype,
        platform,
        memory.device_id,
        False,
        "cupy",
        None,
        array,
    )


def cupy_stream(device: int) -> int:
    """Return the stream on which CuPy works now on a device."""
    return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)


def new_cupy_array(device: int, shape: tuple[int, ...]) -> Any:
    """Make a new f32 array on a device."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype=F32)
