"""Block formats: one description each, and the NumPy reference decoder that reads them.

A `Format` says where in a block the scales and the bits of each element lie. Every target takes
its decoding from this description, so a new format is one more entry of `FORMATS` (and its tests).

The layouts are ggml's (`ggml-common.h`): scales are little-endian f16, and a GGUF weight is N rows
of K contiguous elements. q4jit calls one such row a *column* of the logical matrix [K, N].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError

QK4_0: Final = 32
QK4_1: Final = 32
QK8_0: Final = 32
QK_K: Final = 256

# Work is cut into bands of about this many elements: a megabyte of f32, so that what a band needs
# stays in cache and no call holds more than a few MB beyond its result.
_BAND_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True)
class Plane:
    """One bit field that every element of a block has.

    Byte j of a run of `width_bytes` bytes holds elements j, j + width_bytes, j + 2·width_bytes, …
    of the run in its bits from the lowest up; runs follow each other. The field lands in the
    quant q shifted left by `lshift`.
    """

    at: int
    bits: int
    width_bytes: int
    lshift: int = 0

    @property
    def run_elements(self) -> int:
        """Elements that one run of `width_bytes` bytes holds."""
        return self.width_bytes * 8 // self.bits

    def position(self, element: int) -> tuple[int, int]:
        """The byte (from the start of the plane) and the bit shift at which an element lies."""
        run, within = divmod(element, self.run_elements)
        return (
            run * self.width_bytes + within % self.width_bytes,
            self.bits * (within // self.width_bytes),
        )

    def size_bytes(self, block_elements: int) -> int:
        """Bytes of the plane in a block of `block_elements` elements."""
        return block_elements * self.bits // 8


@dataclass(frozen=True)
class Format:
    """How a block of `block_elements` weights is stored in `block_bytes` bytes.

    The value of an element is d·s·(q − zero) + m: d and m are f16 fields of the block (m only where
    `minimum_at` is given), s an int8 of the element's sub-block of `sub_block_elements` elements
    (only where `sub_scales_at` is given), q is put together from `planes` (and is a two's
    complement int8 where `signed`). A format with `float_dtype` stores plain floats and has none
    of these fields.
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
        """Bits of a quant, all planes together; 0 for a float format."""
        return sum(plane.bits for plane in self.planes)

    def column_bytes(self, k: int) -> int:
        """Bytes of one GGUF row of `k` elements; raises FormatError unless k is whole blocks."""
        if k <= 0 or k % self.block_elements:
            raise FormatError(
                f"{self.name} stores blocks of {self.block_elements} elements along K: "
                f"found K = {k}, accepted is a positive multiple of {self.block_elements}"
            )
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


