"""Replaces the packed modules of transformers by those of q4jit, so that prompts run packed too.

Import it only after `check_interface`: it needs the private modules of transformers.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.gguf.utils import GgufEmbedding, GgufExperts, GgufLinear

from q4jit.errors import ArgumentError, expected
from q4jit.progress import progress
from q4jit.torch.hooks import has_hooks
from q4jit.torch.memory import Stored, weight_in
from q4jit.torch.modules import Embedding, Experts, Linear
from q4jit.torch.weight import Weight
from q4jit.transformers.ties import forget_ties
from q4jit.weights.gguf.types import format_of, type_name
from q4jit.weights.layouts import GGUF

_PACKED: Final = (GgufLinear, GgufExperts, GgufEmbedding)
_SILU: Final = (SiLUActivation, nn.SiLU)


class ReorderedLinear(nn.Module):
    """A `Linear` that puts the features of its input in another order first.

    Blocks span several columns, so the columns of a packed weight cannot change places.

    Attributes:
        linear: the layer.
        order: int64 [K], the feature of x that each column multiplies; not persistent.
    """

    order: Tensor

    def __init__(self, linear: Linear, order: Tensor) -> None:
        """Put the features of inputs in an order. order: int64 [K], on the layer's device."""
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result for x[..., order]: [..., N]."""
        y: Tensor = self.linear(x.index_select(-1, self.order))
        return y


def replace_packed(model: nn.Module) -> list[str]:
    """Replace the packed modules of transformers in a model, and return their names.

    `GgufLinear`, `GgufExperts` and `GgufEmbedding` become `Linear`, `Experts` and `Embedding` of
    q4jit, one by one: each one's raw blocks are freed before the next one is repacked. Layers that
    share a weight share its `Weight`. Progress is shown on standard error.

    Raises ArgumentError for modules that have hooks or lack values, for an activation of experts
    other than SiLU, and for a format that q4jit does not multiply. Then nothing was replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, module in modules.items() if isinstance(module, _PACKED)]
    for name in names:
        check_packed(name, modules[name])
        _check_memory(name, modules[name])
    # ids stay unique until the first module is freed
    places = [(name, id(modules[name])) for name in names]
    parameters = {id(modules[name]): id(getattr(modules[name], "weight", None)) for name in names}
    del modules
    _release(model)
    forget_ties(model, names)
    made: dict[int, nn.Module] = {}
    weights: dict[int, Weight] = {}  # by the id of the parameter, which may be in two modules
    for name, identity in progress(places, "repacking weights"):
        if identity not in made:
            old, parameter = model.get_submodule(name), parameters[identity]
            if parameter not in weights and not isinstance(old, GgufExperts):
                is_shared = list(parameters.values()).count(parameter) > 1
                weights[parameter] = _weight_of(old, is_shared)
            new = made[identity] = _replacement(old, weights.get(parameter))
            _keep_device_hook(old, new.train(old.training))
            del old
        model.set_submodule(name, made[identity])
    return names


def check_packed(name: str, module: nn.Module) -> None:
    """Raise ArgumentError unless q4jit has a replacement for a packed module called `name`.

    The module may be without values yet.
    """
    where = f"{name} ({type(module).__name__})"
    for ggml_type in _types(module):
        if format_of(ggml_type) is None:
            what, got = "a format that q4jit multiplies", f"{type_name(ggml_type)} ({ggml_type})"
            raise ArgumentError(expected(what, got, where=where))
    if isinstance(module, GgufExperts) and not isinstance(module.act_fn, _SILU):
        what, got = "the activation SiLU", type(module.act_fn).__name__
        cure = 'load with quantization_config=GgufConfig(dequantize=True), from "transformers"'
        raise ArgumentError(expected(what, got, where=where, cure=cure))


def _check_memory(name: str, module: nn.Module) -> None:
    """Raise ArgumentError for a module without values, and for one with hooks."""
    where = f"{name} ({type(module).__name__})"
    if not name:
        raise ArgumentError(expected("a model that contains packed modules", where))
    if has_hooks(module):
        what, got = "a module without hooks", "one that has them"
        raise ArgumentError(expected(what, got, where=where, cure="add hooks after replacing"))
    for blocks in _blocks(module):
        if blocks.dtype is not torch.uint8 or blocks.is_meta:
            what, got = "uint8 blocks in memory", f"{blocks.dtype} on {blocks.device}"
            cure = "load the model without offloading: with a device_map of GPUs, or of the CPU"
            raise ArgumentError(expected(what, got, where=where, cure=cure))


def _types(module: Any) -> tuple[int, ...]:
    if isinstance(module, GgufExperts):
        return module.gate_up_type, module.down_type
    return (module.ggml_type,)


def _blocks(module: Any) -> tuple[Tensor, ...]:
    if isinstance(module, GgufExperts):
        return module.gate_up_proj, module.down_proj
    return (module.weight,)


def _release(model: nn.Module) -> None:
    """Let nothing but the model hold its packed modules, so that their blocks are freed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.packed_modules = {}


def _replacement(old: Any, weight: Weight | None) -> nn.Module:
    """Return q4jit's module in place of a packed one. weight: its weight; None for experts."""
    if weight is None:
        return _experts(old)
    if isinstance(old, GgufEmbedding):
        return Embedding(weight, dtype=old.compute_dtype)
    linear = Linear(weight, old.bias)
    order = old.input_permutation
    return linear if order is None else ReorderedLinear(linear, order)


def _weight_of(old: Any, is_shared: bool) -> Weight:
    """Return the `Weight` of a packed layer or table. is_shared: with another module."""
    if isinstance(old, GgufEmbedding):
        size = old.embedding_dim, old.num_embeddings
        return _weight(old.weight, old.ggml_type, size, lookup=not is_shared)
    return _weight(old.weight, old.ggml_type, (old.in_features, old.out_features))


def _keep_device_hook(old: Any, new: nn.Module) -> None:
    """Move the hook that accelerate gives modules of a model on several devices."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def _experts(old: Any) -> Experts:
    """Return q4jit's experts. The rows of `gate` are stored before those of `up`."""
    k, hidden = old.hidden_dim, old.intermediate_dim
    gate, up = (
        _weight(rows.contiguous(), old.gate_up_type, (old.num_experts, k, hidden))
        for rows in old.gate_up_proj.detach().split(hidden, dim=1)
    )
    down = _weight(old.down_proj, old.down_type, (old.num_experts, hidden, k))
    return Experts(gate, up, down, activation="silu")


def _weight(
    blocks: Tensor, ggml_type: int, shape: tuple[int, ...], *, lookup: bool = False
) -> Weight:
    """Return a `Weight` of raw blocks, in memory of its own. shape: (K, N) or (E, K, N)."""
    fmt = format_of(ggml_type)
    assert fmt is not None, "checked by check_packed"
    experts, k, n = (0, *shape)[-3:]
    raw = blocks.detach()
    weight = weight_in(raw, Stored(fmt.name, k, n, experts, GGUF))
    return Weight(weight, device=raw.device, lookup=lookup)
