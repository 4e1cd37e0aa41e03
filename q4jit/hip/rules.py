"""Rules: what was measured, or counted, about GPUs; one table for each platform.

Schedules read these tables where nothing was measured for the product itself. Sizes are in waves,
columns and rows; `compute units` are NVIDIA's SMs.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from q4jit.hip.classes import FEW_ROWS, MANY_ROWS, TALL_TILE_ROWS, TILE_ROWS
from q4jit.hip.kernel import GEMV_MATRIX, MATRIX_COLUMNS, TILE_HALVES
from q4jit.hip.memory import MOST_STAGES_BYTES
from q4jit.plan.kernels import Section
from q4jit.targets import HipArch

GEMV_MOST_ROWS: Final = 8
"""Rows of f32 that `gemv` keeps in shared memory beside each other."""
GEMV_LANES: Final = (16, 32)
"""The fewest and the most threads that share a column: beyond 32, x of 8 rows exceeds 48 KiB."""
ROWS_OF_HALVES_THREADS: Final = 512
"""Threads that split a row of x for `tile_halves`, which waits for them."""

_TALL_TILE_PRODUCTS: Final = 2
_TILE_BLOCKS: Final = 2  # per compute unit


@dataclass(frozen=True)
class Rules(abc.ABC):
    """What a platform does best.

    gemv_matrix_rows: of x, up to which `gemv_matrix` multiplies few rows, and beyond which
    `tile_halves` does. tried: the schedules of a class of few rows that a search compares.

    Of `gemv` and `gemv_dot`: columns of a wave, by rows of x.

    Of `gemv_matrix`: waves of a block, for all products together, and most_waves where a block has
    columns enough, which is more than many_tiles of them for few rows. splits: of K, the first that
    suits counts; for few_rows only from long_k on. ahead: quads that a wave loads before their
    turn. pair_rows: of x, up to which f16 terms are multiplied by dot products.

    Of `tile_halves`: least_tile_rows: of a matrix instruction. most_rows_of_several: of a tile with
    several products. stages_bytes: of x in shared memory.
    """

    gemv_matrix_rows: int
    tried: Mapping[int, tuple[str, ...]]

    splits: tuple[int, ...]
    most_waves: int
    ahead: int

    least_tile_rows: int
    stages_bytes: int

    most_rows_of_several: int = TILE_ROWS
    pair_rows: int = 0
    waves: int = 16
    few_rows: int = 2
    long_k: int = 8192
    many_tiles: int = 4

    # measured on an H100: more columns share a reading of x, fewer leave more waves to hide latency
    gemv_columns: ClassVar[Mapping[int, int]] = {1: 2, 2: 4, 4: 2, 8: 2}
    dot_columns: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1, 8: 1, 16: 1}

    @abc.abstractmethod
    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, folded: bool
    ) -> tuple[int, int]:
        """Columns of a `tile_halves`' block, and its waves; rows: the class of M."""

    def tile_rows(self, arch: HipArch, section: Section, rows: int, may_be_tall: bool) -> int:
        """Rows of a `tile_halves`: all of a few, and 128 of many where such tiles fill the GPU."""
        products = len(section.products)
        tiles = products * section.width * min(rows, MANY_ROWS) // TALL_TILE_ROWS**2
        is_full = rows > MANY_ROWS or tiles >= _TILE_BLOCKS * arch.compute_units
        suits = may_be_tall and rows > TILE_ROWS and products <= _TALL_TILE_PRODUCTS
        if suits and is_full:
            return TALL_TILE_ROWS
        most = TILE_ROWS if products == 1 else self.most_rows_of_several
        return min(max(rows, self.least_tile_rows), most)

    def most_tile_splits(self, arch: HipArch, rows: int, blocks: int) -> int:
        """Blocks of a `tile_halves` that may share columns: several for a single tile of rows."""
        return 1 if rows > TILE_ROWS else _TILE_BLOCKS * arch.compute_units // blocks


class NvidiaRules(Rules):
    """Measured on an H100."""

    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, folded: bool
    ) -> tuple[int, int]:
        """Small blocks for one tile of rows, so that there are many; wide ones for many rows.

        For many rows they are as wide as fills the GPU, since each reads all of x.
        """
        few, many = (64, 4), ((256, 16), (128, 8))
        if rows <= TILE_ROWS or len(section.products) > 1:  # which have more columns together
            return few
        wanted = 0.75 * arch.compute_units * tile_rows / min(rows, MANY_ROWS)  # a full GPU's
        wide = many[1:] if folded else many
        return next((shape for shape in wide if -(-section.width // shape[0]) >= wanted), few)


class AmdRules(Rules):
    """Not measured, but counted.

    A block of `gemv_matrix` splits eight x in about 137 instructions, and multiplies 16 columns by
    128 k in 90 a wave, so that here too a compute unit does best with one block; 16 waves are four
    on a SIMD of CDNA, eight on one of RDNA. A compute unit has 64 KiB of shared memory, and
    registers hold what of x is on its way.
    """

    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, folded: bool
    ) -> tuple[int, int]:
        """128 columns, or half of them where few rows would leave compute units idle."""
        columns = 128
        if rows <= TILE_ROWS and section.width < arch.compute_units * columns:
            columns //= 2
        return columns, columns // MATRIX_COLUMNS


# One block per compute unit, with all the waves that registers leave room for (half of them for
# more products); loading further ahead takes registers and gains nothing; the more rows, the more a
# split of K saves, as each block splits its own x into f16.
NVIDIA: Final = NvidiaRules(
    gemv_matrix_rows=4,
    tried={
        **dict.fromkeys((1, 2), (GEMV_MATRIX,)),
        **dict.fromkeys((4, 8), (TILE_HALVES, GEMV_MATRIX)),
        16: (TILE_HALVES,),
    },
    splits=(2, 1),
    most_waves=28,  # with 72 registers a thread
    ahead=2,
    least_tile_rows=8,
    stages_bytes=MOST_STAGES_BYTES,  # which leaves room for several blocks of a compute unit
)
AMD: Final = AmdRules(
    gemv_matrix_rows=FEW_ROWS[-1],
    tried=dict.fromkeys(FEW_ROWS, (GEMV_MATRIX,)),
    splits=(1,),
    most_waves=16,
    ahead=1,
    least_tile_rows=16,
    stages_bytes=16 << 10,
)
# HBM is far, and four waves a SIMD are few
CDNA: Final = replace(AMD, ahead=2)
# WMMA of RDNA 3 takes its 32 cycles for one row too, and both halves of a wave decode the same
# weights for it: by dot products one row needs a third of the vector units' time. A lane has whole
# units of a column: several products fill the registers.
RDNA3: Final = replace(AMD, pair_rows=1, most_rows_of_several=TILE_ROWS // 2)

_BY_MATRIX: Final = {"mma_sync": NVIDIA, "mfma": CDNA, "wmma": RDNA3, "wmma_gfx12": AMD, None: AMD}


def rules_of(arch: HipArch) -> Rules:
    """Return the rules for an arch, by the kind of its matrix units."""
    return _BY_MATRIX[arch.matrix]
