"""What a fused layer does between its two functions: norms of heads, RoPE, cache, attention.

These have no packed weights, so they stay operations of PyTorch, which its compiler fuses.
"""

from typing import Any, Final

import torch
from torch import Tensor

MATMUL: Final = "matmul"
SUM: Final = "sum"
MODEL: Final = "model"
DECODING: Final = (MATMUL, SUM, MODEL)
"""How attention of one query is computed; MODEL: as the model's configuration says."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [B, H, T, D] after RoPE, which turns the pairs (i, i + R/2) of R elements.

    cos: [B, 1, T, R]. sin: the same, and its first half negated. R may be less than D.
    """
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
    return torch.cat([rotated(x[..., :width], cos, sin), x[..., width:]], -1)


def signed(sin: Tensor) -> Tensor:
    """Return sin with its first half negated: [..., R]."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def one_query(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, by: str
) -> Tensor:
    """Return attention of one query per row: [B, 1, H, D].

    query: [B, H, 1, D]. keys, values: [B, H/G, L, D]; G queries share them, so nothing is repeated.
    mask: bool or additive, [B or 1, 1, 1, L]. by: "matmul" multiplies matrices of G rows, "sum"
    multiplies and adds up in float32 if PyTorch's compiler fuses that, and is "matmul" otherwise.
    """
    batch, heads, _, width = query.shape
    groups = query.view(batch, keys.shape[1], -1, width)
    sums = by == SUM and torch.compiler.is_compiling()
    if sums:
        scores = (groups.float()[..., None, :] * keys.float()[..., None, :, :]).sum(-1)
    else:
        scores = (groups @ keys.transpose(-1, -2)).float()
    scores = scores * scaling
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


def is_one_query(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Return whether `one_query` computes what "sdpa" of transformers does with these arguments."""
    return (
        query.shape[2] == 1
        and (mask is None or mask.shape[1] == 1)
        and options.get("position_bias") is None
    )
