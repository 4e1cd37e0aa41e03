"""Tiny models of every architecture, with the metadata that llama.cpp's converter writes for them.

A recipe has the configuration of a Hugging Face model and the keys of its GGUF file. The keys are
written out by hand: they are what a loader must understand, so nothing here derives one from the
other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from tests.support.torch.gguf_tokenizers import VOCABULARY

HIDDEN: Final = 256
FEED_FORWARD: Final = 512
HEADS: Final = 4
KV_HEADS: Final = 2
CONTEXT: Final = 512
EPS: Final = 1e-5
WINDOW: Final = 16
"""Tokens that a layer with a sliding window sees: fewer than a prompt of the tests."""

MIXED: Final = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_1", "F16", "IQ4_NL", "Q5_0", "BF16")
"""Formats of the matrices of a file, one after the other."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file stores it.

    Attributes:
        data: float32 of the tensor's shape, or uint8 whose last axis is the bytes of a row.
        kind: the type of the tensor.
    """

    data: NDArray[Any]
    kind: GGMLQuantizationType = GGMLQuantizationType.F32

    def values(self) -> NDArray[np.float32]:
        """Return the values of the blocks."""
        return np.array(dequantize(self.data, self.kind), np.float32)

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "Stored":
        """Change the values of float32, or move whole rows."""
        return replace(self, data=np.ascontiguousarray(change(self.data)))


Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Recipe:
    """How a file of a tiny model is made.

    Attributes:
        architecture: `general.architecture` of the file.
        config: of the Hugging Face model, as its authors would publish it.
        keys: the file's metadata; `{arch}.` stands before each.
        convert: what llama.cpp's converter does to the tensors, under the model's names.
        tokenizer: "gpt2" or "llama".
        formats: of the matrices, one after the other.
        extra: more tensors of the file, in float32.
        name: `general.name`.
    """

    architecture: str
    config: PreTrainedConfig
    keys: dict[str, Any]
    convert: Callable[[Tensors, PreTrainedConfig], Tensors] = lambda tensors, _: tensors
    tokenizer: str = "gpt2"
    formats: tuple[str, ...] = MIXED
    extra: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    name: str = "tiny"


def _sizes(*, hidden: int = HIDDEN, layers: int = 2, kv_heads: int = KV_HEADS) -> dict[str, Any]:
    """Return the part of a configuration that most architectures share."""
    return {
        "hidden_size": hidden,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCABULARY,
    }


def _keys(
    config: Any, norm: str = "layer_norm_rms_epsilon", eps: float = EPS, **more: Any
) -> dict[str, Any]:
    """Return the keys that the converter writes for most architectures. norm: the key of eps."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{norm}": eps,
    }
    return keys | {name.replace("__", "."): value for name, value in more.items()}


# --- what the converter does to tensors -----------------------------------------------------------


def interleave_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Take rows from the two halves of each head in turns, as llama.cpp's RoPE of Llama pairs them."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _interleaved(tensors: Tensors, config: Any) -> Tensors:
    made = dict(tensors)
    for name, tensor in tensors.items():
        for part, heads in (
            (".q_proj.", config.num_attention_heads),
            (".k_proj.", config.num_key_value_heads),
        ):
            if part in name:
                made[name] = tensor.map(lambda rows, heads=heads: interleave_rows(rows, heads))
    return made


def _norms_plus_one(tensors: Tensors, _: Any) -> Tensors:
    return {
        name: tensor.map(lambda gain: gain + 1) if name.endswith("norm.weight") else tensor
        for name, tensor in tensors.items()
    }


def _experts_apart(tensors: Tensors, _: Any) -> Tensors:
    """Split gate from up, and store the gate of the shared expert as a vector."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem, half = name.removesuffix("gate_up_proj"), tensor.data.shape[1] // 2
            made[f"{stem}gate_proj.weight"] = tensor.map(lambda rows, half=half: rows[:, :half])
            made[f"{stem}up_proj.weight"] = tensor.map(lambda rows, half=half: rows[:, half:])
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = tensor
        elif "shared_expert_gate" in name:
            made[name] = tensor.map(np.squeeze)
        else:
            made[name] = tensor
    return made


# --- one recipe per architecture ------------------------------------------------------------------

_THETA: Final = 50_000.0  # no configuration's default


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": _THETA} | more}


def llama(*, tied: bool = False, heads: int = KV_HEADS, **more: Any) -> Recipe:
    """Return Llama. heads: for keys and values. more: of the configuration."""
    options = _sizes(kv_heads=heads) | _rope() | {"rms_norm_eps": EPS} | more
    config = LlamaConfig(tie_word_embeddings=tied, **options)
    keys = _keys(
        config, vocab_size=VOCABULARY, rope__dimension_count=config.head_dim, rope__freq_base=_THETA
    )
    return Recipe("llama", config, keys, _interleaved)


def llama_with_factors() -> Recipe:
    """Return Llama 3.1: its RoPE is scaled by factors that the file holds as a tensor."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 64
    rope = scaling | {"rope_type": "llama3", "original_max_position_embeddings": original}
    recipe = llama(tied=True, **_rope(**rope))
    frequencies = _THETA ** -(np.arange(0, 64, 2, dtype=np.float64) / 64)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    factors = 1 / ((1 - smooth) / 8.0 + smooth)
    return replace(recipe, extra={"rope_freqs.weight": factors.astype(np.float32)})


