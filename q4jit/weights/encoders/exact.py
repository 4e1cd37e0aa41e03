"""Encoders with the bytes of the gguf package: formats whose scale follows from extreme values."""

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import FORMATS

# The numbers of MXFP4's codes 0..7; the code of -x is 8 more than that of x.
_E2M1: Final = np.array(FORMATS["MXFP4"].numbers[:8], np.float32)
_BIAS_E8M0: Final = 127
_LARGEST_E2M1: Final = 2  # the exponent of 6, the largest number of E2M1

_QUIET_NAN: Final = np.uint32(0x0040_0000)
_UPPER_HALF: Final = np.uint32(0xFFFF_0000)


def floats(blocks: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of F32 and F16: the elements themselves."""
    return blocks.view(np.uint8)


def bf16(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode BF16: the upper half of each f32, rounded to even. NaN becomes quiet."""
    bits = blocks.view(np.uint32)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    upper = np.where(np.isnan(blocks), bits & _UPPER_HALF | _QUIET_NAN, bits + half)
    return (upper >> np.uint32(16)).astype("<u2").view(np.uint8)


def q4_0(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode Q4_0: the element with the largest magnitude has the code 0."""
    scale, codes = _signed_codes(blocks, 8)
    return as_bytes(scale, pack_nibbles(codes))


def q5_0(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode Q5_0: the element with the largest magnitude has the code 0."""
    scale, codes = _signed_codes(blocks, 16)
    return as_bytes(scale, _fifth_bits(codes), pack_nibbles(codes & np.uint8(15)))


def q4_1(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode Q4_1: the codes divide the range of a block into 15 steps."""
    scale, minimum, codes = _codes_of_range(blocks, 15)
    return as_bytes(scale, minimum, pack_nibbles(codes))


def q5_1(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode Q5_1: the codes divide the range of a block into 31 steps."""
    scale, minimum, codes = _codes_of_range(blocks, 31)
    return as_bytes(scale, minimum, _fifth_bits(codes), pack_nibbles(codes & np.uint8(15)))


def q8_0(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode Q8_0: the largest magnitude has the code 127 or -127."""
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scaled = blocks * _reciprocal(scale)
    whole = _truncated(scaled)
    # rounds .5 away from zero like C's roundf; adding 0.5 first would round 0.49999997 up
    codes = whole + _truncated((scaled - whole) * np.float32(2))
    return as_bytes(scale.astype("<f2"), codes.astype(np.int8))


def mxfp4(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode MXFP4: a power of two as the scale, and the nearest number of E2M1 for each element.

    A tie goes to the smaller magnitude. The bytes of NaN and Inf mean nothing: MXFP4 has neither.
    """
    magnitudes = np.abs(blocks)
    largest = magnitudes.max(-1, keepdims=True)
    exponent = np.floor(np.log2(largest)) - np.float32(_LARGEST_E2M1 - _BIAS_E8M0)
    exponent = np.where((largest > 0) & np.isfinite(largest), exponent, np.float32(0))
    # As in gguf, the exponents -1, -2, … of blocks below 2**-125 wrap to 255, 254, …; their codes
    # are 0.
    stored = exponent.astype(np.int32).astype(np.uint8)
    scale = np.ldexp(np.float32(1), stored.astype(np.int32) - (_BIAS_E8M0 + 1))
    codes = np.zeros(blocks.shape, np.uint8)
    for smaller, larger in pairwise(_E2M1):
        # a code whose value overflows is further away than any other
        middle = np.where(np.isinf(scale * larger), np.inf, scale * ((smaller + larger) / 2))
        codes += magnitudes > middle
    negative = (blocks < 0) & (codes > 0)
    codes |= negative.view(np.uint8) << np.uint8(3)
    return as_bytes(stored, pack_nibbles(codes))


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes of codes [..., 32] below 16: element i beside element i + 16."""
    return codes[..., :16] | codes[..., 16:] << np.uint8(4)


def _signed_codes(
    blocks: NDArray[np.float32], zero: int
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Return scales and codes of 0 to 2·zero - 1 such that the extreme element has the code 0."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = largest / np.float32(-zero)
    codes = _truncated(blocks * _reciprocal(scale) + np.float32(zero + 0.5))
    return scale.astype("<f2"), codes.clip(0, 2 * zero - 1).astype(np.uint8)


def _codes_of_range(
    blocks: NDArray[np.float32], steps: int
) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]:
    """Return scales, minima and codes of 0 to `steps`, from the minimum to the maximum."""
    minimum, maximum = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = (maximum - minimum) / np.float32(steps)
    codes = _truncated((blocks - minimum) * _reciprocal(scale) + np.float32(0.5))
    return scale.astype("<f2"), minimum.astype("<f2"), codes.clip(0, steps).astype(np.uint8)


def _fifth_bits(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bit 4 of codes [..., 32] as 4 bytes, with bit i for element i."""
    return np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")


def _reciprocal(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _truncated(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round towards zero; NaN and Inf become 0, since C does not define their conversion to int.

    They result from NaN, Inf or a scale below 2**-128 (its reciprocal overflows). Such a scale is
    stored as NaN, Inf or 0, so these codes do not matter.
    """
    return np.trunc(np.where(np.isfinite(scaled), scaled, np.float32(0)))


def as_bytes(*fields: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the bytes of fields [n, size], side by side."""
    return np.concatenate([f.view(np.uint8) for f in fields], axis=-1)
