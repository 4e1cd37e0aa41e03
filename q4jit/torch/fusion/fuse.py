"""`fuse`: find the decoder layers of a model, and fuse those that are known."""

from typing import Any, Final

from torch import nn

from q4jit.errors import ArgumentError, expected
from q4jit.torch.fusion.attention import AUTO, DECODING
from q4jit.torch.fusion.layers import (
    Facts,
    FusedAttention,
    FusedDecoderLayer,
    become,
    become_own,
    is_fused,
)
from q4jit.torch.fusion.report import FusedHalves, FusionReport
from q4jit.torch.fusion.styles import Style, activation_of, is_own, prefix_of, style_of
from q4jit.torch.hooks import HOOKS, has_hooks
from q4jit.torch.inputs import check_one_of
from q4jit.torch.modules import Linear
from q4jit.torch.report import Skipped

_LAYER: Final = "DecoderLayer"  # the end of the names of their classes
_CAPTURE: Final = "install_output_capuring_hook"  # of transformers, which spells it like this


def fuse(model: nn.Module, *, decoding: str = AUTO) -> FusionReport:
    """Replace the arithmetic of a model's decoder layers by decorated functions, in place.

    A layer becomes two calls, norm → q, k, v before attention, and o, residual, norm, gate, up,
    activation, down, residual after it. RoPE, cache and attention stay PyTorch's. The numbers are
    those of the model but for rounding: kernels compute in float32, and round results once.

    Known are the decoder layers of Llama, Mistral, Qwen2, Qwen3, the attention of their MoE, Gemma
    1 to 3, and Phi-3 in transformers, whose linear layers are `Linear`s of one precision. What is
    not known, or has hooks, stays as it was, and the report says why. Each half of a layer counts.

    The modules stay, under their names: only the classes of layers and of their attention become
    subclasses of their own. So `state_dict`, `to`, `deepcopy` and pickles are those of the model,
    and a saved state does not depend on `fuse`. The linear layers, norms and feed-forwards inside
    are read, not called: replacing one, or adding a hook, raises ArgumentError in the next call.
    Call `unfuse` first. A layer's attention module takes q, k and v now; call the layer instead.

    Args:
        model: a model of transformers. Layers that are fused already are left out.
        decoding: attention of one query for each row, if the model's is "sdpa". "matmul": two
            matrix products in which heads that share keys are rows. "sum": products and sums in
            float32, for PyTorch's compiler to fuse; eager calls use "matmul". "model": the model's.
            "auto": "matmul" on a GPU and under the compiler, and otherwise PyTorch's operation, as
            "model" chooses, with fewer calls.

    Returns:
        A `FusionReport`. `print(report)` shows a table.

    Raises:
        ArgumentError: the model is no module with decoder layers, or `decoding` is unknown.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        what, got = "a model of transformers", type(given).__name__
        raise ArgumentError(expected(what, got, where="fuse"))
    check_one_of(decoding, DECODING, "decoding of fuse")
    layers = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith(_LAYER)]
    if not layers:
        what, got = "a model of transformers with decoder layers", type(model).__name__
        raise ArgumentError(expected(what, got, where="fuse"))
    fused, skipped = [], []
    for name, layer in layers:
        if is_fused(layer):
            skipped.append(Skipped(name, "it is fused already"))
            continue
        facts, reasons = _facts(name, layer, decoding)
        skipped += reasons
        if facts is None:
            continue
        fused.append(FusedHalves(name, facts.attention, facts.feed_forward))
        if facts.attention:
            become(layer.get_submodule("self_attn"), FusedAttention, facts)
        become(layer, FusedDecoderLayer, facts)
    return FusionReport(tuple(fused), tuple(skipped))


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: give each layer its own forward again."""
    for module in model.modules():
        if is_fused(module):
            become_own(module)


