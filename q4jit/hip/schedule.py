"""How a GPU computes the kernels of a plan: which template serves them, with which constants.

A kernel of the split becomes one launch per section, and one before them where something must be
known row by row first (`rows`). The classes of M, of which each has kernels of its own:

    M = 1, 2, 3…4, 5…8, 9…16   gemv_matrix   16 columns a wave on matrix units: blocks of 18 bytes
                                             (one row on RDNA 3 by dot products of f16; up to
                                             4 rows on NVIDIA's, which take tile_halves for more)
                               gemv          a wave computes columns, up to 8 rows share a decoding
                               gemv_dot      the same by dot products of int8, for precision `i8`
    M ≥ 17                     tile          64 × 64 results a block, on matrix units or by FMA
    M = 17…32, 33…64, 65…512,  tile_halves   32, 64 or 128 × 64 to 256 on matrix units: blocks of
        ≥ 513                                18 bytes

On matrix units M = 1 and M = 16 read weights in one layout, so that a device keeps them once.

`element` is the plan that this project grew from: one block per result. It serves every M and is
what the others are checked and timed against.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from q4jit.errors import TargetError, TuningError
from q4jit.frontend.graph import Graph, Node, reachable
from q4jit.hip.tunings import Choice, Constant, Key, Tuned
from q4jit.pipeline import Remark
from q4jit.plan.kernels import Buffer, Kernel, Plan, Section, Slot, Store
from q4jit.plan.options import Tuning
from q4jit.plan.split import split
from q4jit.targets import HipArch, Target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import FLOAT_BLOCK_ELEMENTS, PLANAR, TILES16, suits_tiles16

ELEMENT: Final = "element"
GEMV: Final = "gemv"
GEMV_DOT: Final = "gemv_dot"
GEMV_MATRIX: Final = "gemv_matrix"
TILE_FMA: Final = "tile_fma"
TILE_MATRIX: Final = "tile_matrix"
TILE_HALVES: Final = "tile_halves"
ROWS: Final = "rows"
DEQUANTIZE: Final = "dequantize"
LOOKUP: Final = "lookup"
SCHEDULES: Final = (ELEMENT, GEMV, GEMV_DOT, GEMV_MATRIX, TILE_FMA, TILE_MATRIX, TILE_HALVES)

UNIT_ELEMENTS: Final = FLOAT_BLOCK_ELEMENTS
"""Elements of a column that are decoded together, in every format."""
TILE_ROWS: Final = 64
TILE_COLUMNS: Final = 64
MAX_GRID_Y: Final = 65535  # CUDA's and HIP's limit; further rows of blocks go to the z axis

_ARGUMENTS: Final = {"load": "array", "ids": "ids", "scalar": "scalar"}  # a slot's kind, by op
_DECODERS: Final = {"dequantize": DEQUANTIZE, "rows": LOOKUP}
MANY_ROWS: Final = 512
_LAST_CLASS: Final = 1024  # of more rows: there are tiles enough, whatever N is
_GEMV_ROWS: Final = (1, 2, 4, 8, 16)
_TILE_HALVES_ROWS: Final = (32, 64)  # of a tile, of which there is one; beyond them there are more
_TALL_TILE_ROWS: Final = 128  # weights are read half as often, where sums leave registers for it
_TALL_TILE_PRODUCTS: Final = 2
# columns and waves, measured on an H100: blocks for one tile of rows are small, so that
# there are many; for many rows they are as wide as fills the GPU, since each reads all of x
_TILE_FEW_ROWS: Final = (64, 4)
_TILE_MANY_ROWS: Final = ((256, 16), (128, 8))
_TILE_MANY_ROWS_FOLDED: Final = _TILE_MANY_ROWS[1:]
_TILES_OF_A_FULL_GPU: Final = 0.75  # per compute unit
_TILE_AMD_COLUMNS: Final = 128
_TILE_BLOCKS: Final = 2  # per compute unit
_TRIED_TILE_BLOCKS: Final = 4
_WARPGROUP_WAVES: Final = 4
# measured on an H100: with so many sums the compiler, left alone, takes more than 128 registers
_BOUNDED_SUMS: Final = 64
BOUNDED_THREADS: Final = 512
_LEAST_COPIERS: Final = 64  # threads of a block that copy x
# measured on an H100: more columns share a reading of x, fewer leave more waves to hide latency
_GEMV_COLUMNS: Final = {1: 2, 2: 4, 4: 2, 8: 2}
_DOT_COLUMNS: Final = {1: 4, 2: 2, 4: 1, 8: 1, 16: 1}
_GEMV_MOST_ROWS: Final = 8  # of f32 in shared memory beside each other
_GEMV_MOST_LANES: Final = 32  # that share a column: with more, x of 8 rows is beyond 48 KiB
_BLOCK_SIZE: Final = 256
# bf16 has 8 significant bits: three terms are an f32 exactly, two err by 2⁻¹⁷
_TERMS: Final = {"f32": 3, "f16": 2, "i8": 2}
# f16 has 11 significant bits: two terms err by 2⁻²³, one by 2⁻¹²
_HALVES: Final = {"f32": 2, "f16": 1, "i8": 1}
_MATRIX_COLUMNS: Final = 16  # of a matrix instruction
_SPLIT_BEFORE: Final = 4  # rows, beyond which x is split by a kernel of its own on NVIDIA's
# WMMA of RDNA 3 takes its 32 cycles for one row too, and both halves of a wave decode the same
# weights for it: by dot products one row needs a third of the vector units' time
_PAIR_ROWS: Final = {"wmma": 1}
# measured on an H100: one block per compute unit, with all the waves that registers leave room for
# (half of them for more products); loading further ahead takes registers and gains nothing; the
# more rows, the more a split of K saves, as each block splits its own x into f16
_MATRIX_FEW_ROWS: Final = 2
_MATRIX_LONG_K: Final = 8192  # from which even few rows are worth a split
_MATRIX_SPLITS: Final = (2, 1)
_MATRIX_THREADS: Final = 512
_MATRIX_MOST_THREADS: Final = 896  # with 72 registers; where a block has columns enough
_MATRIX_MANY_TILES: Final = 4  # of columns, for few rows
# not measured, but counted: a block splits eight x in about 137 instructions, and multiplies 16
# columns by 128 k in 90 a wave, so that here too a compute unit does best with one block; 16 waves
# are four on a SIMD of CDNA, eight on one of RDNA
_MATRIX_AMD_WAVES: Final = 16
# HBM is far, and four waves a SIMD are few; on an H100 two quads ahead were measured; else 1
_MATRIX_AHEAD: Final = {"mfma": 2, "mma_sync": 2}
_QUAD_ELEMENTS: Final = 4 * UNIT_ELEMENTS  # of a column, stored together in TILES16
_LDS_RESERVE_BYTES: Final = 1024
_STAGES_BYTES: Final = 32 << 10  # of x, which leaves room for several blocks of a compute unit
_STAGES_AMD_BYTES: Final = 16 << 10  # which has 64 KiB, and registers hold what is on its way
_MOST_STAGE_UNITS: Final = 16
_ROWS_OF_HALVES_THREADS: Final = 512  # more of a row at a time: whoever waits for it is faster


@dataclass(frozen=True)
class Grid:
    """How many blocks a launch has: x is fixed, y (and beyond its limit z) counts rows.

    rows_per_block: rows of x that a block serves; None where the grid does not depend on M.
    """

    x: int
    rows_per_block: int | None

    def blocks(self, m: int) -> tuple[int, int, int]:
        """The grid for m rows."""
        if self.rows_per_block is None:
            return self.x, 1, 1
        tiles = -(-m // self.rows_per_block)
        return self.x, min(tiles, MAX_GRID_Y), -(-tiles // MAX_GRID_Y)


@dataclass(frozen=True)
class HipKernel:
    """A kernel for a GPU: its work, done by the template `schedule` with these constants.

    layout: of every weight that it reads. rows_per_tile, columns: rows of x and columns of the
    result that a block (`gemv`: a wave) computes. lanes: threads of a wave that share a column.
    ahead: units that each of them loads before their turn. scales_late: a unit's quants are
    multiplied as whole numbers and their sum by the scale (an Inf or NaN there would not meet the
    quants of 0).
    terms: bf16 numbers that each x is split into for matrix units. int8: x is rounded to int8 for
    dot products. halves: f16 numbers that each x is split into, which share a scale (32
    neighbours by `gemv_matrix`, else a whole row). splits: blocks that share columns, each with
    its own part of K. groups: tiles of 16 columns that a wave computes. stage_units: units of x
    in shared memory at a time, of which there are `stages`: one is used, the others are on their
    way. warpgroups: four waves multiply together. pairs: f16 terms are multiplied by dot products
    of two. folded: weights are rounded to f16, their scales included, so that sums need none.
    """

    work: Kernel
    schedule: str
    block_size: int = _BLOCK_SIZE
    layout: str = PLANAR
    rows_per_tile: int = 1
    columns: int = 1
    lanes: int = 1
    terms: int = 0
    int8: bool = False
    ahead: int = 1
    scales_late: bool = False
    halves: int = 0
    splits: int = 1
    groups: int = 1
    stage_units: int = 0
    stages: int = 2
    warpgroups: bool = False
    pairs: bool = False
    folded: bool = False

    # who chose the constants, where it was not the schedule
    origin: str = field(default="", compare=False)

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.work.uniform:
            return f"{self.schedule}, {self.work.rows_class}"
        rows = "1 row" if self.rows_per_tile == 1 else f"{self.rows_per_tile} rows"
        return f"{self.schedule}, {rows} a tile, {self.block_size} threads"

    def waves_k(self, wave: int) -> int:
        """Waves of a block on matrix units that share columns, each with its own part of K."""
        return self.block_size * _MATRIX_COLUMNS * self.groups // (wave * self.columns)

    @property
    def is_bounded(self) -> bool:
        """Whether 512 threads shall share the registers, of which sums take half of their share."""
        if not self.work.sections or not self.warpgroups:
            return False
        sums = self.rows_per_tile // 2 * (1 if self.folded else 2)  # registers of a thread
        is_alone = self.groups == 1 and len(self.section.products) == 1
        return is_alone and sums == _BOUNDED_SUMS and BOUNDED_THREADS % self.block_size == 0

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
        return "f16" if self.terms == _TERMS["f16"] or self.halves == 1 else "f32"

    def slots(self) -> tuple[Slot, ...]:
        """The arguments in order: the function's own, buffers, `m` (rows) last.

        Beside the plan's own kinds: `x` (after the prologue), `x_terms` (x split into bf16 or f16)
        and `x_rough` (which of its rows the split does not represent); `x_quants` (x in int8, four
        to a word), `x_scales` (f32, one per 32 elements for int8, one per row for f16; NaN in rows
        that these do not represent) and `x_sums` (of the quants, i16, one per 16 elements).
        """
        work = self.work
        arguments: dict[Slot, None] = {}
        for node in work.leaves():
            if node.op in _ARGUMENTS:
                arguments[Slot(_ARGUMENTS[node.op], node.arg)] = None
        for section in work.sections:
            for product in section.products:
                arguments[Slot("weight", product.arg, self.layout)] = None
        stores = (*work.loads, *work.rows, *(t for s in work.sections for t in s.stores))
        if work.decoded is not None:
            arguments[Slot("weight", work.decoded.node.arg, self.layout)] = None
            stores = (work.decoded,)
        found = dict.fromkeys(sorted(arguments, key=lambda slot: slot.index))
        for store in stores:
            found[Slot(store.buffer.kind, store.buffer.index)] = None
        if self.terms:
            found |= {Slot("x_terms"): None, Slot("x_rough"): None}
        if self.halves and self.schedule in {ROWS, TILE_HALVES}:
            found |= {Slot("x_terms"): None, Slot("x_scales"): None}
        if self.int8:
            found |= {Slot("x_quants"): None, Slot("x_scales"): None, Slot("x_sums"): None}
        return (*found, Slot("m"))


HipPlan = Plan[HipKernel]


def scratch(plan: HipPlan, kernel: HipKernel, m: int) -> dict[Slot, int]:
    """The slots of a kernel between its own launches, and the bytes of each for m rows.

    A `rows` kernel writes them, and the kernels of its products, which come next, read them.
    """
    rows = 1 if kernel.work.uniform else m
    k = kernel.work.x.width if kernel.work.x is not None else 0
    sizes = {
        "x": 4 * rows * k,
        "x_terms": _halves_bytes(kernel, rows, k) if kernel.halves else 2 * kernel.terms * rows * k,
        "x_rough": 4 * rows,
        "x_quants": rows * k,
        "x_scales": 4 * rows * (k // UNIT_ELEMENTS if kernel.int8 else 1),
        "x_sums": 4 * rows * (k // UNIT_ELEMENTS),
    }
    return {slot: sizes[slot.kind] for slot in kernel.slots() if slot.kind in sizes}


def _halves_bytes(kernel: HipKernel, rows: int, k: int) -> int:
    """x in f16 terms: whole quads for whole tiles; the last stage may be copied beyond them."""
    row_bytes = 2 * kernel.halves * (-(-k // _QUAD_ELEMENTS) * _QUAD_ELEMENTS)
    tiles = (_GEMV_ROWS[-1], *_TILE_HALVES_ROWS)  # beyond them there are several
    tile_rows = next((tile for tile in tiles if rows <= tile), _TALL_TILE_ROWS)
    return -(-rows // tile_rows) * tile_rows * row_bytes + _STAGES_BYTES // 2


def m_class(target: Target, m: int, tuning: Tuning) -> int:
    """The class of a number of rows: the largest in it, but for the last class."""
    if tuning.schedule == ELEMENT:
        return 1
    found = next((rows for rows in _GEMV_ROWS if m <= rows), TILE_ROWS)
    halves = (
        target.hip.matrix is not None
        and tuning.schedule in {None, TILE_HALVES}
        and tuning.layout in {None, TILES16}
    )
    if found == TILE_ROWS and halves:
        classes = (*_TILE_HALVES_ROWS, MANY_ROWS)
        return next((rows for rows in classes if m <= rows), _LAST_CLASS)
    return found


def most_rows(target: Target, rows_class: int, tuning: Tuning) -> int | None:
    """The largest number of rows in a class; None in the last one."""
    return None if m_class(target, rows_class + 1, tuning) == rows_class else rows_class


def grid(plan: HipPlan, kernel: HipKernel) -> Grid:
    """The grid of a kernel."""
    if kernel.work.decoded is not None:
        spec = plan.weight(kernel.work.decoded.node.arg)
        units = -(-spec.k // UNIT_ELEMENTS)
        if kernel.schedule == LOOKUP:
            return Grid(-(-units // kernel.block_size), 1)
        return Grid(-(-spec.n * units // kernel.block_size), None)
    if kernel.schedule == ROWS:
        return Grid(1, 1)
    width = kernel.section.width
    if kernel.schedule == GEMV_MATRIX:
        return Grid(-(-width // kernel.columns) * kernel.splits, kernel.rows_per_tile)
    if kernel.schedule in {GEMV, GEMV_DOT}:
        per_block = kernel.columns * (kernel.block_size // kernel.lanes)
        return Grid(-(-width // per_block), kernel.rows_per_tile)
    return Grid(-(-width // kernel.columns) * kernel.splits, kernel.rows_per_tile)


def make_plan(
    graph: Graph, target: Target, m: int, tuning: Tuning, tuned: Tuned | None = None
) -> HipPlan:
    """Plan a graph for a GPU and m rows of x; plans of one M class are equal.

    tuned: asked for the schedule and constants of each product, where `tuning` leaves them open.
    Raises TargetError for a block size or a schedule that the arch cannot run, and TuningError for
    what `tuned` gives and `candidates` does not.
    """
    check_block_size(target, tuning.block_size)
    kernels, temps = split(graph)
    if (tuning.block_size, tuning.schedule, tuning.layout) != (None, None, None):
        tuned = None
    scheduler = _Scheduler(graph, target, tuning, tuned)
    scheduled = [k for kernel in kernels for k in scheduler.schedule(kernel, m)]
    plan = Plan(graph, target, tuple(scheduled), temps)
    chosen = [_as_chosen(plan, k, scheduler.choice(k.work, m), m) for k in plan.kernels]
    return replace(plan, kernels=tuple(chosen))


# --- choices by measurement -----------------------------------------------------------------------

_NOT_CHOSEN: Final = frozenset(
    "work schedule terms int8 limbs halves scales_late origin warpgroups pairs folded".split()
)  # they follow from the schedule, M, the precision and the weights
_TRIED_COLUMNS: Final = (1, 2, 4, 8)
_TRIED_BLOCK_SIZES: Final = (64, 128, 256, 512)
_MOST_RESIDENT: Final = 1024  # threads of a compute unit, which registers leave room for
_TRIED_AHEAD: Final = (1, 2, 4)
_STAGED_UNIT_BYTES: Final = 144  # of x in shared memory, by `gemv`


def key_of(graph: Graph, target: Target, section: Section, m: int, tuning: Tuning) -> Key:
    """What a choice for the products of a section, with m rows, is filed under."""
    k = section.products[0].operands[0].width
    formats = "+".join(graph.signature[p.arg].format for p in section.products)  # type: ignore[union-attr]  # weights
    return Key(k, section.width, formats, m_class(target, m, tuning), tuning.precision)


def keys_of(plan: HipPlan, m: int, tuning: Tuning) -> tuple[Key, ...]:
    """The keys of all products of a plan, each once."""
    found = [
        key_of(plan.graph, plan.target, section, 1 if kernel.work.uniform else m, tuning)
        for kernel in plan.kernels
        for section in kernel.work.sections
    ]
    return tuple(dict.fromkeys(found))


def schedules_for(target: Target, key: Key) -> tuple[str, ...]:
    """The schedules worth a try for weights whose scales are finite."""
    formats = key.format.split("+")
    blocks = all(FORMATS[name].float_dtype is None for name in formats)
    suits_tiles = target.hip.matrix is not None and _are_tiles(formats)
    if key.m > _GEMV_ROWS[-1]:
        suits_matrix = blocks and target.hip.matrix is not None
        if suits_tiles:
            return (TILE_HALVES,)
        return (TILE_MATRIX, TILE_FMA) if suits_matrix else (TILE_FMA,)
    if suits_tiles:
        if key.m < _SPLIT_BEFORE or not target.hip.is_nvidia:
            return (GEMV_MATRIX,)
        return (TILE_HALVES, GEMV_MATRIX) if key.m < _GEMV_ROWS[-1] else (TILE_HALVES,)
    return (GEMV, GEMV_DOT) if key.precision == "i8" and blocks else (GEMV,)


def _are_tiles(formats: Iterable[str]) -> bool:
    return all(suits_tiles16(FORMATS[name]) for name in formats)


def constants_of(kernel: HipKernel) -> dict[str, Constant]:
    """The constants of a kernel that may be chosen, by name."""
    names = [each.name for each in fields(HipKernel)]
    return {name: getattr(kernel, name) for name in sorted(names) if name not in _NOT_CHOSEN}


def candidates(plan: HipPlan, kernel: HipKernel, m: int) -> tuple[HipKernel, ...]:
    """The legal variants of a kernel with products for m rows, itself first."""
    if kernel.schedule == GEMV_MATRIX:
        return _matrix_candidates(plan, kernel)
    if kernel.schedule == TILE_HALVES:
        return _tile_candidates(plan, kernel, m)
    if kernel.schedule != GEMV:
        return (kernel,)
    arch = plan.target.hip
    units = -(-kernel.section.products[0].operands[0].width // UNIT_ELEMENTS)
    found = [kernel]
    for columns, block_size, ahead in itertools.product(
        _TRIED_COLUMNS, _TRIED_BLOCK_SIZES, _TRIED_AHEAD
    ):
        staged_bytes = kernel.rows_per_tile * ahead * kernel.lanes * _STAGED_UNIT_BYTES
        if (
            kernel.rows_per_tile * columns <= kernel.lanes
            and block_size % arch.wave == 0
            and block_size <= arch.max_block_size
            and staged_bytes <= arch.lds_bytes
            and (ahead - 1) * kernel.lanes < units  # else nothing is left to load ahead
        ):
            found.append(replace(kernel, columns=columns, block_size=block_size, ahead=ahead))
    return tuple(dict.fromkeys(found))


def _matrix_candidates(plan: HipPlan, kernel: HipKernel) -> tuple[HipKernel, ...]:
    arch = plan.target.hip
    tiles = -(-kernel.section.width // _MATRIX_COLUMNS)
    found = [kernel]
    for splits, blocks, threads, ahead in itertools.product(
        (1, 2, 4, 8), (1, 2, 4), (256, 512, 896, 1024), (1, 2)
    ):
        waves_n = -(-tiles * splits // (arch.compute_units * blocks))
        waves_k = threads // arch.wave // waves_n
        candidate = replace(
            kernel,
            columns=_MATRIX_COLUMNS * waves_n,
            block_size=arch.wave * waves_n * waves_k,
            ahead=ahead,
            splits=splits,
        )
        is_resident = blocks * candidate.block_size <= _MOST_RESIDENT
        if waves_k and is_resident and _suits_matrix_units(arch, candidate):
            found.append(candidate)
    return tuple(dict.fromkeys(found))


def _tile_candidates(plan: HipPlan, kernel: HipKernel, m: int) -> tuple[HipKernel, ...]:
    arch = plan.target.hip
    tiles = -(-kernel.section.width // _MATRIX_COLUMNS)
    many = kernel.rows_per_tile >= TILE_ROWS
    found = [kernel]
    for staged, splits, groups, waves_k in itertools.product(
        _staged_variants(arch, kernel, m), (1, 2, 4, 8), (1, 2), (1, 2)
    ):
        units = arch.compute_units * groups
        even = {-(-tiles * splits // (units * blocks)) for blocks in (1, 2)}
        for waves_n in sorted({4, 8, 12, 16} if many or kernel.warpgroups else {4, 8} | even):
            candidate = replace(
                staged,
                columns=_MATRIX_COLUMNS * waves_n * groups,
                block_size=arch.wave * waves_n * waves_k,
                splits=splits,
                groups=groups,
            )
            blocks = -(-tiles // (waves_n * groups)) * splits
            is_full = splits == 1 or blocks <= _TRIED_TILE_BLOCKS * arch.compute_units
            if is_full and _suits_tiles(arch, candidate):
                found.append(candidate)
    return tuple(dict.fromkeys(found))


def _staged_variants(arch: HipArch, kernel: HipKernel, m: int) -> list[HipKernel]:
    """A kernel with the rows of a tile and the stages of x that are worth a try."""
    if not kernel.warpgroups or kernel.rows_per_tile < TILE_ROWS:
        return [kernel]
    tall = kernel.folded and m > TILE_ROWS
    rows = (TILE_ROWS, _TALL_TILE_ROWS) if tall else (TILE_ROWS,)
    return [_staged(arch, kernel, *each) for each in itertools.product(rows, (2, 4))]


def _staged(arch: HipArch, kernel: HipKernel, rows: int, stages: int) -> HipKernel:
    """A kernel for tiles of so many rows, whose x is in shared memory in so many stages."""
    stage_bytes = (_STAGES_BYTES if arch.is_nvidia else _STAGES_AMD_BYTES) // stages
    unit_bytes = 2 * UNIT_ELEMENTS * kernel.halves * rows
    units = min(stage_bytes // unit_bytes, _MOST_STAGE_UNITS)
    return replace(kernel, rows_per_tile=rows, stage_units=units, stages=stages)


def _suits_tiles(arch: HipArch, kernel: HipKernel) -> bool:
    """Whether waves and blocks share a `tile_halves` evenly, and have room to add their sums up."""
    waves_n, rest = divmod(kernel.columns, _MATRIX_COLUMNS * kernel.groups)
    waves_k = kernel.waves_k(arch.wave)
    k = kernel.section.products[0].operands[0].width
    split_quads = -(-k // (_QUAD_ELEMENTS * kernel.splits))
    partial = waves_k * kernel.splits
    sums_bytes = 4 * len(kernel.section.products) * kernel.rows_per_tile * kernel.columns * waves_k
    return (
        rest == 0
        and waves_n * waves_k * arch.wave == kernel.block_size
        and _LEAST_COPIERS <= kernel.block_size <= arch.max_block_size
        and (waves_n % _WARPGROUP_WAVES == 0 or not kernel.warpgroups)
        and max(kernel.stage_units // 4, 1) % waves_k == 0
        and kernel.splits <= min(arch.cluster_blocks, kernel.rows_per_tile)
        and (kernel.splits == 1 or kernel.stage_units <= 4 * split_quads)
        and (partial == 1 or sums_bytes <= arch.lds_bytes - _LDS_RESERVE_BYTES)
    )


def _suits_matrix_units(arch: HipArch, kernel: HipKernel) -> bool:
    """Whether a `gemv_matrix` has something to do for every wave, and room for x and its sums."""
    waves_k = kernel.waves_k(arch.wave)
    k = kernel.section.products[0].operands[0].width
    split_quads = -(-k // (_QUAD_ELEMENTS * kernel.splits))
    x_bytes = kernel.rows_per_tile * (2 * UNIT_ELEMENTS * kernel.halves + 5)  # of a unit
    sums_bytes = 4 * len(kernel.section.products) * kernel.rows_per_tile * kernel.columns
    received_bytes = sums_bytes if kernel.splits > 1 else 0  # from the other blocks
    room_bytes = arch.lds_bytes - _LDS_RESERVE_BYTES - received_bytes
    ahead = waves_k * kernel.ahead
    return (
        kernel.splits <= arch.cluster_blocks
        and kernel.block_size <= arch.max_block_size
        and waves_k * kernel.splits <= -(-k // _QUAD_ELEMENTS)
        and (kernel.ahead == 1 or ahead - waves_k < split_quads)  # else nothing is left to load
        and min(split_quads, ahead) * 4 * x_bytes <= room_bytes
        and sums_bytes * waves_k <= room_bytes
    )


def origins(plan: HipPlan) -> list[Remark]:
    """Who chose the constants of the products, a line per kernel."""
    return [
        Remark(
            "constants",
            f"{kernel.work.name}: constants {kernel.origin or 'by the rules of the schedule'}",
        )
        for kernel in plan.kernels
        if kernel.work.sections
    ]


def _as_chosen(plan: HipPlan, kernel: HipKernel, choice: Choice | None, m: int) -> HipKernel:
    if choice is None or choice.trial.schedule != kernel.schedule:  # another section forbids it
        return kernel
    trial, known = choice.trial, constants_of(kernel)
    asked = dict(trial.constants)
    # a constant that is younger than the choice keeps its value by rule
    wanted = known | asked
    legal = candidates(plan, kernel, m)
    for candidate in legal:
        if asked.keys() <= known.keys() and constants_of(candidate) == wanted:
            return replace(candidate, origin=f"tuned: {choice.origin}")
    raise TuningError(
        f"{choice.origin}: found {trial.name} for {kernel.work.name} on {plan.target}, "
        f"accepted are {', '.join(known)} of one of the {len(legal)} candidates that q4jit tune "
        "tries; it measures them again and replaces the entry"
    )


def remarks(plan: HipPlan, tuning: Tuning) -> list[Remark]:
    """What the kernels of a plan do not follow of a tuning, a line each."""
    products = [kernel for kernel in plan.kernels if kernel.work.sections]
    found = [
        Remark(
            "precision",
            f"precision={tuning.precision!r} is an upper bound: {kernel.work.name} is computed by "
            f"{kernel.schedule} in the more exact {kernel.precision!r}",
        )
        for kernel in products
        if kernel.precision != tuning.precision
    ]
    found += [
        Remark(
            "block_size",
            f"block_size={tuning.block_size}: tiles have {kernel.block_size} threads, "
            f"{kernel.work.name} too",
        )
        for kernel in products
        if tuning.block_size not in {None, kernel.block_size}
    ]
    return found


def check_block_size(target: Target, block_size: int | None) -> None:
    """Raise TargetError unless the arch can run blocks of so many threads (None: our choice)."""
    arch = target.hip
    if block_size is None:
        return
    if block_size % arch.wave or not 0 < block_size <= arch.max_block_size:
        raise TargetError(
            f"block_size={block_size} on {target}: accepted are multiples of its wave of "
            f"{arch.wave} threads, up to {arch.max_block_size}"
        )


@dataclass
class _Scheduler:
    graph: Graph
    target: Target
    tuning: Tuning
    tuned: Tuned | None = None

    def choice(self, kernel: Kernel, m: int) -> Choice | None:
        """What was measured for a kernel of one section."""
        if self.tuned is None or not kernel.sections:
            return None
        if any(self._is_endless(product) for product in kernel.sections[0].products):
            return None  # they were measured with finite scales
        m = 1 if kernel.uniform else m
        key = key_of(self.graph, self.target, kernel.sections[0], m, self.tuning)
        choice = self.tuned(key)
        if choice is not None and choice.trial.schedule not in schedules_for(self.target, key):
            accepted = ", ".join(schedules_for(self.target, key))
            raise TuningError(
                f"{choice.origin}: found the schedule {choice.trial.schedule} for {key} on "
                f"{self.target}, accepted are {accepted}; q4jit tune measures again"
            )
        rounds = choice is not None and choice.trial.schedule == TILE_HALVES and self._may_fold
        # such weights were measured
        return choice if not rounds or self._suit_f16(kernel.sections[0]) else None

    def schedule(self, kernel: Kernel, m: int) -> list[HipKernel]:
        if kernel.decoded is not None:
            return [self._of(kernel, schedule=_DECODERS[kernel.decoded.node.op])]
        m = 1 if kernel.uniform else m
        chosen = [self._schedule_of(kernel, section, m) for section in kernel.sections]
        # x is split in one way for all
        instead = TILE_MATRIX if TILE_MATRIX in chosen else GEMV_MATRIX
        if TILE_MATRIX in chosen or GEMV_DOT in chosen:
            chosen = [instead if name == TILE_HALVES else name for name in chosen]
        terms = max((self._terms(name) for name in chosen), default=0)
        halves = _HALVES[self.tuning.precision] if TILE_HALVES in chosen else 0
        int8 = GEMV_DOT in chosen
        x, rows = kernel.x, kernel.rows
        found = []
        if (
            rows
            or terms
            or halves
            or int8
            or (x is not None and _has_sum(x) and TILE_FMA in chosen)
        ):
            if x is not None and _has_sum(x):
                rows = (*rows, Store(x, Buffer("x", 0, x.width)))
            first = replace(kernel, name=f"{kernel.name}_rows", rows=rows, sections=())
            constants = {"terms": terms, "halves": halves, "int8": int8}
            constants["warpgroups"] = halves > 0 and self._in_warpgroups(m)
            if halves and self.tuning.block_size is None:
                constants["block_size"] = _ROWS_OF_HALVES_THREADS
            found.append(self._of(_without_unused_loads(first), schedule=ROWS, **constants))
        kept = tuple(s for s in rows if kernel.sections)
        for i, (name, section) in enumerate(zip(chosen, kernel.sections, strict=True)):
            number = f"_{i}" if len(chosen) > 1 else ""
            part = replace(
                kernel,
                name=f"{kernel.name}{number}",
                rows=(),
                sections=(section,),
                loads=_distinct((*kernel.loads, *kept)),
            )
            found.append(self._product(_without_unused_loads(part), name, m))
        if not found:
            found.append(self._of(_without_unused_loads(kernel), schedule=ROWS))
        return found

    def _product(self, kernel: Kernel, name: str, m: int) -> HipKernel:
        match name:
            case "gemv" | "gemv_dot":
                most = _GEMV_MOST_ROWS if name == GEMV else _GEMV_ROWS[-1]
                rows = min(m_class(self.target, m, self.tuning), most)
                lanes = self._lanes(kernel)
                by_rows = _GEMV_COLUMNS if name == GEMV else _DOT_COLUMNS
                columns = min(by_rows[rows], lanes)
                return self._of(
                    kernel,
                    schedule=name,
                    rows_per_tile=rows,
                    columns=columns,
                    lanes=lanes,
                    int8=name == GEMV_DOT,
                    scales_late=self._are_finite_blocks(kernel.sections[0]),
                )
            case "gemv_matrix":
                rows = min(m_class(self.target, m, self.tuning), _GEMV_ROWS[-1])
                return self._gemv_matrix(kernel, rows)
            case "tile_halves":
                return self._tile_halves(kernel, m_class(self.target, m, self.tuning))
            case "element":
                return self._of(kernel, schedule=name)
        return self._of(
            kernel,
            schedule=name,
            rows_per_tile=TILE_ROWS,
            columns=TILE_COLUMNS,
            terms=self._terms(name),
        )

    def _gemv_matrix(self, kernel: Kernel, rows: int) -> HipKernel:
        """The first tiling for which K and shared memory suffice."""
        arch = self.target.hip
        (section,) = kernel.sections
        base = self._of(
            kernel,
            schedule=GEMV_MATRIX,
            layout=TILES16,
            rows_per_tile=rows,
            halves=_HALVES[self.tuning.precision],
            pairs=rows <= _PAIR_ROWS.get(arch.matrix or "", 0),
        )
        tilings = self._nvidia_tilings if arch.is_nvidia else self._amd_tilings
        for splits, waves_n, waves_k in tilings(section, rows):
            found = replace(
                base,
                columns=_MATRIX_COLUMNS * waves_n,
                block_size=arch.wave * waves_n * waves_k,
                splits=splits,
            )
            if _suits_matrix_units(arch, found):
                ahead = replace(found, ahead=_MATRIX_AHEAD.get(arch.matrix or "", 1))
                return ahead if _suits_matrix_units(arch, ahead) else found
        if self.tuning.block_size is None and self.tuning.schedule is None:
            return self._product(kernel, GEMV, rows)
        raise TargetError(
            f"{len(section.products)} products of {kernel.name} with block_size={base.block_size} "
            f"on {self.target}: {GEMV_MATRIX} has no room for their sums; accepted are fewer "
            "threads, fewer products in one function, or schedule 'gemv'"
        )

    def _nvidia_tilings(self, section: Section, rows: int) -> Iterator[tuple[int, int, int]]:
        """Splits, waves beside each other, waves that share columns: a block per compute unit."""
        arch, few = self.target.hip, rows <= _MATRIX_FEW_ROWS
        k = section.products[0].operands[0].width
        tiles = -(-section.width // _MATRIX_COLUMNS)
        waves_by_rule, most_waves = (
            max(threads // len(section.products) // arch.wave, 1)
            for threads in (_MATRIX_THREADS, _MATRIX_MOST_THREADS)
        )
        for splits in (1,) if few and k < _MATRIX_LONG_K else _MATRIX_SPLITS:
            wanted = -(-tiles * splits // arch.compute_units)
            if splits > 1 and wanted > most_waves:
                continue  # there are columns enough
            many = wanted > (_MATRIX_MANY_TILES - 1 if few else waves_by_rule)
            for tiling in self._tilings(wanted, most_waves if many else waves_by_rule):
                yield splits, *tiling

    def _amd_tilings(self, section: Section, rows: int) -> Iterator[tuple[int, int, int]]:
        """The same without clusters and measurements."""
        arch = self.target.hip
        wanted = -(-section.width // (_MATRIX_COLUMNS * arch.compute_units))
        for tiling in self._tilings(wanted, max(_MATRIX_AMD_WAVES // len(section.products), 1)):
            yield 1, *tiling

    def _tilings(self, waves_n: int, waves: int) -> list[tuple[int, int]]:
        """Waves beside each other and waves that share columns, the wanted ones first.

        Of `waves` in all, or of as many as the caller's block size has.
        """
        if self.tuning.block_size is None:
            waves_n = min(waves_n, waves)
            return [(waves_n, waves_k) for waves_k in range(waves // waves_n, 0, -1)]
        waves = self.tuning.block_size // self.target.hip.wave
        divisors = [n for n in range(1, waves + 1) if waves % n == 0]
        return [(n, waves // n) for n in sorted(divisors, key=lambda n: abs(n - waves_n))]

    def _tile_halves(self, kernel: Kernel, rows: int) -> HipKernel:
        """For one tile of rows small blocks, of which several share K; for many rows wide ones."""
        arch = self.target.hip
        (section,) = kernel.sections
        halves = _HALVES[self.tuning.precision]
        folded = self._may_fold and self._suit_f16(section)
        tile_rows = self._tile_rows(section, rows, folded)
        columns, waves = self._tile_shape(section, rows, tile_rows, folded)
        base = self._of(
            kernel,
            schedule=TILE_HALVES,
            layout=TILES16,
            block_size=arch.wave * waves,
            columns=columns,
            halves=halves,
            warpgroups=self._in_warpgroups(rows),
            folded=folded,
        )
        base = _staged(arch, base, tile_rows, 2)
        blocks = -(-section.width // columns)
        most = 1 if rows > TILE_ROWS else _TILE_BLOCKS * arch.compute_units // blocks
        splits = [n for n in (8, 4, 2) if n <= most and _suits_tiles(arch, replace(base, splits=n))]
        return replace(base, splits=max(splits, default=1))

    def _tile_shape(
        self, section: Section, rows: int, tile_rows: int, folded: bool
    ) -> tuple[int, int]:
        """Columns of a block, and its waves."""
        arch = self.target.hip
        if not arch.is_nvidia:
            few = rows <= TILE_ROWS and section.width < arch.compute_units * _TILE_AMD_COLUMNS
            columns = _TILE_AMD_COLUMNS // 2 if few else _TILE_AMD_COLUMNS
            return columns, columns // _MATRIX_COLUMNS
        if rows <= TILE_ROWS or len(section.products) > 1:  # which have more columns together
            return _TILE_FEW_ROWS
        wanted = _TILES_OF_A_FULL_GPU * arch.compute_units * tile_rows / min(rows, MANY_ROWS)
        wide = _TILE_MANY_ROWS_FOLDED if folded else _TILE_MANY_ROWS
        return next((s for s in wide if -(-section.width // s[0]) >= wanted), _TILE_FEW_ROWS)

    def _tile_rows(self, section: Section, rows: int, folded: bool) -> int:
        """Rows of a tile: all of a few, and 128 of many where the GPU is full of such tiles."""
        arch = self.target.hip
        least = _GEMV_ROWS[-2 if arch.is_nvidia else -1]
        if self._has_wide_inputs(section):
            return min(max(rows, least), TILE_ROWS // 2)
        tiles = len(section.products) * section.width * min(rows, MANY_ROWS) // _TALL_TILE_ROWS**2
        is_full = rows > MANY_ROWS or tiles >= _TILE_BLOCKS * arch.compute_units
        suits = folded and self._in_warpgroups(rows) and rows > TILE_ROWS
        is_tall = suits and is_full and len(section.products) <= _TALL_TILE_PRODUCTS
        return _TALL_TILE_ROWS if is_tall else min(max(rows, least), TILE_ROWS)

    def _has_wide_inputs(self, section: Section) -> bool:
        """Whether weights fill the registers: a lane of RDNA 3 has whole units of a column."""
        return self.target.hip.matrix == "wmma" and len(section.products) > 1

    def _in_warpgroups(self, m: int) -> bool:
        return self.target.hip.warpgroups and m > _GEMV_ROWS[-1]

    def _of(self, kernel: Kernel, *, schedule: str, **constants: Any) -> HipKernel:
        asked = None if schedule in {TILE_FMA, TILE_MATRIX, TILE_HALVES} else self.tuning.block_size
        base = HipKernel(
            kernel,
            schedule=schedule,
            block_size=asked or _BLOCK_SIZE,
            layout=self.tuning.layout or PLANAR,
        )
        return replace(base, **constants)

    def _schedule_of(self, kernel: Kernel, section: Section, m: int) -> str:
        # the matrix units and the dot products know whole numbers only, and no NaN among scales
        suits = self._are_finite_blocks(section)
        suits_matrix = suits and self.target.hip.matrix is not None
        suits_tiles = suits_matrix and self._suits_tiles(section)
        suits_dot = suits and self.tuning.precision == "i8"
        choice = self.choice(replace(kernel, sections=(section,)), m)
        wish = self.tuning.schedule if choice is None else choice.trial.schedule
        if wish is not None:
            if wish == TILE_MATRIX and not suits_matrix:
                raise TargetError(
                    f"schedule {wish!r} on {self.target} for {kernel.name}: accepted are archs "
                    "with matrix units and block formats with finite scales"
                )
            if wish in {GEMV_MATRIX, TILE_HALVES} and not suits_tiles:
                raise TargetError(
                    f"schedule {wish!r} on {self.target} for {kernel.name}: accepted are archs "
                    f"with matrix units, blocks of 18 bytes with finite scales, and the layout "
                    f"{TILES16!r}"
                )
            if wish == GEMV_DOT and not suits_dot:
                raise TargetError(
                    f"schedule {wish!r} with precision {self.tuning.precision!r} for "
                    f"{kernel.name}: accepted are precision 'i8' and block formats with finite "
                    "scales"
                )
            return wish
        if m <= _GEMV_ROWS[-1]:
            if suits_tiles:
                few = m <= _SPLIT_BEFORE or not self.target.hip.is_nvidia
                return GEMV_MATRIX if few else TILE_HALVES
            return GEMV_DOT if suits_dot else GEMV
        if suits_tiles:
            return TILE_HALVES
        return TILE_MATRIX if suits_matrix else TILE_FMA

    def _are_finite_blocks(self, section: Section) -> bool:
        return all(self._is_finite_blocks(product) for product in section.products)

    @property
    def _may_fold(self) -> bool:
        """Whether tiles round weights to f16, where these suit it."""
        return _HALVES[self.tuning.precision] == 1 and not self.target.hip.flushes_halves

    def _suit_f16(self, section: Section) -> bool:
        return all(self.graph.signature[p.arg].suits_f16 for p in section.products)  # type: ignore[union-attr]  # weights

    def _suits_tiles(self, section: Section) -> bool:
        formats = {self.graph.signature[p.arg].format for p in section.products}  # type: ignore[union-attr]  # weights
        return self.tuning.layout in {None, TILES16} and _are_tiles(formats)

    def _is_finite_blocks(self, product: Node) -> bool:
        spec = self.graph.signature[product.arg]
        return bool(
            getattr(spec, "finite", False) and spec.block_format.float_dtype is None  # type: ignore[union-attr]  # a weight
        )

    def _is_endless(self, product: Node) -> bool:
        """Whether Inf or NaN is among the scales of a weight in blocks."""
        spec = self.graph.signature[product.arg]
        return spec.block_format.float_dtype is None and not spec.finite  # type: ignore[union-attr]  # a weight

    def _terms(self, schedule: str) -> int:
        return _TERMS[self.tuning.precision] if schedule == TILE_MATRIX else 0

    def _lanes(self, kernel: Kernel) -> int:
        """Threads that share a column: a wave, or half of it where K has too few units for one."""
        k = max(p.operands[0].width for p in kernel.sections[0].products)
        units = -(-k // UNIT_ELEMENTS)
        lanes = min(self.target.hip.wave, _GEMV_MOST_LANES)
        while lanes > _GEMV_ROWS[-1] and units <= lanes // 2:
            lanes //= 2
        return lanes


def _has_sum(node: Node) -> bool:
    return any(n.op == "sum" for n in reachable((node,)))


def _distinct(stores: tuple[Store, ...]) -> tuple[Store, ...]:
    """One store per value: a value that is returned twice is read from its first buffer."""
    return tuple({s.node.id: s for s in reversed(stores)}.values())


def _without_unused_loads(kernel: Kernel) -> Kernel:
    """Leave out values of earlier kernels that this one does not read."""
    if kernel.decoded is not None:
        return kernel
    roots = [s.node for s in kernel.rows] + [t.node for s in kernel.sections for t in s.stores]
    roots += [kernel.x] if kernel.x is not None else []
    stop = {s.node.id for s in kernel.loads}
    inside = {p.id for s in kernel.sections for p in s.products}
    used, seen = set[int](), set[int]()
    while roots:
        node = roots.pop()
        if node.id in stop:
            used.add(node.id)
        elif node.id not in seen and node.id not in inside:
            seen.add(node.id)
            roots.extend(node.operands)
    return replace(kernel, loads=tuple(s for s in kernel.loads if s.node.id in used))
