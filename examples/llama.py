"""A Llama decoder in NumPy whose linear layers run as q4jit kernels: a tutorial of the library.

Five short functions hold all arithmetic with weights. Each is ordinary NumPy. `@specialize`
compiles it into one kernel, which decodes the quantised blocks and does the arithmetic around the
products without another pass over memory. Attention has no weights and stays NumPy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from math import isfinite
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from q4jit import GGUFError, QuantizedTensor, specialize
from q4jit.config import num_threads
from q4jit.errors import expected

__all__ = ["Config", "Llama", "State"]

Array = NDArray[np.float32]
Weight = QuantizedTensor
Turns = NDArray[np.complex64]
# of one layer: new keys, new values, all keys, all values
Cache = tuple[Array, Array, Array, Array]

CHUNK = 512  # prompt tokens that pass through the layers together
BLOCK = 64  # rows of a chunk that attend together, so few that their scores stay in the CPU's cache
CAUSAL = np.triu(np.full((BLOCK, BLOCK), -np.inf, np.float32), 1)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Normalise the rows of x. The functions that call this helper are traced through it."""
    scaled: Array = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return scaled * gain


@specialize
def embed(ids: NDArray[np.int64], w: Weight) -> Array:
    """Look up the embeddings of tokens: rows of a weight."""
    rows: Array = w.rows(ids)
    return rows


@specialize
def norm_qkv(
    x: Array, gain: Array, eps: float, wq: Weight, wk: Weight, wv: Weight
) -> tuple[Array, Array, Array]:
    """Compute queries, keys and values: three products that share one normalised x."""
    h = rms_norm(x, gain, eps)
    return h @ wq, h @ wk, h @ wv


@specialize
def norm_swiglu(x: Array, gain: Array, eps: float, w_gate: Weight, w_up: Weight) -> Array:
    """Compute the wide half of the feed-forward network, gated by SiLU."""
    h = rms_norm(x, gain, eps)
    gate, up = h @ w_gate, h @ w_up
    gated: Array = gate / (1 + np.exp(-gate)) * up
    return gated


@specialize
def add_product(residual: Array, x: Array, w: Weight) -> Array:
    """Project x back to the model's width and add it to the residual."""
    return residual + x @ w


@specialize
def norm_head(x: Array, gain: Array, eps: float, w: Weight) -> Array:
    """Compute the logits of all tokens of the vocabulary."""
    return rms_norm(x, gain, eps) @ w


@dataclass(frozen=True)
class Config:
    """The shape of a model, read from a GGUF file's metadata and checked."""

    vocabulary: int
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    context: int
    rope_base: float
    norm_eps: float

    @property
    def head_width(self) -> int:
        """Elements of one head's query, key or value."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys, or values, over all heads."""
        return self.kv_heads * self.head_width

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Read the shape. Raises GGUFError for another architecture or an unsuitable value."""
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            cure = "run examples/transformers_generate.py, which takes other architectures"
            where = "general.architecture"
            raise GGUFError(expected("'llama'", repr(architecture), where=where, cure=cure))
        heads = _count(metadata, "llama.attention.head_count")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, tuple):
            raise GGUFError(
                expected(
                    "an array of strings", type(tokens).__name__, where="tokenizer.ggml.tokens"
                )
            )
        config = cls(
            vocabulary=len(tokens),
            layers=_count(metadata, "llama.block_count"),
            width=_count(metadata, "llama.embedding_length"),
            feed_forward=_count(metadata, "llama.feed_forward_length"),
            heads=heads,
            kv_heads=_count(metadata, "llama.attention.head_count_kv", heads),
            context=_count(metadata, "llama.context_length"),
            rope_base=_positive(metadata, "llama.rope.freq_base", 10000.0),
            norm_eps=_positive(metadata, "llama.attention.layer_norm_rms_epsilon"),
        )
        config._check(metadata)
        return config

    def _check(self, metadata: Mapping[str, Any]) -> None:
        if self.width % self.heads or self.head_width % 2:
            raise GGUFError(
                f"llama.attention.head_count {self.heads} must divide "
                f"llama.embedding_length {self.width} into heads of even width"
            )
        if self.heads % self.kv_heads:
            raise GGUFError(
                f"llama.attention.head_count_kv {self.kv_heads} must divide "
                f"llama.attention.head_count {self.heads}"
            )
        for key, required in (
            ("llama.rope.dimension_count", self.head_width),
            ("llama.attention.key_length", self.head_width),
            ("llama.attention.value_length", self.head_width),
            ("llama.rope.scaling.type", "none"),
            ("llama.expert_count", 0),
        ):
            if metadata.get(key, required) != required:
                raise GGUFError(expected(repr(required), repr(metadata[key]), where=key))


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer block."""

    attn_norm: Array
    attn_q: Weight
    attn_k: Weight
    attn_v: Weight
    attn_output: Weight
    ffn_norm: Array
    ffn_gate: Weight
    ffn_up: Weight
    ffn_down: Weight


