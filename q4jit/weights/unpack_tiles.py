"""Unpack the layout `tiles16`: columns in GGUF's order, the inverse of `pack_tiles16`.

Four adjacent codes become a word of 32 bits, a byte each. A plane of up to four bits has codes 0
and 2 at the same bits of the halves of a word, and codes 1 and 3 likewise, so two shifts and masks
extract all four.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import Format, Plane, SubFactors
from q4jit.weights.repack import float_fields, store_codes, store_factors
from q4jit.weights.tiles import (
    E2M1_LOW_BITS,
    E2M1_SIGNS,
    FACTOR_BIAS,
    PANEL_COLUMNS,
    PARTS,
    QUAD_ELEMENTS,
    QUAD_UNITS,
    SIGN_BITS,
    Tiles,
    is_biased,
    is_e2m1,
    shares_bytes,
)

_HALVES: Final = 0x00010001
"""Repeats the mask of a half in both halves of a word."""

_BYTES: Final = 0x01010101
"""Repeats the mask of a byte in all bytes of a word."""

# unpacked at a time, so that temporary arrays stay in cache
_BAND_ELEMENTS: Final = 1 << 18


def tiles16_bands(
    packed: NDArray[np.uint8], shape: Tiles
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first column, columns), with the padding of N and K, some at a time."""
    regions = {name: shape.in_region(packed, name) for name in shape.records}
    step = max(1, _BAND_ELEMENTS // (PANEL_COLUMNS * shape.quads * QUAD_ELEMENTS))
    for first in range(0, shape.panels, step):
        records = {name: _records(region[first : first + step]) for name, region in regions.items()}
        yield first * PANEL_COLUMNS, _columns(shape, records)


def _records(region: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return panels of a region [panels, records, 16, bytes] as [columns, records, bytes]."""
    panels, records, columns, record_bytes = region.shape
    return np.ascontiguousarray(region.swapaxes(1, 2)).reshape(
        panels * columns, records, record_bytes
    )


def _columns(shape: Tiles, records: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return columns [n, column_bytes] from records [n, records, bytes] by region."""
    fmt, n = shape.fmt, len(records["d"])
    count = shape.quads * QUAD_ELEMENTS // fmt.block_elements
    blocks = np.zeros((n, count, fmt.block_bytes), np.uint8)
    store_codes(fmt, _codes(fmt, records).reshape(n, count, -1), blocks)
    if "scales" in records:
        for sub, stored in _sub_factors(fmt, records["scales"]):
            integers = stored.astype(np.int16) - np.int16(FACTOR_BIAS * is_biased(sub))
            store_factors(sub, fmt.sub_blocks, integers.reshape(n, count, -1), blocks)
    start = 0
    for at, size in float_fields(fmt):
        end = start + shape.quad_blocks * size
        blocks[..., at : at + size] = records["d"][..., start:end].reshape(n, count, size)
        start = end
    return blocks.reshape(n, -1)


def _sub_factors(
    fmt: Format, stored: NDArray[np.uint8]
) -> list[tuple[SubFactors, NDArray[np.uint8]]]:
    """Return the sub-scales and the sub-minima, if any, each with its integers as stored."""
    subs = [sub for sub in (fmt.sub_scales, fmt.sub_minima) if sub is not None]
    if not shares_bytes(fmt):
        return list(zip(subs, np.split(stored, len(subs), axis=-1), strict=True))
    scales, minima = subs
    low = stored & np.uint8((1 << scales.bits) - 1)
    return [(scales, low), (minima, stored >> np.uint8(scales.bits))]


def _codes(fmt: Format, records: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return codes in the order of elements: [n, elements]."""
    n, quads = records["quants0"].shape[:2]
    # units of a quad, upper, parts: a word is four adjacent elements
    codes = np.zeros((n, quads, QUAD_UNITS, 2, PARTS), "<u4")
    for i, plane in enumerate(fmt.planes):
        words = records[f"quants{i}"].view("<u4").reshape(n, quads, PARTS, -1)
        for unit in range(QUAD_UNITS):
            for upper in range(2):
                four = _four_codes(fmt, plane, words, unit, upper)
                codes[:, :, unit, upper] |= four << np.uint32(plane.lshift)
    if fmt.signed:
        codes ^= np.uint32(SIGN_BITS * _BYTES)
    return codes.view(np.uint8).reshape(n, -1)


def _four_codes(
    fmt: Format, plane: Plane, words: NDArray[np.uint32], unit: int, upper: int
) -> NDArray[np.uint32]:
    """Return the four codes of the lower or upper elements that each part has of a unit.

    words: [..., PARTS, plane.bits]. Returns [..., PARTS], a byte of each word per code.
    """
    if plane.bits == 8:
        return words[..., 2 * unit + upper]
    if is_e2m1(fmt):
        pairs = [_e2m1_pair(words[..., unit], upper, b) for b in range(2)]
    else:
        word_units = 4 // plane.bits
        mask = np.uint32(((1 << plane.bits) - 1) * _HALVES)
        pairs = []
        for b in range(2):
            row, column = divmod(2 * (unit % word_units) + b, word_units)
            shift = column * plane.bits + 8 * row + 4 * upper
            pairs.append(words[..., unit // word_units] >> np.uint32(shift) & mask)
    return pairs[0] | pairs[1] << np.uint32(8)


def _e2m1_pair(words: NDArray[np.uint32], upper: int, b: int) -> NDArray[np.uint32]:
    """Return the codes b and b + 2 of four in E2M1, each in the low bits of a half."""
    signs = words >> np.uint32(E2M1_SIGNS[upper][b]) & np.uint32(_HALVES)
    return signs << np.uint32(3) | words >> np.uint32(E2M1_LOW_BITS[upper][b]) & np.uint32(
        7 * _HALVES
    )
