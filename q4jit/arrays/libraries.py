"""Find the library of an array on a device: PyTorch, CuPy, or any with one of two protocols.

The protocols are `__cuda_array_interface__` and DLPack. No library is imported here: if there is an
array of a library, the library is imported already.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from q4jit.arrays.arguments import plain
from q4jit.arrays.cupy_arrays import cupy_stream, cupy_view, new_cupy_array
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.host_tensors import host_array, is_host_tensor, refuse_mixing
from q4jit.arrays.protocols import dlpack_view, interface_view
from q4jit.arrays.torch_tensors import new_tensor, torch_stream, torch_view
from q4jit.arrays.views import DeviceView, device_of
from q4jit.errors import ArgumentError
from q4jit.floats import FloatType, numpy_dtype
from q4jit.frontend.containers import LEAVES
from q4jit.frontend.structures import Structure

_ON_HOST: Final = LEAVES | {Structure}  # types that need no further look


def as_device_array(array: object, name: str = "array") -> DeviceView | None:
    """Return the view of an array on a device, without a copy; None if it is not on a device.

    name: what errors call the array. Raises ArgumentError if it tracks gradients or NumPy does not
    know its elements, and DeviceError if its device's driver is missing.
    """
    if type(array) is np.ndarray:
        return None
    if isinstance(array, DeviceArray):
        return array.view()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return torch_view(torch, array, name)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return cupy_view(cupy, array)
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except Exception as error:  # other libraries raise anything
        raise ArgumentError(
            f"argument {name!r}: __cuda_array_interface__ of the {type(array).__name__} failed: "
            f"{error!r}"
        ) from error
    if interface is not None:
        return interface_view(interface, array)
    if hasattr(array, "__dlpack_device__"):
        return dlpack_view(array, name)
    return None


def with_views(values: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    """Return the arguments, with a `DeviceView` in place of each array on a device.

    Tensors in host memory become arrays that share it. Raises the errors of `as_device_array`,
    `host_array` and `refuse_mixing`.
    """
    refuse_mixing(values, names)
    leaves: list[Any] = []
    for value, name in zip(values, names, strict=True):
        view = None if type(value) in _ON_HOST else as_device_array(value, name)
        if view is not None:
            leaves.append(view)
        else:
            leaves.append(host_array(value, name) if is_host_tensor(value) else plain(value))
    return tuple(leaves)


def current_stream(view: DeviceView) -> int:
    """Return the current stream of the library and device of `view`; 0 is the default stream."""
    if view.library == "torch":
        return torch_stream(view.device)
    if view.library == "cupy":
        return cupy_stream(view.device)
    return view.stream or 0


def empty_like_kind(view: DeviceView, shape: tuple[int, ...], float_type: FloatType) -> Any:
    """Return a new array on the device of `view`, of its library or a DeviceArray."""
    if view.library == "torch":
        return new_tensor(view.owner, shape, float_type)
    if view.library == "cupy":
        return new_cupy_array(view.device, shape, float_type)
    return DeviceArray(shape, device_of(view), numpy_dtype(float_type), view.stream or 0)