class State:
    """Keys and values of the tokens so far, with room for `capacity` tokens.

    Both have the shape [layer, kv head, position, element]. Attention then multiplies by plain
    slices, and new tokens are written in place.
    """

    def __init__(self, config: Config, capacity: int) -> None:
        if not 0 < capacity <= config.context:
            raise ValueError(
                f"capacity must be from 1 to the model's context, {config.context}, not {capacity}"
            )
        shape = (config.layers, config.kv_heads, capacity, config.head_width)
        self.capacity = capacity
        self.length = 0
        self.keys = np.empty(shape, np.float32)
        self.values = np.empty(shape, np.float32)
        self.turns = _turns(config, capacity)
        self.step: Step | None = None

    def caches(self, count: int) -> Iterator["Cache"]:
        """Yield each layer's cache for `count` more tokens: their room, and all tokens so far."""
        stop = self.length + count
        new, seen = slice(self.length, stop), slice(stop)
        # iterating over a slice of all layers gives each layer's part
        return zip(
            self.keys[:, :, new],
            self.values[:, :, new],
            self.keys[:, :, seen],
            self.values[:, :, seen],
            strict=True,
        )


class Step:
    """One token through all layers, with calls that are bound once to arrays that stay."""

    def __init__(self, model: "Llama") -> None:
        config, eps = model.config, model.config.norm_eps
        width, turning = config.width, config.width + config.kv_width
        x, y, mixed, gated = (
            np.empty((1, n), np.float32) for n in (width, width, width, config.feed_forward)
        )
        qkv = np.empty((1, turning + config.kv_width), np.float32)
        q, k, v = qkv[:, :width], qkv[:, width:turning], qkv[:, turning:]
        heads = config.kv_heads, -1, config.head_width
        self.x, self.mixed = x, mixed.reshape(heads)
        self.queries, self.key, self.value = q.reshape(heads), k.reshape(heads), v.reshape(heads)
        self.pairs = _pairs(qkv[0, :turning]).reshape(-1, config.head_width // 2)
        self.layers = [
            (
                norm_qkv.bind(x, w.attn_norm, eps, w.attn_q, w.attn_k, w.attn_v, out=(q, k, v)),
                add_product.bind(x, mixed, w.attn_output, out=y),
                norm_swiglu.bind(y, w.ffn_norm, eps, w.ffn_gate, w.ffn_up, out=gated),
                add_product.bind(y, gated, w.ffn_down, out=x),
            )
            for w in model.layers
        ]

    def __call__(self, embedded: Array, state: State) -> Array:
        """Return the last layer's output for a token that follows those in `state`."""
        turn = state.turns[state.length]
        self.x[...] = embedded
        for calls, (new_keys, new_values, keys, values) in zip(
            self.layers, state.caches(1), strict=True
        ):
            project, add_attention, gate, add_feed_forward = calls
            project()
            np.multiply(self.pairs, turn, self.pairs)
            new_keys[...], new_values[...] = self.key, self.value
            # NumPy's BLAS is slow for few rows times many columns, and fast the other way round
            scores = np.ascontiguousarray((keys @ self.queries.swapaxes(1, 2)).swapaxes(1, 2))
            np.divide(*weighted(scores, values), self.mixed)
            add_attention()
            gate()
            add_feed_forward()
        return self.x


class Llama:
    """The decoder. `forward` turns token ids into logits and adds the tokens to a `State`."""

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.config = config = Config.from_metadata(metadata)
        width, kv_width, wide = config.width, config.kv_width, config.feed_forward
        shapes = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width, kv_width),
            "attn_v": (width, kv_width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (width, wide),
            "ffn_up": (width, wide),
            "ffn_down": (wide, width),
        }
        used: set[str] = set()

        def take(name: str, *shape: int) -> Any:
            used.add(name)
            return _take(tensors, name, shape)

        self.embedding: Weight = take("token_embd.weight", width, config.vocabulary)
        self.output_norm: Array = take("output_norm.weight", width)
        self.head: Weight = (
            take("output.weight", width, config.vocabulary)
            if "output.weight" in tensors
            else self.embedding
        )
        self.layers = [
            Layer(**{key: take(f"blk.{i}.{key}.weight", *shape) for key, shape in shapes.items()})
            for i in range(config.layers)
        ]
        if unknown := sorted(set(tensors) - used):
            raise GGUFError(f"tensor {unknown[0]!r} is not part of this llama decoder")

    def state(self, capacity: int) -> State:
        """Return an empty state with room for `capacity` tokens."""
        return State(self.config, capacity)

    def forward(self, tokens: Sequence[int], state: State, *, every: bool = False) -> Array:
        """Return the logits after the last of M more tokens, or after every one: [1 or M, N]."""
        if not 0 < len(tokens) <= state.capacity - state.length:
            raise ValueError(
                f"{len(tokens)} tokens do not fit after {state.length} in a state for "
                f"{state.capacity}"
            )
        logits = []
        for start in range(0, len(tokens), CHUNK):
            x = self._advance(tokens[start : start + CHUNK], state, every)
            if every or start + CHUNK >= len(tokens):
                logits.append(norm_head(x, self.output_norm, self.config.norm_eps, self.head))
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _advance(self, tokens: Sequence[int], state: State, every: bool) -> Array:
        """Return the last layer's output for a chunk of tokens that follow those in `state`.

        every: for all of its tokens, not only the last.
        """
        x: Array = embed(np.array(tokens), self.embedding)
        if len(tokens) == 1:
            state.step = state.step or Step(self)
            x = state.step(x, state)
        else:
            x = self._layers(x, state, every)
        state.length += len(tokens)
        return x

    def _layers(self, x: Array, state: State, every: bool) -> Array:
        eps = self.config.norm_eps
        turns = state.turns[state.length : state.length + len(x)]
        for w, cache in zip(self.layers, state.caches(len(x)), strict=True):
            q, k, v = norm_qkv(x, w.attn_norm, eps, w.attn_q, w.attn_k, w.attn_v)
            mixed = attention(q, k, v, turns, cache)
            if w is self.layers[-1] and not every:
                x, mixed = x[-1:], mixed[-1:]  # only the last row has logits
            x = add_product(x, mixed, w.attn_output)
            gated = norm_swiglu(x, w.ffn_norm, eps, w.ffn_gate, w.ffn_up)
            x = add_product(x, gated, w.ffn_down)
        return x

    def calls(self, prompt_length: int) -> Iterator[Callable[[], object]]:
        """Yield the calls that `forward` makes for a prompt and for a single token.

        Running them first moves two delays out of `forward`: the first call with a signature
        compiles, and the first call with a weight repacks it.
        """
        config, eps = self.config, self.config.norm_eps
        lengths = {1, min(prompt_length, CHUNK), prompt_length % CHUNK or CHUNK}
        for m in sorted(lengths, reverse=True):
            yield partial(embed, np.zeros(m, np.int64), self.embedding)
            x, wide = (np.zeros((m, n), np.float32) for n in (config.width, config.feed_forward))
            for w in self.layers:
                qkv = (x, w.attn_norm, eps, w.attn_q, w.attn_k, w.attn_v)
                yield partial(norm_qkv, *qkv)
                yield partial(add_product, x, x, w.attn_output)
                swiglu = (x, w.ffn_norm, eps, w.ffn_gate, w.ffn_up)
                yield partial(norm_swiglu, *swiglu)
                yield partial(add_product, x, wide, w.ffn_down)
        yield partial(norm_head, x[:1], self.output_norm, eps, self.head)


