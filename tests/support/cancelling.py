"""Q4_1 weights in which scale · code and minimum cancel each other, exactly in many elements."""

import functools
from typing import Final

import numpy as np

from q4jit.weights.formats import FORMATS
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
