"""The architectures that `from_gguf` knows, and how their files differ from transformers' models.

Files hold what llama.cpp's converter writes (`convert_hf_to_gguf.py`), under the names of the
package gguf. Names of configuration attributes are those of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Architecture:
    """How a kind of file differs from the model that transformers makes of it.

    Attributes:
        name: `general.architecture`, which also begins the keys of the file.
        model_type: the name of the model in transformers.
        norm_epsilon: the configuration's name of the norms' epsilon.
        has_rms_norms: whether norms are RMSNorms; otherwise LayerNorms.
        norm_offset: what the file's norm weights are larger by.
        has_paired_rows: whether rows of q and k are in the order in which RoPE rotates pairs
            (2i, 2i + 1); the model rotates (i, i + D/2).
        rotates_part: whether RoPE may rotate only the start of a head.
        counts: more attributes, from keys that hold positive whole numbers.
        numbers: more attributes, from keys that hold positive numbers. They are optional.
        biases: attributes that are True if the file has this bias in layer 0. Single biases that
            they stand for may be missing in the file.
    """

    name: str
    model_type: str
    norm_epsilon: str = "rms_norm_eps"
    has_rms_norms: bool = True
    norm_offset: float = 0.0
    has_paired_rows: bool = False
    rotates_part: bool = False
    counts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)


_EXPERTS: Final = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SOFTCAPPING: Final = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

_LISTED: Final = (
    Architecture(
        "llama",
        "llama",
        has_paired_rows=True,
        biases={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
    ),
    Architecture("qwen2", "qwen2"),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        counts={
            **_EXPERTS,
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
        biases={"qkv_bias": "attn_q"},
    ),
    Architecture("qwen3", "qwen3", biases={"attention_bias": "attn_q"}),
    Architecture("qwen3moe", "qwen3_moe", counts=_EXPERTS, biases={"attention_bias": "attn_q"}),
    Architecture("gemma", "gemma", norm_offset=1.0),
    Architecture(
        "gemma2",
        "gemma2",
        norm_offset=1.0,
        counts={"sliding_window": "attention.sliding_window"},
        numbers=_SOFTCAPPING,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        norm_offset=1.0,
        counts={"sliding_window": "attention.sliding_window"},
        numbers=_SOFTCAPPING,
    ),
    Architecture("phi3", "phi3", rotates_part=True),
    Architecture(
        "starcoder2",
        "starcoder2",
        norm_epsilon="norm_epsilon",
        has_rms_norms=False,
        biases={"use_bias": "attn_q"},
    ),
    Architecture(
        "stablelm",
        "stablelm",
        rotates_part=True,
        norm_epsilon="layer_norm_eps",
        has_rms_norms=False,
        biases={"use_qkv_bias": "attn_q"},
    ),
    Architecture(
        "nemotron",
        "nemotron",
        rotates_part=True,
        norm_epsilon="norm_eps",
        has_rms_norms=False,
        norm_offset=1.0,
        biases={"attention_bias": "attn_q", "mlp_bias": "ffn_up"},
    ),
)
ARCHITECTURES: Final = MappingProxyType({each.name: each for each in _LISTED})
"""By `general.architecture`."""

PACKED_BY_TRANSFORMERS: Final = ("qwen35", "qwen35moe", "lfm2")
"""Those that transformers' own loader keeps packed once `install` has given it kernels."""
