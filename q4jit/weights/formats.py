"""Block formats: a description of each.

A `Format` gives the positions of the scales and of each element's bits in a block. Every target
decodes by this description, so a new format is one more entry of `FORMATS` (and its tests).

Blocks are ggml's (`ggml-common.h`): little-endian, with scales in f16 or E8M0. A GGUF weight is N
rows of K contiguous elements; q4jit calls these rows the *columns* of the matrix w [K, N].
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from q4jit.errors import FormatError, expected, short_name
from q4jit.floats import FloatType

QK4_0: Final = 32
QK4_1: Final = 32
QK5_0: Final = 32
QK5_1: Final = 32
QK8_0: Final = 32
QK4_NL: Final = 32
QK_MXFP4: Final = 32
QK_K: Final = 256

UNIT_ELEMENTS: Final = 32
"""Elements that kernels decode together. Every block is a whole number of units."""

ScaleType = Literal["f16", "e8m0"]
SCALE_BYTES: Final[dict[ScaleType, int]] = {"f16": 2, "e8m0": 1}


@dataclass(frozen=True)
class Plane:
    """A bit field of every element's code: `bits` bits, shifted left by `lshift` in the code.

    A plane is a sequence of runs of `width_bytes` bytes. Byte j of a run holds the elements j,
    j + width_bytes, j + 2·width_bytes, … of the run, from its lowest bits upward.

    Attributes:
        at: where the plane starts in a block, in bytes.
    """

    at: int
    bits: int
    width_bytes: int
    lshift: int = 0

    @property
    def run_elements(self) -> int:
        """Elements of a run."""
        return self.width_bytes * 8 // self.bits

    def position(self, element: int) -> tuple[int, int]:
        """Return the byte, counted from the plane's start, and the lowest bit of an element."""
        run, in_run = divmod(element, self.run_elements)
        shift, byte = divmod(in_run, self.width_bytes)
        return run * self.width_bytes + byte, self.bits * shift

    def size_bytes(self, block_elements: int) -> int:
        """Return the bytes of the plane in a block of `block_elements` elements."""
        return block_elements * self.bits // 8


@dataclass(frozen=True)
class FactorBits:
    """A bit field of every sub-block's factor: `bits` bits, shifted left by `lshift` in it.

    Sub-block j = row · columns + column has its bits in one byte. Both the byte and the lowest bit
    grow in steps with the column and with the row.

    Attributes:
        at: the byte of sub-block 0 in a block.
        shift: the lowest bit of sub-block 0 in its byte.
        byte_steps: how far the byte moves from a column to the next, and from a row to the next.
        shift_steps: how far the lowest bit moves, likewise.
    """

    at: int
    bits: int
    columns: int
    shift: int = 0
    byte_steps: tuple[int, int] = (1, 0)
    shift_steps: tuple[int, int] = (0, 0)
    lshift: int = 0

    def position(self, sub_block: int) -> tuple[int, int]:
        """Return the byte, counted from the block's start, and the lowest bit of a sub-block."""
        row, column = divmod(sub_block, self.columns)
        byte = self.at + column * self.byte_steps[0] + row * self.byte_steps[1]
        return byte, self.shift + column * self.shift_steps[0] + row * self.shift_steps[1]


@dataclass(frozen=True)
class SubFactors:
    """The integers of the sub-blocks, which multiply the block's scale or its minimum.

    Attributes:
        parts: the bit fields that make up a stored integer.
        zero: the stored integer of the factor 0.
        signed: whether a stored integer is an int8 in two's complement, and unsigned otherwise.
        negative: whether the factor is minus the integer.
    """

    parts: tuple[FactorBits, ...]
    zero: int = 0
    signed: bool = False
    negative: bool = False

    @property
    def bits(self) -> int:
        """Bits of a stored integer."""
        return sum(part.bits for part in self.parts)

    def bytes_read(self, count: int) -> set[int]:
        """Return the bytes of a block that hold the factors of `count` sub-blocks."""
        return {part.position(j)[0] for part in self.parts for j in range(count)}


