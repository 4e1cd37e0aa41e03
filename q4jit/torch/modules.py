"""Modules of PyTorch with quantised weights: `Linear`, `Embedding`, `Experts`.

Each calls one decorated function with its arguments and its `Weight`s. So modules compile, export
and differentiate as decorated functions do.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn

from q4jit.conversions import tensor_dtype
from q4jit.errors import ArgumentError, FormatError, Q4JitError, expected
from q4jit.precision import BOUNDS
from q4jit.torch.arithmetic import ACTIVATIONS, LOOKED_UP, activated, affine, of_each_precision
from q4jit.torch.inputs import FLOAT_DTYPES, check_floats, check_ids, check_one_of
from q4jit.torch.memory import AnyWeight
from q4jit.torch.quantizing import quantized_weight
from q4jit.torch.weight import Device, Weight, indexed
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.indexed import vecmat
from q4jit.weights.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


def _feed_forward(
    x: Any, gate: Any, up: Any, down: Any, ids: Any, weights: Any, activation: str
) -> Any:
    rows = x[..., None, :]
    g = activated(vecmat(rows, gate[ids]), activation)
    return (vecmat(g * vecmat(rows, up[ids]), down[ids]) * weights[..., None]).sum(axis=-2)


_AFFINE: Final = of_each_precision(affine)
_FEED_FORWARD: Final = of_each_precision(_feed_forward)


class _OneWeight(nn.Module):
    """Base of modules that have a `Weight` where PyTorch's have a parameter."""

    weight: Weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        floats = state_dict.get(f"{prefix}weight")
        if floats is not None:
            got = f"{tensor_dtype(floats)} {list(floats.shape)}"
            what = f"{self.weight.format} {list(self.weight.shape)}"
            cure = "load the state into the float model, then call replace_linears"
            rest[-1].append(expected(what, got, where=f"{prefix}weight", cure=cure))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __repr__(self) -> str:  # in one line, as those of nn.Linear and nn.Embedding
        return f"{type(self).__name__}({self.extra_repr()})"


