"""Block formats: a description of each, and the reference decoder in NumPy.

A `Format` gives the positions of the scales and of each element's bits in a block. Every target
decodes by this description, so a new format is one more entry of `FORMATS` (and its tests).

Blocks are ggml's (`ggml-common.h`): little-endian, with scales in f16 or E8M0. A GGUF weight is N
rows of K contiguous elements; q4jit calls these rows the *columns* of the matrix w [K, N].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, expected, short_name
from q4jit.floats import FLOAT_BYTES, FloatType

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

# Elements that are decoded at a time: a megabyte of f32. The temporary arrays stay in
# cache, and a call needs only a few MB beyond its result.
_BAND_ELEMENTS: Final = 1 << 18


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

    @property
    def is_unit(self) -> bool:
        """Whether a run is a unit, as in repacked formats."""
        return self.run_elements == UNIT_ELEMENTS

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
_E2M1_NUMBERS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values

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
            table=_E2M1_NUMBERS,
        ),
    )
}


def find_format(name: object) -> Format:
    """Return the format called `name`, in upper or lower case.

    Raises FormatError, which lists the known formats.
    """
    fmt = FORMATS.get(name.upper()) if isinstance(name, str) else None
    if fmt is None:
        known = ", ".join(FORMATS)
        raise FormatError(f"unknown format {short_name(name)}; known formats: {known}")
    return fmt


def batches(count: int, elements: int) -> Iterator[slice]:
    """Divide `count` columns of `elements` elements into batches that are decoded at a time."""
    step = max(1, _BAND_ELEMENTS // elements)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


# --- decoding ------------------------------------------------------------------------------------


def decode(fmt: Format, columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode columns to floats, as the reference for every kernel.

    columns: uint8 [n, column_bytes], contiguous along the last axis. Returns f32 [n, K] with the
    rounding of ggml's `dequantize_row`.
    """
    n, column_bytes = columns.shape
    with np.errstate(all="ignore"):  # scales may be NaN or Inf
        if fmt.float_type is not None:
            return _floats(fmt.float_type, columns)
        blocks = columns.reshape(n, column_bytes // fmt.block_bytes, fmt.block_bytes)
        return _decode_blocks(fmt, blocks).reshape(n, -1)


def _floats(float_type: FloatType, columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    stored = np.ascontiguousarray(columns)
    if float_type == "bf16":  # the upper half of an f32; NumPy itself has no such dtype
        return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.view(f"<f{FLOAT_BYTES[float_type]}").astype(np.float32)


def _decode_blocks(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = _numbers(fmt, blocks)
    values *= _of_elements(fmt, fmt.sub_scales, scales(fmt, blocks), blocks)
    if fmt.minimum_at is not None:
        minimum = _f16_field(blocks, fmt.minimum_at)
        values += _of_elements(fmt, fmt.sub_minima, minimum, blocks)
    return values


def _of_elements(
    fmt: Format, sub: SubFactors | None, field: NDArray[np.float32], blocks: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return a field [..., 1] of the blocks, times the factors of their sub-blocks, if any."""
    if sub is None:
        return field
    products = field * factors(sub, fmt.sub_blocks, blocks).astype(np.float32)
    if sub.negative:  # of the float, so that the sign of a zero is ggml's
        np.negative(products, out=products)
    return np.repeat(products, fmt.sub_block_elements, axis=-1)


def _numbers(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    stored = codes(fmt, blocks)
    if fmt.table is not None:
        return np.array(fmt.table, np.float32)[stored]
    numbers: NDArray[np.float32] = (stored.view(np.int8) if fmt.signed else stored).astype(
        np.float32
    )
    if fmt.zero:
        numbers -= np.float32(fmt.zero)
    return numbers


def scales(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scales of blocks [..., block_bytes]: f32 [..., 1]."""
    assert fmt.scale_at is not None, "a block format without a scale"
    if fmt.scale_type == "f16":
        return _f16_field(blocks, fmt.scale_at)
    exponents = blocks[..., fmt.scale_at : fmt.scale_at + 1].astype(np.uint32)
    # half of 2^(e - 127), because the table has twice the values; the first two are denormal
    normal = np.maximum(exponents, 1) - np.uint32(1) << np.uint32(23)
    return np.where(exponents < 2, np.uint32(0x00200000) << exponents, normal).view(np.float32)


def _f16_field(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    field = np.ascontiguousarray(blocks[..., at : at + 2])
    return field.view("<f2").astype(np.float32)


def factors(sub: SubFactors, count: int, blocks: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return the integers of the `count` sub-blocks of blocks [..., block_bytes]: [..., count].

    Those of `negative` factors are not negated.
    """
    stored = np.zeros((*blocks.shape[:-1], count), np.uint8)
    for part in sub.parts:
        at, shifts = np.array([part.position(j) for j in range(count)]).T
        field = blocks[..., at] >> shifts.astype(np.uint8) & np.uint8((1 << part.bits) - 1)
        stored |= field << np.uint8(part.lshift)
    integers = (stored.view(np.int8) if sub.signed else stored).astype(np.int16)
    integers -= np.int16(sub.zero)
    return integers


def codes(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the codes of blocks [..., block_bytes] in element order: [..., block_elements]."""
    stored = _plane_field(fmt, fmt.planes[0], blocks)
    for plane in fmt.planes[1:]:
        stored |= _plane_field(fmt, plane, blocks)
    return stored


def _plane_field(fmt: Format, plane: Plane, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    size = plane.size_bytes(fmt.block_elements)
    stored = blocks[..., plane.at : plane.at + size]
    runs = stored.reshape(*blocks.shape[:-1], -1, 1, plane.width_bytes)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, np.newaxis]
    field = (runs >> shifts & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.lshift)
    return field.reshape(*blocks.shape[:-1], fmt.block_elements)


# --- repacking -----------------------------------------------------------------------------------


def repack(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks [..., block_bytes] as blocks of `fmt.repacked`, without loss.

    Works on what it is given at once: callers pass some columns at a time.
    """
    packed = fmt.repacked
    if packed is fmt:
        return blocks
    out = np.zeros((*blocks.shape[:-1], packed.block_bytes), np.uint8)
    moved = [(fmt.scale_at, packed.scale_at, SCALE_BYTES[fmt.scale_type])]
    if fmt.minimum_at is not None:
        moved.append((fmt.minimum_at, packed.minimum_at, 2))
    for at, to, size in moved:
        assert at is not None, "a block format without a scale"
        assert to is not None, "repacked without its scale"
        out[..., to : to + size] = blocks[..., at : at + size]
    for old, new in ((fmt.sub_scales, packed.sub_scales), (fmt.sub_minima, packed.sub_minima)):
        if old is not None and new is not None:
            _store_factors(new, factors(old, fmt.sub_blocks, blocks), out)
    stored = codes(fmt, blocks)
    for plane in packed.planes:
        size = plane.size_bytes(fmt.block_elements)
        out[..., plane.at : plane.at + size] = _unit_plane(plane, stored)
    return out


def _store_factors(sub: SubFactors, values: NDArray[np.int16], out: NDArray[np.uint8]) -> None:
    """Store integers [..., count] of sub-blocks in repacked blocks."""
    stored = (values + np.int16(sub.zero)).astype(np.uint8)  # int8 in two's complement
    (part,) = sub.parts
    out[..., part.at : part.at + part.columns] |= stored << np.uint8(part.shift)


def _unit_plane(plane: Plane, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a plane of repacked blocks from codes [..., block_elements]."""
    field = stored >> np.uint8(plane.lshift) & np.uint8((1 << plane.bits) - 1)
    layers = field.reshape(*stored.shape[:-1], -1, 8 // plane.bits, plane.width_bytes)
    packed = layers[..., 0, :].copy()
    for i in range(1, 8 // plane.bits):
        packed |= layers[..., i, :] << np.uint8(i * plane.bits)
    return packed.reshape(*stored.shape[:-1], -1)
