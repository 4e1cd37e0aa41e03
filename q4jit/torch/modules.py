"""Modules of PyTorch with quantised weights: `Linear`, `Embedding`, `Experts`.

Each calls one decorated function with its arguments and its `Weight`s. So modules compile, export
and differentiate as decorated functions do.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor, nn

from q4jit.dispatcher import Specialized, specialize
from q4jit.errors import ArgumentError, Q4JitError, expected
from q4jit.precision import BOUNDS
from q4jit.torch.inputs import check_floats
from q4jit.torch.quantizing import quantized_weight
from q4jit.torch.weight import Device, Weight, indexed
from q4jit.weights.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


def _affine(x: Any, w: Any, bias: Any) -> Any:
    y = x @ w
    return y if bias is None else y + bias


def _of_each_precision(function: Callable[..., Any]) -> dict[str, Specialized[Any, Any]]:
    # in a dict, because PyTorch's compiler can look up there
    return {precision: specialize(function, precision=precision) for precision in BOUNDS}


_AFFINE: Final = _of_each_precision(_affine)


class Linear(nn.Module):
    """y = x @ w + bias with a quantised weight, in place of `nn.Linear`.

    The result has x's dtype if the bias has it too, and else their promotion. `.bfloat16()` casts
    the bias, and leaves the weight as it is. The weight is frozen; x and the bias may require
    gradients.

    Attributes:
        in_features, out_features: K and N.
        weight: a `Weight` [K, N].
        bias: a parameter [N], or None.
        precision: as in `specialize`.
    """

    bias: nn.Parameter | None
    weight: Weight

    def __init__(
        self,
        weight: QuantizedTensor | Weight,
        bias: Any = None,
        *,
        device: Device = None,
        precision: str = "f32",
    ) -> None:
        """Make a layer of a weight [K, N], whose columns are the outputs.

        weight: a `Weight` is shared, not copied. bias: floats [N]. A parameter is kept as it is; of
        another tensor or array a parameter is made, which requires a gradient if the tensor does.
        device: None is that of a `Weight`, or else PyTorch's default device. Raises ArgumentError
        for another weight, bias or precision, and for a device without kernels.
        """
        super().__init__()
        if precision not in BOUNDS:
            what = " or ".join(map(repr, BOUNDS))
            raise ArgumentError(expected(what, repr(precision), where="precision of Linear"))
        self.weight = _matrix(weight, device, "weight of Linear")
        self.in_features, self.out_features = self.weight.K, self.weight.N
        self.precision = precision
        self.register_parameter("bias", _bias(bias, self.out_features, self.weight.blocks.device))

    @classmethod
    def from_bytes(
        cls,
        raw: "Buffer | Any",
        shape: tuple[int, int],
        format: str,  # noqa: A002 - the name in QuantizedTensor.from_bytes
        bias: Any = None,
        *,
        device: Device = None,
        precision: str = "f32",
    ) -> Self:
        """Make a layer of the bytes of a GGUF tensor of shape (K, N).

        raw, shape, format: as in `QuantizedTensor.from_bytes`; the rest as in `Linear`. Raises
        FormatError if bytes, shape and format do not match, and the errors of `Linear`.
        """
        weight = QuantizedTensor.from_bytes(raw, shape=shape, format=format)
        return cls(weight, bias, device=device, precision=precision)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str,  # noqa: A002 - the name in quantize
        *,
        device: Device = None,
        precision: str = "f32",
    ) -> Self:
        """Make a layer of the quantised weight of an `nn.Linear`, and of its bias.

        The bias is the same parameter. format: one that `quantize` makes. device: None is that of
        the `nn.Linear`; on "meta" nothing is quantised. Raises ArgumentError for another module,
        and for a weight that requires a gradient; FormatError for another format, and unless K is
        whole blocks.
        """
        if not isinstance(linear, nn.Linear):
            got = type(linear).__name__
            raise ArgumentError(expected("an nn.Linear", got, where="Linear.from_linear"))
        weight = quantized_weight(linear.weight, "linear.weight", to=format, device=device)
        return cls(weight, linear.bias, device=device, precision=precision)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ w + bias: [..., N] for x [..., K] in float32, float16 or bfloat16.

        Raises ArgumentError for another dtype, width or device of x.
        """
        try:
            y: Tensor = _AFFINE[self.precision](x, self.weight, self.bias)
        except Q4JitError:
            check_floats(x, "x", self, self.in_features, self.weight.blocks.device)
            raise
        return y

    def extra_repr(self) -> str:
        """Return sizes and format, for `print(model)`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        precision = "" if self.precision == "f32" else f", precision={self.precision}"
        return f"{sizes}, bias={self.bias is not None}, format={self.weight.format}{precision}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # in one line, as nn.Linear's


def _matrix(weight: object, device: Device, where: str, *, lookup: bool = False) -> Weight:
    """Return the `Weight` [K, N] of an argument, on a device. Raises ArgumentError."""
    if isinstance(weight, Weight):
        held = weight
        if device is not None and indexed(device) != weight.blocks.device:
            held = copy.deepcopy(weight).to(device)
    elif isinstance(weight, QuantizedTensor):
        return Weight(weight, device=device, lookup=lookup)
    else:
        cure = 'use q4jit.quantize(w, "Q4_0") for a float matrix [K, N]'
        what = "a QuantizedTensor or Weight"
        raise ArgumentError(expected(what, type(weight).__name__, where=where, cure=cure))
    if held.experts:
        cure = "use Experts for the weights of a mixture"
        raise ArgumentError(expected("a weight [K, N]", str(held), where=where, cure=cure))
    return held


def _bias(bias: Any, n: int, device: torch.device) -> nn.Parameter | None:
    """Return the parameter [N] of an argument. Raises ArgumentError for another shape or dtype."""
    if bias is None:
        return None
    tensor = torch.as_tensor(bias)
    if tensor.shape != (n,) or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        what, got = f"floats [{n}]", f"{dtype} {list(tensor.shape)}"
        raise ArgumentError(expected(what, got, where="bias of Linear"))
    if isinstance(bias, nn.Parameter) and bias.device == device:
        return bias
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad)
