"""Block formats: a description of each, and the reference decoder and encoder in NumPy.

A `Format` gives the positions of the scales and of each element's bits in a block. Every target
decodes by this description, so a new format is one more entry of `FORMATS` (and its tests).

Blocks are ggml's (`ggml-common.h`): little-endian, with scales in f16. A GGUF weight is N rows of K
contiguous elements; q4jit calls these rows the *columns* of the matrix w [K, N].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, expected, short_name

QK4_0: Final = 32
QK4_1: Final = 32
QK8_0: Final = 32
QK_K: Final = 256

# Elements that are decoded or encoded at a time: a megabyte of f32. The temporary arrays stay in
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

    def position(self, element: int) -> tuple[int, int]:
        """Return the byte, counted from the plane's start, and the lowest bit of an element."""
        run, in_run = divmod(element, self.run_elements)
        shift, byte = divmod(in_run, self.width_bytes)
        return run * self.width_bytes + byte, self.bits * shift

    def size_bytes(self, block_elements: int) -> int:
        """Return the bytes of the plane in a block of `block_elements` elements."""
        return block_elements * self.bits // 8


@dataclass(frozen=True)
class Format:
    """How a block of `block_elements` elements is stored in `block_bytes` bytes.

    value = scale · sub-scale · (code − zero) + minimum. The scale and the minimum are f16 fields of
    the block, the sub-scales int8, one per sub-block. A format without a minimum or sub-scales has
    None as their position. A format with `float_dtype` stores plain floats and has no fields.

    Attributes:
        name: as in GGUF's tools, for example "Q4_0".
        ggml_type: its number in GGUF files.
        planes: the bit fields that make up a code.
        scale_at, minimum_at, sub_scales_at: positions of these fields in a block, in bytes.
        sub_block_elements: elements that share a scale.
        zero: the code of the value 0.
        signed: whether a code is an int8 in two's complement, and unsigned otherwise.
        float_dtype: NumPy's name of the element type of F16 and F32.
    """

    name: str
    ggml_type: int
    block_elements: int
    block_bytes: int
    planes: tuple[Plane, ...] = ()
    scale_at: int | None = None
    minimum_at: int | None = None
    sub_scales_at: int | None = None
    sub_block_elements: int = 32
    zero: int = 0
    signed: bool = False
    float_dtype: str | None = None

    @property
    def quant_bits(self) -> int:
        """Bits of a code, in all planes; 0 for a float format."""
        return sum(plane.bits for plane in self.planes)

    def column_bytes(self, k: int) -> int:
        """Return the bytes of a column. Raises FormatError unless `k` is whole blocks."""
        if k <= 0 or k % self.block_elements:
            what = f"a positive multiple of {self.block_elements} (a block of {self.name})"
            raise FormatError(expected(what, str(k), where="K"))
        return k // self.block_elements * self.block_bytes


