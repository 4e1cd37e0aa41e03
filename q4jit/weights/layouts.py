"""Weight layouts: byte permutations of GGUF rows that suit a kernel's loads.

`gguf` is the file's own order: one row of blocks per column of the logical matrix [K, N].

`interleaved16` puts 16 columns side by side, so that a vector lane is one output column: scales
load as one vector, activations are broadcast and nothing is ever summed across lanes. Columns are
taken 16 at a time (zero blocks fill the last group); a group is a sequence of tiles along K, and a
tile holds two neighbouring blocks (one, where their number is odd), which makes it a whole number
of cache lines. Within a tile every field of the format is cut into units and unit u of all 16
columns stands together:

    [d of block 0, 16 × f16][d of block 1]  [m …]  [scales, 16 × int8 each …]
    [quants of block 0: words of 4 bytes, 16 columns each][quants of block 1]

F16 and F32 rows are taken 32 elements at a time as if those were a block (K is padded with zeros).

`planar` is for GPUs, where the threads of a wave read neighbouring blocks of one column: each field
of the format has a region of its own, which holds that field of every block, block after block and
column after column. So the 16 (or 32, …) bytes of a block's quants are aligned to 16 bytes and a
wave reads one run of memory. A region starts at a multiple of 256 bytes, the quants first:

    [quants of column 0: block 0, 1, …][quants of column 1] …  [scales …]  [d of column 0 …] … [m …]

`tiles16` is `planar` for matrix units, where a wave has 16 columns and four lanes share a block of
32 elements. A quad is four neighbouring blocks of a column, transposed by words of 4 bytes, so that
what a lane needs of them is one run of 16 bytes; the quads of 16 columns follow each other, so that
what a wave needs is one run, too. Blocks of zeros fill the last quad and the last 16 columns:

    [columns 0…15: quad 0 of column 0, of column 1, …][quad 1 …] … [columns 16…31 …] …
    a quad: [word 0 of blocks 0, 1, 2, 3][word 1 of blocks 0, 1, 2, 3][word 2 …][word 3 …]
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError
from q4jit.locks import BUILD
from q4jit.weights.formats import Format

GGUF: Final = "gguf"
INTERLEAVED16: Final = "interleaved16"
PLANAR: Final = "planar"
TILES16: Final = "tiles16"

PANEL_COLUMNS: Final = 16
LANES: Final = PANEL_COLUMNS  # of a CPU's vector: one for each column of a panel
FLOAT_BLOCK_ELEMENTS: Final = 32
CACHE_LINE_BYTES: Final = 64
REGION_BYTES: Final = 256  # a GPU's longest burst
_SHARED_BYTES: Final = 32 << 20
_BAND_BYTES: Final = 4 << 20  # rows repacked at a time: bounds the temporary copies


@dataclass(frozen=True)
class Field:
    """A run of bytes in a block that is cut into units of `word_bytes`."""

    name: str
    at: int
    size_bytes: int
    word_bytes: int


def fields(fmt: Format) -> tuple[Field, ...]:
    """The fields of a block in the order in which a tile holds them."""
    if fmt.float_dtype is not None:
        return (Field("values", 0, FLOAT_BLOCK_ELEMENTS * fmt.block_bytes, fmt.block_bytes),)
    found = []
    if fmt.scale_at is not None:
        found.append(Field("d", fmt.scale_at, 2, 2))
    if fmt.minimum_at is not None:
        found.append(Field("m", fmt.minimum_at, 2, 2))
    if fmt.sub_scales_at is not None:
        count = fmt.block_elements // fmt.sub_block_elements
        found.append(Field("scales", fmt.sub_scales_at, count, 1))
    for i, plane in enumerate(fmt.planes):
        size = plane.size_bytes(fmt.block_elements)
        found.append(Field(f"quants{i}", plane.at, size, 4))
    return tuple(found)


@dataclass(frozen=True)
class Interleaved:
    """The shape of one weight [K, N] in the `interleaved16` layout; all sizes in bytes."""

    fmt: Format
    k: int
    n: int

    @cached_property
    def block_elements(self) -> int:
        """Elements along K in one block (32 for the float formats)."""
        return FLOAT_BLOCK_ELEMENTS if self.fmt.float_dtype else self.fmt.block_elements

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
        """Groups of 16 columns."""
        return -(-self.n // PANEL_COLUMNS)

    @cached_property
    def blocks_per_slab(self) -> int:
        """Two where the blocks can be paired, else one."""
        return 1 if self.blocks % 2 else 2

    @cached_property
    def slabs(self) -> int:
        """Tiles along K."""
        return self.blocks // self.blocks_per_slab

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of a tile."""
        return PANEL_COLUMNS * self.blocks_per_slab * sum(f.size_bytes for f in fields(self.fmt))

    @cached_property
    def panel_bytes(self) -> int:
        """Bytes of a group of 16 columns."""
        return self.slabs * self.slab_bytes

    def field_at(self, name: str) -> tuple[int, int]:
        """Where a field of block 0 starts in a tile, and how far on block 1 has it.

        Scales of both blocks stand before the quants of both, so quants stay aligned.
        """
        head = [f for f in fields(self.fmt) if not f.name.startswith("quants")]
        body = [f for f in fields(self.fmt) if f.name.startswith("quants")]
        start = 0
        for field in head:
            if field.name == name:
                return start, PANEL_COLUMNS * field.size_bytes
            start += PANEL_COLUMNS * field.size_bytes * self.blocks_per_slab
        stride = PANEL_COLUMNS * sum(f.size_bytes for f in body)
        for field in body:
            if field.name == name:
                return start, stride
            start += PANEL_COLUMNS * field.size_bytes
        raise KeyError(name)