class Linear(_OneWeight):
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
    _adds_bias: bool = True  # False if parts of y are added up before the bias

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
        check_one_of(precision, tuple(BOUNDS), "precision of Linear")
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

        raw, shape, format: as in `QuantizedTensor.from_bytes`; the rest as in `Linear`. The shape
        is that of `nn.Linear.weight` in reverse. Raises FormatError if bytes, shape and format do
        not match, and the errors of `Linear`.
        """
        given: Any = raw
        rows = given.shape[0] if getattr(given, "ndim", 1) == 2 else shape[1]
        if rows != shape[1]:  # a column has as many bytes as rows of another length
            what, got = f"{shape[1]} rows of bytes, N of (K, N) = {shape}", f"{rows}"
            cure = f"use shape={shape[::-1]}" if rows == shape[0] else ""
            raise FormatError(expected(what, got, where="Linear.from_bytes", cure=cure))
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
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            what, got = "an nn.Linear, with its own forward", type(linear).__name__
            raise ArgumentError(expected(what, got, where="Linear.from_linear"))
        weight = quantized_weight(linear.weight, "linear.weight", to=format, device=device)
        return cls(weight, linear.bias, device=device, precision=precision)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ w + bias: [..., N] for x [..., K] in float32, float16 or bfloat16.

        Raises ArgumentError for another dtype, width or device of x.
        """
        try:
            bias = self.bias if self._adds_bias else None
            y: Tensor = _AFFINE[self.precision](x, self.weight, bias)
        except Q4JitError:
            check_floats(x, "x", self, self.in_features, self.weight.blocks.device)
            raise
        return y

    def extra_repr(self) -> str:
        """Return sizes and format, for `print(model)`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        precision = "" if self.precision == "f32" else f", precision={self.precision}"
        return f"{sizes}, bias={self.bias is not None}, format={self.weight.format}{precision}"


class Embedding(_OneWeight):
    """A table of vectors in a quantised weight, in place of `nn.Embedding`.

    The vectors are the columns of the weight [K, N], the rows of a GGUF tensor. Only those that are
    asked for are decoded.

    Attributes:
        num_embeddings, embedding_dim: N and K.
        weight: a `Weight` [K, N], for look-ups.
        dtype: of the results. `.to(dtype)`, `.half()` and the like change it.
    """

    def __init__(
        self,
        weight: QuantizedTensor | Weight,
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
    ) -> None:
        """Make a table of a weight [K, N].

        weight: a `Weight` is shared, not copied, and read where it is: one without lookup=True may
        serve a `Linear` too. A `QuantizedTensor` is copied in GGUF's order. dtype: float32, float16
        or bfloat16. device: as in `Linear`. Raises ArgumentError for another weight or dtype, and
        for a device without kernels.
        """
        super().__init__()
        self.weight = _matrix(weight, device, "weight of Embedding", lookup=True)
        self.embedding_dim, self.num_embeddings = self.weight.K, self.weight.N
        self.dtype = _checked_dtype(dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        format: str,  # noqa: A002 - the name in quantize
        *,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Self:
        """Make a table of the quantised weight of an `nn.Embedding`.

        format: one that `quantize` makes. dtype, device: None are those of the `nn.Embedding`; on
        "meta" nothing is quantised. `padding_idx` needs nothing, because the weight is frozen.
        Raises ArgumentError for another module, for one with `max_norm`, which changes the weight,
        and for a weight that requires a gradient; FormatError for another format, and unless the
        length of a vector is whole blocks.
        """
        where, kind = "Embedding.from_embedding", type(embedding)
        if not isinstance(embedding, nn.Embedding) or kind.forward is not nn.Embedding.forward:
            what = "an nn.Embedding, with its own forward"
            raise ArgumentError(expected(what, kind.__name__, where=where))
        if embedding.max_norm is not None:
            what, got = "an nn.Embedding without max_norm", f"max_norm={embedding.max_norm}"
            raise ArgumentError(expected(what, got, where=where))
        given, name = embedding.weight, "embedding.weight"
        weight = quantized_weight(given, name, to=format, device=device, lookup=True)
        return cls(weight, dtype=given.dtype if dtype is None else dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of ids: [..., K] for ids [...], int32 or int64; [K] for a single id.

        Raises ArgumentError for ids of another dtype or device, and on the CPU for ids beyond N.
        """
        given: object = ids
        if isinstance(given, Tensor) and not given.dim():  # a number to decorated functions
            return self.forward(given.reshape(1))[0]
        try:
            vectors: Tensor = LOOKED_UP(ids, self.weight, FLOAT_DTYPES[self.dtype])
        except Q4JitError:
            check_ids(ids, "ids", self, self.weight.blocks.device)
            raise
        return vectors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Change the dtype of results as `to`, `half` and the like ask for."""
        dtype = fn(torch.zeros(1, dtype=self.dtype, device=self.weight.blocks.device)).dtype
        self.dtype = _checked_dtype(dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch's
        return self

    def extra_repr(self) -> str:
        """Return sizes and format, for `print(model)`."""
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{sizes}, format={self.weight.format}, dtype={self.dtype}"


class Experts(nn.Module):
    """The gated feed-forward of a mixture of experts, as one function of those that ids choose.

    y = Σₐ weightₐ · (activation(x @ gate[idₐ]) * (x @ up[idₐ])) @ down[idₐ]

    Attributes:
        gate, up: `Weight`s [E, K, H].
        down: a `Weight` [E, H, N].
        activation: "silu", "gelu_tanh" or "relu".
        precision: as in `specialize`.
    """

    gate: Weight
    up: Weight
    down: Weight

    def __init__(
        self,
        gate: ExpertTensor | Weight,
        up: ExpertTensor | Weight,
        down: ExpertTensor | Weight,
        *,
        activation: str = "silu",
        device: Device = None,
        precision: str = "f32",
    ) -> None:
        """Make the experts of their weights. A `Weight` is shared, not copied.

        device: as in `Linear`. Raises ArgumentError for weights that do not fit each other, for an
        unknown activation or precision, and for a device without kernels.
        """
        super().__init__()
        check_one_of(precision, tuple(BOUNDS), "precision of Experts")
        check_one_of(activation, ACTIVATIONS, "activation of Experts")
        self.gate, self.up, self.down = (
            _of_experts(weight, device, f"{name} of Experts")
            for name, weight in (("gate", gate), ("up", up), ("down", down))
        )
        self.activation, self.precision = activation, precision
        experts, k, hidden = self.gate.shape
        if self.up.shape != self.gate.shape:
            what = f"[{experts}, {k}, {hidden}], the shape of gate"
            raise ArgumentError(expected(what, str(list(self.up.shape)), where="up of Experts"))
        if self.down.shape[:-1] != (experts, hidden):
            what, got = f"[{experts}, {hidden}, N]", str(list(self.down.shape))
            raise ArgumentError(expected(what, got, where="down of Experts"))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the feed-forwards of chosen experts: [..., N].

        x: floats [..., K]. ids: int32 or int64 [..., A], the experts of each row. weights: floats
        [..., A]. The result has their dtype, or the promotion of two. Raises ArgumentError for
        other dtypes, widths and devices.
        """
        try:
            y: Tensor = _FEED_FORWARD[self.precision](
                x, self.gate, self.up, self.down, ids, weights, self.activation
            )
        except Q4JitError:
            device = self.gate.blocks.device
            check_floats(x, "x", self, self.gate.K, device)
            check_ids(ids, "ids", self, device)
            check_floats(weights, "weights", self, ids.shape[-1] if ids.dim() else 1, device)
            raise
        return y

    def extra_repr(self) -> str:
        """Return sizes and formats, for `print(model)`."""
        experts, k, hidden = self.gate.shape
        sizes = f"experts={experts}, in_features={k}, hidden={hidden}, out_features={self.down.N}"
        formats = dict.fromkeys(w.format for w in (self.gate, self.up, self.down))
        precision = "" if self.precision == "f32" else f", precision={self.precision}"
        return f"{sizes}, activation={self.activation}, format={'/'.join(formats)}{precision}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOAT_DTYPES:
        what, where = " or ".join(map(str, FLOAT_DTYPES)), "dtype of q4jit.torch.Embedding"
        cure = "use float(), half() or bfloat16()"
        raise ArgumentError(expected(what, str(dtype), where=where, cure=cure))
    return dtype


