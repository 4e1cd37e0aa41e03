"""Weight layouts: orders of a weight's bytes that suit the loads of kernels.

`gguf` is the order of the file: one column of w after the other, each a sequence of blocks. The
other layouts hold the fields of repacked blocks (`Format.repacked`).

`interleaved16` is for CPUs, where each lane of a vector computes one column: a vector of scales is
one load, activations are broadcast, and no sum crosses lanes. A panel is 16 adjacent columns; zero
blocks fill the last one. It is divided along K into slabs of two blocks (of one, if the number of
blocks is odd), so that a slab is a whole number of cache lines. In a slab each field is divided
into words, and word i of all 16 columns is contiguous:

    [d of block 0, 16 × f16][d of block 1]  [m …]  [scales, 16 × int8 each …]
    [quants of block 0: words of 4 bytes, 16 columns each][quants of block 1]

F16 and F32 have no blocks; 32 elements are treated as one (zeros fill the last along K).

`planar` is for GPUs, where the threads of a wave read adjacent blocks of one column. Each field has
its own region, which holds that field of every block, column after column. So a block's quants are
aligned to 16 bytes, and a wave's loads are contiguous. Regions start at multiples of 256 bytes; the
quants come first:

    [quants of column 0: block 0, 1, …][quants of column 1] …  [scales …]  [d of column 0 …] … [m …]

`tiles16` is for GPUs with matrix units: see `tiles.py`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, expected
from q4jit.locks import BUILD
from q4jit.weights.formats import SCALE_BYTES, Format
from q4jit.weights.mapped import DrainedColumns
from q4jit.weights.repack import repack
from q4jit.weights.tiles import PANEL_COLUMNS, REGION_BYTES, Tiles, pack_tiles16, suits_tiles16

GGUF: Final = "gguf"
INTERLEAVED16: Final = "interleaved16"
PLANAR: Final = "planar"
TILES16: Final = "tiles16"
LAYOUTS: Final = frozenset({GGUF, INTERLEAVED16, PLANAR, TILES16})

Columns = NDArray[np.uint8] | DrainedColumns
"""Columns of a weight in GGUF's order, which are read in bands."""

LANES: Final = PANEL_COLUMNS  # of a CPU's vector, one per column
FLOAT_BLOCK_ELEMENTS: Final = 32
CACHE_LINE_BYTES: Final = 64
_POOL_BYTES: Final = 32 << 20
_BAND_BYTES: Final = 4 << 20  # of columns that are repacked at a time, to bound temporary copies


@dataclass(frozen=True)
class Field:
    """A field of a block, divided into words.

    Attributes:
        name: GGUF's name (`d`, `m`, `scales`), `quants0` and `quants1` for planes, or `values`.
        at: where it starts in a GGUF block, in bytes.
    """

    name: str
    at: int
    size_bytes: int
    word_bytes: int


def fields(fmt: Format) -> tuple[Field, ...]:
    """Return the fields of a block in the order of a slab."""
    if fmt.float_type is not None:
        return (Field("values", 0, FLOAT_BLOCK_ELEMENTS * fmt.block_bytes, fmt.block_bytes),)
    listed = []
    if fmt.scale_at is not None:
        size_bytes = SCALE_BYTES[fmt.scale_type]
        listed.append(Field("d", fmt.scale_at, size_bytes, size_bytes))
    if fmt.minimum_at is not None:
        listed.append(Field("m", fmt.minimum_at, 2, 2))
    listed += _factor_fields(fmt)
    for i, plane in enumerate(fmt.planes):
        listed.append(Field(f"quants{i}", plane.at, plane.size_bytes(fmt.block_elements), 4))
    return tuple(listed)


def _factor_fields(fmt: Format) -> list[Field]:
    """Return the fields of sub-scales and sub-minima: one, `scales`, if they share bytes."""
    scales = fmt.sub_scales.bytes_read(fmt.sub_blocks) if fmt.sub_scales else set()
    minima = fmt.sub_minima.bytes_read(fmt.sub_blocks) if fmt.sub_minima else set()
    if scales & minima:
        scales, minima = scales | minima, set()
    named = {"scales": scales, "minima": minima}
    return [Field(name, min(at), max(at) + 1 - min(at), 1) for name, at in named.items() if at]


