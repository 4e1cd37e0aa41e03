"""Configurations of transformers, from the keys and tensors of a GGUF file.

transformers reads them too, but not everything that llama.cpp's converter writes: it ignores the
width of heads, RoPE's scaling, the width of experts, Gemma's scale of queries, and biases.
"""

from math import log
from typing import Any, Final

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
    values |= {name: keys.number(key) for name, key in architecture.numbers.items() if key in keys}
    for name, tensor in architecture.biases.items():
        values[name] = f"blk.0.{tensor}.bias" in file.tensors
    values |= _OWN.get(architecture.name, _nothing)(file, architecture, values)
    if "rope_parameters" not in values:
        values["rope_parameters"] = _rope(keys, architecture, values["head_dim"])
    config: PretrainedConfig = transformers.AutoConfig.for_model(architecture.model_type, **values)
    return config


def _sizes(file: GGUFFile, keys: Keys, architecture: Architecture) -> dict[str, Any]:
    layers, heads = keys.count("block_count"), keys.count("attention.head_count")
    if not any(name.startswith(f"blk.{layers - 1}.") for name in file.tensors):
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
        # files of experts only may lack it
        **({"intermediate_size": keys.count(_WIDTH)} if _WIDTH in keys else {}),
    }


_WIDTH: Final = "feed_forward_length"


def _check_tokens(file: GGUFFile, rows: int) -> None:
    """Raise GGUFError if the tokenizer has tokens without a row in the embedding."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, tuple) and len(tokens) > rows:
        what = f"at most {rows} tokens, the rows of token_embd.weight"
        where = f"{file.paths[0]}: tokenizer.ggml.tokens"
        raise GGUFError(expected(what, str(len(tokens)), where=where))


def _special(file: GGUFFile) -> dict[str, int | None]:
    """Return the ids of special tokens; None for those that the file does not name."""
    keys = Keys(file, "tokenizer.ggml")
    values: dict[str, int | None] = {}
    for name, key in _SPECIAL_IDS.items():
        value = keys.value(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise keys.error(key, "the id of a token", value)
        values[name] = value
    return values


def _check_supported(keys: Keys, architecture: Architecture) -> None:
    """Raise GGUFError for a mixture of experts whose architecture has none, such as Mixtral's."""
    experts = keys.value("expert_count", 0)
    if experts and "num_experts" not in architecture.counts:
        raise keys.error("expert_count", f"no experts in a {architecture.name} model", experts)


def _rope(keys: Keys, architecture: Architecture, head_width: int) -> dict[str, Any]:
    """Return RoPE's parameters."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    parameters["rope_theta"] = keys.number("rope.freq_base", _DEFAULT_ROPE_BASE)
    rotated = keys.count("rope.dimension_count", head_width)
    if architecture.rotates_part:
        parameters["partial_rotary_factor"] = rotated / head_width
    elif rotated != head_width:
        what = f"{head_width}, the width of a head"
        raise keys.error("rope.dimension_count", what, rotated)
    _check_factors(keys.file, rotated // 2)
    return parameters | _scaling(keys)


def _check_factors(file: GGUFFile, count: int) -> None:
    """Raise GGUFError if the file has factors of RoPE, but not one for each frequency."""
    entry = file.tensors.get(ROPE_FACTORS)
    if entry is not None and entry.shape != (count,):
        where = f"{file.paths[0]}: tensor {ROPE_FACTORS}"
        raise GGUFError(expected(f"shape [{count}]", str(list(entry.shape)), where=where))


def _scaling(keys: Keys) -> dict[str, Any]:
    """Return the parameters of RoPE's scaling, if the file has one."""
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none" or "rope.scaling.factor" not in keys:
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        original = "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = keys.count(original)
        # llama.cpp multiplies YaRN's own factor by that of the file
        own = keys.number("rope.scaling.attn_factor", 1.0)
        scaling["attention_factor"] = own * (1 + 0.1 * log(scaling["factor"]))
    elif kind != "linear":
        raise keys.error("rope.scaling.type", "'none', 'linear' or 'yarn'", kind)
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
    if keys.value("attention.sliding_window", 0) != 0:  # converters write 0 for none
        own["sliding_window"] = keys.count("attention.sliding_window")
    original = "rope.scaling.original_context_length"
    if original in keys:
        own["original_max_position_embeddings"] = keys.count(original)
    factors = [f"rope_factors_{length}.weight" for length in ("short", "long")]
    if all(name in file for name in factors):
        short, long = ([float(v) for v in _vector(file, name)] for name in factors)
        rope = _rope(keys, architecture, values["head_dim"])
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope["original_max_position_embeddings"] = keys.count(original)
        if "rope.scaling.attn_factor" in keys:
            rope["attention_factor"] = keys.number("rope.scaling.attn_factor")
        own["rope_parameters"] = rope
    return own


def _vector(file: GGUFFile, name: str) -> Any:
    if len(file.tensors[name].shape) != 1:
        what, got = "a vector", f"shape {list(file.tensors[name].shape)}"
        raise GGUFError(expected(what, got, where=f"{file.paths[0]}: tensor {name}"))
    return file[name]


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