def _matrix(weight: object, device: Device, where: str, *, lookup: bool = False) -> Weight:
    """Return the `Weight` [K, N] of an argument, on a device. Raises ArgumentError."""
    held = _held(weight, device, lookup) if isinstance(weight, QuantizedTensor | Weight) else None
    if held is None or held.experts:
        cure = 'use q4jit.quantize(w, "Q4_0") for a float matrix [K, N]'
        if isinstance(weight, nn.Linear | nn.Embedding):
            kind = type(weight).__name__
            cure = f'use {kind}.from_{kind.lower()}(module, "Q4_0"), from q4jit.torch'
        got = type(weight).__name__
        if isinstance(weight, ExpertTensor | Weight):
            got, cure = f"one of shape {list(weight.shape)}", "use Experts for those of a mixture"
        what = "a QuantizedTensor or Weight [K, N]"
        raise ArgumentError(expected(what, got, where=where, cure=cure))
    return held


def _of_experts(weight: object, device: Device, where: str) -> Weight:
    """Return the `Weight` [E, K, N] of an argument, on a device. Raises ArgumentError."""
    held = _held(weight, device) if isinstance(weight, ExpertTensor | Weight) else None
    if held is None or not held.experts:
        what, got = "an ExpertTensor or Weight [E, K, N]", type(weight).__name__
        if isinstance(weight, QuantizedTensor | Weight):
            got = f"one of shape {list(weight.shape)}"
        cure = "use ExpertTensor.stack(weights) for a list of matrices"
        raise ArgumentError(expected(what, got, where=where, cure=cure))
    return held


def _held(weight: AnyWeight | Weight, device: Device, lookup: bool = False) -> Weight:
    """Return a weight as a module. One that is on the device already is not copied."""
    if not isinstance(weight, Weight):
        return Weight(weight, device=device, lookup=lookup)
    if device is None or indexed(device) == weight.blocks.device:
        return weight
    return copy.deepcopy(weight).to(device)


def _bias(bias: Any, n: int, device: torch.device) -> nn.Parameter | None:
    """Return the parameter [N] of an argument. Raises ArgumentError for another shape or dtype."""
    if bias is None:
        return None
    # a copy of an array, because arrays from files cannot be written to
    tensor = bias if isinstance(bias, Tensor) else torch.as_tensor(np.array(bias))
    if tensor.shape != (n,) or not tensor.is_floating_point():
        what, got = f"floats [{n}]", f"{tensor_dtype(tensor)} {list(tensor.shape)}"
        raise ArgumentError(expected(what, got, where="bias of Linear"))
    if isinstance(bias, nn.Parameter) and bias.device == device:
        return bias
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad)
