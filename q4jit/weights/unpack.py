"""Unpack weights: columns in GGUF's order from a layout, the inverse of `layouts.pack`.

No format has bits that `pack` drops, so the bytes of the columns are the original ones.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, expected
from q4jit.weights.formats import Format
from q4jit.weights.layouts import (
    GGUF,
    INTERLEAVED16,
    TILES16,
    Interleaved,
    Planar,
    band_bytes,
    fields,
    packed_bytes,
)
from q4jit.weights.repack import unrepack
from q4jit.weights.tiles import PANEL_COLUMNS, Tiles
from q4jit.weights.unpack_tiles import tiles16_bands


def unpack(
    fmt: Format, layout: str, packed: NDArray[np.uint8], k: int, n: int
) -> NDArray[np.uint8]:
    """Return the columns of a weight [K, N] in a layout: read-only uint8 [N, column_bytes].

    packed: uint8 [bytes] as `pack` returns it, or columns in the layout `gguf`, whose memory the
    result shares. Bytes of padding may have any values. Works on a few megabytes at a time, so the
    peak memory is the input and the result. Raises FormatError for an unknown layout, for one that
    the format does not have, for another number of bytes, and unless K is whole blocks.
    """
    check_bytes(fmt, layout, packed, (k, n))
    columns: NDArray[np.uint8] = _unpacked(fmt, layout, packed, (1, k, n))[0]
    return columns


def unpack_experts(
    fmt: Format, layout: str, packed: NDArray[np.uint8], experts: int, k: int, n: int
) -> NDArray[np.uint8]:
    """Return the columns of experts [E, K, N] in a layout: read-only uint8 [E, N, column_bytes].

    packed: uint8 [bytes] as `pack_experts` returns it. Raises FormatError as `unpack` does.
    """
    check_bytes(fmt, layout, packed, (experts, k, n))
    return _unpacked(fmt, layout, packed, (experts, k, n))


def check_bytes(
    fmt: Format, layout: str, packed: NDArray[np.uint8], shape: tuple[int, ...]
) -> None:
    """Raise FormatError unless `packed` may be a weight of `shape`, (K, N) or (E, K, N).

    It must be C-contiguous uint8 with the bytes of the layout; the other errors are as in `unpack`.
    """
    *experts, k, n = shape
    size = packed_bytes(fmt, layout, k, n) * (experts[0] if experts else 1)
    axes = "(E, K, N)" if experts else "(K, N)"
    where = f"{fmt.name} of shape {axes} = {shape} in the layout {layout!r}"
    if packed.dtype != np.uint8 or not packed.flags.c_contiguous:
        strides = "" if packed.flags.c_contiguous else "strided "
        got = f"{strides}{packed.dtype}"
        raise FormatError(expected("contiguous uint8", got, where=where))
    if packed.nbytes != size:
        raise FormatError(expected(f"{size} bytes", f"{packed.nbytes} bytes", where=where))


def _unpacked(
    fmt: Format, layout: str, packed: NDArray[np.uint8], shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Return the columns of experts: uint8 [E, N, column_bytes]."""
    experts, k, n = shape
    if layout == GGUF:
        columns = packed.reshape(experts, n, -1)
    else:
        columns = np.empty((experts, n, fmt.column_bytes(k)), np.uint8)
        for own, out in zip(packed.reshape(experts, -1), columns, strict=True):
            for first, band in _bands(fmt, layout, own, k, n):
                part = out[first : first + len(band)]
                part[...] = band[: len(part), : out.shape[1]]  # without padding
    columns.flags.writeable = False
    return columns


def _bands(
    fmt: Format, layout: str, packed: NDArray[np.uint8], k: int, n: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first column, columns), with the padding of N and K, some at a time."""
    if layout == TILES16:
        return tiles16_bands(packed, Tiles(fmt, k, n))
    if layout == INTERLEAVED16:
        return _interleaved_bands(fmt, packed, Interleaved(fmt.repacked, k, n))
    return _planar_bands(fmt, packed, Planar(fmt.repacked, k, n))


def _interleaved_bands(
    fmt: Format, packed: NDArray[np.uint8], shape: Interleaved
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    panels = packed.reshape(shape.panels, shape.slabs, shape.slab_bytes)
    step = max(1, band_bytes(fmt) // shape.panel_bytes)
    for first in range(0, shape.panels, step):
        blocks = _interleaved_blocks(shape, panels[first : first + step])
        columns = unrepack(fmt, blocks).reshape(len(blocks), -1)
        yield first * PANEL_COLUMNS, columns


def _interleaved_blocks(shape: Interleaved, panels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the repacked blocks of panels: uint8 [columns, blocks, block_bytes]."""
    count, slab_blocks = len(panels), shape.blocks_per_slab
    listed = fields(shape.fmt)
    block_bytes = sum(field.size_bytes for field in listed)
    blocks = np.empty((count, PANEL_COLUMNS, shape.slabs, slab_blocks, block_bytes), np.uint8)
    for field in listed:
        word = np.dtype(f"<u{field.word_bytes}")
        words = blocks[..., field.at : field.at + field.size_bytes].view(word)
        start, stride = shape.field_at(field.name)
        for block in range(slab_blocks):
            at = start + block * stride
            stored = panels[..., at : at + PANEL_COLUMNS * field.size_bytes].view(word)
            # panel, slab, word, column -> panel, column, slab, word
            words[:, :, :, block] = stored.reshape(count, shape.slabs, -1, PANEL_COLUMNS).transpose(
                0, 3, 1, 2
            )
    return blocks.reshape(count * PANEL_COLUMNS, shape.blocks, block_bytes)


def _planar_bands(
    fmt: Format, packed: NDArray[np.uint8], shape: Planar
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    listed = fields(shape.fmt)
    block_bytes = sum(field.size_bytes for field in listed)
    step = max(1, band_bytes(fmt) // (shape.blocks * block_bytes))
    for first in range(0, shape.n, step):
        count = min(step, shape.n - first)
        blocks = np.empty((count, shape.blocks, block_bytes), np.uint8)
        for field in listed:
            start, size = shape.regions[field.name]
            at = start + first * shape.blocks * size
            region = packed[at : at + count * shape.blocks * size]
            blocks[..., field.at : field.at + size] = region.reshape(count, shape.blocks, size)
        yield first, unrepack(fmt, blocks).reshape(count, -1)