FORMATS: Final[dict[str, Format]] = {
    f.name: f
    for f in (
        Format("F32", 0, 1, 4, float_dtype="<f4"),
        Format("F16", 1, 1, 2, float_dtype="<f2"),
        Format("Q4_0", 2, QK4_0, 18, (Plane(2, 4, 16),), scale_at=0, zero=8),
        Format("Q4_1", 3, QK4_1, 20, (Plane(4, 4, 16),), scale_at=0, minimum_at=2),
        Format("Q8_0", 8, QK8_0, 34, (Plane(2, 8, 32),), scale_at=0, signed=True),
        Format(
            "Q6_K",
            14,
            QK_K,
            210,
            (Plane(0, 4, 64), Plane(128, 2, 32, lshift=4)),
            scale_at=208,
            sub_scales_at=192,
            sub_block_elements=16,
            zero=32,
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


def decode(fmt: Format, columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode columns to floats, as the reference for every kernel.

    columns: uint8 [n, column_bytes], contiguous along the last axis. Returns f32 [n, K] with the
    rounding of ggml's `dequantize_row`.
    """
    n, column_bytes = columns.shape
    with np.errstate(all="ignore"):  # scales may be NaN or Inf
        if fmt.float_dtype is not None:
            return np.ascontiguousarray(columns).view(fmt.float_dtype).astype(np.float32)
        blocks = columns.reshape(n, column_bytes // fmt.block_bytes, fmt.block_bytes)
        return _decode_blocks(fmt, blocks).reshape(n, -1)


def _decode_blocks(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = _codes(fmt, blocks).astype(np.float32)
    if fmt.zero:
        values -= np.float32(fmt.zero)
    scale = _f16_field(blocks, fmt.scale_at)
    if fmt.sub_scales_at is not None:
        sub_blocks = fmt.block_elements // fmt.sub_block_elements
        stored = blocks[..., fmt.sub_scales_at : fmt.sub_scales_at + sub_blocks].view(np.int8)
        scale = np.repeat(scale * stored.astype(np.float32), fmt.sub_block_elements, axis=-1)
    values *= scale
    if fmt.minimum_at is not None:
        values += _f16_field(blocks, fmt.minimum_at)
    return values


def _f16_field(blocks: NDArray[np.uint8], at: int | None) -> NDArray[np.float32]:
    assert at is not None, "a block format without a scale"
    field = np.ascontiguousarray(blocks[..., at : at + 2])
    return field.view("<f2").astype(np.float32)


def _codes(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.integer]:
    """Return the codes of blocks [..., block_bytes] in element order: [..., block_elements]."""
    codes = _plane_field(fmt, fmt.planes[0], blocks)
    for plane in fmt.planes[1:]:
        codes |= _plane_field(fmt, plane, blocks)
    return codes.view(np.int8) if fmt.signed else codes


def _plane_field(fmt: Format, plane: Plane, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    size = plane.size_bytes(fmt.block_elements)
    stored = blocks[..., plane.at : plane.at + size]
    runs = stored.reshape(*blocks.shape[:-1], -1, 1, plane.width_bytes)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, np.newaxis]
    field = (runs >> shifts & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.lshift)
    return field.reshape(*blocks.shape[:-1], fmt.block_elements)


def encode(fmt: Format, columns: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Quantise float columns [n, K] to uint8 [n, column_bytes] as ggml's reference does.

    Raises FormatError for a format that q4jit only reads (Q6_K), and unless K is whole blocks.
    """
    encoder = _ENCODERS.get(fmt.name)
    if encoder is None:
        raise FormatError(f"q4jit cannot quantise to {fmt.name}, only to {', '.join(_ENCODERS)}")
    n, k = columns.shape
    column_bytes = fmt.column_bytes(k)
    with np.errstate(all="ignore"):  # f16 overflows to Inf, as in ggml
        # float64 goes to F16 in one step; through f32 it would be rounded twice
        values = np.ascontiguousarray(columns, fmt.float_dtype or np.float32)
        blocks = values.reshape(n, -1, fmt.block_elements)
        return np.ascontiguousarray(encoder(blocks)).reshape(n, column_bytes)


def _reciprocal(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _truncated(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round towards zero; NaN and Inf become 0, since C does not define their conversion to int.

    They result from NaN, Inf or a scale below 2**-128 (its reciprocal overflows). Such a scale is
    stored as NaN, Inf or 0, so these codes do not matter.
    """
    return np.trunc(np.where(np.isfinite(scaled), scaled, np.float32(0)))


def _as_bytes(*fields: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.concatenate([f.view(np.uint8) for f in fields], axis=-1)


def _pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes[..., :16] | codes[..., 16:] << np.uint8(4)


def _encode_q4_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    largest = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    scale = largest / np.float32(-8)
    codes = _truncated(values * _reciprocal(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return _as_bytes(scale.astype("<f2"), _pack_nibbles(codes))


def _encode_q4_1(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    minimum, maximum = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scale = (maximum - minimum) / np.float32(15)
    steps = (values - minimum) * _reciprocal(scale)
    codes = _truncated(steps + np.float32(0.5)).clip(0, 15).astype(np.uint8)
    return _as_bytes(scale.astype("<f2"), minimum.astype("<f2"), _pack_nibbles(codes))


def _encode_q8_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    scaled = values * _reciprocal(scale)
    whole = _truncated(scaled)
    # rounds .5 away from zero like C's roundf; adding 0.5 first would round 0.49999997 up
    codes = whole + _truncated((scaled - whole) * np.float32(2))
    return _as_bytes(scale.astype("<f2"), codes.astype(np.int8))


_ENCODERS: Final[dict[str, Callable[[NDArray[Any]], NDArray[np.uint8]]]] = {
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q8_0": _encode_q8_0,
    "F16": lambda values: values.view(np.uint8),
    "F32": lambda values: values.view(np.uint8),
}
