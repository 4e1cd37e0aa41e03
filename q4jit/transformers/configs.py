"""Configurations of transformers, from the keys and tensors of a GGUF file.

transformers reads them too, but not everything that llama.cpp's converter writes: it ignores the
width of heads, RoPE's scaling, the width of experts, Gemma's scale of queries, and biases.
"""

from math import inf, log, nextafter
from typing import Any, Final

import numpy as np
import transformers
from transformers import PretrainedConfig

from q4jit.errors import GGUFError, expected
from q4jit.transformers.architectures import Architecture
from q4jit.transformers.keys import Keys
from q4jit.transformers.plan import ROPE_FACTORS
from q4jit.weights.gguf.file import GGUFFile

_DEFAULT_ROPE_BASE: Final = 10000.0  # llama.cpp's, for files without the key
_SPECIAL_IDS: Final = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
# The largest models of these families scale queries by the width of the model instead of that of a
# head. Files do not say so; llama.cpp knows them by their number of layers (`LLM_TYPE_27B`).
_SCALED_BY_WIDTH: Final = {("gemma2", 46), ("gemma3", 62)}


def config_of(file: GGUFFile, architecture: Architecture) -> PretrainedConfig:
    """Return the configuration of the model in a file. Raises GGUFError for missing keys."""
    keys = Keys(file, architecture.name)
    _check_supported(keys, architecture)
    values = {**_sizes(file, keys, architecture), **_special(file)}
    values |= {name: keys.count(key) for name, key in architecture.counts.items()}
    _check_experts(keys, values)
    values |= {name: keys.number(key) for name, key in architecture.numbers.items() if key in keys}
    for name, tensor in architecture.biases.items():
        values[name] = f"blk.0.{tensor}.bias" in file.tensors
    values |= _OWN.get(architecture.name, _nothing)(file, architecture, values)
    if "rope_parameters" not in values:
        values["rope_parameters"] = _rope(keys, architecture, values["head_dim"])
    try:
        config: PretrainedConfig = transformers.AutoConfig.for_model(
            architecture.model_type, **values
        )
    except Exception as error:  # whatever its checks of values raise
        what = f"transformers cannot configure a {architecture.name} model: {error}"
        raise GGUFError(f"{file.paths[0]}: {what}") from error
    return config


def _sizes(file: GGUFFile, keys: Keys, architecture: Architecture) -> dict[str, Any]:
    layers, heads = keys.count("block_count"), keys.count("attention.head_count")
    numbers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if numbers != {str(i) for i in range(min(layers, len(numbers) + 1))}:
        raise keys.error("block_count", "the number of layers in the file", layers)
    width = keys.count("embedding_length")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        what, where = "a tensor token_embd.weight of two dimensions", file.paths[0]
        got = "none" if table is None else f"one of shape {list(table.shape)}"
        raise GGUFError(expected(what, got, where=where))
    _check_tokens(file, table.shape[1])
    key_heads = keys.count("attention.head_count_kv", heads)
    if heads % key_heads:
        raise keys.error("attention.head_count_kv", f"a divisor of {heads} heads", key_heads)
    epsilon = "attention.layer_norm_rms_epsilon"
    if not architecture.has_rms_norms:
        epsilon = "attention.layer_norm_epsilon"
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": keys.count("attention.key_length", max(1, width // heads)),
        "max_position_embeddings": keys.count("context_length"),
        architecture.norm_epsilon: keys.number(epsilon),
        "vocab_size": table.shape[1],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_feed_forward(keys, architecture),
    }


def _feed_forward(keys: Keys, architecture: Architecture) -> dict[str, int]:
    """Return the width of the feed-forward, which files of experts only may lack."""
    if "num_experts" in architecture.counts and _WIDTH not in keys:
        return {}
    return {"intermediate_size": keys.count(_WIDTH)}


_WIDTH: Final = "feed_forward_length"


def _check_tokens(file: GGUFFile, rows: int) -> None:
    """Raise GGUFError if the tokenizer has tokens without a row in the embedding."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, tuple) and len(tokens) > rows:
        what = f"at most {rows} tokens, the rows of token_embd.weight"
        where = f"{file.paths[0]}: tokenizer.ggml.tokens"
        raise GGUFError(expected(what, str(len(tokens)), where=where))


def _special(file: GGUFFile) -> dict[str, Any]:
    """Return the ids of special tokens; None for those that the file does not name."""
    keys = Keys(file, "tokenizer.ggml")
    return {name: keys.value(key) for name, key in _SPECIAL_IDS.items()}


def check_special(file: GGUFFile) -> None:
    """Raise GGUFError for special tokens that are not ids of tokens of the file."""
    keys = Keys(file, "tokenizer.ggml")
    tokens: Any = keys.value("tokens")
    count = len(tokens) if isinstance(tokens, tuple) else 0
    for key in (*_SPECIAL_IDS.values(), "unknown_token_id"):
        value = keys.value(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise keys.error(key, f"the id of one of {count} tokens", value)


def _check_supported(keys: Keys, architecture: Architecture) -> None:
    """Raise GGUFError for a mixture of experts whose architecture has none, such as Mixtral's."""
    if "num_experts" not in architecture.counts and not keys.says_none("expert_count"):
        experts = keys.value("expert_count")
        raise keys.error("expert_count", f"no experts in a {architecture.name} model", experts)