def llama_with_linear_scaling() -> Recipe:
    """Return Llama with positions divided by a factor."""
    recipe = llama(**_rope(rope_type="linear", factor=4.0))
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    return replace(recipe, keys=recipe.keys | keys)


def mistral(name: str = "Mistral 7B") -> Recipe:
    """Return Mistral, whose files say that they are Llama."""
    return replace(llama(), name=name, tokenizer="llama")


def qwen2(*, tied: bool = False) -> Recipe:
    """Return Qwen 2, which has biases for q, k and v."""
    config = Qwen2Config(**_sizes(), **_rope(), rms_norm_eps=EPS, tie_word_embeddings=tied)
    return Recipe("qwen2", config, _keys(config, rope__freq_base=_THETA))


def qwen2_with_yarn() -> Recipe:
    """Return Qwen 2 with YaRN."""
    original = 32
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    config = Qwen2Config(**_sizes(), **_rope(**rope), rms_norm_eps=EPS, tie_word_embeddings=False)
    keys = _keys(config, rope__freq_base=_THETA) | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": original,
    }
    return Recipe("qwen2", config, keys)


def qwen2_moe(*, inner: int = 1408, shared: int = 5632) -> Recipe:
    """Return Qwen 2 with experts. inner, shared: their widths; as given, transformers' defaults."""
    config = Qwen2MoeConfig(
        **_sizes() | _rope(),
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=False,
    )
    keys = _keys(
        config,
        rope__freq_base=_THETA,
        expert_count=4,
        expert_used_count=2,
        expert_feed_forward_length=inner,
        expert_shared_feed_forward_length=shared,
    )
    return Recipe("qwen2moe", config, keys, _experts_apart)


def qwen3(*, tied: bool = True, head_dim: int = 128) -> Recipe:
    """Return Qwen 3, which normalises q and k. head_dim: 128 is the default of transformers."""
    config = Qwen3Config(
        **_sizes(), **_rope(), rms_norm_eps=EPS, tie_word_embeddings=tied, head_dim=head_dim
    )
    return Recipe("qwen3", config, _head_keys(config, rope__freq_base=_THETA))


def qwen3_moe(*, inner: int = 768) -> Recipe:
    """Return Qwen 3 with experts. inner: width of an expert; as given, transformers' default."""
    config = Qwen3MoeConfig(
        **_sizes() | _rope(),
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
    )
    keys = _head_keys(
        config,
        rope__freq_base=_THETA,
        expert_count=4,
        expert_used_count=2,
        expert_feed_forward_length=inner,
    )
    return Recipe("qwen3moe", config, keys, _experts_apart)


def _head_keys(config: Any, **more: Any) -> dict[str, Any]:
    lengths = {"attention__key_length": config.head_dim, "attention__value_length": config.head_dim}
    return _keys(config, **lengths, **more)


def gemma2(*, head_dim: int = 256, soft_caps: tuple[float, float] = (50.0, 30.0)) -> Recipe:
    """Return Gemma 2, in which every other layer sees a window. soft_caps: of scores, of logits."""
    config = Gemma2Config(
        **_sizes(),
        rms_norm_eps=EPS,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=WINDOW,
        attn_logit_softcapping=soft_caps[0],
        final_logit_softcapping=soft_caps[1],
    )
    keys = _head_keys(
        config,
        attn_logit_softcapping=soft_caps[0],
        final_logit_softcapping=soft_caps[1],
        attention__sliding_window=WINDOW,
    )
    return Recipe("gemma2", config, keys, _norms_plus_one, tokenizer="llama")


