"""Choose how a CPU computes the kernels of a plan: tiles, instructions, layouts, arguments."""

from dataclasses import dataclass, replace
from typing import Final

from q4jit.cpu.dots import (
    SDOT,
    VPDPBUSD_256,
    VPDPBUSD_512,
    VPMADDUBSW,
    DotInstruction,
)
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.specs import WeightSpec
from q4jit.plan.kernels import Kernel, Plan, Section, Slot
from q4jit.plan.split import split
from q4jit.targets import Target
from q4jit.weights.formats import Format
from q4jit.weights.layouts import CACHE_LINE_BYTES, GGUF, INTERLEAVED16, LANES, Interleaved

# In narrower results most of a panel's 16 lanes would be idle: columns are computed one by one.
_NARROW: Final = 8

_ARGUMENTS: Final = {"load": "array", "scalar": "scalar", "ids": "ids"}  # operation: kind of slot

COLUMNS: Final = "columns"
"""A panel of 16 columns at a time, from the interleaved layout."""
DOT: Final = "dot"
"""One column at a time, from GGUF rows: narrow results, slices that start inside a panel."""
TRANSPOSED: Final = "transposed"
"""Products with `w.T`: 16 rows of w at a time, from the interleaved layout."""


@dataclass(frozen=True)
class Tile:
    """A register tile: rows of x and panels of 16 columns whose sums are held in registers."""

    rows: int
    panels: int = 1

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Its vectors of sums, each by its panel and row."""
        return [(panel, row) for panel in range(self.panels) for row in range(self.rows)]

    @property
    def columns(self) -> int:
        """Columns of all its panels."""
        return self.panels * LANES


@dataclass(frozen=True)
class Dot:
    """How CPUs with a feature multiply integers.

    Attributes:
        feature: the CPU's feature.
        instruction: what multiplies.
        few: the tile if M is at most twice its rows; it then has as few rows as M needs.
        many: the tiles of greater M, for three digits and for one.
        planes: the tile of greater M for one digit, if codes are in several planes.
    """

    feature: str
    instruction: DotInstruction
    few: Tile
    many: tuple[Tile, Tile]
    planes: Tile


# The first line whose feature the CPU has chooses its kernels. `f32` needs three digits of x, which
# are added in 32 bits; `i8` needs one, and sums of 16 bits are enough. Float formats, and whatever
# no line serves, are multiplied as floats.
DOTS: Final = (
    #   feature       instruction  few rows  many rows: three digits, one; several planes
    Dot("avx512vnni", VPDPBUSD_512, Tile(8), (Tile(4, 2), Tile(6, 2)), Tile(12)),
    Dot("avxvnni", VPDPBUSD_256, Tile(4), (Tile(4), Tile(4)), Tile(4)),
    Dot("avx2", VPMADDUBSW, Tile(4), (Tile(4), Tile(4)), Tile(4)),
    Dot("dotprod", SDOT, Tile(4), (Tile(4), Tile(4)), Tile(4)),
)
_FLOATS: Final = {32: Tile(8), 16: Tile(4)}  # by vector registers: sums of more rows would spill

# Many rows are multiplied in bands whose x stays in a second-level cache (`i8` took 8 % less time
# than for all rows at once). They have this many rows at least: each band reads all weights again.
_BAND_BYTES: Final = 1 << 20
_BAND_ROWS: Final = 48


@dataclass(frozen=True)
class TransposedTiles:
    """The register tiles of products with `w.T`.

    Attributes:
        sums: vectors of sums for few rows; the other registers hold y and weights.
        few: the most rows of a tile for few rows.
        many: the most rows of a tile for many rows, which has more than `few`.
        chunks: chunks of K in a tile for many rows.
    """

    sums: int
    few: int
    many: int
    chunks: int

    def sums_at_once(self, rows: int) -> int:
        """Return how many elements of a chunk few rows are multiplied by together."""
        return next(count for count in (16, 8, 4, 2) if rows * count <= self.sums)


# by the vectors of 16 lanes that the registers hold
_TRANSPOSED: Final = {
    32: TransposedTiles(24, 6, 12, 2),
    8: TransposedTiles(6, 3, 6, 1),
    4: TransposedTiles(4, 2, 3, 1),
}
# Rows of w in a task: those of a slab of two blocks. More rows of a super-block share a cache line,
# which should be read from memory once (with 64, Q6_K took 1.3 times as long at M = 1).
_TRANSPOSED_WIDTH: Final = 64
# Rows in a band of many rows: few enough for their sums to be on the stack, which has 2 MB.
_TRANSPOSED_ROWS: Final = 192
_TRANSPOSED_SUM_BYTES: Final = 512 << 10

# the layouts that look-ups read; the first is made for weights in GGUF blocks
_READ_BY_ROWS: Final = (GGUF, INTERLEAVED16)

DIGITS: Final = {"f32": 3, "f16": 3, "i8": 1}
"""Digits of x by precision; the more exact f32 serves f16."""

UNIT: Final = 32
"""Elements of x that share a step."""
EXPERT_SLOTS: Final = ("order", "buckets", "bucket_list")
"""Slots about the vectors of experts: their numbers, sorted by expert; how many buckets there are;
and of each bucket its expert, its first place in the order, and the place after its last."""
BUCKET_WORDS: Final = 3
"""Words of 8 bytes of a bucket."""

HEADER_BYTES: Final = 32
"""Bytes of a unit of x before its digits."""


@dataclass(frozen=True)
class CpuKernel:
    """A kernel for the CPU.

    Attributes:
        work: what the kernel computes.
        tile: the register tile.
        dot: how integers are multiplied; None if all products are products of floats.
        digits: the digits of each element of x in integer products.
        decoded_layout: of the weight whose rows or values the kernel returns.
    """

    work: Kernel
    tile: Tile = Tile(1)
    dot: Dot | None = None
    digits: int = 0
    decoded_layout: str = INTERLEAVED16

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.work.decoded is not None:
            in_panels = self.work.decoded.node.op == "rows" and self.decoded_layout != GGUF
            return self.work.rows_class + (f", in {self.decoded_layout}" if in_panels else "")
        rows = "1 row a tile" if self.tile.rows == 1 else f"{self.tile.rows} rows a tile"
        if self.work.uniform:
            rows = self.work.rows_class
        if self.work.chosen is not None:
            rows += ", grouped by expert"
        if self.tile.panels > 1:
            rows += f" of {self.tile.columns} columns"
        if self.dot is None:
            return rows
        digits = "1 digit" if self.digits == 1 else f"{self.digits} digits"
        return f"{rows}, {digits} by {self.dot.instruction.name}"

    def schedule_of(self, section: Section) -> str:
        """Return the schedule of a section: `COLUMNS`, `DOT` or `TRANSPOSED`."""
        return schedule_of(section)

    def slots(self) -> tuple[Slot, ...]:
        """Return the kernel's arguments in order.

        These are the plan's own slots and four more: `pool`, `x` (the prologue's result),
        `row_factors` (the power of two that each row's sums are multiplied by) and `digits` (x
        again, as integers).
        """
        slots: dict[Slot, None] = {Slot("pool"): None, Slot("m"): None}  # a set that keeps order
        work = self.work
        for node in work.leaves():
            if node.op in _ARGUMENTS:
                slots[Slot(_ARGUMENTS[node.op], node.arg)] = None
        if work.chosen is not None:
            alone = "one" if work.uniform else ""
            slots |= {Slot(kind, work.chosen.arg, alone): None for kind in EXPERT_SLOTS}
        for section in work.sections:
            for product in section.products:
                slots[Slot("weight", product.arg, layout(section))] = None
        stores = [*work.loads, *work.rows, *(t for s in work.sections for t in s.stores)]
        if work.decoded is not None:
            slots[Slot("weight", work.decoded.node.arg, self.decoded_layout)] = None
            stores.append(work.decoded)
        for store in stores:
            slots[Slot(store.buffer.kind, store.buffer.index)] = None
        if work.x is not None:
            slots |= {Slot("x"): None, Slot("row_factors"): None}
            if self.digits:
                slots[Slot("digits")] = None
        return tuple(slots)


CpuPlan = Plan[CpuKernel]


def layout(section: Section) -> str:
    """Return the weight layout that the section's schedule reads."""
    return GGUF if schedule_of(section) == DOT else INTERLEAVED16