@dataclass(frozen=True)
class Format:
    """How a block of `block_elements` elements is stored in `block_bytes` bytes.

    value = scale · sub-scale · number + minimum · sub-minimum. The number of a code is code − zero,
    or the entry of a table. The scale and the minimum are fields of the block, the sub-scales and
    sub-minima integers, one per sub-block. A format without one of them has None in its place, and
    the factor is 1 (without a minimum: 0). A format with `float_type` stores plain floats and has
    no fields.

    Attributes:
        name: as in GGUF's tools, for example "Q4_0".
        ggml_type: its number in GGUF files.
        planes: the bit fields that make up a code, the lowest bits first.
        scale_at, minimum_at: positions of these fields in a block, in bytes.
        scale_type: the type of the scale. The minimum is always an f16.
        sub_block_elements: elements that share a scale.
        zero: the code of the value 0.
        signed: whether a code is an int8 in two's complement, and unsigned otherwise.
        table: the numbers of all codes, int8, if they are not counted from `zero`.
        float_type: the element type of F32, F16 and BF16.
    """

    name: str
    ggml_type: int
    block_elements: int
    block_bytes: int
    planes: tuple[Plane, ...] = ()
    scale_at: int | None = None
    minimum_at: int | None = None
    sub_scales: SubFactors | None = None
    sub_minima: SubFactors | None = None
    sub_block_elements: int = UNIT_ELEMENTS
    zero: int = 0
    signed: bool = False
    table: tuple[int, ...] | None = None
    scale_type: ScaleType = "f16"
    float_type: FloatType | None = None

    @property
    def quant_bits(self) -> int:
        """Bits of a code, in all planes; 0 for a float format."""
        return sum(plane.bits for plane in self.planes)

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks of a block: elements that share a scale and a minimum."""
        return self.block_elements // self.sub_block_elements

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The number of each code, from code 0 up. Each fits in an int8, or is 128 at most."""
        if self.table is not None:
            return self.table
        codes = range(1 << self.quant_bits)
        if self.signed:
            half = len(codes) // 2
            return tuple(code - 2 * half * (code >= half) for code in codes)
        return tuple(code - self.zero for code in codes)

    @property
    def largest_number(self) -> int:
        """The largest magnitude of a code's number."""
        return max(map(abs, self.numbers))

    @cached_property
    def repacked(self) -> "Format":
        """The same format with blocks that suit wide loads, as `repack` makes them.

        Each plane is divided into units of 32 elements, so that a unit's part of it is contiguous:
        byte j of the 4·bits bytes has the elements j, j + 4·bits, …. Each sub-scale and sub-minimum
        is a byte (or both share one, if they fit). The format itself, if that changes nothing.
        """
        if self.float_type is not None:
            return self
        packed = _repacked(self)
        return self if packed == self else packed

    def column_bytes(self, k: int) -> int:
        """Return the bytes of a column. Raises FormatError unless `k` is whole blocks."""
        if k <= 0 or k % self.block_elements:
            what = f"a positive multiple of {self.block_elements} (a block of {self.name})"
            raise FormatError(expected(what, str(k), where="K"))
        return k // self.block_elements * self.block_bytes


