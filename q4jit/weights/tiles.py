"""The layout `tiles16`: codes in the order in which lanes of a matrix unit decode them.

A wave has 16 columns, a panel. Four lanes share a unit of a column (32 elements): lane p has its
part p, the elements 4p…4p + 3 and 16 + 4p…16 + 4p + 3. A quad is four adjacent units of a column.
What a lane has of a quad is contiguous in each region, the quads of the 16 columns are contiguous,
too, and so are those of a panel. So each load of a wave is one run of memory.

Each plane of codes has a region; a part of a quad has 4 · bits bytes there. Bytes hold the codes of
an 8-bit plane: those of unit 0, first the lower elements, then the upper ones, those of unit 1, ….
Narrower planes become pairs of f16 by shifts and masks. A word has two halves of 16 bits, the lower
half for the elements b = 0 and 1 of four, the upper one for b + 2. Unit u has its bits in the word
u · bits / 4, where j = 2 · (u mod 4 / bits) + b numbers the pairs of elements. The lower elements
have the bits from j mod (4 / bits) · bits + 8 · (j div 4 / bits) upward, and the upper elements the
bits four higher. With 4 bits, these are the nibbles of Q4_0 as they are stored in files.

Codes of MXFP4 are floats of four bits (E2M1): a sign, and three bits of exponent and fraction. With
the sign in bit 15 of an f16 and the others in bits 9 to 11 they are the number times 2^-15. In a
half of a word, the lower elements have their signs in the bits 15 and 12, the upper ones in 14 and
13, and the other bits from 9, 6, 3 and 0 upward, so that masks and left shifts give pairs.

The region `scales` has the sub-scales of a quad, a byte each, and then its sub-minima; a byte holds
both if they fit. The region `d` has the scales of a quad's blocks and then their minima. A block of
several quads has them once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.decode import codes, factors
from q4jit.weights.formats import (
    E2M1_NUMBERS,
    SCALE_BYTES,
    UNIT_ELEMENTS,
    Format,
    Plane,
    SubFactors,
)
from q4jit.weights.mapped import DrainedColumns

PANEL_COLUMNS: Final = 16
QUAD_UNITS: Final = 4
QUAD_ELEMENTS: Final = QUAD_UNITS * UNIT_ELEMENTS
REGION_BYTES: Final = 256  # a GPU's longest burst
PARTS: Final = 4
"""Lanes that share a unit."""

FACTOR_BIAS: Final = 128
"""What is added to sub-factors that may be negative, so that bytes are unsigned."""

E2M1_SIGNS: Final = ((15, 12), (14, 13))  # bits of a half of a word, by upper and element
E2M1_LOW_BITS: Final = ((9, 6), (3, 0))
_SUB_BLOCKS: Final = frozenset({16, 32})
# of a code in planes: f16 has ten bits below the exponent, four of them to shift
_MOST_PAIR_BITS: Final = 6
SIGN_BITS: Final = 0x80
_BAND_ELEMENTS: Final = 1 << 21  # that are packed at a time, to bound temporary copies


def suits_tiles16(fmt: Format) -> bool:
    """Return whether `tiles16` can store a format: codes of up to six bits, or of eight.

    In E8M0 each unit must have a scale, and no minimum.
    """
    if fmt.float_type is not None or fmt.sub_block_elements not in _SUB_BLOCKS:
        return False
    is_of_units = fmt.block_elements == UNIT_ELEMENTS and fmt.minimum_at is None
    if fmt.scale_type == "e8m0" and not is_of_units:
        return False
    bits = [plane.bits for plane in fmt.planes]
    in_planes = sum(bits) <= _MOST_PAIR_BITS and set(bits) <= {1, 2, 4}
    is_power = fmt.block_elements & (fmt.block_elements - 1) == 0
    return is_power and (in_planes or bits == [8])


def are_plain(fmt: Format) -> bool:
    """Return whether blocks are those of Q4_0: an f16 scale and 32 codes of four bits."""
    is_scaled = fmt.scale_type == "f16" and fmt.minimum_at is None and fmt.sub_scales is None
    bits = [plane.bits for plane in fmt.planes]
    return is_scaled and bits == [4] and fmt.table is None and fmt.block_elements == UNIT_ELEMENTS


def is_e2m1(fmt: Format) -> bool:
    """Return whether codes are floats with a sign, two bits of exponent and one of fraction."""
    is_bare = fmt.minimum_at is None and [plane.bits for plane in fmt.planes] == [4]
    return fmt.table == E2M1_NUMBERS and is_bare


def shares_bytes(fmt: Format) -> bool:
    """Return whether a byte holds the sub-scale and the sub-minimum of a sub-block."""
    scales, minima = fmt.sub_scales, fmt.sub_minima
    if scales is None or minima is None or is_biased(scales) or is_biased(minima):
        return False
    return scales.bits + minima.bits <= 8


def is_biased(sub: SubFactors) -> bool:
    """Return whether sub-factors are stored with a bias: they may be negative."""
    return sub.signed or sub.zero > 0


def _bits(sub: SubFactors | None) -> int:
    return 0 if sub is None else sub.bits


@dataclass(frozen=True)
class Tiles:
    """The sizes and positions of a weight [K, N] in `tiles16`, in bytes.

    Attributes:
        fmt: the format of its blocks, as in GGUF.
    """

    fmt: Format
    k: int
    n: int

    @cached_property
    def quads(self) -> int:
        """Quads of a column, of whole blocks."""
        step = max(QUAD_ELEMENTS, self.fmt.block_elements)
        return -(-self.k // step) * step // QUAD_ELEMENTS

    @cached_property
    def panels(self) -> int:
        """Panels along N."""
        return -(-self.n // PANEL_COLUMNS)

    @property
    def quad_blocks(self) -> int:
        """Blocks of a quad; 1 if a block has several quads."""
        return max(QUAD_ELEMENTS // self.fmt.block_elements, 1)

    @property
    def block_quads(self) -> int:
        """Quads of a block; 1 if a quad has several blocks."""
        return max(self.fmt.block_elements // QUAD_ELEMENTS, 1)

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks of a quad."""
        return QUAD_ELEMENTS // self.fmt.sub_block_elements

    @cached_property
    def records(self) -> dict[str, int]:
        """The bytes of each region for a quad of a column; of `d`, for a whole block at least."""
        records = {
            f"quants{i}": QUAD_ELEMENTS * plane.bits // 8 for i, plane in enumerate(self.fmt.planes)
        }
        subs = (self.fmt.sub_scales is not None) + (self.fmt.sub_minima is not None)
        if subs:
            records["scales"] = self.sub_blocks * (1 if shares_bytes(self.fmt) else subs)
        block_bytes = SCALE_BYTES[self.fmt.scale_type] + 2 * (self.fmt.minimum_at is not None)
        records["d"] = self.quad_blocks * block_bytes
        return records

    @cached_property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Where each region starts, and the bytes of a record."""
        regions: dict[str, tuple[int, int]] = {}
        at = 0
        for name, record_bytes in self.records.items():
            regions[name] = at, record_bytes
            at += -(-self._region_bytes(name) // REGION_BYTES) * REGION_BYTES
        return regions

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the whole weight."""
        name, (start, _) = list(self.regions.items())[-1]
        return start + -(-self._region_bytes(name) // REGION_BYTES) * REGION_BYTES

    def in_region(self, packed: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return a region as records: uint8 [panels, records of a column, 16, record_bytes]."""
        start, record_bytes = self.regions[name]
        region = packed[start : start + self._region_bytes(name)]
        return region.reshape(self.panels, -1, PANEL_COLUMNS, record_bytes)

    def _region_bytes(self, name: str) -> int:
        quads = self.quads // (self.block_quads if name == "d" else 1)
        return self.panels * PANEL_COLUMNS * quads * self.records[name]


def pack_tiles16(
    fmt: Format,
    columns: NDArray[np.uint8] | DrainedColumns,
    packed: NDArray[np.uint8],
    shape: Tiles,
) -> None:
    """Store columns, uint8 [N, column_bytes] as in GGUF, in `packed`, which is zeros."""
    regions = {name: shape.in_region(packed, name) for name in shape.records}
    step = max(1, _BAND_ELEMENTS // (PANEL_COLUMNS * shape.quads * QUAD_ELEMENTS))
    for first in range(0, shape.panels, step):
        band = columns[first * PANEL_COLUMNS : (first + step) * PANEL_COLUMNS]
        blocks = band.reshape(len(band), -1, fmt.block_bytes)
        panels = slice(first, min(first + step, shape.panels))
        for name, values in _of_blocks(fmt, shape, blocks).items():
            _store(regions[name][panels], values)


def _store(region: NDArray[np.uint8], values: NDArray[np.uint8]) -> None:
    """Store records [n, records, record_bytes] in panels; zeros fill the last one."""
    n, records, record_bytes = values.shape
    whole = n // PANEL_COLUMNS
    full = values[: whole * PANEL_COLUMNS].reshape(whole, PANEL_COLUMNS, records, record_bytes)
    region[:whole, :records] = full.transpose(0, 2, 1, 3)
    if n % PANEL_COLUMNS:
        region[whole, :records, : n % PANEL_COLUMNS] = values[whole * PANEL_COLUMNS :].swapaxes(
            0, 1
        )


def _of_blocks(
    fmt: Format, shape: Tiles, blocks: NDArray[np.uint8]
) -> dict[str, NDArray[np.uint8]]:
    """Return the records of blocks [n, blocks, block_bytes] by region: [n, records, bytes]."""
    n, count = blocks.shape[:2]
    quads = -(-count * fmt.block_elements // QUAD_ELEMENTS)
    stored = codes(fmt, blocks).reshape(n, -1)
    if fmt.signed:
        stored ^= np.uint8(SIGN_BITS)
    stored = _padded(stored, quads * QUAD_ELEMENTS)
    records = {}
    for i, plane in enumerate(fmt.planes):
        fields = stored >> np.uint8(plane.lshift) & np.uint8((1 << plane.bits) - 1)
        in_order = fields.reshape(n, quads, QUAD_UNITS, 2, PARTS, 4)
        records[f"quants{i}"] = _e2m1_parts(in_order) if is_e2m1(fmt) else _parts(plane, in_order)
    subs = _sub_factors(fmt, blocks, n, quads)
    if subs is not None:
        records["scales"] = subs
    stored_at = ((fmt.scale_at, SCALE_BYTES[fmt.scale_type]), (fmt.minimum_at, 2))
    of_blocks = [
        _of_quads(blocks[..., at : at + size], shape.quad_blocks)
        for at, size in stored_at
        if at is not None
    ]
    records["d"] = np.concatenate(of_blocks, axis=-1)
    return records


def _of_quads(field: NDArray[np.uint8], quad_blocks: int) -> NDArray[np.uint8]:
    """Return a field of blocks [n, blocks, bytes] by quads: [n, quads, quad_blocks · bytes]."""
    n, count, size_bytes = field.shape
    width = -(-count // quad_blocks) * quad_blocks * size_bytes
    return _padded(field.reshape(n, -1), width).reshape(n, -1, quad_blocks * size_bytes)


def _padded(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Return values [n, …] with zeros up to `width`."""
    missing = width - values.shape[1]
    return values if missing == 0 else np.pad(values, ((0, 0), (0, missing)))


def _parts(plane: Plane, fields: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the parts of quads [n, quads, bytes] from bit fields [n, quads, 4, 2, PARTS, 4]."""
    n, quads = fields.shape[:2]
    if plane.bits == 8:
        return fields.transpose(0, 1, 4, 2, 3, 5).reshape(n, quads, -1)
    # unit, upper, b, then what is contiguous: column, quad, part, half of a word
    split = fields.reshape(n, quads, QUAD_UNITS, 2, PARTS, 2, 2)
    ordered = np.ascontiguousarray(split.transpose(2, 3, 6, 0, 1, 4, 5))
    word_units = 4 // plane.bits
    parts = np.zeros((n, quads, PARTS, plane.bits, 2), np.uint16)
    for u in range(QUAD_UNITS):
        halves = np.zeros(ordered.shape[3:], np.uint16)
        for upper in range(2):
            for b in range(2):
                row, column = divmod(2 * (u % word_units) + b, word_units)
                shift = np.uint16(column * plane.bits + 8 * row + 4 * upper)
                halves |= ordered[u, upper, b].astype(np.uint16) << shift
        parts[..., u // word_units, :] |= halves
    return parts.view(np.uint8).reshape(n, quads, -1)


def _e2m1_parts(fields: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the parts of quads [n, quads, bytes] from codes in E2M1 [n, quads, 4, 2, PARTS, 4]."""
    n, quads = fields.shape[:2]
    # element of a half, upper, then column, quad, part, unit, half of a word
    split = fields.reshape(n, quads, QUAD_UNITS, 2, PARTS, 2, 2).transpose(6, 3, 0, 1, 4, 2, 5)
    halves = np.zeros(split.shape[2:], np.uint16)
    for upper in range(2):
        for b in range(2):
            stored = split[b, upper].astype(np.uint16)
            halves |= stored >> np.uint16(3) << np.uint16(E2M1_SIGNS[upper][b])
            halves |= (stored & np.uint16(7)) << np.uint16(E2M1_LOW_BITS[upper][b])
    return halves.view(np.uint8).reshape(n, quads, -1)


def _sub_factors(
    fmt: Format, blocks: NDArray[np.uint8], n: int, quads: int
) -> NDArray[np.uint8] | None:
    """Return the bytes of sub-scales and sub-minima of quads: [n, quads, bytes]."""
    width = quads * (QUAD_ELEMENTS // fmt.sub_block_elements)
    listed = [
        _padded(_factor_bytes(sub, fmt.sub_blocks, blocks).reshape(n, -1), width)
        for sub in (fmt.sub_scales, fmt.sub_minima)
        if sub is not None
    ]
    if not listed:
        return None
    if shares_bytes(fmt):
        listed = [listed[0] | listed[1] << np.uint8(_bits(fmt.sub_scales))]
    return np.concatenate([each.reshape(n, quads, -1) for each in listed], axis=-1)


def _factor_bytes(sub: SubFactors, count: int, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    integers = factors(sub, count, blocks)
    return (integers + np.int16(FACTOR_BIAS * is_biased(sub))).astype(np.uint8)