def find_format(name: str) -> Format:
    """The format called `name`; raises FormatError, naming the known ones."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise FormatError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}") from None


def bands(rows: int, row_elements: int) -> Iterator[slice]:
    """Divide rows into the parts that are decoded or encoded at a time."""
    step = max(1, _BAND_ELEMENTS // row_elements)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def decode(fmt: Format, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode GGUF rows to floats: the reference that every kernel is held against.

    rows: uint8 [n, row_bytes], contiguous along the last axis. Returns f32 [n, K], rounded as
    ggml's own `dequantize_row` does.
    """
    n, row_bytes = rows.shape
    with np.errstate(all="ignore"):  # NaN and Inf are values like any other
        if fmt.float_dtype is not None:
            return np.ascontiguousarray(rows).view(fmt.float_dtype).astype(np.float32)
        blocks = rows.reshape(n, row_bytes // fmt.block_bytes, fmt.block_bytes)
        return _decode_blocks(fmt, blocks).reshape(n, -1)


def _decode_blocks(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = _quants(fmt, blocks).astype(np.float32)
    if fmt.zero:
        values -= np.float32(fmt.zero)
    scale = _f16_field(blocks, fmt.scale_at)
    if fmt.sub_scales_at is not None:
        count = fmt.block_elements // fmt.sub_block_elements
        first = fmt.sub_scales_at
        sub = blocks[..., first : first + count].view(np.int8).astype(np.float32)
        scale = np.repeat(scale * sub, fmt.sub_block_elements, axis=-1)
    values *= scale
    if fmt.minimum_at is not None:
        values += _f16_field(blocks, fmt.minimum_at)
    return values


def _f16_field(blocks: NDArray[np.uint8], offset_bytes: int | None) -> NDArray[np.float32]:
    assert offset_bytes is not None, "a block format without d"
    field = np.ascontiguousarray(blocks[..., offset_bytes : offset_bytes + 2])
    return field.view("<f2").astype(np.float32)


def _quants(fmt: Format, blocks: NDArray[np.uint8]) -> NDArray[np.integer]:
    """The quants of blocks [..., block_bytes] in element order: [..., block_elements]."""
    q = _plane_field(fmt, fmt.planes[0], blocks)
    for plane in fmt.planes[1:]:
        q |= _plane_field(fmt, plane, blocks)
    return q.view(np.int8) if fmt.signed else q


def _plane_field(fmt: Format, plane: Plane, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    size = plane.size_bytes(fmt.block_elements)
    stored = blocks[..., plane.at : plane.at + size]
    runs = stored.reshape(*blocks.shape[:-1], -1, 1, plane.width_bytes)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, np.newaxis]
    field = (runs >> shifts & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.lshift)
    return field.reshape(*blocks.shape[:-1], fmt.block_elements)


def encode(fmt: Format, rows: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Quantise float rows [n, K] to GGUF rows, uint8 [n, row_bytes], as ggml's reference does.

    Raises FormatError for a format that q4jit only reads (Q6_K), and unless K is whole blocks.
    """
    encoder = _ENCODERS.get(fmt.name)
    if encoder is None:
        raise FormatError(f"q4jit cannot quantise to {fmt.name}: it can to {', '.join(_ENCODERS)}")
    n, k = rows.shape
    row_bytes = fmt.column_bytes(k)
    with np.errstate(all="ignore"):  # f16 overflows to Inf, as in ggml
        # to F16 in one step: by way of f32 a float64 would be rounded twice
        values = np.ascontiguousarray(rows, fmt.float_dtype or np.float32)
        blocks = values.reshape(n, -1, fmt.block_elements)
        return np.ascontiguousarray(encoder(blocks)).reshape(n, row_bytes)


def _reciprocal(d: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _truncated(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Towards zero, and 0 for NaN and Inf, whose conversion to an integer C leaves undefined.

    They come from NaN, Inf or a d below 2**-128 (its reciprocal overflows), and d is stored as
    NaN, Inf or 0 then, so that the quants do not matter.
    """
    return np.trunc(np.where(np.isfinite(scaled), scaled, np.float32(0)))


def _as_bytes(*fields: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.concatenate([f.view(np.uint8) for f in fields], axis=-1)


def _pack_nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return q[..., :16] | q[..., 16:] << np.uint8(4)


def _encode_q4_0(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    d = largest / np.float32(-8)
    q = _truncated(x * _reciprocal(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return _as_bytes(d.astype("<f2"), _pack_nibbles(q))


def _encode_q4_1(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    d = (high - low) / np.float32(15)
    q = _truncated((x - low) * _reciprocal(d) + np.float32(0.5)).clip(0, 15).astype(np.uint8)
    return _as_bytes(d.astype("<f2"), low.astype("<f2"), _pack_nibbles(q))


def _encode_q8_0(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scaled = x * _reciprocal(d)
    whole = _truncated(scaled)
    # halves round away from zero, as C's roundf; adding 0.5 first would round 0.49999997 up
    q = whole + _truncated((scaled - whole) * np.float32(2))
    return _as_bytes(d.astype("<f2"), q.astype(np.int8))


_ENCODERS: Final[dict[str, Callable[[NDArray[Any]], NDArray[np.uint8]]]] = {
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q8_0": _encode_q8_0,
    "F16": lambda x: x.view(np.uint8),
    "F32": lambda x: x.view(np.uint8),
}
