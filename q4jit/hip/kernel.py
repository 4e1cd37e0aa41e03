"""The kernels of a plan for a GPU, each a template with constants, and their grids."""

from dataclasses import dataclass, field
from typing import Final

from q4jit.frontend.graph import Node
from q4jit.plan.kernels import Kernel, Plan, Section, Slot
from q4jit.weights.layouts import FLOAT_BLOCK_ELEMENTS, PLANAR, TILES16

ELEMENT: Final = "element"
ELEMENT_TRANSPOSED: Final = "element_transposed"
GEMV: Final = "gemv"
GEMV_TRANSPOSED: Final = "gemv_transposed"
ADD_SPLITS: Final = "add_splits"
GEMV_DOT: Final = "gemv_dot"
GEMV_MATRIX: Final = "gemv_matrix"
TILE_FMA: Final = "tile_fma"
TILE_TRANSPOSED: Final = "tile_transposed"
TILE_MATRIX: Final = "tile_matrix"
TILE_HALVES: Final = "tile_halves"
TILE_HALVES_TRANSPOSED: Final = "tile_halves_transposed"
ROWS: Final = "rows"
DEQUANTIZE: Final = "dequantize"
LOOKUP: Final = "lookup"
SORT_EXPERTS: Final = "sort_experts"

UNIT_ELEMENTS: Final = FLOAT_BLOCK_ELEMENTS
"""Elements of a column that are decoded together, in every format."""
QUAD_ELEMENTS: Final = 4 * UNIT_ELEMENTS
"""Elements of a column that are stored together in `TILES16`."""
QUAD_UNITS: Final = QUAD_ELEMENTS // UNIT_ELEMENTS
MATRIX_COLUMNS: Final = 16
"""Columns of a matrix instruction."""
MAX_GRID_Y: Final = 65535
"""CUDA's and HIP's limit; further rows of blocks go to the z axis."""
BLOCK_SIZE: Final = 256
"""Threads of a block, unless a rule or a caller chooses another number."""

# bf16 has 8 significant bits: three terms are an f32 exactly, two err by 2⁻¹⁷
BF16_TERMS: Final = {"f32": 3, "f16": 2, "i8": 2}
# f16 has 11 significant bits: two terms err by 2⁻²³, one by 2⁻¹²
F16_TERMS: Final = {"f32": 2, "f16": 1, "i8": 1}

BOUNDED_THREADS: Final = 512
"""Threads of a compute unit that must find registers where `HipKernel.is_bounded`."""
# measured on an H100: with these sums the compiler, left alone, uses more than 128 registers
_BOUNDED_SUMS: Final = 64

_ARGUMENTS: Final = {"load": "array", "ids": "ids", "scalar": "scalar"}  # a slot's kind, by op


