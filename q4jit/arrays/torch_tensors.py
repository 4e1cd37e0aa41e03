"""PyTorch's tensors, used in place: views of them, new ones, and the fast path of repeated calls.

PyTorch is not imported: a tensor exists only where it is imported already.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from q4jit.arrays.views import DeviceView, named_dtype
from q4jit.errors import ArgumentError
from q4jit.weights.tensor import QuantizedTensor

_NUMBERS: Final = frozenset({float, np.float32, np.float64})
_STATIC: Final = frozenset({bool, int, str, type(None)})  # arguments that kernels are made for


def torch_view(torch: Any, tensor: Any, name: str) -> DeviceView | None:
    """See a tensor, which messages call `name`, in place; None if it is not on a GPU.

    Raises ArgumentError where it tracks gradients or does not lie in memory as it reads.
    """
    _note_pytorch(torch)
    device = tensor.device
    if device.type != "cuda":  # what PyTorch calls AMD's too
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"found {name}, a tensor that requires a gradient: accepted are tensors without, as "
            f"{name}.detach() gives, or a call under torch.no_grad()"
        )
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise ArgumentError(
            f"found {name}, a tensor that is sparse or to be negated or conjugated when read: "
            f"accepted are dense tensors, as {name}.to_dense(), .resolve_neg() and .resolve_conj() "
            "give"
        )
    return DeviceView(
        tensor.data_ptr(),
        tuple(tensor.shape),
        None if tensor.is_contiguous() else tensor.stride(),
        _torch_dtype(tensor.dtype),
        _torch_platform(torch),
        device.index,
        False,
        "torch",
        None,
        tensor,
    )


def torch_stream(device: int) -> int:
    """Return the stream on which PyTorch works now on a device."""
    return _stream_query(sys.modules["torch"])(device)


def new_tensor(like: Any, shape: tuple[int, ...]) -> Any:
    """A new f32 tensor of `shape` where PyTorch's tensor `like` is."""
    return like.new_empty(shape, dtype=sys.modules["torch"].float32)


@functools.cache
def _torch_dtype(dtype: object) -> np.dtype[Any]:
    """NumPy's dtype of the same name: `torch.float32`."""
    return named_dtype(str(dtype).removeprefix("torch."), "a tensor")


@functools.cache
def _torch_platform(torch: Any) -> str:
    return "amd" if torch.version.hip else "nvidia"


@functools.cache
def _stream_query(torch: Any) -> Callable[[int], int]:
    """How PyTorch's current stream is asked for.

    The private function is what Triton uses; the public one makes two objects on its way.
    """
    private: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return private or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


# --- calls in a hurry ----------------------------------------------------------------------------


class _PyTorch(NamedTuple):
    """What every call needs of PyTorch, found once."""

    module: Any
    tensor: type  # other subclasses than a parameter may answer otherwise than they lie in memory
    parameter: type
    tracks_gradients: Callable[[], bool]
    current_stream: Callable[[int], int]


_pytorch: _PyTorch | None = None  # None until a first tensor was seen


def _note_pytorch(torch: Any) -> None:
    global _pytorch  # noqa: PLW0603 - a process has one PyTorch, as it has one sys.modules
    if _pytorch is None or _pytorch.module is not torch:
        kinds = torch.Tensor, torch.nn.Parameter
        _pytorch = _PyTorch(torch, *kinds, torch.is_grad_enabled, _stream_query(torch))


def tensor_facts(args: Sequence[Any], out: Any) -> tuple[tuple[object, ...], list[int], int] | None:
    """All that decides how a call on PyTorch's tensors is served, where they lie, and the stream.

    The facts are a key: what one call was served with, any other of the same key may be, but for
    tensors that overlap. None where an argument or `out` needs a closer look (`as_device_array`).
    Each question to a tensor costs 50 to 100 ns, more than all else here: none is asked twice.
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
                key += (value.shape, value.dtype, device)  # no complex dtype is ever served
                pointers.append(value.data_ptr())
            elif kind is QuantizedTensor:
                key.append(value.signature)
            elif kind in _NUMBERS:
                key.append(kind)
            elif kind in _STATIC:
                key += (kind, value)
            else:
                return None
    except RuntimeError:  # what sparse tensors answer, and others without memory of their own
        return None
    return tuple(key), pointers, current_stream(device)
