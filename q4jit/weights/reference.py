"""Random weights and activations, and their exact products, which kernels are compared with."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, numpy_dtype
from q4jit.precision import error_scale
from q4jit.weights.decode import decode
from q4jit.weights.formats import FORMATS, Format, SubFactors
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
    if fmt.float_type is not None:
        raw = float_bytes(fmt.float_type, rng.standard_normal((n, k)) * size)
        return QuantizedTensor.from_bytes(raw.tobytes(), shape=(k, n), format=name)
    blocks = rng.integers(0, 256, (n, k // fmt.block_elements, fmt.block_bytes), np.uint8)
    spread = fmt.largest_number if fmt.table else 1 << fmt.quant_bits - 1
    if fmt.sub_scales is not None:
        spread *= 1 << fmt.sub_scales.bits - 1
    depth = 1 << fmt.sub_minima.bits - 1 if fmt.sub_minima else 1
    store_scales(fmt, blocks, size / spread * rng.uniform(0.5, 1.5, blocks.shape[:2]))
    if fmt.minimum_at is not None:
        sign = 1 if fmt.sub_minima and fmt.sub_minima.negative else -1
        minima = sign * size / depth * rng.uniform(0.5, 1.5, (*blocks.shape[:2], 1))
        at = fmt.minimum_at
        blocks[..., at : at + 2] = minima.astype("<f2").view(np.uint8)
    return QuantizedTensor.from_bytes(blocks.tobytes(), shape=(k, n), format=name)


def float_bytes(float_type: FloatType, values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return floats [n, K] as stored in a float format: uint8 [n, column_bytes].

    Values become bfloat16 by truncation, which needs no package and is no worse for a reference.
    """
    if float_type == "bf16":
        upper = values.astype(np.float32).view(np.uint32) >> np.uint32(16)
        return upper.astype("<u2").view(np.uint8)
    return values.astype(numpy_dtype(float_type).newbyteorder("<")).view(np.uint8)


def store_scales(fmt: Format, blocks: NDArray[np.uint8], scales: NDArray[np.floating]) -> None:
    """Store positive scales [...] in blocks [..., block_bytes]; E8M0 rounds to powers of two."""
    assert fmt.scale_at is not None, "a block format without a scale"
    if fmt.scale_type == "e8m0":
        _, exponents = np.frexp(scales)
        blocks[..., fmt.scale_at] = np.clip(exponents + 128, 0, 254)
    else:
        stored = scales[..., np.newaxis].astype("<f2").view(np.uint8)
        blocks[..., fmt.scale_at : fmt.scale_at + 2] = stored


def without_signs(w: QuantizedTensor) -> QuantizedTensor:
    """Return a weight whose values are at least 0: of each pair ±v it takes v.

    Every code whose number is negative is replaced by the code with all bits but the sign's, or by
    the largest; scales and minima lose their signs.
    """
    fmt, raw = w.block_format, w.raw.copy()
    if fmt.float_type is not None:
        raw[:, fmt.block_bytes - 1 :: fmt.block_bytes] &= 0x7F
        return QuantizedTensor.from_bytes(raw.tobytes(), shape=w.shape, format=w.format)
    blocks = raw.reshape(len(raw), -1, fmt.block_bytes)
    _clear_sign_planes(fmt, blocks)
    for at in (fmt.scale_at if fmt.scale_type == "f16" else None, fmt.minimum_at):
        if at is not None:
            blocks[..., at + 1] &= 0x7F
    if fmt.sub_minima is not None and fmt.sub_minima.negative and fmt.minimum_at is not None:
        blocks[..., fmt.minimum_at + 1] |= 0x80
    if fmt.sub_scales is not None:
        _clear_sub_signs(fmt.sub_scales, fmt.sub_blocks, blocks)
    return QuantizedTensor.from_bytes(raw.tobytes(), shape=w.shape, format=w.format)


def _clear_sign_planes(fmt: Format, blocks: NDArray[np.uint8]) -> None:
    """Set the highest bit of every code so that its number is at least 0."""
    negative = np.array(fmt.numbers) < 0
    if not negative.any():
        return
    upper_half_is_negative = bool(negative[-1])
    for plane in fmt.planes:
        if plane.lshift + plane.bits < fmt.quant_bits:
            continue
        stored = blocks[..., plane.at : plane.at + plane.size_bytes(fmt.block_elements)]
        highest = (0xFF // ((1 << plane.bits) - 1)) << (plane.bits - 1)  # bits of a byte's codes
        if upper_half_is_negative:
            stored &= 0xFF ^ highest
        else:
            stored |= highest


def _clear_sub_signs(sub: SubFactors, count: int, blocks: NDArray[np.uint8]) -> None:
    """Set the highest bit of every stored sub-scale so that the factor is at least 0."""
    if not (sub.signed or sub.zero):
        return
    part = max(sub.parts, key=lambda each: each.lshift)
    for j in range(count):
        byte, shift = part.position(j)
        bit = np.uint8(1 << shift + part.bits - 1)
        if sub.signed:
            blocks[..., byte] &= ~bit
        else:
            blocks[..., byte] |= bit


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
