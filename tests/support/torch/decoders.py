"""Small models of transformers with random weights, packed: two layers, heads that share keys."""

import copy
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from q4jit.torch import replace_linears

_SIZES: Final = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW: Final = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS: Final = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}
DECODERS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **_WINDOW},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **_EXPERTS},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "gemma": {},
    "gemma2": {
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 0.02,  # so small that it matters
        "attn_implementation": "eager",
        **_WINDOW,
    },
    "gemma3_text": {"query_pre_attn_scalar": 32, **_WINDOW},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
}
"""By the model type: what its configuration has beyond the sizes."""


def decoder(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a packed model of a type in `DECODERS`, whose norms and biases are random too."""
    torch.manual_seed(0)
    settings = {**_SIZES, **DECODERS[kind], **changes}
    implementation = settings.pop("attn_implementation", None)
    make: Any = AutoModelForCausalLM.from_config
    model = make(CONFIG_MAPPING[kind](**settings), attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model = model.to(dtype).eval().requires_grad_(False)
    replace_linears(model, "Q4_0")
    return model


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error of a tensor."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def pair(kind: str, **changes: Any) -> tuple[Any, Any]:
    """Return two equal models."""
    model = decoder(kind, **changes)
    return model, copy.deepcopy(model)
