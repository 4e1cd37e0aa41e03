"""Facts about a weight's scales: whether all are finite, and whether f16 is exact enough."""

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType
from q4jit.weights.decode import batches
from q4jit.weights.formats import Format
from q4jit.weights.mapped import DrainedColumns
from q4jit.weights.tiles import are_plain

_F16_MAGNITUDE: Final = 0x7FFF  # the bits of |d|, which are ordered like the values
_F16_INFINITY: Final = 0x7C00
_FLOAT_BITS: Final[dict[FloatType, tuple[int, int]]] = {  # of a magnitude, and of infinity
    "f32": (0x7FFFFFFF, 0x7F800000),
    "f16": (_F16_MAGNITUDE, _F16_INFINITY),
    "bf16": (0x7FFF, 0x7F80),
}
_E8M0_LATE: Final = 128 + 28  # 2^28: half of 2^(e - 127) at e
_F16_128: Final = 0x5800
# For rounding to f16: the largest rms relative error, and the largest share of one scale in the
# squares of all scales. The errors of one scale add up, while those of many cancel out.
_ROUNDING_ERROR: Final = 3.5e-4
_SCALE_SHARE: Final = 1 / 16


def scale_facts(fmt: Format, columns: NDArray[np.uint8] | DrainedColumns) -> tuple[bool, bool]:
    """Return whether all scales are finite, and whether values may be rounded to f16.

    columns: uint8 [N, column_bytes] of a matrix. See `QuantizedTensor.suits_f16`.
    """
    k = columns.shape[1] // fmt.block_bytes * fmt.block_elements
    bands = (columns[batch] for batch in batches(len(columns), k))
    if not are_plain(fmt):
        return all(finite_blocks(fmt, band).all() for band in bands), True
    counts = np.zeros(_F16_MAGNITUDE + 1, np.int64)  # of each |d|, by its bits
    for band in bands:
        band_counts = np.bincount(_field(fmt, band, 0) & _F16_MAGNITUDE)
        counts[: len(band_counts)] += band_counts
    return not counts[_F16_INFINITY:].any(), _rounds_well(counts)


def finite_blocks(fmt: Format, columns: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return for each block whether its values are finite, by its scale and minimum.

    A plain float is a block of its own. A scale in E8M0 counts as finite while kernels can apply it
    late, after they added up products of codes: below 2^28, which no trained weight approaches.
    """
    if fmt.float_type is not None:
        bits = np.ascontiguousarray(columns).view(f"<u{fmt.block_bytes}").reshape(-1)
        magnitude, infinity = _FLOAT_BITS[fmt.float_type]
        flags: NDArray[np.bool_] = bits & magnitude < infinity
        return flags
    finite = np.ones(columns.size // fmt.block_bytes, np.bool_)
    if fmt.scale_type == "e8m0":
        blocks = columns.reshape(-1, fmt.block_bytes)
        finite &= blocks[:, fmt.scale_at] < _E8M0_LATE
    elif fmt.scale_at is not None:
        finite &= _field(fmt, columns, fmt.scale_at) & _F16_MAGNITUDE < _F16_INFINITY
    if fmt.minimum_at is not None:
        finite &= _field(fmt, columns, fmt.minimum_at) & _F16_MAGNITUDE < _F16_INFINITY
    return finite


def _rounds_well(counts: NDArray[np.int64]) -> bool:
    """Return whether values may be rounded to f16. counts: of each |d|, by its bits."""
    if counts[_F16_128:].any():
        return False
    squares, errors = _f16_squares()
    energy = counts[:_F16_128] * squares
    total = float(energy.sum())
    if total == 0.0:
        return True
    error = float((energy * errors).sum()) / total
    return error <= _ROUNDING_ERROR**2 and float(energy.max()) <= _SCALE_SHARE * total


def _field(fmt: Format, columns: NDArray[np.uint8], at: int) -> NDArray[np.uint16]:
    """Return the bits of the f16 field at byte `at` of every block."""
    blocks = columns.reshape(-1, fmt.block_bytes)
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2").reshape(-1)


@functools.cache
def _f16_squares() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return by the bits of d: d², and the largest squared relative error of 1…8 times d in f16."""
    d = np.arange(_F16_128, dtype=np.uint16).view(np.float16).astype(np.float64)
    values = d[:, None] * np.arange(1, 9)
    with np.errstate(invalid="ignore"):  # 0 / 0
        errors = np.abs(values.astype(np.float16) / values - 1)
    errors[values < np.finfo(np.float16).smallest_normal] = 1
    return d**2, np.square(errors.max(axis=1))
