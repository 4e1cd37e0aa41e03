"""A made-up format, which tests add to `FORMATS`: what every target must be able to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import FORMATS, FactorBits, Format, Plane, SubFactors
from q4jit.weights.tensor import QuantizedTensor
from tests.support.kernels import F32, Doubles, Weight, random_blocks

# 64 elements in sub-blocks of 16: codes of 3 bits in planes of 2 and 1, and an offset
MADE_UP: Final = Format(
    "Q3_X",
    1000,
    64,
    32,
    (Plane(8, 2, 16), Plane(24, 1, 8, lshift=2)),
    scale_at=0,
    minimum_at=2,
    sub_scales=SubFactors((FactorBits(4, 4, 4),), zero=8),
    sub_minima=SubFactors((FactorBits(4, 4, 4, shift=4),), negative=True),
    sub_block_elements=16,
    zero=3,
)


@contextmanager
def registered() -> Iterator[Format]:
    """Add the made-up format to `FORMATS`."""
    FORMATS[MADE_UP.name] = MADE_UP
    try:
        yield MADE_UP
    finally:
        del FORMATS[MADE_UP.name]


def made_up_weight(k: int, n: int) -> Weight:
    """Return a random weight of the format, which must be registered."""
    blocks = random_blocks(MADE_UP, k, n, "normal", np.random.default_rng([k, n]))
    tensor = QuantizedTensor.from_bytes(blocks, shape=(k, n), format=MADE_UP.name)
    return Weight(tensor, _values(blocks).reshape(n, k).T)


def _values(blocks: NDArray[np.uint8]) -> Doubles:
    """Decode blocks [n, blocks, 32] without the format's description: f64 [n, blocks, 4, 16]."""
    scale, minimum = (blocks[..., at : at + 2].copy().view("<f2").astype(F32) for at in (0, 2))
    low = blocks[..., np.newaxis, 8:24] >> (2 * np.arange(4))[:, np.newaxis] & 3
    high = blocks[..., np.newaxis, 24:32] >> np.arange(8)[:, np.newaxis] & 1
    codes = low + 4 * high.reshape(low.shape)
    factors = blocks[..., 4:8].astype(F32)
    sub_scales = scale * (factors % 16 - 8)
    sub_minima = minimum * (factors // 16)
    numbers = codes.astype(F32) - 3
    values = sub_scales[..., np.newaxis] * numbers - sub_minima[..., np.newaxis]
    return values.astype(np.float64)
