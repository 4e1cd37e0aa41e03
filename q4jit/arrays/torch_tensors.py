"""PyTorch's tensors: views of them, new ones, and the fast path of repeated calls.

PyTorch is never imported here: if there is a tensor, it is imported already.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from q4jit.arrays.views import DeviceView
from q4jit.conversions import as_argument
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_NAMES, FloatType
from q4jit.frontend.structures import Structure
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

_NUMBERS: Final = frozenset({float, np.float32, np.float64})
_ALIGNMENT_MASK: Final = 7  # of four f16 or bf16 numbers, which kernels load at once
_STATIC: Final = frozenset({bool, int, str, type(None), Structure})  # compiled into kernels
_WEIGHTS: Final = frozenset({QuantizedTensor, ExpertTensor})
_NO_ARRAYS: Final = _NUMBERS | _STATIC | _WEIGHTS


def torch_view(torch: Any, tensor: Any, name: str) -> DeviceView | None:
    """Return the view of a tensor; None if it is not on a GPU. Errors call the tensor `name`.

    Raises ArgumentError if the tensor tracks gradients, or its memory does not hold its values
    (sparse, negated or conjugated tensors).
    """
    _note_pytorch(torch)
    device = tensor.device
    if device.type != "cuda":  # AMD's GPUs have this type as well
        return None
    check_tensor(torch, tensor, name)
    return DeviceView(
        tensor.data_ptr(),
        tuple(tensor.shape),
        None if tensor.is_contiguous() else tensor.stride(),
        _torch_dtype(tensor.dtype),
        torch_platform(torch),
        device.index,
        False,
        "torch",
        None,
        tensor,
    )


def check_tensor(torch: Any, tensor: Any, name: str) -> None:
    """Raise ArgumentError for a tensor that tracks gradients, or without values in its memory."""
    if tensor.requires_grad and torch.is_grad_enabled():
        got = "one that requires a gradient"
        cure = (
            f"use {as_argument(name, tensor)}, or call under torch.no_grad(); "
            "import q4jit.torch to differentiate calls"
        )
        raise ArgumentError(
            expected("a tensor without gradient", got, where=f"argument {name!r}", cure=cure)
        )
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        got = "one that is sparse, or negated or conjugated lazily"
        cure = f"use {as_argument(name, tensor)}"
        raise ArgumentError(expected("a dense tensor", got, where=f"argument {name!r}", cure=cure))


def torch_stream(device: int) -> int:
    """Return PyTorch's current stream on a device."""
    return _stream_query(sys.modules["torch"])(device)


def new_tensor(like: Any, shape: tuple[int, ...], float_type: FloatType) -> Any:
    """Return a new tensor of `shape` and type on the device of the tensor `like`."""
    return like.new_empty(shape, dtype=getattr(sys.modules["torch"], FLOAT_NAMES[float_type]))


@functools.cache
def _torch_dtype(dtype: object) -> str:
    """Return the name of a dtype, float32 for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def torch_platform(torch: Any) -> str:
    """Return the platform of the GPUs that this PyTorch was built for."""
    return "amd" if torch.version.hip else "nvidia"


@functools.cache
def _stream_query(torch: Any) -> Callable[[int], int]:
    """Return the function that returns PyTorch's current stream on a device.

    The private function, which Triton uses too, is faster: the public one makes two objects.
    """
    private: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return private or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


# --- the fast path --------------------------------------------------------------------------------


class _PyTorch(NamedTuple):
    """The parts of PyTorch that every call uses, looked up once."""

    module: Any
    tensor: type  # other subclasses than Parameter may override what their memory says
    parameter: type
    tracks_gradients: Callable[[], bool]
    current_stream: Callable[[int], int]


_pytorch: _PyTorch | None = None  # None before the first tensor


def _note_pytorch(torch: Any) -> None:
    global _pytorch  # noqa: PLW0603 - a process has one PyTorch, as it has one sys.modules
    if _pytorch is None or _pytorch.module is not torch:
        kinds = torch.Tensor, torch.nn.Parameter
        _pytorch = _PyTorch(torch, *kinds, torch.is_grad_enabled, _stream_query(torch))


def arrays_sharing(args: Sequence[Any]) -> list[Any] | None:
    """Return the arguments of a call with arrays in place of PyTorch's tensors in host memory.

    The arrays share the tensors' memory. None: an argument needs the full check, or there is no
    such tensor.
    """
    if _pytorch is None:
        return None
    _, tensor, parameter, tracks_gradients, _ = _pytorch
    values: list[Any] = []
    has_tensor = False
    try:
        for value in args:
            kind = type(value)
            if kind is tensor or kind is parameter:
                if not value.is_cpu or not value.ndim:
                    return None
                if value.requires_grad:
                    if tracks_gradients():
                        return None
                    value = value.detach()  # noqa: PLW2901 - the same memory
                values.append(value.numpy())
                has_tensor = True
            elif kind in _NO_ARRAYS:
                values.append(value)
            else:
                return None
    except (RuntimeError, TypeError):  # sparse or negated tensors; dtypes that NumPy does not have
        return None
    return values if has_tensor else None


def tensor_facts(args: Sequence[Any], out: Any) -> tuple[tuple[object, ...], list[int], int] | None:
    """Return (key, pointers, stream) of a call on PyTorch's tensors, or None.

    Calls with the same key may use the same launch, unless their tensors overlap. The pointers are
    those of the tensors in order. None: an argument or `out` needs the full check
    (`as_device_array`). Reading a tensor's attribute costs 50 to 100 ns, more than everything else
    here, so each is read once.
    """
    if _pytorch is None:
        return None
    _, tensor, parameter, tracks_gradients, current_stream = _pytorch
    values = args if out is None else (*args, *out) if type(out) is tuple else (*args, out)
    key: list[object] = [type(out)]
    pointers = []
    device = 0
    try:
        for value in values:
            kind = type(value)
            if kind is tensor or kind is parameter:
                if (
                    not value.is_cuda
                    or not value.is_contiguous()
                    or value.is_neg()
                    or (value.requires_grad and tracks_gradients())
                ):
                    return None
                device = value.get_device()
                # is_conj() is not read: no call with a complex dtype ever gets a launch
                pointer = value.data_ptr()
                key += (value.shape, value.dtype, device, pointer & _ALIGNMENT_MASK)
                pointers.append(pointer)
            elif kind is QuantizedTensor or kind is ExpertTensor:
                key.append(value.signature)
            elif kind in _NUMBERS:
                key.append(kind)
            elif kind in _STATIC:
                key += (kind, value)
            else:
                return None
    except RuntimeError:  # sparse tensors, and others without own memory
        return None
    if not pointers:  # PyTorch may have no GPU whose stream it could tell
        return None
    return tuple(key), pointers, current_stream(device)
