"""Random weights and activations, and their exact products: what kernels are held to."""

import functools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.precision import error_scale
from q4jit.weights.formats import FORMATS, decode
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_DECODED_BYTES: Final = 256 << 20  # of f64 values of a weight at a time


@functools.cache
def random_x(m: int, k: int) -> Floats:
    """Normal activations [M, K]."""
    return np.random.default_rng([m, k]).standard_normal((m, k)).astype(np.float32)


@functools.cache
def random_weight(name: str, k: int, n: int, seed: int = 0) -> QuantizedTensor:
    """A weight [K, N] of random quants, whose products have about the size of x."""
    fmt = FORMATS[name]
    rng = np.random.default_rng([seed, k, n])
    size = 1 / math.sqrt(k)
    if fmt.float_dtype is not None:
        floats = (rng.standard_normal((n, k)) * size).astype(fmt.float_dtype)
        return QuantizedTensor.from_bytes(floats.tobytes(), shape=(k, n), format=name)
    blocks = rng.integers(0, 256, (n, k // fmt.block_elements, fmt.block_bytes), np.uint8)
    spread = 2.0 ** (fmt.quant_bits - 1)
    if fmt.sub_scales_at is not None:
        spread *= 128
    for at, value in ((fmt.scale_at, size / spread), (fmt.minimum_at, -size)):
        if at is not None:
            halves = value * rng.uniform(0.5, 1.5, (*blocks.shape[:2], 1))
            blocks[..., at : at + 2] = halves.astype("<f2").view(np.uint8)
    return QuantizedTensor.from_bytes(blocks.tobytes(), shape=(k, n), format=name)


def exact_products(x: Floats, weights: Sequence[QuantizedTensor]) -> tuple[Doubles, Doubles]:
    """Σ x @ w over `weights` [K, N] in float64, and √(Σ(xw)² + K·2⁻¹⁴⁹), which errors relate to."""
    wide = x.astype(np.float64)
    k, n = weights[0].shape
    y, squares = (np.zeros((len(x), n)) for _ in range(2))
    step = max(1, _DECODED_BYTES // (8 * k))
    for w in weights:
        for at in range(0, n, step):
            values = decode(w.block_format, w.raw[at : at + step]).astype(np.float64).T
            y[:, at : at + step] += wide @ values
            squares[:, at : at + step] += wide**2 @ values**2
    return y, error_scale(squares, len(weights) * k)


def rotated_copies(total_bytes: int, one_bytes: int) -> int:
    """Return how many equal weights of `one_bytes` take turns until they exceed `total_bytes`.

    total_bytes: what defeats the caches, or 0 where one weight may stay in them.
    """
    return max(2, total_bytes // max(one_bytes, 1) + 1) if total_bytes else 1
