"""Weights in which scale · code and minimum cancel each other, exactly in many elements."""

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import FORMATS, SubFactors
from tests.support.kernels import F32, Floats, Weight, random_blocks, set_f16, wrap

QUANTS_AT: Final = 4  # in a block, behind d and m
ZEROS: Final = (0, 16)
"""Elements of each block that are 0 in the columns 1, 4, 7, …"""


@functools.cache
def cancelling(k: int, n: int) -> Weight:
    """Return a weight whose blocks have a code of the value 0: minimum = −code · scale.

    All elements of the columns 0, 3, 6, … are 0, those in `ZEROS` of the columns 1, 4, 7, …, and
    random ones of the others. Products with a scale of all of f16's 11 bits need more than 24 bits.
    """
    rng = np.random.default_rng([k, n])
    blocks = random_blocks(FORMATS["Q4_1"], k, n, "normal", rng)
    shape = blocks.shape[:2]
    few_bits = rng.integers(64, 128, shape)  # 15 times this is exact in f16
    all_bits = rng.integers(1024, 2048, shape) / 16
    is_power = rng.integers(0, 2, shape) == 1  # a power of two times any scale is exact
    codes = np.where(is_power, rng.choice([1, 2, 4, 8], shape), rng.integers(0, 16, shape))
    scales = np.where(is_power, all_bits, few_bits) / 2048 * rng.choice([-1, 1], shape)
    set_f16(blocks, 0, scales.astype(np.float16))
    set_f16(blocks, 2, (-codes * scales).astype(np.float16))
    pairs = (codes * 0x11).astype(np.uint8)  # two elements of a byte
    blocks[::3, :, QUANTS_AT:] = pairs[::3, :, np.newaxis]
    blocks[1::3, :, QUANTS_AT] = pairs[1::3]
    w = wrap("Q4_1", k, blocks)
    assert not w.values[:, ::3].any()
    for first in ZEROS:
        assert not w.values[first::32, 1::3].any()
    return w


@functools.cache
def nearly_cancelling(k: int, n: int) -> Weight:
    """Return `cancelling` with the smallest scales in the first block: no column is 0."""
    raw = cancelling(k, n).tensor.raw.reshape(n, -1, FORMATS["Q4_1"].block_bytes)
    rng = np.random.default_rng(0)
    tiny = random_blocks(FORMATS["Q4_1"], 32, n, "zero", rng)
    set_f16(tiny, 0, (rng.choice([-1, 1], (n, 1)) / 2**24).astype(np.float16))
    w = wrap("Q4_1", k, np.concatenate([tiny, raw[:, 1:]], axis=1))
    assert w.values.any(0).all()
    return w


def only_zeros(k: int) -> Floats:
    """Return rows of x that are 0 wherever the columns 1, 4, 7, … of `cancelling` are not."""
    x = np.zeros((4, k), F32)
    rng = np.random.default_rng(k)
    for first in ZEROS:
        x[:3, first::32] = rng.standard_normal((3, k // 32))
        x[3, 32 + first] = 1.7  # a single unit
    x[1] *= F32(1e20)
    x[2] *= F32(1e-20)
    return x


@functools.cache
def cancelling_sub_blocks(name: str, k: int, n: int) -> Weight:
    """Return a weight with sub-minima whose columns 0, 2, 4, … are exactly 0.

    There, block scale and block minimum are the same, all codes of a sub-block too, and the
    sub-minimum is that code times the sub-scale. The other columns are so but in the first block.
    """
    fmt = FORMATS[name]
    assert fmt.sub_scales is not None
    assert fmt.sub_minima is not None
    assert fmt.scale_at is not None
    assert fmt.minimum_at is not None
    rng = np.random.default_rng([k, n])
    blocks = random_blocks(fmt, k, n, "normal", rng)
    shape = blocks.shape[:2]
    kept = blocks[1::2, 0].copy()
    scales = (rng.integers(1024, 2048, shape) / 2048 * rng.choice([-1, 1], shape)).astype("<f2")
    set_f16(blocks, fmt.scale_at, scales)
    set_f16(blocks, fmt.minimum_at, scales)
    most = (1 << fmt.sub_minima.bits) - 1
    codes = rng.integers(1, 1 << fmt.quant_bits, (*shape, fmt.sub_blocks))
    factors = rng.integers(0, most // codes + 1)
    _set_factors(blocks, fmt.sub_scales, factors)
    _set_factors(blocks, fmt.sub_minima, factors * codes)
    for i in range(fmt.block_elements):
        for plane in fmt.planes:
            byte, shift = plane.position(i)
            code = codes[..., i // fmt.sub_block_elements] >> plane.lshift
            _set_bits(blocks, plane.at + byte, shift, plane.bits, code)
    blocks[1::2, 0] = kept
    set_f16(blocks[1::2, 0], fmt.scale_at, (scales[1::2, 0] / 2048).astype(np.float16))
    set_f16(blocks[1::2, 0], fmt.minimum_at, (scales[1::2, 0] / 4096).astype(np.float16))
    w = wrap(name, k, blocks)
    assert not w.values[:, ::2].any()
    assert w.values[:, 1::2].any(0).all()
    return w


def _set_factors(blocks: NDArray[np.uint8], sub: SubFactors, values: NDArray[np.int64]) -> None:
    """Write the integers [..., sub-blocks] of blocks [..., block_bytes]."""
    for j in range(values.shape[-1]):
        for part in sub.parts:
            byte, shift = part.position(j)
            _set_bits(blocks, byte, shift, part.bits, values[..., j] >> part.lshift)


def _set_bits(
    blocks: NDArray[np.uint8], byte: int, shift: int, bits: int, values: NDArray[np.int64]
) -> None:
    mask = (1 << bits) - 1
    blocks[..., byte] &= np.uint8(0xFF ^ mask << shift)
    blocks[..., byte] |= ((values & mask) << shift).astype(np.uint8)
