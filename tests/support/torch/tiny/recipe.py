"""What a file of a tiny model is made of, and what llama.cpp's converter does to tensors.

A recipe has the configuration of a Hugging Face model and the keys of its GGUF file. The keys are
written out by hand: they are what a loader must understand, so nothing here derives one from the
other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from tests.support.torch.tiny.tokenizers import VOCABULARY

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
        keys: the file's metadata; without the `{arch}.` in front.
        convert: what llama.cpp's converter does to the tensors, under the model's names.
        gain: what the weights of norms are near to.
        tokenizer: "gpt2" or "llama"; empty for none.
        formats: of the matrices, one after the other; none for those of Q4_K_M.
        extra: more tensors of the file, in float32.
        lacks: the end of names of biases that the file does not have.
        name: `general.name`.
        ignored: what transformers' own loader ignores of the file: its model is another one.
    """

    architecture: str
    config: PreTrainedConfig
    keys: dict[str, Any]
    convert: Callable[[Tensors, PreTrainedConfig], Tensors] = lambda tensors, _: tensors
    gain: float = 1.0
    tokenizer: str = "gpt2"
    formats: tuple[str, ...] = ()
    extra: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    lacks: str = "no name"
    name: str = "Tiny"
    ignored: str = ""


def sizes(*, layers: int = 2, kv_heads: int = KV_HEADS) -> dict[str, Any]:
    """Return the part of a configuration that most architectures share."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCABULARY,
    }


def file_keys(
    config: Any, norm: str = "layer_norm_rms_epsilon", eps: float = EPS, **more: Any
) -> dict[str, Any]:
    """Return the keys that the converter writes for most architectures. norm: the key of eps."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{norm}": eps,
    }
    return keys | {name.replace("__", "."): value for name, value in more.items()}


# --- what the converter does to tensors -----------------------------------------------------------


def interleaved(tensors: Tensors, config: Any) -> Tensors:
    """Take rows of q and k from the two halves of each head in turns, as RoPE in llama.cpp does."""

    def change(rows: NDArray[Any], heads: int) -> NDArray[Any]:
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    made = dict(tensors)
    for name, tensor in tensors.items():
        if (module := name.split(".")[-2]) in heads:
            made[name] = tensor.map(partial(change, heads=heads[module]))
    return made


def norms_plus_one(tensors: Tensors, _: Any) -> Tensors:
    """Add one to the weights of norms."""
    return {
        name: tensor.map(lambda gain: gain + 1) if name.endswith("norm.weight") else tensor
        for name, tensor in tensors.items()
    }


def experts_apart(tensors: Tensors, _: Any) -> Tensors:
    """Split gate from up, and store the gate of the shared expert as a vector."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem, half = name.removesuffix("gate_up_proj"), tensor.data.shape[1] // 2
            for part, chosen in (("gate", slice(half)), ("up", slice(half, None))):
                made[f"{stem}{part}_proj.weight"] = tensor.map(itemgetter((slice(None), chosen)))
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = tensor
        elif "shared_expert_gate" in name:
            made[name] = tensor.map(np.squeeze)
        else:
            made[name] = tensor
    return made