@dataclass(frozen=True)
class HipKernel:
    """A kernel for a GPU: its work, done by the template `schedule` with these constants.

    Attributes:
        work: what it computes.
        schedule: the template.
        block_size: threads of a block.
        layout: the layout of every weight that it reads.
        rows_per_tile: rows of x that a block computes.
        columns: columns of the result that a block (`gemv`: a group of lanes) computes.
        lanes: threads of a wave that share a column.
        bf16_terms: bf16 numbers that each x is split into for matrix units.
        int8: x is rounded to int8 for dot products.
        ahead: units (`gemv_matrix`: quads) that a lane loads before their turn.
        scales_late: the quants of a unit are multiplied as whole numbers, and their sum by the
            scale (an Inf or NaN there would not meet the quants of 0).
        f16_terms: f16 numbers that each x is split into. They share a scale: those of a unit in
            `gemv_matrix`, elsewhere those of a row.
        exact_x: x is an array of f16 or bf16, so that one f16 term is all of it.
        splits: blocks that share columns, each with its own part of K (of N, for `w.T`).
        wave_panels: panels that a wave computes.
        stage_units: units of x in a stage.
        stages: stages in shared memory: one is multiplied, the others are on their way.
        warpgroups: four waves multiply together.
        pairs: f16 terms are multiplied by dot products of two.
        x_sums: sums of x that minima are multiplied by: none, one of a unit, or two of its halves.
        units_beside: the units of a quad are multiplied side by side, each by rows of x of its own.
        folded: weights are rounded to f16 after their scales are multiplied, so sums need none.
        experts: the matrices of a weight, if the vectors of a call are sorted by expert; else 0.
        origin: who chose the constants, if the schedule did not.
    """

    work: Kernel
    schedule: str
    block_size: int = BLOCK_SIZE
    layout: str = PLANAR
    rows_per_tile: int = 1
    columns: int = 1
    lanes: int = 1
    bf16_terms: int = 0
    int8: bool = False
    ahead: int = 1
    scales_late: bool = False
    f16_terms: int = 0
    exact_x: bool = False
    splits: int = 1
    wave_panels: int = 1
    stage_units: int = 0
    stages: int = 2
    warpgroups: bool = False
    pairs: bool = False
    folded: bool = False
    x_sums: int = 0
    units_beside: bool = False
    experts: int = 0
    origin: str = field(default="", compare=False)

    @property
    def granule(self) -> int:
        """The elements of a column at whose multiples the lanes of a wave begin, for `w.T`."""
        return QUAD_ELEMENTS if self.layout == TILES16 else UNIT_ELEMENTS

    def first_k(self, product: Node) -> int:
        """Return the element of a column at which the first block begins, for `w.T`."""
        return product.start // self.granule * self.granule

    @property
    def transposed_tiles(self) -> int:
        """The blocks that divide the results of a product with `w.T`."""
        widths = [p.start - self.first_k(p) + p.width for p in self.section.products]
        return -(-max(widths) // self.columns)

    @property
    def cluster_blocks(self) -> int:
        """The blocks of a cluster."""
        return 1 if self.schedule in {GEMV_TRANSPOSED, ADD_SPLITS} else self.splits

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.work.uniform:
            return f"{self.schedule}, {self.work.rows_class}"
        if self.work.chosen is not None:
            vectors = f"{self.rows_per_tile} vectors of an expert"
            vectors = vectors if self.experts else "a vector and its expert"
            return f"{self.schedule}, {vectors} a tile, {self.block_size} threads"
        if self.schedule == LOOKUP and self.layout != PLANAR:
            return f"{self.schedule} in {self.layout}, {self.block_size} threads"
        rows = "1 row" if self.rows_per_tile == 1 else f"{self.rows_per_tile} rows"
        return f"{self.schedule}, {rows} a tile, {self.block_size} threads"

    def waves_k(self, wave: int) -> int:
        """Return the waves of a block that share columns, each with its own part of K."""
        return self.block_size * MATRIX_COLUMNS * self.wave_panels // (wave * self.columns)

    @property
    def is_bounded(self) -> bool:
        """Whether 512 threads must share the registers, and sums take half of their share."""
        if not self.work.sections or not self.warpgroups:
            return False
        sums = self.rows_per_tile // 2 * (1 if self.folded else 2)  # registers of a thread
        is_alone = self.wave_panels == 1 and len(self.section.products) == 1
        return is_alone and sums == _BOUNDED_SUMS and BOUNDED_THREADS % self.block_size == 0

    @property
    def multiplied(self) -> tuple[Node, ...]:
        """The products whose weights it reads: `add_splits` adds up those of the kernel before."""
        if self.schedule == ADD_SPLITS:
            return ()
        return tuple(product for section in self.work.sections for product in section.products)

    @property
    def section(self) -> Section:
        """The only section of a kernel that computes products."""
        (section,) = self.work.sections
        return section

    def schedule_of(self, section: Section) -> str:
        """Name the way in which a section is computed, which is the same for all of a kernel."""
        return self.schedule

    @property
    def precision(self) -> str:
        """The class of precision of the products."""
        if self.int8:
            return "i8"
        rounds_x = self.f16_terms == 1 and not self.exact_x
        return "f16" if self.bf16_terms == BF16_TERMS["f16"] or rounds_x else "f32"

    def slots(self) -> tuple[Slot, ...]:
        """Return the arguments in order: the function's own, then buffers, then `m` (rows).

        Their kinds are those of a plan and these:
            x: x after the prologue.
            x_terms: x split into bf16 or f16.
            x_rough: the rows that bf16 terms cannot represent.
            x_quants: x in int8, four to a word.
            x_scales: f32, one per unit for int8 and one per row for f16; NaN in rough rows.
            x_sums: sums of 16 quants of x, i16; of f16 terms, sums of 16 x, f32, times the quants'
                step and over the row's scale.
            expert_order: i32, the numbers of the call's vectors, sorted by expert.
            expert_tiles: i32, of each tile its expert, its first place in the order, its vectors.
            split_sums: f32, the sums of each product [splits, M, width].
        """
        work = self.work
        by_expert = (Slot("expert_order"), Slot("expert_tiles")) if self.experts else ()
        if work.sorted_by is not None:
            return Slot("ids", work.sorted_by.arg), *by_expert, Slot("m")
        arguments: dict[Slot, None] = {}
        for node in work.leaves():
            if node.op in _ARGUMENTS:
                arguments[Slot(_ARGUMENTS[node.op], node.arg)] = None
        if self.work.chosen is not None and self.multiplied:
            arguments[Slot("ids", self.work.chosen.arg)] = None
        for product in self.multiplied:
            arguments[Slot("weight", product.arg, self.layout)] = None
        stores = (*work.loads, *work.rows, *(t for s in work.sections for t in s.stores))
        if work.decoded is not None:
            arguments[Slot("weight", work.decoded.node.arg, self.layout)] = None
            stores = (work.decoded,)
        slots = dict.fromkeys((*sorted(arguments, key=lambda slot: slot.index), *by_expert))
        for store in stores:
            slots[Slot(store.buffer.kind, store.buffer.index)] = None
        if self.bf16_terms:
            slots |= {Slot("x_terms"): None, Slot("x_rough"): None}
        if self.f16_terms and self.schedule in {ROWS, TILE_HALVES, TILE_HALVES_TRANSPOSED}:
            slots |= {Slot("x_terms"): None, Slot("x_scales"): None}
            if self.x_sums:
                slots[Slot("x_sums")] = None
        if self.int8:
            slots |= {Slot("x_quants"): None, Slot("x_scales"): None, Slot("x_sums"): None}
        if self.schedule in {GEMV_TRANSPOSED, ADD_SPLITS}:
            slots[Slot("split_sums")] = None
        return (*slots, Slot("m"))


HipPlan = Plan[HipKernel]


@dataclass(frozen=True)
class Grid:
    """The number of blocks of a launch: x is fixed; y, and beyond its limit z, counts rows.

    Attributes:
        x: blocks along the x axis.
        rows_per_block: rows of x that a block computes; None if the grid does not depend on M.
        experts: a tile of each of them may be less than full.
    """

    x: int
    rows_per_block: int | None
    experts: int = 0

    def blocks(self, m: int) -> tuple[int, int, int]:
        """Return the grid for m rows."""
        if self.rows_per_block is None:
            return self.x, 1, 1
        tiles = -(-m // self.rows_per_block) + min(self.experts, m)
        return self.x, min(tiles, MAX_GRID_Y), -(-tiles // MAX_GRID_Y)


def grid(plan: HipPlan, kernel: HipKernel) -> Grid:
    """Return the grid of a kernel."""
    if kernel.work.decoded is not None:
        spec = plan.weight(kernel.work.decoded.node.arg)
        units = -(-spec.k // UNIT_ELEMENTS)
        if kernel.schedule == LOOKUP:
            return Grid(-(-units // kernel.block_size), 1)
        return Grid(-(-spec.n * units // kernel.block_size), None)
    if kernel.schedule == SORT_EXPERTS:
        return Grid(1, None)
    if kernel.schedule == ROWS:
        return Grid(1, 1)
    columns = kernel.columns
    if kernel.schedule in {GEMV, GEMV_DOT}:
        columns *= kernel.block_size // kernel.lanes
    if kernel.schedule == GEMV_TRANSPOSED:
        return Grid(kernel.transposed_tiles * kernel.splits, kernel.rows_per_tile)
    if kernel.schedule == ADD_SPLITS:
        return Grid(-(-kernel.section.width // columns), 1)
    blocks = -(-kernel.section.width // columns) * kernel.splits
    return Grid(blocks, kernel.rows_per_tile, kernel.experts)
