"""PyTorch's tensors in host memory: NumPy arrays that share it, and results as tensors.

PyTorch is never imported here: if there is a tensor, it is imported already.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.dtypes import F32, FLOATS, ID_NAMES
from q4jit.arrays.torch_tensors import check_tensor
from q4jit.arrays.views import DeviceView
from q4jit.conversions import as_argument, as_tensor, has_values, is_tensor, tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_TYPES, float_type_of, numpy_dtype
from q4jit.frontend.containers import Apart, together


def is_host_tensor(value: object) -> bool:
    """Return whether an object is a tensor that is not on a GPU."""
    if not is_tensor(value):
        return False
    tensor: Any = value
    return bool(tensor.device.type != "cuda")  # AMD's GPUs have this type as well


def host_array(tensor: Any, name: str) -> NDArray[Any]:
    """Return the array that shares a tensor's memory. Errors call the tensor `name`.

    Raises ArgumentError for a tensor that tracks gradients, whose memory does not hold its values,
    that is on a device without kernels, or whose dtype no kernel reads.
    """
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        what = "a tensor on the CPU or on a GPU of CUDA or ROCm"
        got, cure = f"one on {tensor.device}", f"use {name}.cpu()"
        if not has_values(tensor):
            got, cure = f"{got}, without values", f"use torch.zeros_like({name}, device='cpu')"
        raise ArgumentError(expected(what, got, where=f"argument {name!r}", cure=cure))
    check_tensor(torch, tensor, name)
    dtype = tensor_dtype(tensor)
    if dtype not in FLOAT_TYPES and dtype not in ID_NAMES:
        got, cure = f"{dtype} {list(tensor.shape)}", f"use {as_argument(name, tensor)}"
        raise ArgumentError(expected(FLOATS, got, where=f"argument {name!r}", cure=cure))
    shared = tensor.detach()
    if dtype != "bfloat16":
        return _memory_of(shared, name)
    try:
        bf16 = numpy_dtype("bf16")
    except ImportError as error:
        raise ArgumentError(
            f"argument {name!r}: NumPy has no bfloat16 without ml_dtypes; run "
            f"pip install ml_dtypes, or use {name}.float()"
        ) from error
    return _memory_of(shared.view(torch.int16), name).view(bf16)


def _memory_of(tensor: Any, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = tensor.numpy()
    except RuntimeError as error:  # of torch.func and torch.compile
        got = f"one that NumPy cannot read ({error})"
        what = "a tensor with values in memory"
        raise ArgumentError(expected(what, got, where=f"argument {name!r}")) from error
    return array


def refuse_mixing(values: Sequence[Any], names: Sequence[str]) -> None:
    """Raise ArgumentError if NumPy's arrays are among arguments that are tensors in host memory.

    Nothing would say which of the two the results are.
    """
    pairs = list(zip(values, names, strict=True))
    tensor = next((name for value, name in pairs if is_host_tensor(value)), "")
    for value, name in pairs if tensor else ():
        if isinstance(value, np.ndarray) and value.ndim:
            what, cure = f"a tensor, as {tensor!r} is one", f"use {as_tensor(name, value)}"
            got = f"a NumPy array {list(value.shape)}"
            raise ArgumentError(expected(what, got, where=f"argument {name!r}", cure=cure))


def are_on_host(values: Sequence[Any], leaves: Sequence[Any]) -> bool:
    """Return whether the tensors of a call are in host memory, and its results so too.

    leaves: the values as `with_views` returns them. A tensor without axes is a number, and may be
    in host memory beside arrays on a GPU.
    """
    return DeviceView not in map(type, leaves) and any(map(is_host_tensor, values))


def arrays_of(out: Any) -> Any:
    """Return `out=` with arrays that share memory in place of tensors in host memory.

    Tensors of other dtypes than results have stay as they are, and are refused with the others.
    """
    apart = Apart()
    tree = apart.tree(out)
    leaves = (host_array(v, "out") if _may_be_result(v) else v for v in apart.leaves)
    return together(tree, leaves)


def _may_be_result(value: Any) -> bool:
    return is_host_tensor(value) and tensor_dtype(value) in FLOAT_TYPES


def tensors_of(results: Any) -> Any:
    """Return results with tensors that share memory in place of arrays."""
    if type(results) is np.ndarray:
        return host_tensor(results)
    if type(results) is tuple and all(type(r) is np.ndarray for r in results):
        return tuple([host_tensor(r) for r in results])
    apart = Apart()
    tree = apart.tree(results)
    leaves = (host_tensor(v) if isinstance(v, np.ndarray) else v for v in apart.leaves)
    return together(tree, leaves)


def host_tensor(array: NDArray[Any]) -> Any:
    """Return the tensor that shares an array's memory."""
    torch = sys.modules["torch"]
    if array.dtype is not F32 and float_type_of(array.dtype) == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