@dataclass(frozen=True)
class Planar:
    """The shape of one weight [K, N] in the `planar` layout; all sizes in bytes.

    tiled: in `tiles16`.
    """

    fmt: Format
    k: int
    n: int
    tiled: bool = False

    @cached_property
    def block_elements(self) -> int:
        """Elements along K in one block (32 for the float formats)."""
        return FLOAT_BLOCK_ELEMENTS if self.fmt.float_dtype else self.fmt.block_elements

    @cached_property
    def blocks(self) -> int:
        """Blocks along K."""
        blocks = -(-self.k // self.block_elements)
        return -(-blocks // 4) * 4 if self.tiled else blocks

    @cached_property
    def columns(self) -> int:
        """Columns that are stored."""
        return -(-self.n // PANEL_COLUMNS) * PANEL_COLUMNS if self.tiled else self.n

    @cached_property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Where the region of a field starts, and how many bytes of it a block has."""
        order = sorted(fields(self.fmt), key=lambda f: -f.size_bytes)
        found: dict[str, tuple[int, int]] = {}
        start = 0
        for field in order:
            found[field.name] = start, field.size_bytes
            size = self.columns * self.blocks * field.size_bytes
            start += -(-size // REGION_BYTES) * REGION_BYTES
        return found

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the whole weight."""
        start, size = list(self.regions.values())[-1]
        return start + -(-self.columns * self.blocks * size // REGION_BYTES) * REGION_BYTES


def pack(fmt: Format, layout: str, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Permute GGUF rows, uint8 [N, row_bytes], into `layout`: read-only uint8, one dimension.

    Works a few megabytes at a time, so the peak is the rows and the result. Raises FormatError for
    an unknown layout.
    """
    if layout == PLANAR:
        return _pack_planar(fmt, rows)
    if layout == TILES16:
        return _pack_tiles16(fmt, rows)
    if layout != INTERLEAVED16:
        known = f"{INTERLEAVED16!r}, {PLANAR!r} and {TILES16!r}"
        raise FormatError(f"unknown weight layout {layout!r}: known are {known}")
    n, row_bytes = rows.shape
    shape = Interleaved(fmt, row_bytes // fmt.block_bytes * fmt.block_elements, n)
    packed = _shared_empty(shape.panels * shape.panel_bytes)
    groups = packed.reshape(shape.panels, shape.slabs, shape.slab_bytes)
    for first, last, band in _bands(shape, rows):
        _pack_band(shape, band, groups[first:last])
    packed.flags.writeable = False
    return packed


@dataclass
class _Shared:
    """Memory that small weights share, one behind the other."""

    memory: NDArray[np.uint8]
    used_bytes: int = 0

    def references(self) -> int:
        """How many there are to the memory: each array that lies there has one."""
        return sys.getrefcount(self.memory)


_shared = _Shared(np.empty(0, np.uint8))
_UNUSED: Final = _shared.references()


def _shared_empty(size_bytes: int) -> NDArray[np.uint8]:
    """Memory for a CPU's kernels, at a cache line: a vector load that crosses one costs two.

    Small weights lie beside each other, because NumPy asks for huge pages for large arrays only and
    a small model's weights would else spend a tenth of their time in page tables. An array keeps
    the memory of its neighbours.
    """
    if size_bytes > _SHARED_BYTES // 8:
        return _aligned_empty(size_bytes)
    with BUILD:
        if _shared.references() == _UNUSED:
            _shared.used_bytes = 0
        if _shared.memory.size < _shared.used_bytes + size_bytes + CACHE_LINE_BYTES:
            _shared.memory, _shared.used_bytes = np.empty(_SHARED_BYTES, np.uint8), 0
        found = _from_line(_shared.memory[_shared.used_bytes :], size_bytes)
        _shared.used_bytes = found.ctypes.data + size_bytes - _shared.memory.ctypes.data
    return found


def _aligned_empty(size_bytes: int) -> NDArray[np.uint8]:
    return _from_line(np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8), size_bytes)


def _from_line(buffer: NDArray[np.uint8], size_bytes: int) -> NDArray[np.uint8]:
    start = -buffer.ctypes.data % CACHE_LINE_BYTES
    return buffer[start : start + size_bytes]


def _bands(
    shape: Interleaved, rows: NDArray[np.uint8]
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    row_bytes = shape.padded_k // shape.fmt.block_elements * shape.fmt.block_bytes
    step = max(1, _BAND_BYTES // (PANEL_COLUMNS * row_bytes))
    for first in range(0, shape.panels, step):
        last = min(first + step, shape.panels)
        band = rows[first * PANEL_COLUMNS : last * PANEL_COLUMNS]
        if band.shape != ((last - first) * PANEL_COLUMNS, row_bytes):
            padded = np.zeros(((last - first) * PANEL_COLUMNS, row_bytes), np.uint8)
            padded[: band.shape[0], : band.shape[1]] = band
            band = padded
        yield first, last, band


def _pack_band(shape: Interleaved, band: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    groups, per_tile = len(out), shape.blocks_per_slab
    blocks = band.reshape(groups, PANEL_COLUMNS, shape.slabs, per_tile, -1)
    for field in fields(shape.fmt):
        unit = np.dtype(f"<u{field.word_bytes}")
        source = blocks[..., field.at : field.at + field.size_bytes].view(unit)
        start, stride = shape.field_at(field.name)
        for block in range(per_tile):
            first = start + block * stride
            target = out[..., first : first + PANEL_COLUMNS * field.size_bytes].view(unit)
            target.reshape(groups, shape.slabs, -1, PANEL_COLUMNS)[...] = source[
                :, :, :, block
            ].transpose(0, 2, 3, 1)


def _pack_planar(fmt: Format, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    n, row_bytes = rows.shape
    shape = Planar(fmt, row_bytes // fmt.block_bytes * fmt.block_elements, n)
    packed = _aligned_empty(shape.size_bytes)
    sources = {field.name: field for field in fields(fmt)}
    end = 0
    for name, (start, size) in shape.regions.items():
        packed[end:start] = 0
        end = start + n * shape.blocks * size
        region = packed[start:end].reshape(n, shape.blocks * size)
        if fmt.float_dtype is not None:
            region[:, :row_bytes] = rows
            region[:, row_bytes:] = 0
        else:
            first = sources[name].at
            blocks = rows.reshape(n, shape.blocks, fmt.block_bytes)
            region.reshape(n, shape.blocks, size)[...] = blocks[..., first : first + size]
    packed[end:] = 0
    packed.flags.writeable = False
    return packed


def suits_tiles16(fmt: Format) -> bool:
    """Whether a format can be stored in `tiles16`: blocks of 32 quants of four bits and a scale."""
    return [f.name for f in fields(fmt)] == ["d", "quants0"] and fmt.block_bytes == 18


def _pack_tiles16(fmt: Format, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if not suits_tiles16(fmt):
        raise FormatError(
            f"the layout {TILES16!r} is for blocks of 18 bytes: {fmt.name} has others"
        )
    n, row_bytes = rows.shape
    shape = Planar(fmt, row_bytes // fmt.block_bytes * fmt.block_elements, n, tiled=True)
    packed = _aligned_empty(shape.size_bytes)
    packed[...] = 0
    quads = shape.blocks // 4
    sources = {field.name: field.at for field in fields(fmt)}
    for first in range(0, n, PANEL_COLUMNS):
        tile = np.zeros((PANEL_COLUMNS, shape.blocks, fmt.block_bytes), np.uint8)
        some = rows[first : first + PANEL_COLUMNS].reshape(
            -1, row_bytes // fmt.block_bytes, fmt.block_bytes
        )
        tile[: some.shape[0], : some.shape[1]] = some
        for name, (start, size) in shape.regions.items():
            fours = tile[..., sources[name] : sources[name] + size].reshape(
                PANEL_COLUMNS, quads, 4, -1, min(size, 4)
            )
            size_bytes = PANEL_COLUMNS * shape.blocks * size
            at = start + first // PANEL_COLUMNS * size_bytes
            # column, quad, block, word -> quad, column, word, block
            packed[at : at + size_bytes] = fours.transpose(1, 0, 3, 2, 4).reshape(-1)
    packed.flags.writeable = False
    return packed
