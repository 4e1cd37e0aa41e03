"""Quantise the parameters of float modules."""

from typing import Any, Final

import torch

from q4jit.conversions import tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.torch.weight import Device, Weight
from q4jit.weights.quantize import quantize

_FLOATS: Final = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_TENSORS: Final = frozenset({torch.Tensor, torch.nn.Parameter})  # others may be distributed


def quantized_weight(
    rows: torch.Tensor, name: str, *, to: str, device: Device = None, lookup: bool = False
) -> Weight:
    """Return a weight [K, N] of the float weight [N, K] of an `nn.Linear` or `nn.Embedding`.

    name: of the tensor, for errors. to: the format. device: None is that of the tensor. A tensor on
    "meta" gives a weight without values. Raises ArgumentError for a tensor that requires a gradient
    or has another dtype, and FormatError for a format that `quantize` does not make and for a K
    that is not whole blocks.
    """
    check_frozen(rows, name)
    device = rows.device if device is None else device
    if rows.device.type == "meta":
        n, k = rows.shape
        return Weight.empty(to, (k, n), device=device, lookup=lookup)
    return Weight(quantize(_array(rows).T, to), device=device, lookup=lookup)


def check_frozen(rows: torch.Tensor, name: str) -> None:
    """Raise ArgumentError for a float weight that cannot be quantised; arguments as above."""
    if rows.requires_grad and torch.is_grad_enabled():
        what, got = "a weight without gradient", "one that requires a gradient"
        cure = "use model.requires_grad_(False), or call under torch.no_grad()"
        raise ArgumentError(expected(what, got, where=name, cure=cure))
    if rows.dim() != 2 or not is_float(rows):
        kind = "" if type(rows) in _TENSORS else f"{type(rows).__name__} in "
        what, got = "floats [N, K]", f"{kind}{tensor_dtype(rows)} {list(rows.shape)}"
        raise ArgumentError(expected(what, got, where=name))


def is_float(rows: torch.Tensor) -> bool:
    """Return whether a tensor holds floats of 16 bits or more in memory of its own."""
    return type(rows) in _TENSORS and rows.dtype in _FLOATS and rows.layout is torch.strided


def _array(rows: torch.Tensor) -> Any:
    host = rows.detach().cpu()
    return (host.float() if host.dtype is torch.bfloat16 else host).numpy()  # exact
