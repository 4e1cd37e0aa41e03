"""The rules: constants for products that nothing was measured for, in one table per platform.

Each number has its origin beside it: a measurement or a count of instructions. *Waves* are waves of
a thread block, and *compute units* are NVIDIA's SMs.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

from q4jit.hip.classes import FEW_ROWS, MANY_ROWS, TALL_TILE_ROWS, TILE_ROWS
from q4jit.hip.kernel import GEMV_MATRIX, MATRIX_COLUMNS, QUAD_ELEMENTS, TILE_HALVES
from q4jit.hip.memory import MOST_STAGES_BYTES
from q4jit.plan.kernels import Section
from q4jit.targets import HipArch

GEMV_MOST_ROWS: Final = 8
"""Rows of f32 that a `gemv` keeps in shared memory."""
GEMV_LANES: Final = (16, 32)
"""The fewest and the most threads that share a column: with more, 8 rows of x exceed 48 KiB."""
F16_ROWS_THREADS: Final = 512
"""Threads that split a row of x into f16 terms; `tile_halves` waits for them."""

TRANSPOSED_WAVES: Final = 4
"""Waves of a `tile_halves_transposed`, each with a word of every unit of a quad."""
MOST_TRANSPOSED_PRODUCTS: Final = 4
"""Products of a `tile_halves_transposed` whose sums find registers."""
TRANSPOSED_STAGES: Final = ((4, 3), (2, 4), (2, 3), (2, 2), (1, 3), (1, 2))
"""Units of a stage and stages of a `tile_halves_transposed`: the first that have room.

