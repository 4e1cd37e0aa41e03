"""Random weights and activations, and their exact products, which kernels are compared with."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, numpy_dtype
from q4jit.precision import error_scale
from q4jit.weights.formats import FORMATS, decode
from q4jit.weights.tensor import QuantizedTensor

Doubles = NDArray[np.float64]

_DECODED_BYTES: Final = 256 << 20  # of a weight's f64 values at a time


@functools.cache
def random_x(m: int, k: int, dtype: FloatType = "f32") -> NDArray[Any]:
    """Return normally distributed activations [M, K]. Raises ImportError as `numpy_dtype` does."""
    normal = np.random.default_rng([m, k]).standard_normal((m, k)).astype(np.float32)
    return normal.astype(numpy_dtype(dtype))


@functools.cache
def random_weight(name: str, k: int, n: int, seed: int = 0) -> QuantizedTensor:
    """Return a weight [K, N] of random codes whose products are about as large as x."""
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
            field = value * rng.uniform(0.5, 1.5, (*blocks.shape[:2], 1))
            blocks[..., at : at + 2] = field.astype("<f2").view(np.uint8)
    return QuantizedTensor.from_bytes(blocks.tobytes(), shape=(k, n), format=name)


def without_signs(w: QuantizedTensor) -> QuantizedTensor:
    """Return a weight whose values are at least 0: no sign bits, and codes from the zero up."""
    fmt, raw = w.block_format, w.raw.copy()
    if fmt.float_dtype is not None:
        raw = np.abs(raw.view(fmt.float_dtype)).view(np.uint8)
        return QuantizedTensor.from_bytes(raw.tobytes(), shape=w.shape, format=w.format)
    blocks = raw.reshape(len(raw), -1, fmt.block_bytes)
    for plane in fmt.planes:
        if plane.lshift + plane.bits < fmt.quant_bits:
            continue
        codes = blocks[..., plane.at : plane.at + plane.size_bytes(fmt.block_elements)]
        highest = (0xFF // ((1 << plane.bits) - 1)) << (plane.bits - 1)  # bits of a byte's codes
        if fmt.signed:
            codes &= 0xFF ^ highest
        elif fmt.zero:
            codes |= highest
    for at in (fmt.scale_at, fmt.minimum_at):
        if at is not None:
            blocks[..., at + 1] &= 0x7F
    if fmt.sub_scales_at is not None:
        count = fmt.block_elements // fmt.sub_block_elements
        blocks[..., fmt.sub_scales_at : fmt.sub_scales_at + count] &= 0x7F
    return QuantizedTensor.from_bytes(raw.tobytes(), shape=w.shape, format=w.format)


def exact_products(x: NDArray[Any], weights: Sequence[QuantizedTensor]) -> tuple[Doubles, Doubles]:
    """Return Σ x @ w over `weights` [K, N] in float64, and its `precision.error_scale`."""
    wide = x.astype(np.float64)
    k, n = weights[0].shape
    y, squares = (np.zeros((len(x), n)) for _ in range(2))
    step = max(1, _DECODED_BYTES // (8 * k))
    for w in weights:
        for first in range(0, n, step):
            batch = slice(first, first + step)
            values = decode(w.block_format, w.raw[batch]).astype(np.float64).T
            y[:, batch] += wide @ values
            squares[:, batch] += wide**2 @ values**2
    return y, error_scale(squares, len(weights) * k)


def rotated_copies(total_bytes: int, one_bytes: int) -> int:
    """Return the number of weights of `one_bytes` that a measurement uses in turn.

    Together they exceed `total_bytes`, so that no weight is in a cache when its turn comes; 0: one
    weight may stay in the cache.
    """
    return max(2, total_bytes // max(one_bytes, 1) + 1) if total_bytes else 1
