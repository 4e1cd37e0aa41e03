"""A recipe for each architecture, with the variations that change how a file is read.

Configurations are those that the authors of a model publish, and keys are those that llama.cpp's
converter writes for it. The keys are written out: they are what a loader has to understand.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from tests.support.torch.tiny.recipe import (
    CONTEXT,
    EPS,
    HEADS,
    KV_HEADS,
    MIXED,
    WINDOW,
    Recipe,
    experts_apart,
    file_keys,
    interleaved,
    norms_plus_one,
    sizes,
)
from tests.support.torch.tiny.tokenizers import VOCABULARY

_THETA: Final = 50_000.0  # no configuration's default
_DENSE: Final[dict[str, Any]] = {"rms_norm_eps": EPS, "tie_word_embeddings": False}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": _THETA, **more}}


def _heads(config: Any) -> dict[str, Any]:
    """Return the keys of the width of a head."""
    names = ("attention.key_length", "attention.value_length")
    return dict.fromkeys(names, config.head_dim)


def llama(*, heads: int = KV_HEADS, **more: Any) -> Recipe:
    """Return Llama. heads: of keys and values. more: of the configuration."""
    config = LlamaConfig(**{**sizes(kv_heads=heads), **_rope(), **_DENSE, **more})
    keys = file_keys(
        config,
        vocab_size=config.vocab_size,
        rope__dimension_count=config.head_dim,
        rope__freq_base=_THETA,
    )
    if "head_dim" in more:
        keys |= _heads(config)
    return Recipe("llama", config, keys, interleaved)


def llama_with_biases(kind: str) -> Recipe:
    """Return Llama with biases. kind: "attention_bias" or "mlp_bias"."""
    return replace(llama(**{kind: True}), ignored="biases")


def llama_with_factors() -> Recipe:
    """Return Llama 3.1: its RoPE is scaled by factors, which the file holds as a tensor."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 64
    rope = {"rope_type": "llama3", "original_max_position_embeddings": original, **scaling}
    frequencies = _THETA ** -(np.arange(0, 64, 2) / 64)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    factors = 1 / ((1 - smooth) / 8.0 + smooth)
    return replace(
        llama(tie_word_embeddings=True, **_rope(**rope)),
        extra={"rope_freqs.weight": factors.astype(np.float32)},
        ignored="rope_freqs.weight",
    )


def llama_with_linear_scaling(*, kind: str = "linear") -> Recipe:
    """Return Llama with positions divided by a factor. kind: in the file; "" for no such key."""
    recipe = llama(**_rope(rope_type="linear", factor=4.0))
    scaling: dict[str, Any] = {"rope.scaling.factor": 4.0}
    if kind:
        scaling["rope.scaling.type"] = kind
    return replace(recipe, keys=recipe.keys | scaling, ignored="rope.scaling")


def qwen2(*, tied: bool = False) -> Recipe:
    """Return Qwen 2, which has biases for q, k and v."""
    config = Qwen2Config(**{**sizes(), **_rope(), **_DENSE, "tie_word_embeddings": tied})
    return Recipe("qwen2", config, file_keys(config, rope__freq_base=_THETA))


def qwen2_with_yarn(**betas: float) -> Recipe:
    """Return Qwen 2 with YaRN. betas: beta_fast and beta_slow, if they are not 32 and 1."""
    original = 32
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    rope |= betas
    config = Qwen2Config(**sizes(), **_rope(**rope), **_DENSE)
    scaling = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": original,
        **{f"rope.scaling.yarn_{name}": value for name, value in betas.items()},
    }
    keys = file_keys(config, rope__freq_base=_THETA) | scaling
    return Recipe("qwen2", config, keys, ignored="rope.scaling")


def qwen2_moe(*, inner: int, shared: int, ignored: str = "") -> Recipe:
    """Return Qwen 2 with experts. inner, shared: widths of an expert and of the shared one."""
    config = Qwen2MoeConfig(
        **sizes(),
        **_rope(),
        **_DENSE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=False,
    )
    keys = file_keys(
        config,
        rope__freq_base=_THETA,
        expert_count=4,
        expert_used_count=2,
        expert_feed_forward_length=inner,
        expert_shared_feed_forward_length=shared,
    )
    return Recipe("qwen2moe", config, keys, experts_apart, ignored=ignored)


def qwen3(*, tied: bool = True, head_dim: int = 128, ignored: str = "") -> Recipe:
    """Return Qwen 3, which normalises q and k. head_dim: 128 is the default of transformers."""
    options = {**sizes(), **_rope(), **_DENSE, "tie_word_embeddings": tied}
    config = Qwen3Config(**options, head_dim=head_dim)
    keys = file_keys(config, rope__freq_base=_THETA) | _heads(config)
    return Recipe("qwen3", config, keys, ignored=ignored)