Each stage ends with a barrier, so long stages are preferred to many.
"""

TileShape = tuple[int, int]
"""Columns and waves of a thread block of `tile_halves`."""
Kind = Literal["folded", "plain", "other"]
"""Weights of a `tile_halves`: of Q4_0, rounded to f16 or not, or of other formats."""


@dataclass(frozen=True, kw_only=True)
class GpuRules(abc.ABC):
    """The constants that suit a platform.

    Attributes:
        gemv_matrix_rows: most rows of x for `gemv_matrix`; `tile_halves` multiplies more.
        tried: for each class of few rows, the schedules that a search compares.
        gemv_columns: columns of a wave of `gemv`, by rows of x.
        dot_columns: columns of a wave of `gemv_dot`, by rows of x.
        ahead_registers: most registers for the units that a lane of `gemv` loads ahead, for one row
            and for several rows; more of them halve the columns. None: no limit.

        splits: numbers of splits of K in `gemv_matrix`; the first that suits is taken.
        waves: waves of a `gemv_matrix` block, divided by the number of products.
        most_waves: the same if a compute unit has more panels than `waves`.
        most_waves_of_others: most of either for other formats than Q4_0 and more than `light_rows`.
        even_waves: waves of a `gemv_matrix` block are a multiple of it, if they can be.
        light_rows: most rows of x that are cheap to split into f16 terms. For so few rows, K is
            split only from `long_k` on, and `many_panels` per compute unit get `most_waves`.
        long_k: see `light_rows`.
        many_panels: see `light_rows`.
        ahead: quads that a wave of `gemv_matrix` loads before their turn.
        pair_rows: most rows of x whose f16 terms `gemv_matrix` multiplies by dot products.

        least_tile_rows: fewest rows of a tile of `tile_halves`.
        most_rows_of_several: most rows of a tile with several products.
        most_rows_of_wide: the same if they have codes of more than four bits.
        tall_products: most products of a tile of 128 rows.
        blocks_per_unit: thread blocks of `tile_halves` that fill a compute unit.
        stages_bytes: shared memory for x in `tile_halves`.
    """

    gemv_matrix_rows: int
    tried: Mapping[int, tuple[str, ...]]
    # measured on an H100: with more columns, more products share each x that is read; with fewer,
    # there are more waves, which hide latency
    gemv_columns: ClassVar[Mapping[int, int]] = {1: 2, 2: 4, 4: 2, 8: 2}
    dot_columns: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1, 8: 1, 16: 1}
    ahead_registers: tuple[int, int] | None = None

    splits: tuple[int, ...]
    waves: int = 16
    most_waves: int
    most_waves_of_others: int
    even_waves: int = 1
    light_rows: int = 2
    long_k: int = 8192
    many_panels: int = 4
    ahead: int
    pair_rows: int = 0

    least_tile_rows: int
    most_rows_of_several: int = TILE_ROWS
    most_rows_of_wide: int = TILE_ROWS
    tall_products: int = 2
    blocks_per_unit: int = 2
    stages_bytes: int

    @abc.abstractmethod
    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, kind: Kind
    ) -> TileShape:
        """Return the columns and waves of a `tile_halves`; rows: the class of M."""

    def waves_of(self, products: int, is_light: bool) -> tuple[int, int]:
        """Return `waves` and `most_waves` of a block; is_light: few rows, or blocks of Q4_0."""
        limit = self.most_waves if is_light else self.most_waves_of_others
        return (
            max(min(self.waves, limit) // products, 1),
            max(min(self.most_waves, limit) // products, 1),
        )

    def columns_of_gemv(self, rows: int, registers: int) -> int:
        """Return the columns of a wave of `gemv`; registers: of a lane for a unit of a column."""
        columns = self.gemv_columns[rows]
        if self.ahead_registers is not None:
            most = self.ahead_registers[rows > 1]
            while columns > 1 and columns * registers > most:
                columns //= 2
        return columns

    def tile_rows(
        self, arch: HipArch, section: Section, rows: int, may_be_tall: bool, has_wide: bool
    ) -> int:
        """Return the rows of a tile of `tile_halves`.

        Few rows are one tile. Many rows have tiles of 128 rows, if those fill the GPU. has_wide:
        whether codes have more than four bits.
        """
        products = len(section.products)
        tiles = products * section.width * min(rows, MANY_ROWS) // TALL_TILE_ROWS**2
        is_full = rows > MANY_ROWS or tiles >= self.blocks_per_unit * arch.compute_units
        suits = may_be_tall and rows > TILE_ROWS and products <= self.tall_products
        if suits and is_full:
            return TALL_TILE_ROWS
        several = self.most_rows_of_wide if has_wide else self.most_rows_of_several
        most = TILE_ROWS if products == 1 else several
        return min(max(rows, self.least_tile_rows), most)

    def transposed_tile_rows(
        self, arch: HipArch, section: Section, rows: int, f16_terms: int
    ) -> int:
        """Return the rows of a tile of `tile_halves_transposed`.

        A lane has a sum per row for each product. Two blocks of four waves have 255 registers a
        thread: more sums than these are spilled.
        """
        products = len(section.products)
        tiles = section.width * min(rows, MANY_ROWS) // TALL_TILE_ROWS**2
        # two blocks of a cluster share each, so that there are two on almost every compute unit
        is_full = rows > MANY_ROWS or 4 * tiles >= 3 * arch.compute_units
        if products == f16_terms == 1 and rows > TILE_ROWS and is_full:
            return TALL_TILE_ROWS
        load = products * f16_terms
        most = TILE_ROWS if load <= 2 else TILE_ROWS // 2 if load <= 4 else TILE_ROWS // 4
        return min(max(rows, self.least_tile_rows), most)

    def most_transposed_splits(self, arch: HipArch, section: Section, rows: int, tile: int) -> int:
        """Return how many thread blocks of a `tile_halves_transposed` may divide N.

        Results have only K columns, so blocks are few. tile: rows of a tile.
        """
        blocks = -(-section.width // QUAD_ELEMENTS) * -(-min(rows, MANY_ROWS) // tile)
        return 1 if rows > MANY_ROWS else self.blocks_per_unit * arch.compute_units // blocks

    def most_tile_splits(self, arch: HipArch, rows: int, blocks: int) -> int:
        """Return how many thread blocks of a `tile_halves` may share columns.

        Several may if all rows are one tile: otherwise there are enough blocks to fill the GPU.
        """
        return 1 if rows > TILE_ROWS else self.blocks_per_unit * arch.compute_units // blocks


@dataclass(frozen=True, kw_only=True)
class NvidiaRules(GpuRules):
    """Rules that were measured on an H100.

    Attributes:
        narrow: shape of the blocks for one tile of rows, and for several products, which have more
            columns together. The blocks are small, so that there are many.
        wide: shapes of the blocks for many rows. Each block reads all of x, so the widest shape
            that fills the GPU is taken.
        wide_folded: the same for weights that are rounded to f16.
        fullness: the part of the compute units that `wide` shapes must fill.
    """

    narrow: TileShape
    wide: tuple[TileShape, ...]
    wide_folded: tuple[TileShape, ...]
    fullness: float

    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, kind: Kind
    ) -> TileShape:
        """Return `narrow`, or the first of `wide` that fills the GPU."""
        if rows <= TILE_ROWS or len(section.products) > 1:
            return self.narrow
        wanted = self.fullness * arch.compute_units * tile_rows / min(rows, MANY_ROWS)
        for columns, waves in self.wide_folded if kind == "folded" else self.wide:
            if -(-section.width // columns) >= wanted:
                return columns, waves
        return self.narrow


@dataclass(frozen=True, kw_only=True)
class AmdRules(GpuRules):
    """Rules that were counted, not measured.

    A thread block of `gemv_matrix` needs about 137 instructions to split eight elements of x, and
    each wave needs 90 to multiply 16 columns by 128 elements of K. One block per compute unit is
    therefore best, as on NVIDIA. 16 waves are four per SIMD on CDNA and eight on RDNA. docs/amd.md
    counts whole blocks.

    Attributes:
        tile_columns: columns of a block of `tile_halves`. Few rows take half of them if there are
            fewer blocks than compute units.
        most_columns_of_several: most of them for several products of other formats than Q4_0.
    """

    tile_columns: int
    most_columns_of_several: int

    def tile_shape(
        self, arch: HipArch, section: Section, rows: int, tile_rows: int, kind: Kind
    ) -> TileShape:
        """Return `tile_columns` or half of them, with a wave for each panel."""
        columns = self.tile_columns
        if rows <= TILE_ROWS and section.width < arch.compute_units * columns:
            columns //= 2
        if kind == "other" and len(section.products) > 1:
            columns = min(columns, self.most_columns_of_several)
        return columns, columns // MATRIX_COLUMNS


NVIDIA: Final = NvidiaRules(
    gemv_matrix_rows=4,
    tried={
        **dict.fromkeys((1, 2), (GEMV_MATRIX,)),
        **dict.fromkeys((4, 8), (TILE_HALVES, GEMV_MATRIX)),
        16: (TILE_HALVES,),
    },
    splits=(2, 1),  # each block splits its own x into f16: more rows gain more from a split of K
    most_waves=28,  # one block per compute unit: 28 waves of 72 registers a thread fill it
    most_waves_of_others=28,
    ahead=2,  # further ahead takes registers and gains nothing
    least_tile_rows=8,  # of a matrix instruction
    stages_bytes=MOST_STAGES_BYTES,  # leaves room for several blocks per compute unit
    narrow=(64, 4),
    wide=((256, 16), (128, 8)),
    wide_folded=((128, 8),),
    fullness=0.75,
)
AMD: Final = AmdRules(
    gemv_matrix_rows=FEW_ROWS[-1],
    tried=dict.fromkeys(FEW_ROWS, (GEMV_MATRIX,)),
    splits=(1,),  # no clusters, in which blocks could add their sums
    most_waves=16,
    most_waves_of_others=16,
    # SIMDs of a compute unit (RDNA: of a work-group processor). Counted: with 12 waves instead of
    # 15 the busiest SIMD issues 10 to 30 % less for K = 4096
    even_waves=4,
    ahead=1,
    # counted: of one row LLVM spills 256, but not 192; of two rows 128, but not 76
    ahead_registers=(192, 96),
    least_tile_rows=16,  # of a matrix instruction
    stages_bytes=16 << 10,  # of 64 KiB; the next stage is in registers while it is loaded
    tile_columns=128,
    most_columns_of_several=128,
)
# HBM has a long latency, and four waves per SIMD hide little of it. Counted: 16 waves have 128
# registers a lane, which spill up to 130 of Q2_K and 33 of Q4_K; 8 waves spill none. Tiles of two
# products and 128 columns have 8 waves, which spill up to 121 of Q6_K and 50 of Q4_K.
CDNA: Final = replace(AMD, ahead=2, most_waves_of_others=8, most_columns_of_several=64)
# WMMA of RDNA 3 takes its 32 cycles also for a single row, and lanes 0 to 15 and 16 to 31 of a wave
# decode the same weights for it. With dot products, one row needs a third of that vector time. A
# lane has whole units of a column, so several products fill the registers; counted: 32 rows spill
# up to 32 of Q8_0.
RDNA3: Final = replace(
    AMD,
    pair_rows=1,
    most_rows_of_several=TILE_ROWS // 2,
    most_rows_of_wide=TILE_ROWS // 4,
)

_BY_MATRIX: Final = {"mma_sync": NVIDIA, "mfma": CDNA, "wmma": RDNA3, "wmma_gfx12": AMD, None: AMD}


def rules_of(arch: HipArch) -> GpuRules:
    """Return the rules for an arch, by the kind of its matrix units."""
    return _BY_MATRIX[arch.matrix]