def gemma3(
    *, layers: int = 2, head_dim: int = 256, theta: float = 1e6, factor: float = 1.0
) -> Recipe:
    """Return Gemma 3: every sixth layer sees all. theta, factor: of the RoPE of these layers."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    more: dict[str, Any] = {}
    if factor != 1:
        full = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        more = {"rope__scaling__type": "linear", "rope__scaling__factor": factor}
    config = Gemma3TextConfig(
        **_sizes(layers=layers),
        rms_norm_eps=EPS,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    keys = _head_keys(config, attention__sliding_window=WINDOW, rope__freq_base=theta, **more)
    return Recipe("gemma3", config, keys, _norms_plus_one, tokenizer="llama")


def phi3(*, window: int = 0, rotary: float = 1.0) -> Recipe:
    """Return Phi 3, whose q, k, v and gate, up are fused. rotary: part of a head that turns."""
    config = Phi3Config(
        **_sizes(),
        **_rope(partial_rotary_factor=rotary),
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        pad_token_id=0,
        sliding_window=window or None,
    )
    keys = _keys(
        config,
        rope__dimension_count=int(64 * rotary),
        rope__freq_base=_THETA,
        rope__scaling__original_context_length=CONTEXT,
        attention__sliding_window=window,
    )
    return Recipe("phi3", config, keys, tokenizer="llama")


def starcoder2() -> Recipe:
    """Return StarCoder 2, which has biases everywhere."""
    config = Starcoder2Config(
        **_sizes(), **_rope(), norm_epsilon=EPS, tie_word_embeddings=True, sliding_window=None
    )
    return Recipe("starcoder2", config, _keys(config, "layer_norm_epsilon", rope__freq_base=_THETA))


def stablelm(*, bias: bool = True, parallel: bool = False, rotary: float = 0.25) -> Recipe:
    """Return StableLM. rotary: part of a head that turns."""
    config = StableLmConfig(
        **_sizes(),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": rotary,
        },
        layer_norm_eps=EPS,
        tie_word_embeddings=False,
        use_qkv_bias=bias,
        use_parallel_residual=parallel,
    )
    keys = _keys(
        config,
        "layer_norm_epsilon",
        rope__dimension_count=int(64 * rotary),
        use_parallel_residual=parallel,
    )
    return Recipe("stablelm", config, keys)


def nemotron(*, rotary: float = 0.5, eps: float = EPS) -> Recipe:
    """Return Nemotron, whose feed-forward has no gate. rotary: part of a head that turns."""
    config = NemotronConfig(
        **_sizes() | _rope(partial_rotary_factor=rotary), norm_eps=eps, tie_word_embeddings=False
    )
    keys = _keys(
        config,
        "layer_norm_epsilon",
        eps,
        vocab_size=VOCABULARY,
        rope__dimension_count=int(64 * rotary),
        rope__freq_base=_THETA,
        rope__scaling__type="none",
    )
    return Recipe("nemotron", config, keys, _norms_plus_one)


def falcon() -> Recipe:
    """Return Falcon 7B: one head of keys and values, and attention beside the feed-forward."""
    config = FalconConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
        layer_norm_epsilon=EPS,
        tie_word_embeddings=True,
    )
    keys = {
        "context_length": 2048,
        "tensor_data_layout": "jploski",
        "embedding_length": HIDDEN,
        "feed_forward_length": 4 * HIDDEN,
        "block_count": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.layer_norm_epsilon": EPS,
    }
    return Recipe("falcon", config, keys)


RECIPES: Final[dict[str, Callable[[], Recipe]]] = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama all heads": lambda: llama(heads=HEADS),
    "llama one head": lambda: llama(heads=1),
    "llama biases": lambda: llama(attention_bias=True),
    "llama mlp biases": lambda: llama(mlp_bias=True),
    "llama linear": llama_with_linear_scaling,
    "llama factors": llama_with_factors,
    "llama head": lambda: llama(head_dim=128),
    "mistral": mistral,
    "mistral name": lambda: mistral("mistral"),
    "qwen2": qwen2,
    "qwen2 tied": lambda: qwen2(tied=True),
    "qwen2 yarn": qwen2_with_yarn,
    "qwen2moe": qwen2_moe,
    "qwen2moe widths": lambda: qwen2_moe(inner=256, shared=512),
    "qwen3": qwen3,
    "qwen3 untied": lambda: qwen3(tied=False),
    "qwen3 head": lambda: qwen3(head_dim=64),
    "qwen3moe": qwen3_moe,
    "qwen3moe widths": lambda: qwen3_moe(inner=256),
    "gemma2": gemma2,
    "gemma2 head": lambda: gemma2(head_dim=64),
    "gemma2 caps": lambda: gemma2(soft_caps=(1.0, 2.0)),
    "gemma3": gemma3,
    "gemma3 head": lambda: gemma3(head_dim=64),
    "gemma3 layers": lambda: gemma3(layers=6),
    "gemma3 theta": lambda: gemma3(layers=6, theta=_THETA),
    "gemma3 linear": lambda: gemma3(layers=6, factor=8.0),
    "phi3": phi3,
    "phi3 window": lambda: phi3(window=WINDOW),
    "phi3 rotary": lambda: phi3(rotary=0.75),
    "starcoder2": starcoder2,
    "stablelm": stablelm,
    "stablelm rotary": lambda: stablelm(rotary=0.5),
    "stablelm parallel": lambda: stablelm(bias=False, parallel=True),
    "nemotron": nemotron,
    "nemotron rotary": lambda: nemotron(rotary=1.0),
    "nemotron eps": lambda: nemotron(eps=1e-2),
    "falcon": falcon,
}
