"""The encoder of IQ4_NL: 16 values that are closer together near 0, and one scale per block."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.encoders.exact import as_bytes, pack_nibbles
from q4jit.weights.encoders.search import Floats, ScaleSearch, by_element, normalise, reciprocal
from q4jit.weights.formats import FORMATS

_NUMBERS: Final = np.array(FORMATS["IQ4_NL"].numbers, np.float32)

# The code of each half from -128 to 127.5: the middles between values are multiples of 0.5, so the
# elements in an interval of 0.5 have the same code.
_CODES: Final = np.abs(np.arange(-127.75, 128, 0.5)[:, np.newaxis] - _NUMBERS).argmin(1)
_CODES_U8: Final = _CODES.astype(np.uint8)
_NEAREST: Final = _NUMBERS[_CODES]

# Where the grid brings the largest element: to either end, which is 113 or -127, and near it.
_TARGETS: Final = (*range(-140, -90, 7), *range(127, 84, -7))


def iq4_nl(blocks: Floats) -> NDArray[np.uint8]:
    """Encode IQ4_NL: blocks [n, 32] to uint8 [n, 18]."""
    values = by_element(blocks, 32)
    powers = normalise(values, 1)
    search = ScaleSearch(values, _nearest)
    search.grid(_TARGETS)
    stored = (search.scale * powers).astype("<f2")
    scale = stored.astype(np.float32) / powers
    codes = np.take(_CODES_U8, _halves(values, reciprocal(scale)), mode="clip")
    return as_bytes(stored[:, np.newaxis], pack_nibbles(np.ascontiguousarray(codes.T)))


def _nearest(values: Floats, inverse: Floats) -> Floats:
    return np.take(_NEAREST, _halves(values, inverse), mode="clip")


def _halves(values: Floats, inverse: Floats) -> NDArray[np.intp]:
    """Return the rows of the tables for values / scale; those beyond a table's end are clipped."""
    halves = values * (2 * inverse)
    halves += np.float32(256)
    return halves.astype(np.intp)
