"""The decoder layers that `fuse` knows, by their classes in transformers."""

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from q4jit.torch.arithmetic import GELU_TANH, RELU, SILU


@dataclass(frozen=True)
class Style:
    """How the layers of an architecture compute, beyond what their modules say.

    Attributes:
        zero_centred: norms multiply by 1 + gain.
        inner_norms: results of attention and feed-forward are normed before the residual.
        divided: q, k and v are one matrix, and gate and up another.
        options: attributes of the attention module that its kernel gets as keyword arguments.
        config_options: the same of its configuration.
    """

    zero_centred: bool = False
    inner_norms: bool = False
    divided: bool = False
    options: tuple[tuple[str, str], ...] = ()
    config_options: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the linear layers of attention, and of the feed-forward."""
        if self.divided:
            return ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")
        return ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

    @property
    def activation(self) -> str:
        """The name of the feed-forward's activation."""
        return "activation_fn" if self.divided else "act_fn"

    @property
    def norms(self) -> tuple[str, str, str, str]:
        """The names of the norms before and after attention, before and after the feed-forward.

        "" for one that the layers lack.
        """
        if self.inner_norms:
            middle = "post_attention_layernorm", "pre_feedforward_layernorm"
            return "input_layernorm", *middle, "post_feedforward_layernorm"
        return "input_layernorm", "", "post_attention_layernorm", ""


_WINDOW: Final = (("sliding_window", "sliding_window"),)
_SOFTCAP: Final = (("softcap", "attn_logit_softcapping"),)

STYLES: Final = {
    "llama.Llama": Style(),
    "mistral.Mistral": Style(config_options=_WINDOW),
    "qwen2.Qwen2": Style(options=_WINDOW),
    "qwen2_moe.Qwen2Moe": Style(),
    "qwen3.Qwen3": Style(options=_WINDOW),
    "qwen3_moe.Qwen3Moe": Style(options=_WINDOW),
    "gemma.Gemma": Style(zero_centred=True),
    "gemma2.Gemma2": Style(zero_centred=True, inner_norms=True, options=_WINDOW + _SOFTCAP),
    "gemma3.Gemma3": Style(zero_centred=True, inner_norms=True, options=_WINDOW),
    "phi3.Phi3": Style(divided=True, config_options=_WINDOW),
}
"""By the folder and the prefix of the classes."""

_ACTIVATIONS: Final = {
    "SiLU": SILU,
    "SiLUActivation": SILU,
    "GELUTanh": GELU_TANH,
    "ReLU": RELU,
}


def style_of(layer: nn.Module) -> Style | None:
    """Return the style of a decoder layer, None for an unknown class."""
    return next((s for name, s in STYLES.items() if is_own(layer, name, "DecoderLayer")), None)


def prefix_of(layer: nn.Module) -> str:
    """Return the key in `STYLES` of a decoder layer of a known style."""
    return next(name for name in STYLES if is_own(layer, name, "DecoderLayer"))


def is_own(module: nn.Module, name: str, suffix: str) -> bool:
    """Return whether the class of a module is one of transformers', and no subclass.

    name: a key of `STYLES`. suffix: of the class.
    """
    folder, _, prefix = name.partition(".")
    kind = type(module)
    own = f"transformers.models.{folder}.modeling_{folder}", f"{prefix}{suffix}"
    return (kind.__module__, kind.__qualname__) == own


def activation_of(module: Any) -> str:
    """Return the name of an activation for the functions; "" for an unknown one."""
    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return ""
    if kind is nn.GELU and module.approximate == "tanh":
        return GELU_TANH
    return _ACTIVATIONS.get(kind.__name__, "")
