"""What a fused layer does between its two functions: norms of heads, RoPE, cache, attention.

These have no packed weights, so they stay operations of PyTorch, which its compiler fuses.
"""

import operator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from q4jit.torch.memory import version_of

AUTO: Final = "auto"
MATMUL: Final = "matmul"
SUM: Final = "sum"
MODEL: Final = "model"
DECODING: Final = (AUTO, MATMUL, SUM, MODEL)
"""How attention of one query is computed; MODEL: as the model's configuration says."""

_KEPT_TURNS: Final = 2  # Gemma 3 alternates between two kinds of layers
_Turns = tuple[Tensor, Tensor]


def by_head(x: Tensor, batch: int, length: int, width: int) -> Tensor:
    """Return heads [B, H, T, D] of x [B, T, H · D]."""
    if length == 1:  # the same without a transposition
        return x.view(batch, -1, 1, width)
    return x.view(batch, length, -1, width).transpose(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [B, H, T, D] after RoPE, which turns the pairs (i, i + R/2) of R elements.

    cos: [B, 1, T, R]. sin: the same, and its first half negated. R may be less than D.
    """
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
    return torch.cat([rotated(x[..., :width], cos, sin), x[..., width:]], -1)


def turns_of(embeddings: _Turns) -> _Turns:
    """Return cos and sin for `rotated`.

    embeddings: cos and sin [B, T, R] of transformers. All layers of a forward get the same ones, so
    an eager call keeps the last results. PyTorch's compiler finds equal expressions by itself, and
    a graph that is captured has to compute its own.
    """
    if (
        torch.compiler.is_compiling()
        or (embeddings[1].is_cuda and torch.cuda.is_current_stream_capturing())
        or embeddings[1].is_inference()  # it would not say that it was written to
        or any(x.requires_grad for x in embeddings)  # results without gradients would be kept
    ):
        return _turns(*embeddings)
    global _last_turns  # noqa: PLW0603 - a cache, replaced as a whole
    key = *embeddings, *map(version_of, embeddings)
    for kept, turns in _last_turns:
        if all(map(operator.is_, kept[:2], key[:2])) and kept[2:] == key[2:]:
            return turns
    turns = _turns(*embeddings)
    if not turns[1].is_inference():  # gradients could not use it later
        _last_turns = ((key, turns), *_last_turns)[:_KEPT_TURNS]
    return turns


_last_turns: tuple[tuple[Any, _Turns], ...] = ()


def _turns(cos: Tensor, sin: Tensor) -> _Turns:
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return cos.unsqueeze(1), signed.unsqueeze(1)


def one_query(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, by: str
) -> Tensor:
    """Return attention of one query per row: [B, H, 1, D], or [B, 1, H, D] of the same order.

    query: [B, H, 1, D]. keys, values: [B, H/G, L, D]; G queries share them, so nothing is repeated.
    mask: bool or additive, [B or 1, 1, 1, L]. by: "matmul" multiplies matrices of G rows, "sum"
    multiplies and adds up in float32 if PyTorch's compiler fuses that, and is "matmul" otherwise;
    "auto" is one operation of PyTorch's on an eager CPU, which takes no mask here.
    """
    if by == AUTO and not (query.is_cuda or torch.compiler.is_compiling()):
        mixed: Tensor = scaled_dot_product_attention(
            query, keys, values, scale=scaling, enable_gqa=True
        )
        return mixed
    batch, heads, _, width = query.shape
    sums = by == SUM and torch.compiler.is_compiling()
    query = (query.float() if sums else query) * scaling  # first, so that float16 does not overflow
    groups = query.view(batch, keys.shape[1], -1, width)
    if sums:
        scores = (groups[..., None, :] * keys.float()[..., None, :, :]).sum(-1)
    else:
        scores = (groups @ keys.transpose(-1, -2)).float()
    if mask is not None:
        # the least number instead of -inf: a row without a visible key must not be NaN
        least = torch.finfo(torch.float32).min
        scores = scores.masked_fill(~mask, least) if mask.dtype is torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    if sums:
        mixed = (weights[..., None] * values.float()[..., None, :, :]).sum(-2).to(values.dtype)
    else:
        mixed = weights.to(values.dtype) @ values
    return mixed.view(batch, 1, heads, -1)


def is_one_query(
    query: Tensor, mask: Tensor | None, options: dict[str, Any], decoding: str
) -> bool:
    """Return whether `one_query` takes the place of "sdpa" of transformers with these arguments."""
    if decoding == AUTO:  # an eager CPU has one fast operation for it, if there is no mask
        chosen = mask is None or query.is_cuda or torch.compiler.is_compiling()
    else:
        chosen = decoding != MODEL
    return (
        chosen
        and query.shape[2] == 1
        and (mask is None or mask.shape[1] == 1)
        and options.get("position_bias") is None
    )