def _check_experts(keys: Keys, values: dict[str, Any]) -> None:
    """Raise GGUFError for a single expert, and unless there are as many as a token needs."""
    experts, used = values.get("num_experts", 2), values.get("num_experts_per_tok", 1)
    if experts < 2:  # its tensors have two dimensions
        raise keys.error("expert_count", "at least 2 experts", experts)
    if used > experts:
        raise keys.error("expert_used_count", f"at most {experts}, the number of experts", used)


def _rope(keys: Keys, architecture: Architecture, head_width: int) -> dict[str, Any]:
    """Return RoPE's parameters."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    parameters["rope_theta"] = keys.number("rope.freq_base", _DEFAULT_ROPE_BASE)
    rotated = keys.count("rope.dimension_count", head_width)
    what = f"{head_width}, the width of a head"
    if architecture.rotates_part and rotated <= head_width:
        parameters["partial_rotary_factor"] = rotary_factor(rotated, head_width)
    elif rotated != head_width:
        part = "at most " if architecture.rotates_part else ""
        raise keys.error("rope.dimension_count", f"{part}{what}", rotated)
    if rotated % 2:
        raise keys.error("rope.dimension_count", "an even number", rotated)
    _check_factors(keys.file, rotated // 2, ROPE_FACTORS)
    return parameters | _scaling(keys)


def rotary_factor(rotated: int, head_width: int) -> float:
    """Return the factor whose product with the width of a head transformers rounds down right."""
    factor = rotated / head_width
    return factor if int(head_width * factor) == rotated else nextafter(factor, inf)


def _check_factors(file: GGUFFile, count: int, name: str, *, required: bool = False) -> None:
    """Raise GGUFError if the file has factors of RoPE, but not one for each frequency."""
    entry, where = file.tensors.get(name), f"{file.paths[0]}: tensor {name}"
    if entry is None and required:
        raise GGUFError(expected(f"shape [{count}]", "none", where=where))
    if entry is not None and entry.problem:
        raise GGUFError(f"{where}: {entry.problem}")
    if entry is not None and entry.shape != (count,):
        raise GGUFError(expected(f"shape [{count}]", str(list(entry.shape)), where=where))


def _scaling(keys: Keys) -> dict[str, Any]:
    """Return the parameters of RoPE's scaling, if the file has one."""
    kind = keys.text("rope.scaling.type", "linear")  # llama.cpp's, for files without the key
    if kind == "longrope" and keys.prefix == "phi3":
        return {}  # `_phi3` reads it
    if kind not in {"none", "linear", "yarn"}:
        raise keys.error("rope.scaling.type", "'none', 'linear' or 'yarn'", kind)
    if kind == "none" or keys.says_none("rope.scaling.factor"):
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        original = "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = keys.count(original)
        # llama.cpp multiplies YaRN's own factor by that of the file
        own = keys.number("rope.scaling.attn_factor", 1.0)
        scaling["attention_factor"] = own * (1 + 0.1 * log(scaling["factor"]))
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in keys:
                scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
        for name in ("ext_factor", "attn_factor"):
            value = keys.value(key := f"rope.scaling.yarn_{name}", 1.0)
            if not isinstance(value, float) or value != 1.0:  # transformers has no such number
                raise keys.error(key, "1.0", value)
    return scaling


# --- what single architectures have besides ---------------------------------------------------


def _nothing(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    return {}


def _qwen3moe(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    return {"norm_topk_prob": True}  # llama.cpp's models do so; files do not say it


def _gemma(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    by_width = (architecture.name, values["num_hidden_layers"]) in _SCALED_BY_WIDTH
    head = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": head if by_width else values["head_dim"]}


def _gemma3(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    keys = Keys(file, architecture.name)
    local = keys.number("rope.freq_base_swa", _DEFAULT_ROPE_BASE)
    sliding = {"rope_type": "default", "rope_theta": local}
    rope = {
        "full_attention": _rope(keys, architecture, values["head_dim"]),
        "sliding_attention": sliding,
    }
    return {**_gemma(file, architecture, values), "rope_parameters": rope}


def _phi3(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    keys, own = Keys(file, architecture.name), dict[str, Any]()
    if not keys.says_none("attention.sliding_window"):
        own["sliding_window"] = keys.count("attention.sliding_window")
    original = "rope.scaling.original_context_length"
    if original in keys:
        own["original_max_position_embeddings"] = keys.count(original)
    factors = [f"rope_factors_{length}.weight" for length in ("short", "long")]
    is_long = keys.value("rope.scaling.type") == "longrope"
    if is_long or any(name in file.tensors for name in factors):
        rope = _rope(keys, architecture, values["head_dim"])
        count = int(values["head_dim"] * rope["partial_rotary_factor"]) // 2
        for name in factors:
            _check_factors(file, count, name, required=True)
        short, long = ([float(v) for v in np.asarray(file[name])] for name in factors)
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope["original_max_position_embeddings"] = keys.count(original)
        if "rope.scaling.attn_factor" in keys:
            rope["attention_factor"] = keys.number("rope.scaling.attn_factor")
        own["rope_parameters"] = rope
    return own


def _stablelm(file: GGUFFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    if "blk.0.attn_q_norm.weight" in file.tensors:
        what, where = (
            "no norms of single heads",
            f"{file.paths[0]}: tensor blk.0.attn_q_norm.weight",
        )
        raise GGUFError(expected(what, "one", where=where))
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors}


_OWN: Final = {
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "stablelm": _stablelm,
}