@dataclass(frozen=True)
class Interleaved:
    """The sizes and positions of a weight [K, N] in the layout `interleaved16`, in bytes.

    Attributes:
        fmt: a repacked format.
    """

    fmt: Format
    k: int
    n: int

    @cached_property
    def block_elements(self) -> int:
        """Elements of a block (32 for the float formats)."""
        return FLOAT_BLOCK_ELEMENTS if self.fmt.float_type else self.fmt.block_elements

    @cached_property
    def blocks(self) -> int:
        """Blocks along K."""
        return -(-self.k // self.block_elements)

    @cached_property
    def padded_k(self) -> int:
        """K rounded up to whole blocks."""
        return self.blocks * self.block_elements

    @cached_property
    def panels(self) -> int:
        """Panels along N."""
        return -(-self.n // PANEL_COLUMNS)

    @cached_property
    def blocks_per_slab(self) -> int:
        """Two, or one if the number of blocks along K is odd."""
        return 1 if self.blocks % 2 else 2

    @cached_property
    def slabs(self) -> int:
        """Slabs along K."""
        return self.blocks // self.blocks_per_slab

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of a slab."""
        return PANEL_COLUMNS * self.blocks_per_slab * sum(f.size_bytes for f in fields(self.fmt))

    @cached_property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        return self.slabs * self.slab_bytes

    def field_at(self, name: str) -> tuple[int, int]:
        """Return where a field of a slab's block 0 starts, and how much later block 1 has it.

        The scales of both blocks precede the quants of both, so that quants are aligned.
        """
        scales = [f for f in fields(self.fmt) if not f.name.startswith("quants")]
        quants = [f for f in fields(self.fmt) if f.name.startswith("quants")]
        at = 0
        for field in scales:
            if field.name == name:
                return at, PANEL_COLUMNS * field.size_bytes
            at += PANEL_COLUMNS * field.size_bytes * self.blocks_per_slab
        stride = PANEL_COLUMNS * sum(f.size_bytes for f in quants)
        for field in quants:
            if field.name == name:
                return at, stride
            at += PANEL_COLUMNS * field.size_bytes
        raise KeyError(name)


@dataclass(frozen=True)
class Planar:
    """The sizes and positions of a weight [K, N] in `planar`, in bytes.

    Attributes:
        fmt: a repacked format.
    """

    fmt: Format
    k: int
    n: int

    @cached_property
    def block_elements(self) -> int:
        """Elements of a block (32 for the float formats)."""
        return FLOAT_BLOCK_ELEMENTS if self.fmt.float_type else self.fmt.block_elements

    @cached_property
    def blocks(self) -> int:
        """Blocks along K."""
        return -(-self.k // self.block_elements)

    @cached_property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Where the region of each field starts, and the bytes of that field in a block."""
        order = sorted(fields(self.fmt), key=lambda f: -f.size_bytes)
        regions: dict[str, tuple[int, int]] = {}
        at = 0
        for field in order:
            regions[field.name] = at, field.size_bytes
            size = self.n * self.blocks * field.size_bytes
            at += -(-size // REGION_BYTES) * REGION_BYTES
        return regions

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the whole weight."""
        start, size = list(self.regions.values())[-1]
        return start + -(-self.n * self.blocks * size // REGION_BYTES) * REGION_BYTES


def packed_bytes(fmt: Format, layout: str, k: int, n: int) -> int:
    """Return the bytes of a weight [K, N] in a layout.

    Raises FormatError for an unknown layout, for one that the format does not have, and unless K is
    whole blocks.
    """
    column_bytes = fmt.column_bytes(k)
    if layout == GGUF:
        return n * column_bytes
    if layout == PLANAR:
        return Planar(fmt.repacked, k, n).size_bytes
    if layout == TILES16:
        _check_tiles16(fmt)
        return Tiles(fmt, k, n).size_bytes
    if layout != INTERLEAVED16:
        known = ", ".join(map(repr, (GGUF, INTERLEAVED16, PLANAR, TILES16)))
        raise FormatError(f"unknown weight layout {layout!r}; known layouts: {known}")
    shape = Interleaved(fmt.repacked, k, n)
    return shape.panels * shape.panel_bytes


def _check_tiles16(fmt: Format) -> None:
    if not suits_tiles16(fmt):
        formats = "a format with blocks of codes"
        raise FormatError(expected(formats, fmt.name, where=f"layout {TILES16!r}"))


def pack(
    fmt: Format, layout: str, columns: Columns, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Repack columns, uint8 [N, column_bytes] as in GGUF, into a layout: read-only uint8 [bytes].

    Works on a few megabytes at a time, so the peak memory is the input and the result.

    out: contiguous uint8 [bytes], which is overwritten, padding included, and returned as it is.
    Without it, the result is in memory of its own, which begins at a cache line. Raises FormatError
    for an unknown layout, for one that the format does not have, and for another `out`.
    """
    n, column_bytes = columns.shape
    k = column_bytes // fmt.block_bytes * fmt.block_elements
    size_bytes = packed_bytes(fmt, layout, k, n)
    if out is not None:
        _check_out(out, size_bytes)
    make = _pooled_memory if layout == INTERLEAVED16 else _aligned_memory
    packed = make(size_bytes) if out is None else out
    _PACKERS[layout](fmt, k, columns, packed)
    if out is None:
        packed.flags.writeable = False
    return packed


def pack_experts(
    fmt: Format, layout: str, columns: Columns, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Repack the columns of experts, uint8 [E, N, column_bytes]: read-only uint8 [E · bytes].

    Each expert is repacked by itself, so that all take the same bytes. out: as in `pack`. Raises
    FormatError as `pack` does.
    """
    experts, n, column_bytes = columns.shape
    k = column_bytes // fmt.block_bytes * fmt.block_elements
    size_bytes = experts * packed_bytes(fmt, layout, k, n)
    if out is not None:
        _check_out(out, size_bytes)
    packed = _aligned_memory(size_bytes) if out is None else out
    for e, row in enumerate(packed.reshape(experts, -1)):
        pack(fmt, layout, columns[e], row)
    if out is None:
        packed.flags.writeable = False
    return packed


def _check_out(out: NDArray[np.uint8], size_bytes: int) -> None:
    if out.dtype != np.uint8 or out.shape != (size_bytes,) or not out.flags.c_contiguous:
        what, got = f"contiguous uint8 [{size_bytes}]", f"{out.dtype} {list(out.shape)}"
        raise FormatError(expected(what, got, where="out"))


@dataclass
class _Pool:
    """Memory from which small weights are cut one after the other."""

    memory: NDArray[np.uint8]
    used_bytes: int = 0

    def references(self) -> int:
        """Return the number of references to the memory; each array cut from it is one."""
        return sys.getrefcount(self.memory)


_pool = _Pool(np.empty(0, np.uint8))
_UNUSED: Final = _pool.references()


def _pooled_memory(size_bytes: int) -> NDArray[np.uint8]:
    """Return memory for a CPU's kernels, aligned to cache lines so that no vector load crosses one.

    Small weights share a large array, because NumPy asks for huge pages only for large arrays: with
    memory of their own, a small model's weights would cost a tenth of the time in page tables. An
    array keeps the memory of its neighbours alive.
    """
    if size_bytes > _POOL_BYTES // 8:
        return _aligned_memory(size_bytes)
    with BUILD:
        if _pool.references() == _UNUSED:
            _pool.used_bytes = 0
        if _pool.memory.size < _pool.used_bytes + size_bytes + CACHE_LINE_BYTES:
            _pool.memory, _pool.used_bytes = np.empty(_POOL_BYTES, np.uint8), 0
        memory = _from_cache_line(_pool.memory[_pool.used_bytes :], size_bytes)
        _pool.used_bytes = memory.ctypes.data + size_bytes - _pool.memory.ctypes.data
    return memory


def aligned(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return packed bytes as kernels read them: these, or a copy that starts at a cache line."""
    if packed.ctypes.data % CACHE_LINE_BYTES == 0:
        return packed
    copy = _aligned_memory(packed.nbytes)
    copy[...] = packed
    copy.flags.writeable = False
    return copy


def _aligned_memory(size_bytes: int) -> NDArray[np.uint8]:
    return _from_cache_line(np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8), size_bytes)


def _from_cache_line(buffer: NDArray[np.uint8], size_bytes: int) -> NDArray[np.uint8]:
    at = -buffer.ctypes.data % CACHE_LINE_BYTES
    return buffer[at : at + size_bytes]


def _batches(
    fmt: Format, shape: Interleaved, columns: Columns
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Yield (first panel, last panel, their repacked columns): zeros where K or N is padded."""
    column_bytes = shape.padded_k // shape.fmt.block_elements * shape.fmt.block_bytes
    step = max(1, band_bytes(fmt) // (PANEL_COLUMNS * column_bytes))
    for first in range(0, shape.panels, step):
        last = min(first + step, shape.panels)
        batch = _repacked_columns(fmt, columns[first * PANEL_COLUMNS : last * PANEL_COLUMNS])
        if batch.shape != ((last - first) * PANEL_COLUMNS, column_bytes):
            padded = np.zeros(((last - first) * PANEL_COLUMNS, column_bytes), np.uint8)
            padded[: batch.shape[0], : batch.shape[1]] = batch
            batch = padded
        yield first, last, batch


def band_bytes(fmt: Format) -> int:
    """Return the bytes of columns to work on at a time: repacking unpacks every code to a byte."""
    return _BAND_BYTES if fmt.repacked is fmt else _BAND_BYTES // 4


def _repacked_columns(fmt: Format, columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return columns [n, column_bytes] with repacked blocks."""
    n, column_bytes = columns.shape
    blocks = columns.reshape(n, column_bytes // fmt.block_bytes, fmt.block_bytes)
    return repack(fmt, blocks).reshape(n, -1)


def _pack_gguf(fmt: Format, k: int, columns: Columns, packed: NDArray[np.uint8]) -> None:
    rows = packed.reshape(columns.shape)
    step = max(1, _BAND_BYTES // columns.shape[1])
    for first in range(0, len(rows), step):
        rows[first : first + step] = columns[first : first + step]


def _pack_interleaved16(fmt: Format, k: int, columns: Columns, packed: NDArray[np.uint8]) -> None:
    shape = Interleaved(fmt.repacked, k, columns.shape[0])
    panels = packed.reshape(shape.panels, shape.slabs, shape.slab_bytes)
    for first, last, batch in _batches(fmt, shape, columns):
        _pack_batch(shape, batch, panels[first:last])


def _pack_batch(shape: Interleaved, batch: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    panels, slab_blocks = len(out), shape.blocks_per_slab
    blocks = batch.reshape(panels, PANEL_COLUMNS, shape.slabs, slab_blocks, -1)
    for field in fields(shape.fmt):
        word = np.dtype(f"<u{field.word_bytes}")
        words = blocks[..., field.at : field.at + field.size_bytes].view(word)
        start, stride = shape.field_at(field.name)
        for block in range(slab_blocks):
            at = start + block * stride
            target = out[..., at : at + PANEL_COLUMNS * field.size_bytes].view(word)
            # panel, column, slab, word -> panel, slab, word, column
            target.reshape(panels, shape.slabs, -1, PANEL_COLUMNS)[...] = words[
                :, :, :, block
            ].transpose(0, 2, 3, 1)


def _pack_planar(fmt: Format, k: int, columns: Columns, packed: NDArray[np.uint8]) -> None:
    n, column_bytes = columns.shape
    shape = Planar(fmt.repacked, k, n)
    regions, end = [], 0
    for name, (start, size) in shape.regions.items():
        packed[end:start] = 0
        end = start + n * shape.blocks * size
        regions.append((name, packed[start:end].reshape(n, shape.blocks, size)))
    packed[end:] = 0
    step = max(1, band_bytes(fmt) // column_bytes)
    field_at = {field.name: field.at for field in fields(shape.fmt)}
    for first in range(0, n, step):
        batch = _repacked_columns(fmt, columns[first : first + step])
        for name, region in regions:
            if fmt.float_type is not None:
                part = region[first : first + step].reshape(len(batch), -1)
                part[:, :column_bytes] = batch
                part[:, column_bytes:] = 0
            else:
                at, size = field_at[name], region.shape[-1]
                blocks = batch.reshape(len(batch), shape.blocks, -1)
                region[first : first + step] = blocks[..., at : at + size]


def _pack_tiles16(fmt: Format, k: int, columns: Columns, packed: NDArray[np.uint8]) -> None:
    packed[...] = 0
    pack_tiles16(fmt, columns, packed, Tiles(fmt, k, columns.shape[0]))


_PACKERS: Final = {
    GGUF: _pack_gguf,
    INTERLEAVED16: _pack_interleaved16,
    PLANAR: _pack_planar,
    TILES16: _pack_tiles16,
}
