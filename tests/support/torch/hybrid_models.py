"""Random GGUF files of the architectures that transformers keeps packed, in their tensor names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from q4jit import quantize
from q4jit.weights.formats import FORMATS

WIDTH: Final = 256
HIDDEN: Final = 512
VOCABULARY: Final = 320
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 64
KEY_HEADS, VALUE_HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 4, 64, 64
VALUES: Final = VALUE_HEADS * VALUE_WIDTH
QKV: Final = 2 * KEY_HEADS * KEY_WIDTH + VALUES
EXPERTS, CHOSEN, EXPERT_HIDDEN = 4, 2, 256
ARCHITECTURES: Final = ("qwen35", "qwen35moe", "lfm2")
NOTHING: Final[Mapping[str, str]] = {}

Array = NDArray[np.float32]


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        values: in PyTorch's order of axes.
        format: the name of the block format, "F32" for floats.
    """

    name: str
    values: Array
    format: str = "F32"


def write(
    path: Path,
    architecture: str,
    *,
    tied: bool = False,
    without: str = "",
    formats: Mapping[str, str] = NOTHING,
) -> Path:
    """Write a model of two layers: one of linear attention or convolution, one of full attention.

    tied: the head is the embedding. without: the name of a tensor to leave out. formats: other ones
    than usual, by the names of tensors.
    """
    rng = np.random.default_rng(ARCHITECTURES.index(architecture))
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, architecture)
    for entry in _entries(rng, architecture, tied):
        if entry.name != without:
            _add(writer, entry._replace(format=formats.get(entry.name, entry.format)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, entry: Entry) -> None:
    if entry.format == "F32":
        writer.add_tensor(entry.name, entry.values)
        return
    blocks = np.stack(
        [
            quantize(matrix.T, entry.format).raw
            for matrix in entry.values.reshape(-1, *entry.values.shape[-2:])
        ]
    )
    kind = gguf.GGMLQuantizationType(FORMATS[entry.format].ggml_type)
    writer.add_tensor(entry.name, blocks.reshape(*entry.values.shape[:-1], -1), raw_dtype=kind)


def _add_keys(writer: Any, architecture: str) -> None:
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if architecture == "lfm2":
        writer.add_feed_forward_length(HIDDEN)
        writer.add_head_count_kv([0, KV_HEADS])
        writer.add_shortconv_l_cache(3)
        return
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_rope_dimension_count(HEAD_WIDTH // 2)
    writer.add_rope_dimension_sections([6, 5, 5, 0])
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(KEY_WIDTH)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUES)
    if architecture == "qwen35":
        writer.add_feed_forward_length(HIDDEN)
    else:
        writer.add_expert_feed_forward_length(EXPERT_HIDDEN)
        writer.add_expert_shared_feed_forward_length(EXPERT_HIDDEN)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(CHOSEN)


def _entries(rng: np.random.Generator, architecture: str, tied: bool) -> Iterator[Entry]:
    yield _matrix(rng, "token_embd", VOCABULARY, WIDTH, "Q6_K")
    if not tied:
        yield _matrix(rng, "output", VOCABULARY, WIDTH, "Q8_0")
    if architecture == "lfm2":
        yield _norm(rng, "token_embd_norm", WIDTH)
        yield from _convolution(rng, "blk.0")
    else:
        yield _norm(rng, "output_norm", WIDTH)
        yield from _linear_attention(rng, "blk.0")
    yield from _attention(rng, "blk.1", gated=architecture != "lfm2")
    for block in ("blk.0", "blk.1"):
        yield _norm(rng, f"{block}.attn_norm", WIDTH)
        after = "ffn_norm" if architecture == "lfm2" else "post_attention_norm"
        yield _norm(rng, f"{block}.{after}", WIDTH)
        if architecture == "qwen35moe":
            yield from _mixture(rng, block)
        else:
            yield _matrix(rng, f"{block}.ffn_gate", HIDDEN, WIDTH, "Q4_K")
            yield _matrix(rng, f"{block}.ffn_up", HIDDEN, WIDTH, "Q5_0")
            yield _matrix(rng, f"{block}.ffn_down", WIDTH, HIDDEN, "IQ4_NL")


def _attention(rng: np.random.Generator, block: str, *, gated: bool) -> Iterator[Entry]:
    queries = HEADS * HEAD_WIDTH
    yield _matrix(rng, f"{block}.attn_q", queries * (2 if gated else 1), WIDTH, "Q4_K")
    yield _matrix(rng, f"{block}.attn_k", KV_HEADS * HEAD_WIDTH, WIDTH, "Q8_0")
    yield _matrix(rng, f"{block}.attn_v", KV_HEADS * HEAD_WIDTH, WIDTH, "Q8_0")
    yield _matrix(rng, f"{block}.attn_output", WIDTH, queries, "Q4_1")
    yield _norm(rng, f"{block}.attn_q_norm", HEAD_WIDTH)
    yield _norm(rng, f"{block}.attn_k_norm", HEAD_WIDTH)


def _linear_attention(rng: np.random.Generator, block: str) -> Iterator[Entry]:
    yield _matrix(rng, f"{block}.attn_qkv", QKV, WIDTH, "Q4_K")
    yield _matrix(rng, f"{block}.attn_gate", VALUES, WIDTH, "Q4_K")
    yield _matrix(rng, f"{block}.ssm_alpha", VALUE_HEADS, WIDTH, "Q8_0")
    yield _matrix(rng, f"{block}.ssm_beta", VALUE_HEADS, WIDTH, "F32")
    yield _matrix(rng, f"{block}.ssm_out", WIDTH, VALUES, "Q4_K")
    yield Entry(f"{block}.ssm_conv1d.weight", _values(rng, QKV, 4))
    yield Entry(f"{block}.ssm_a", -np.exp(_values(rng, VALUE_HEADS)))
    yield Entry(f"{block}.ssm_dt.bias", _values(rng, VALUE_HEADS))
    yield _norm(rng, f"{block}.ssm_norm", VALUE_WIDTH)


def _convolution(rng: np.random.Generator, block: str) -> Iterator[Entry]:
    yield _matrix(rng, f"{block}.shortconv.in_proj", 3 * WIDTH, WIDTH, "Q4_K")
    yield _matrix(rng, f"{block}.shortconv.out_proj", WIDTH, WIDTH, "MXFP4")
    yield Entry(f"{block}.shortconv.conv.weight", _values(rng, WIDTH, 3))


def _mixture(rng: np.random.Generator, block: str) -> Iterator[Entry]:
    yield _matrix(rng, f"{block}.ffn_gate_inp", EXPERTS, WIDTH, "F32")
    yield Entry(f"{block}.ffn_gate_inp_shexp.weight", _values(rng, WIDTH, scale=1 / 16))
    for name, n, k, format_ in (
        ("gate", EXPERT_HIDDEN, WIDTH, "Q4_K"),
        ("up", EXPERT_HIDDEN, WIDTH, "Q4_K"),
        ("down", WIDTH, EXPERT_HIDDEN, "Q6_K"),
    ):
        values = _values(rng, EXPERTS, n, k, scale=k**-0.5)
        yield Entry(f"{block}.ffn_{name}_exps.weight", values, format_)
        yield _matrix(rng, f"{block}.ffn_{name}_shexp", n, k, "Q8_0")


def _matrix(rng: np.random.Generator, name: str, n: int, k: int, format_: str) -> Entry:
    return Entry(f"{name}.weight", _values(rng, n, k, scale=k**-0.5), format_)


def _norm(rng: np.random.Generator, name: str, width: int) -> Entry:
    return Entry(f"{name}.weight", 1 + _values(rng, width, scale=1 / 8))


def _values(rng: np.random.Generator, *shape: int, scale: float = 1) -> Array:
    return (rng.standard_normal(shape) * scale).astype(np.float32)