def _facts(name: str, layer: Any, decoding: str) -> tuple[Facts | None, list[Skipped]]:
    """Return the facts of a decoder layer, or None, and why it or a half of it stays."""
    style = style_of(layer)
    if style is None:
        return None, [Skipped(name, f"{type(layer).__name__} is no decoder layer that is known")]
    prefix = prefix_of(layer)
    norms = {n: getattr(layer, n) for n in style.norms if n}
    if reason := _layer_reason(layer, norms, prefix):
        return None, [Skipped(name, reason)]
    reasons = {
        "self_attn": _attention_reason(layer.self_attn, style, prefix)
        or _hooked({n: norms[n] for n in style.norms[:2] if n}),
        "mlp": _feed_forward_reason(layer.mlp, style, prefix)
        or _hooked({n: norms[n] for n in style.norms[2:] if n}),
    }
    if not any(reasons.values()):
        o, down = layer.self_attn.o_proj.precision, layer.mlp.down_proj.precision
        if o != down:
            reasons["mlp"] = f"its precision is {down}, and that of o_proj is {o}"
    skipped = [Skipped(f"{name}.{half}", reason) for half, reason in reasons.items() if reason]
    if all(reasons.values()):
        return None, skipped
    norm = norms[style.norms[0]]
    attention, feed_forward = (not reason for reason in reasons.values())
    facts = Facts(
        name=name,
        style=style,
        norm=type(norm),
        mlp=type(layer.mlp),
        act=type(getattr(layer.mlp, style.activation, None)),
        attention=attention,
        feed_forward=feed_forward,
        eps=_eps(norm),
        activation=activation_of(getattr(layer.mlp, style.activation)) if feed_forward else "",
        decoding=decoding,
        options=_options(layer.self_attn, style) if attention else {},
    )
    return facts, skipped


def _layer_reason(layer: Any, norms: dict[str, Any], prefix: str) -> str:
    """Return why a layer cannot be fused at all; empty if it can."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    for name, norm in norms.items():
        if not is_own(norm, prefix, "RMSNorm"):
            return f"{name} is a {type(norm).__name__}, an unknown norm"
    if len({_eps(norm) for norm in norms.values()}) > 1:
        return "its norms differ in eps"
    dropouts = (m for m in layer.children() if isinstance(m, nn.Dropout))
    return "it has dropout" if any(m.p for m in dropouts) else ""


def _attention_reason(attention: Any, style: Style, prefix: str) -> str:
    if not is_own(attention, prefix, "Attention"):
        return f"{type(attention).__name__} is another class than that of the layer"
    if "forward" in vars(attention):
        return "its forward was replaced"
    if any(
        _CAPTURE not in getattr(hook, "__qualname__", "")
        for kind in HOOKS
        for hook in getattr(attention, kind).values()
    ):
        return "it has hooks"
    return _linears_reason(attention, style.linears[0], same=-1)


def _feed_forward_reason(mlp: Any, style: Style, prefix: str) -> str:
    if not is_own(mlp, prefix, "MLP"):
        return f"{type(mlp).__name__} is no feed-forward that is known"
    activation = getattr(mlp, style.activation)
    if reason := _hooked({"it": mlp, "its activation": activation}):
        return reason
    if reason := _linears_reason(mlp, style.linears[1]):
        return reason
    if not activation_of(activation):
        return f"{type(activation).__name__} is an unknown activation"
    return ""


def _linears_reason(parent: Any, names: tuple[str, ...], same: int | None = None) -> str:
    """Return why linear layers cannot be parts of one function; empty if they can.

    same: how many of them have to have one precision, as a slice's end.
    """
    linears = {name: getattr(parent, name) for name in names}
    for name, linear in linears.items():
        if type(linear) is not Linear:
            kind = type(linear)
            own = f"{kind.__name__} of {kind.__module__.partition('.modules')[0]}"
            return f"{name} is a {own}, no Linear of q4jit"
    if reason := _hooked(linears):
        return reason
    precisions = dict.fromkeys(linears[name].precision for name in names[:same])
    if len(precisions) > 1:
        return f"its layers have different precisions: {', '.join(precisions)}"
    devices = dict.fromkeys(str(linear.weight.device) for linear in linears.values())
    return f"its layers are on {', '.join(devices)}" if len(devices) > 1 else ""


def _hooked(modules: dict[str, Any]) -> str:
    for name, module in modules.items():
        if has_hooks(module) or "forward" in vars(module):
            return f"{name} has hooks"
    return ""


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _options(attention: Any, style: Style) -> dict[str, Any]:
    """Return the keyword arguments that the model's attention function gets from its module."""
    own = {key: getattr(attention, name) for key, name in style.options}
    return own | {key: getattr(attention.config, name, None) for key, name in style.config_options}
