"""The reference decoder of all block formats, in NumPy."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FLOAT_BYTES, FloatType
from q4jit.weights.formats import Format, Plane, SubFactors

# Elements that are decoded at a time: a megabyte of f32. The temporary arrays stay in
# cache, and a call needs only a few MB beyond its result.
_BAND_ELEMENTS: Final = 1 << 18


def batches(count: int, elements: int) -> Iterator[slice]:
    """Divide `count` columns of `elements` elements into batches that are decoded at a time."""
    step = max(1, _BAND_ELEMENTS // elements)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def decode_matrix(fmt: Format, columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode columns, uint8 [N, column_bytes]: f32 [K, N] in Fortran order."""
    n, column_bytes = columns.shape
    k = column_bytes // fmt.block_bytes * fmt.block_elements
    values = np.empty((n, k), np.float32)
    for batch in batches(n, k):
        values[batch] = decode(fmt, columns[batch])
    return values.T


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
    word = plane_word(plane)
    stored = blocks[..., plane.at : plane.at + size].view(word)
    runs = stored.reshape(*blocks.shape[:-1], -1, 1, plane.width_bytes // word.itemsize)
    shifts = np.arange(0, 8, plane.bits).astype(word)[:, np.newaxis]
    field = (runs >> shifts & plane_mask(plane)) << word.type(plane.lshift)
    of_elements: NDArray[np.uint8] = field.view(np.uint8)
    return of_elements.reshape(*blocks.shape[:-1], fmt.block_elements)


def plane_word(plane: Plane) -> np.dtype[Any]:
    """Return the widest unsigned type whose words divide a run of a plane.

    NumPy's inner loops go along a run, so words of 8 bytes save seven eighths of the steps.
    """
    return np.dtype(next(f"<u{size}" for size in (8, 4, 1) if plane.width_bytes % size == 0))


def plane_mask(plane: Plane) -> Any:
    """Return the word that selects the lowest field of each byte in a plane."""
    word = plane_word(plane)
    return word.type(((1 << plane.bits) - 1) * int.from_bytes(b"\x01" * word.itemsize, "little"))
