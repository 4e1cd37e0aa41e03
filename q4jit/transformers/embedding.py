"""`ScaledEmbedding`: the embedding of Gemma's models."""

from typing import Any

import torch
from torch import Tensor

from q4jit.torch import Embedding


class ScaledEmbedding(Embedding):
    """An `Embedding` whose vectors are multiplied by a number.

    Attributes:
        scale: the number, rounded to the type of the vectors, as transformers does.
    """

    def __init__(self, weight: Any, scale: float, *, dtype: torch.dtype = torch.float32) -> None:
        """Make a table of a weight [K, N]. Raises the errors of `Embedding`."""
        super().__init__(weight, dtype=dtype)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scaled vectors of ids: [..., K] for ids [...]."""
        vectors = super().forward(ids)
        return vectors * torch.tensor(self.scale, dtype=vectors.dtype, device="cpu").item()

    def extra_repr(self) -> str:
        """Return sizes, format and scale, for `print(model)`."""
        return f"{super().extra_repr()}, scale={self.scale:g}"