def _repacked(fmt: Format) -> Format:
    """Return the description of the blocks that `repack` makes."""
    at = 0
    scale_at, at = at, at + SCALE_BYTES[fmt.scale_type]
    minimum_at = None
    if fmt.minimum_at is not None:
        minimum_at, at = at, at + 2
    sub_scales, sub_minima, at = _byte_factors(fmt, at)
    planes = []
    for plane in fmt.planes:
        planes.append(Plane(at, plane.bits, UNIT_ELEMENTS * plane.bits // 8, plane.lshift))
        at += plane.size_bytes(fmt.block_elements)
    return replace(
        fmt,
        block_bytes=at,
        planes=tuple(planes),
        scale_at=scale_at,
        minimum_at=minimum_at,
        sub_scales=sub_scales,
        sub_minima=sub_minima,
    )


def _byte_factors(fmt: Format, at: int) -> tuple[SubFactors | None, SubFactors | None, int]:
    """Return the sub-scales and sub-minima of repacked blocks, and where their bytes end."""
    scales, minima, count = fmt.sub_scales, fmt.sub_minima, fmt.sub_blocks
    if scales is not None and minima is not None and scales.bits + minima.bits <= 8:
        low = FactorBits(at, scales.bits, count)
        high = FactorBits(at, minima.bits, count, shift=scales.bits)
        return replace(scales, parts=(low,)), replace(minima, parts=(high,)), at + count
    if scales is not None:
        scales, at = SubFactors((FactorBits(at, 8, count),), signed=True), at + count
    if minima is not None:
        part = FactorBits(at, 8, count)
        minima = SubFactors((part,), signed=True, negative=minima.negative)
        at += count
    return scales, minima, at


# --- the formats ---------------------------------------------------------------------------------

# 6 bits for each of eight sub-blocks. The first four have the low bits of a byte each. The others
# have nibbles of the bytes after these, and two bits above those of the first four.
_K_SCALES: Final = SubFactors(
    (
        FactorBits(4, 4, 4, byte_steps=(1, 8)),
        FactorBits(4, 2, 4, shift=4, shift_steps=(0, 2), lshift=4),
    )
)
_K_MINIMA: Final = SubFactors(
    (
        FactorBits(8, 4, 4, byte_steps=(1, 4), shift_steps=(0, 4)),
        FactorBits(8, 2, 4, shift=4, shift_steps=(0, 2), lshift=4),
    ),
    negative=True,
)
_IQ4_NUMBERS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_NUMBERS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values

FORMATS: Final[dict[str, Format]] = {
    f.name: f
    for f in (
        Format("F32", 0, 1, 4, float_type="f32"),
        Format("F16", 1, 1, 2, float_type="f16"),
        Format("BF16", 30, 1, 2, float_type="bf16"),
        Format("Q4_0", 2, QK4_0, 18, (Plane(2, 4, 16),), scale_at=0, zero=8),
        Format("Q4_1", 3, QK4_1, 20, (Plane(4, 4, 16),), scale_at=0, minimum_at=2),
        Format(
            "Q5_0", 6, QK5_0, 22, (Plane(6, 4, 16), Plane(2, 1, 1, lshift=4)), scale_at=0, zero=16
        ),
        Format(
            "Q5_1",
            7,
            QK5_1,
            24,
            (Plane(8, 4, 16), Plane(4, 1, 1, lshift=4)),
            scale_at=0,
            minimum_at=2,
        ),
        Format("Q8_0", 8, QK8_0, 34, (Plane(2, 8, 32),), scale_at=0, signed=True),
        Format(
            "Q2_K",
            10,
            QK_K,
            84,
            (Plane(16, 2, 32),),
            scale_at=80,
            minimum_at=82,
            sub_scales=SubFactors((FactorBits(0, 4, 16),)),
            sub_minima=SubFactors((FactorBits(0, 4, 16, shift=4),), negative=True),
            sub_block_elements=16,
        ),
        Format(
            "Q3_K",
            11,
            QK_K,
            110,
            (Plane(32, 2, 32), Plane(0, 1, 32, lshift=2)),
            scale_at=108,
            sub_scales=SubFactors(
                (
                    FactorBits(96, 4, 8, shift_steps=(0, 4)),
                    FactorBits(104, 2, 4, shift_steps=(0, 2), lshift=4),
                ),
                zero=32,
            ),
            sub_block_elements=16,
            zero=4,
        ),
        Format(
            "Q4_K",
            12,
            QK_K,
            144,
            (Plane(16, 4, 32),),
            scale_at=0,
            minimum_at=2,
            sub_scales=_K_SCALES,
            sub_minima=_K_MINIMA,
        ),
        Format(
            "Q5_K",
            13,
            QK_K,
            176,
            (Plane(48, 4, 32), Plane(16, 1, 32, lshift=4)),
            scale_at=0,
            minimum_at=2,
            sub_scales=_K_SCALES,
            sub_minima=_K_MINIMA,
        ),
        Format(
            "Q6_K",
            14,
            QK_K,
            210,
            (Plane(0, 4, 64), Plane(128, 2, 32, lshift=4)),
            scale_at=208,
            sub_scales=SubFactors((FactorBits(192, 8, 16),), signed=True),
            sub_block_elements=16,
            zero=32,
        ),
        Format("IQ4_NL", 20, QK4_NL, 18, (Plane(2, 4, 16),), scale_at=0, table=_IQ4_NUMBERS),
        Format(
            "IQ4_XS",
            23,
            QK_K,
            136,
            (Plane(8, 4, 16),),
            scale_at=0,
            sub_scales=SubFactors(
                (
                    FactorBits(4, 4, 2, byte_steps=(0, 1), shift_steps=(4, 0)),
                    FactorBits(2, 2, 4, byte_steps=(0, 1), shift_steps=(2, 0), lshift=4),
                ),
                zero=32,
            ),
            table=_IQ4_NUMBERS,
        ),
        Format(
            "MXFP4",
            39,
            QK_MXFP4,
            17,
            (Plane(1, 4, 16),),
            scale_at=0,
            scale_type="e8m0",
            table=E2M1_NUMBERS,
        ),
    )
}


def find_format(name: object) -> Format:
    """Return the format called `name`, in upper or lower case.

    Raises FormatError, which lists the known formats.
    """
    fmt = FORMATS.get(name.upper()) if isinstance(name, str) else None
    if fmt is None:
        known = f"known formats: {', '.join(FORMATS)}"
        base = name.upper().rpartition("_")[0] if isinstance(name, str) else ""
        if base in FORMATS:  # Q4_K_M and the like
            known = f"use {base!r}: {name} names the mixture of formats in a file"
        raise FormatError(f"unknown format {short_name(name)}; {known}")
    return fmt