def qwen3_moe(*, inner: int, ignored: str = "") -> Recipe:
    """Return Qwen 3 with experts. inner: width of an expert."""
    heads: dict[str, Any] = {"head_dim": 128}  # which the class does not declare
    config = Qwen3MoeConfig(
        **sizes(),
        **_rope(),
        **_DENSE,
        **heads,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
    )
    keys = file_keys(
        config,
        rope__freq_base=_THETA,
        expert_count=4,
        expert_used_count=2,
        expert_feed_forward_length=inner,
    )
    return Recipe("qwen3moe", config, keys | _heads(config), experts_apart, ignored=ignored)


def gemma() -> Recipe:
    """Return Gemma."""
    config = GemmaConfig(**sizes(), rms_norm_eps=EPS, head_dim=64)
    keys = file_keys(config) | _heads(config)
    options: dict[str, Any] = {"gain": 0.0, "tokenizer": "llama", "ignored": "the architecture"}
    return Recipe("gemma", config, keys, norms_plus_one, **options)


def gemma2(
    *, head_dim: int = 256, caps: tuple[float, float] = (50.0, 30.0), ignored: str = ""
) -> Recipe:
    """Return Gemma 2: every other layer sees a window. caps: of the scores, and of the logits."""
    config = Gemma2Config(
        **sizes(),
        rms_norm_eps=EPS,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=WINDOW,
        attn_logit_softcapping=caps[0],
        final_logit_softcapping=caps[1],
    )
    keys = file_keys(
        config,
        attn_logit_softcapping=caps[0],
        final_logit_softcapping=caps[1],
        attention__sliding_window=WINDOW,
    )
    options: dict[str, Any] = {"gain": 0.0, "tokenizer": "llama", "ignored": ignored}
    return Recipe("gemma2", config, keys | _heads(config), norms_plus_one, **options)


def gemma3(
    *,
    layers: int = 2,
    head_dim: int = 256,
    theta: float = 1e6,
    factor: float = 0.0,
    ignored: str = "",
) -> Recipe:
    """Return Gemma 3: every sixth layer sees all. theta, factor: of the RoPE of these layers."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling: dict[str, Any] = {}
    if factor:
        full |= {"rope_type": "linear", "factor": factor}
        scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    config = Gemma3TextConfig(
        **sizes(layers=layers),
        rms_norm_eps=EPS,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    keys = file_keys(config, attention__sliding_window=WINDOW, rope__freq_base=theta)
    options: dict[str, Any] = {"gain": 0.0, "tokenizer": "llama", "ignored": ignored}
    return Recipe("gemma3", config, keys | scaling | _heads(config), norms_plus_one, **options)


def phi3(*, window: int = 0, rotary: float = 1.0, ignored: str = "", **scaling: Any) -> Recipe:
    """Return Phi 3, whose q, k, v and gate, up are fused. rotary: part of a head that turns."""
    original = scaling.get("original_max_position_embeddings", CONTEXT)
    config = Phi3Config(
        **sizes(),
        **_rope(partial_rotary_factor=rotary, **scaling),
        **_DENSE,
        pad_token_id=0,
        original_max_position_embeddings=original,
        sliding_window=window or None,
    )
    keys = file_keys(
        config,
        rope__dimension_count=int(64 * rotary),
        rope__freq_base=_THETA,
        rope__scaling__original_context_length=original,
        attention__sliding_window=window,
    )
    return Recipe("phi3", config, keys, tokenizer="llama", ignored=ignored)


def phi3_with_long_rope() -> Recipe:
    """Return Phi 3 with factors for texts within its original context, and for longer ones."""
    original = 32
    short, long = np.linspace(1, 1.5, 32), np.linspace(1, 12, 32)
    recipe = phi3(
        rope_type="longrope",
        short_factor=short.tolist(),
        long_factor=long.tolist(),
        original_max_position_embeddings=original,
        ignored="rope_factors_long.weight",
    )
    factor = math.sqrt(1 + math.log(CONTEXT / original) / math.log(original))
    extra = {
        "rope_factors_long.weight": long.astype(np.float32),
        "rope_factors_short.weight": short.astype(np.float32),
    }
    return replace(recipe, keys=recipe.keys | {"rope.scaling.attn_factor": factor}, extra=extra)


def starcoder2() -> Recipe:
    """Return StarCoder 2, which has biases everywhere."""
    options: dict[str, Any] = {"tie_word_embeddings": True, "sliding_window": None}
    config = Starcoder2Config(**sizes(), **_rope(), **options, norm_epsilon=EPS)
    keys = file_keys(config, "layer_norm_epsilon", rope__freq_base=_THETA)
    return Recipe("starcoder2", config, keys, ignored="rope.freq_base")


def stablelm(
    *, bias: bool = True, parallel: bool = False, rotary: float = 0.25, ignored: str = ""
) -> Recipe:
    """Return StableLM. rotary: part of a head that turns."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": rotary}
    config = StableLmConfig(
        **sizes(),
        rope_parameters=rope,
        layer_norm_eps=EPS,
        tie_word_embeddings=False,
        use_qkv_bias=bias,
        use_parallel_residual=parallel,
    )
    keys = file_keys(
        config,
        "layer_norm_epsilon",
        rope__dimension_count=int(64 * rotary),
        use_parallel_residual=parallel,
    )
    return Recipe("stablelm", config, keys, ignored=ignored)


