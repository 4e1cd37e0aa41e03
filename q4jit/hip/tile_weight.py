"""What `part/tiles.hip.j2` needs to know of a weight in `tiles16`."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from q4jit.hip.values import literal
from q4jit.hip.weight_facts import BYTE_ZERO, WeightFacts
from q4jit.weights.formats import SCALE_BYTES
from q4jit.weights.tiles import FACTOR_BIAS, Tiles, is_biased, is_e2m1, shares_bytes

_BYTE_PAIR = 1024  # what `byte_pair` adds to a byte
_QUANT_STEP = 2.0**-9  # of what `halves` returns


@dataclass(frozen=True)
class Region:
    """A region of `tiles16`.

    Attributes:
        name: its name as a constant.
        start_bytes: where it begins.
        size_bytes: its bytes for a quad of a column; for a block, if that has several quads.
    """

    name: str
    start_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class _TilePlane:
    """A bit field of the codes.

    Attributes:
        index: its number among the planes.
        bits: of a code.
        lshift: where its bits are in the code.
    """

    index: int
    bits: int
    lshift: int

    @property
    def words(self) -> int:
        """Words of 32 bits in a lane's part of a quad."""
        return self.bits

    @property
    def word_units(self) -> int:
        """Units that share a word."""
        return max(4 // self.bits, 1)

    @property
    def low_mask(self) -> str:
        """The bits of a pair of the lower elements of a unit."""
        return f"{((1 << self.bits) - 1 << self.lshift) * 0x00010001:#010x}u"

    @property
    def high_mask(self) -> str:
        """The bits of a pair of the upper elements of a unit."""
        return f"{((1 << self.bits) - 1 << self.lshift + 4) * 0x00010001:#010x}u"


class TileWeight(WeightFacts):
    """What the struct of a weight in `tiles16` is made of."""

    @property
    def largest(self) -> str:
        """The largest code, or number of a table."""
        bits = self._file.quant_bits if self._file.table is None else 8
        return literal((1 << bits) - 1)

    @property
    def offset_type(self) -> str:
        """The type that counts bytes: 32 bits halve the additions of a GPU."""
        return "u32" if self.tiles.size_bytes < 1 << 32 else "u64"

    @cached_property
    def tiles(self) -> Tiles:
        """Its sizes in `tiles16`."""
        return Tiles(self._file, self.spec.k, self.spec.n)

    @property
    def tile_regions(self) -> list[Region]:
        """The regions of `tiles16`."""
        return [Region(name.upper(), *each) for name, each in self.tiles.regions.items()]

    @property
    def tile_region(self) -> dict[str, Region]:
        """The regions of `tiles16` by name."""
        return {region.name: region for region in self.tile_regions}

    @property
    def tile_planes(self) -> list[_TilePlane]:
        """The planes of the codes."""
        return [_TilePlane(i, p.bits, p.lshift) for i, p in enumerate(self._file.planes)]

    @property
    def is_e2m1(self) -> bool:
        """Whether codes are floats of four bits, which masks and shifts make pairs of f16."""
        return is_e2m1(self._file)

    @property
    def in_nibbles(self) -> bool:
        """Whether codes are pairs of f16 after shifts and masks."""
        return self._file.table is None and not self._in_bytes

    @property
    def has_byte_pairs(self) -> bool:
        """Whether bytes, stored or found in a table, become pairs of f16."""
        return not (self.in_nibbles or self.is_e2m1)

    @property
    def _in_bytes(self) -> bool:
        return self._file.planes[0].bits == 8

    @property
    def code_zero(self) -> int:
        """What is subtracted from a code as it is stored."""
        return self._file.zero + (BYTE_ZERO if self._file.signed else 0)

    @property
    def unsigned_zero(self) -> int:
        """What is subtracted from a code, or from the number that a table has for it."""
        return self.code_zero if self._file.table is None else BYTE_ZERO

    @property
    def half_zero(self) -> int:
        """What `halves` subtracts from a pair of f16."""
        return self.unsigned_zero if self.in_nibbles else self.unsigned_zero + _BYTE_PAIR

    @property
    def pair_of_zero(self) -> str:
        """Minus this, times the step of quants, as a pair of f16."""
        bits = int(np.float16(-self.half_zero * _QUANT_STEP).view(np.uint16))
        return f"{bits * 0x00010001:#010x}u"

    @property
    def scale_words(self) -> int:
        """Words of a quad's sub-scales and sub-minima."""
        return self.tiles.records.get("scales", 0) // 4

    @property
    def d_words(self) -> int:
        """Words of the fields of a quad's blocks."""
        return -(-self.tiles.records["d"] // 4)

    @property
    def loads_8(self) -> bool:
        """Whether a lane loads eight bytes at a time."""
        return self.loads_8_of_scales or any(plane.words == 2 for plane in self.tile_planes)

    @property
    def loads_8_of_scales(self) -> bool:
        """Whether a quad has eight bytes of scales."""
        records = self.tiles.records
        return 8 in (records.get("scales"), records["d"])

    @property
    def shares_bytes(self) -> bool:
        """Whether a byte holds the sub-scale and the sub-minimum of a sub-block."""
        return shares_bytes(self._file)

    @property
    def factor_shift(self) -> int:
        """Where the sub-minimum begins in a byte that it shares."""
        return self._file.sub_scales.bits if self._file.sub_scales is not None else 0

    @property
    def low_factors(self) -> str:
        """The sub-scales of four bytes that they share."""
        return f"{((1 << self.factor_shift) - 1) * 0x01010101:#010x}u"

    @property
    def high_factors(self) -> str:
        """The sub-minima of four bytes that they share, shifted down."""
        return f"{((1 << 8 - self.factor_shift) - 1) * 0x01010101:#010x}u"

    @property
    def scale_bias(self) -> str:
        """What is subtracted from a byte of the sub-scales."""
        return self._bias(self._file.sub_scales is not None and is_biased(self._file.sub_scales))

    @property
    def minimum_bias(self) -> str:
        """What is subtracted from a byte of the sub-minima."""
        return self._bias(self._file.sub_minima is not None and is_biased(self._file.sub_minima))

    @staticmethod
    def _bias(is_present: bool) -> str:
        return f"{FACTOR_BIAS if is_present else 0}.0f"

    @property
    def negative_minima(self) -> bool:
        """Whether the sub-minima are subtracted."""
        return self._file.sub_minima is not None and self._file.sub_minima.negative

    @property
    def m_at(self) -> int:
        """Where the minima begin in the fields of a quad's blocks, in bytes."""
        return self.tiles.quad_blocks * SCALE_BYTES[self._file.scale_type]