def expert_bytes(plan: CpuPlan, product: Node, layout_name: str) -> int:
    """Return the bytes of an expert's matrix, and so from one expert to the next."""
    spec, weight = plan.weight(product.arg), interleaved(plan, product.arg)
    if layout_name == GGUF:
        return spec.n * spec.block_format.column_bytes(spec.k)
    return weight.panels * weight.panel_bytes


def panels(section: Section) -> int:
    """Return how many panels of 16 columns a section has."""
    return -(-section.width // LANES)


def interleaved(plan: CpuPlan, arg: int) -> Interleaved:
    """Return the interleaved layout of a weight argument."""
    spec = plan.weight(arg)
    return Interleaved(spec.block_format.repacked, spec.k, spec.n)


def padded_k(plan: CpuPlan, kernel: CpuKernel) -> int:
    """Return the floats in a row of x: K, padded to whole blocks of each weight of the kernel.

    For products with `w.T` it is N, padded to an odd number of panels.
    """
    weights = [interleaved(plan, p.arg) for s in kernel.work.sections for p in s.products]
    if kernel.work.is_transposed:
        # an odd number of cache lines, so that rows do not share sets of a cache
        return (weights[0].panels | 1) * LANES
    return max((weight.padded_k for weight in weights), default=0)


def unit_bytes(digits: int) -> int:
    """Return the bytes of a unit of x in digits: a header, then its digits."""
    return HEADER_BYTES + digits * UNIT


def digits_bytes(k: int, digits: int) -> int:
    """Return the bytes of a row of x in digits: `k` elements in units, then the row's end."""
    end_bytes = 4 * (2 + k // UNIT)  # the number of rough units, the smallest step, their list
    return k // UNIT * unit_bytes(digits) + -(-end_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES


def find_dot(target: Target) -> Dot | None:
    """Return how a CPU multiplies integers; None if floats are faster."""
    return next((dot for dot in DOTS if target.has(dot.feature)), None)


def zero_of(fmt: Format, instruction: DotInstruction) -> int:
    """Return the code of the value 0, in the codes that the instruction takes.

    Signed numbers become codes of an unsigned instruction by adding a power of two.
    """
    if not (fmt.signed or fmt.table):
        return fmt.zero
    least = 0 if instruction.signed else -min(fmt.numbers)
    return 1 << (least - 1).bit_length() if least > 0 else 0


def is_integer(plan: CpuPlan, kernel: CpuKernel, section: Section, product: Node) -> bool:
    """Return whether a kernel computes a product by integers."""
    spec = plan.weight(product.arg)
    return kernel.dot is not None and _suits(kernel.dot, kernel.digits, section, spec)


def _suits(dot: Dot, digits: int, section: Section, spec: WeightSpec) -> bool:
    fmt = spec.block_format
    if fmt.float_type is not None or (digits > 1 and dot.instruction.pairs):
        return False
    largest_code = max(fmt.numbers) + zero_of(fmt, dot.instruction)
    # Inf and NaN among the scales give the right result only if each element is scaled by itself
    served = largest_code <= dot.instruction.largest_code and spec.finite
    return served and schedule_of(section) == COLUMNS


def more_exact(plan: CpuPlan, precision: str) -> list[str]:
    """Return the names of the weights that are multiplied in f32 though `precision` allows less."""
    names = {
        plan.graph.names[product.arg]: None
        for kernel in plan.kernels
        for section in kernel.work.sections
        for product in section.products
        if DIGITS[precision] != 1 or not is_integer(plan, kernel, section, product)
    }
    return [] if precision == "f32" else list(names)


def tile_of(target: Target, m: int, digits: int = 3) -> Tile:
    """Return the register tile for m rows of x.

    A tile never has more rows than x, because the last tile overlaps the one before it. Few
    different tiles serve all m; they are the CPU's classes of M.
    """
    dot, few = find_dot(target), _few_rows(target)
    if m > 2 * few:
        return Tile(few) if dot is None else dot.many[digits == 1]
    tiles = max(1, -(-m // few))
    return Tile(max(1, -(-m // tiles)))


def _few_rows(target: Target) -> int:
    dot = find_dot(target)
    return (dot.few if dot is not None else _FLOATS[target.vector_registers]).rows


def m_class(target: Target, m: int) -> int:
    """Return the class of M: the rows of a tile, or the least M that counts as many rows.

    Plans of one class are equal.
    """
    few = _few_rows(target)
    return 2 * few + 1 if m > 2 * few else tile_of(target, m).rows


def _transposed_tile(target: Target, m: int, formats: list[Format], products: int) -> Tile:
    """Return the tile of products with `w.T`; it is the same for all m of a class.

    products: the most in a section. Their sums share the stack: tiles shrink if there are many.
    """
    tiles, rows = transposed_tiles(target), m_class(target, m)
    runs = [plane.run_elements for fmt in formats for plane in fmt.repacked.planes]
    panels = max([*runs, _TRANSPOSED_WIDTH]) // LANES
    if rows > 2 * _few_rows(target):
        rows = min(tiles.many, rows)
    else:
        rows = -(-rows // -(-rows // tiles.few))
    most = _TRANSPOSED_SUM_BYTES // products
    while panels > 1 and rows * _sums_bytes(panels) > most:
        panels //= 2
    while rows > 1 and rows * _sums_bytes(panels) > most:
        rows //= 2
    return Tile(rows, panels)


def _sums_bytes(panels: int) -> int:
    """Return the bytes of a row's sums with `w.T`: two floats each, and up to two chunks more."""
    return (panels + 2) * 8 * LANES


def transposed_tiles(target: Target) -> TransposedTiles:
    """Return the tiles of products with `w.T`."""
    return _TRANSPOSED[target.vector_registers * target.vector_bytes // (4 * LANES)]


def band_rows(plan: CpuPlan, kernel: CpuKernel) -> int | None:
    """Return the rows of x in a band; None if one band has all rows."""
    tile = kernel.tile
    if kernel.work.is_transposed:
        if tile.rows <= transposed_tiles(plan.target).few:
            return None
        products = max(len(s.products) for s in kernel.work.sections)
        row_bytes = products * _sums_bytes(tile.panels)
        rows = min(_TRANSPOSED_SUM_BYTES // row_bytes, _TRANSPOSED_ROWS)
    elif kernel.dot is None or (tile.rows <= kernel.dot.few.rows and tile.panels == 1):
        return None
    else:
        row_bytes = digits_bytes(padded_k(plan, kernel), kernel.digits)
        rows = max(_BAND_BYTES // row_bytes, _BAND_ROWS)
    return max(rows // tile.rows, 1) * tile.rows


def make_plan(graph: Graph, target: Target, m: int, precision: str = "f32") -> CpuPlan:
    """Plan a graph for a CPU and m rows of x; plans of one class of M are equal."""
    kernels, temps = split(graph)
    plan: CpuPlan = Plan(graph, target, (), temps)
    return replace(plan, kernels=tuple(_scheduled(plan, k, m, precision) for k in kernels))


def _scheduled(plan: CpuPlan, kernel: Kernel, m: int, precision: str) -> CpuKernel:
    if kernel.decoded is not None:
        node = kernel.decoded.node
        in_panels = node.op == "dequantize"
        layout = INTERLEAVED16 if in_panels else plan.weight(node.arg).rows_layout(_READ_BY_ROWS)
        return CpuKernel(kernel, decoded_layout=layout)
    m = 1 if kernel.uniform else m
    dot, digits = find_dot(plan.target), DIGITS[precision]
    specs = [(s, plan.weight(p.arg)) for s in kernel.sections for p in s.products]
    if kernel.is_transposed:
        formats = [spec.block_format for _, spec in specs]
        products = max(len(section.products) for section in kernel.sections)
        return CpuKernel(kernel, _transposed_tile(plan.target, m, formats, products))
    if dot is None or not any(_suits(dot, digits, s, spec) for s, spec in specs):
        dot, digits = None, 0
    if kernel.chosen is not None:
        # rows of one expert are as many as the ids say, so tiles are not fitted to M
        return CpuKernel(kernel, Tile(1 if m == 1 else _few_rows(plan.target)), dot, digits)
    tile = tile_of(plan.target, m, digits)
    if dot is None and tile.panels > 1:
        tile = _FLOATS[plan.target.vector_registers]
    elif dot is not None and digits == 1 and m > 2 * dot.few.rows:
        # Joining planes takes instructions and registers. A tile of one panel joins them once for
        # more rows, and spills nothing (Q5_K and Q6_K took a quarter less time on a Xeon with AMX).
        in_planes = any(len(spec.block_format.planes) > 1 for _, spec in specs)
        tile = dot.planes if in_planes else tile
    return CpuKernel(kernel, tile, dot, digits)


def schedule_of(section: Section) -> str:
    """Return the schedule of a section: `COLUMNS`, `DOT` or `TRANSPOSED`."""
    if section.products[0].transposed:
        return TRANSPOSED
    aligned = all(p.start % LANES == 0 for p in section.products)
    return COLUMNS if aligned and section.width >= _NARROW else DOT