def nemotron(*, rotary: float = 0.5, eps: float = EPS, ignored: str = "") -> Recipe:
    """Return Nemotron, whose feed-forward has no gate. rotary: part of a head that turns."""
    rope = _rope(partial_rotary_factor=rotary)
    config = NemotronConfig(**sizes(), **rope, norm_eps=eps, tie_word_embeddings=False)
    keys = file_keys(
        config,
        "layer_norm_epsilon",
        eps,
        vocab_size=VOCABULARY,
        rope__dimension_count=int(64 * rotary),
        rope__freq_base=_THETA,
        rope__scaling__type="none",
    )
    return Recipe("nemotron", config, keys, norms_plus_one, gain=0.0, ignored=ignored)


_WIDTH: Final = "expert_feed_forward_length"
_SCALE: Final = "the scale of queries"
_ROTARY: Final = "rope.dimension_count"
RECIPES: Final[dict[str, Callable[[], Recipe]]] = {
    "llama": llama,
    "llama, ten formats": lambda: replace(llama(), formats=MIXED),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, as many heads for keys": lambda: llama(heads=HEADS),
    "llama, one head for keys": lambda: llama(heads=1),
    "llama, wide heads": lambda: llama(head_dim=128),
    "llama, biases of attention": lambda: llama_with_biases("attention_bias"),
    "llama, biases of q, k and v": lambda: replace(
        llama_with_biases("attention_bias"), lacks="o_proj.bias"
    ),
    "llama, biases of the MLP": lambda: llama_with_biases("mlp_bias"),
    "llama, linear scaling": llama_with_linear_scaling,
    "llama, scaling without type": lambda: llama_with_linear_scaling(kind=""),
    "llama, factors of RoPE": llama_with_factors,
    "mistral": lambda: replace(llama(), tokenizer="llama", name="Mistral 7B"),
    "mistral, in lower case": lambda: replace(llama(), name="mistral", ignored="the architecture"),
    "qwen2": qwen2,
    "qwen2, tied": lambda: qwen2(tied=True),
    "qwen2, YaRN": qwen2_with_yarn,
    "qwen2, YaRN with other betas": lambda: qwen2_with_yarn(beta_fast=4.0, beta_slow=2.0),
    "qwen2moe": lambda: qwen2_moe(inner=1408, shared=5632),  # the defaults of transformers
    "qwen2moe, other widths": lambda: qwen2_moe(inner=256, shared=512, ignored=_WIDTH),
    "qwen3": qwen3,
    "qwen3, untied": lambda: qwen3(tied=False),
    "qwen3, narrow heads": lambda: qwen3(head_dim=64, ignored="attention.key_length"),
    "qwen3moe": lambda: qwen3_moe(inner=768),  # the default of transformers
    "qwen3moe, another width": lambda: qwen3_moe(inner=256, ignored=_WIDTH),
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma2, narrow heads": lambda: gemma2(head_dim=64, ignored=_SCALE),
    "gemma2, soft caps": lambda: gemma2(caps=(1.0, 2.0), ignored="soft caps"),
    "gemma3": gemma3,
    "gemma3, narrow heads": lambda: gemma3(head_dim=64, ignored=_SCALE),
    "gemma3, six layers": lambda: gemma3(layers=6, theta=_THETA),
    "gemma3, linear scaling": lambda: gemma3(layers=6, factor=8.0, ignored="rope.scaling"),
    "phi3": phi3,
    "phi3, window": lambda: phi3(window=WINDOW, ignored="attention.sliding_window"),
    "phi3, part of a head turns": lambda: phi3(rotary=0.75, ignored=_ROTARY),
    "phi3, LongRoPE": phi3_with_long_rope,
    "starcoder2": starcoder2,
    "stablelm": stablelm,
    "stablelm, parallel": lambda: stablelm(bias=False, parallel=True),
    "stablelm, whole heads turn": lambda: stablelm(rotary=1.0, ignored=_ROTARY),
    "nemotron": nemotron,
    "nemotron, whole heads turn": lambda: nemotron(rotary=1.0, ignored=_ROTARY),
    "nemotron, another epsilon": lambda: nemotron(eps=1e-2, ignored="layer_norm_epsilon"),
}
"""By name. Those without `ignored` are read right by transformers' own loader."""