def attention(q: Array, k: Array, v: Array, turns: Turns, cache: Cache) -> Array:
    """Store k and v of M new tokens, and return attention of q to all tokens so far: [M, heads·D].

    q: [M, heads·D]; k, v: [M, kv heads·D]. RoPE rotates the pairs (2i, 2i+1) of q and k. A pair is
    one complex number, so a rotation is one product. Heads that share keys and values are rows of
    one matrix product.
    """
    new_keys, new_values, keys, values = cache
    m, (kv_heads, length, width) = len(q), values.shape
    np.multiply(_pairs(k).reshape(m, kv_heads, -1).swapaxes(0, 1), turns, _pairs(new_keys))
    new_values[...] = v.reshape(m, kv_heads, width).swapaxes(0, 1)
    mixed = np.empty((m, kv_heads, q.shape[1] // (kv_heads * width), width), np.float32)

    def mix(first: int) -> None:
        rows = slice(first, min(first + BLOCK, m))
        size, seen = rows.stop - first, length - m + rows.stop
        by_head = _pairs(q[rows]).reshape(size, kv_heads, -1, width // 2).transpose(1, 2, 0, 3)
        queries = np.multiply(by_head, turns[rows], order="C").view(np.float32)
        scores = queries.reshape(kv_heads, -1, width) @ keys[:, :seen].swapaxes(1, 2)
        scores.reshape(kv_heads, -1, size, seen)[..., -size:] += CAUSAL[:size, :size]
        sums, weights = weighted(scores, values[:, :seen])
        sums /= weights
        mixed[rows] = sums.reshape(kv_heads, -1, size, width).transpose(2, 0, 1, 3)

    for _ in _threads().map(mix, reversed(range(0, m, BLOCK))):  # the longest first
        pass
    return mixed.reshape(m, -1)


def weighted(scores: Array, values: Array) -> tuple[Array, Array]:
    """Return the values summed with weights exp(scores), [..., D], and the weights' sums, [..., 1].

    The scores become weights in place, relative to the largest of a row, so that none overflows.
    """
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, scores)
    return scores @ values, np.add.reduce(scores, axis=-1, keepdims=True)


@lru_cache
def _threads() -> ThreadPoolExecutor:
    """Return a pool for blocks of rows, which run in parallel: NumPy releases the GIL."""
    return ThreadPoolExecutor(num_threads())


def _pairs(x: Array) -> Turns:
    return x.view(np.complex64)


def _turns(config: Config, positions: int) -> Turns:
    """Return RoPE's factor for each position and pair of elements: [positions, D/2].

    It includes D^-¼. A query and a key are both rotated, so their product is scaled by D^-½.
    """
    pairs = np.arange(config.head_width // 2)
    speeds = config.rope_base ** (-2.0 * pairs / config.head_width)
    turns = np.exp(1j * np.outer(np.arange(positions), speeds)) * config.head_width**-0.25
    rounded: Turns = turns.astype(np.complex64)
    return rounded


def _take(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Any:
    if name not in tensors:
        raise GGUFError(f"the file has no tensor {name!r}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise GGUFError(expected(str(shape), str(tuple(tensor.shape)), where=f"shape of {name!r}"))
    return tensor


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise GGUFError(expected("a positive whole number", repr(value), where=key))
    return value


def _positive(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float) or not isfinite(value) or value <= 0:
        raise GGUFError(expected("a positive number", repr(value), where=key))
    return value
