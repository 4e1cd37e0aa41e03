"""How a CPU computes the kernels of a plan: tiles, instructions, weight layouts, arguments."""

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

# Below this width most lanes of a group of 16 columns would be idle: take columns one by one.
_NARROW: Final = 8

_ARGUMENTS: Final = {"load": "array", "scalar": "scalar", "ids": "ids"}  # slots by operation

COLUMNS: Final = "columns"
"""16 columns at a time from the interleaved layout."""
DOT: Final = "dot"
"""One column at a time from GGUF rows: narrow results, slices that do not start at a group."""


@dataclass(frozen=True)
class Tile:
    """Rows of x and groups of 16 columns that are multiplied together."""

    rows: int
    groups: int = 1

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every (group, row) of it."""
        return [(g, r) for g in range(self.groups) for r in range(self.rows)]


@dataclass(frozen=True)
class Dot:
    """How CPUs with a feature multiply integers.

    quant_bits: of the largest quants that are multiplied. few: the tile for M up to twice its rows,
    or fewer rows of it. many: the tiles beyond, of three digits and of one.
    """

    feature: str
    instruction: DotInstruction
    quant_bits: int
    few: Tile
    many: tuple[Tile, Tile]


# Which kernels serve which CPU and M: the first line whose feature the CPU has. Digits of x make
# `f32` from three sums of 32 bits and `i8` from one of either kind. Float formats, and what no line
# serves, are products of floats.
DOTS: Final = (
    #   feature       instruction  bits  few rows  many rows: three digits, one
    Dot("avx512vnni", VPDPBUSD_512, 8, Tile(8), (Tile(4, 2), Tile(6, 2))),
    Dot("avxvnni", VPDPBUSD_256, 8, Tile(4), (Tile(4), Tile(4))),
    Dot("avx2", VPMADDUBSW, 4, Tile(4), (Tile(4), Tile(4))),
    Dot("dotprod", SDOT, 8, Tile(4), (Tile(4), Tile(4))),
)
_FLOATS: Final = {32: Tile(8), 16: Tile(4)}  # by vector registers: more rows would spill sums

DIGITS: Final = {"f32": 3, "f16": 3, "i8": 1}
"""Digits of int8 by precision; f16 is served by the more exact f32."""

UNIT: Final = 32
"""Elements of x that share a step."""
HEADER_BYTES: Final = 32


@dataclass(frozen=True)
class CpuKernel:
    """A kernel for the CPU: its tile, and by what it multiplies integers, in how many digits."""

    work: Kernel
    tile: Tile = Tile(1)
    dot: Dot | None = None
    limbs: int = 0

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.work.decoded is not None:
            return self.work.rows_class
        rows = "1 row a tile" if self.tile.rows == 1 else f"{self.tile.rows} rows a tile"
        if self.work.uniform:
            rows = self.work.rows_class
        if self.tile.groups > 1:
            rows += f" of {self.tile.groups * LANES} columns"
        if self.dot is None:
            return rows
        digits = "1 digit" if self.limbs == 1 else f"{self.limbs} digits"
        return f"{rows}, {digits} by {self.dot.instruction.name}"

    def schedule_of(self, section: Section) -> str:
        """Name the way in which a section is computed."""
        return schedule_of(section)

    def slots(self) -> tuple[Slot, ...]:
        """The arguments in order.

        Beside the plan's own: `pool`, `x` (the prologue's result), `exponent` (its power-of-two
        scale per row) and `digits` (x again, as integers).
        """
        found: dict[Slot, None] = {Slot("pool"): None, Slot("m"): None}
        work = self.work
        for node in work.leaves():
            if node.op in _ARGUMENTS:
                found[Slot(_ARGUMENTS[node.op], node.arg)] = None
        for section in work.sections:
            for product in section.products:
                found[Slot("weight", product.arg, layout(section))] = None
        stores = [*work.loads, *work.rows, *(t for s in work.sections for t in s.stores)]
        if work.decoded is not None:
            node = work.decoded.node
            whole = node.op == "dequantize"
            found[Slot("weight", node.arg, INTERLEAVED16 if whole else GGUF)] = None
            stores.append(work.decoded)
        for store in stores:
            found[Slot(store.buffer.kind, store.buffer.index)] = None
        if work.x is not None:
            found |= {Slot("x"): None, Slot("exponent"): None}
            if self.limbs:
                found[Slot("digits")] = None
        return tuple(found)


CpuPlan = Plan[CpuKernel]


def layout(section: Section) -> str:
    """The weight layout that the section's schedule reads."""
    return INTERLEAVED16 if schedule_of(section) == COLUMNS else GGUF


def groups(section: Section) -> int:
    """Tasks of 16 columns."""
    return -(-section.width // LANES)


def interleaved(plan: CpuPlan, arg: int) -> Interleaved:
    """The interleaved layout of a weight argument."""
    spec = plan.weight(arg)
    return Interleaved(spec.block_format, spec.k, spec.n)


def padded_k(plan: CpuPlan, kernel: CpuKernel) -> int:
    """Floats in a row of the prologue's result: K in whole blocks of every weight it meets."""
    products = (p for s in kernel.work.sections for p in s.products)
    return max((interleaved(plan, p.arg).padded_k for p in products), default=0)


def unit_bytes(limbs: int) -> int:
    """Bytes of a unit of x in digits: a header, then its digits."""
    return HEADER_BYTES + limbs * UNIT


def digits_bytes(k: int, limbs: int) -> int:
    """Bytes of a row of x in digits, `k` whole units: the units, then the list of some of them."""
    list_bytes = 4 * (2 + k // UNIT)
    return k // UNIT * unit_bytes(limbs) + -(-list_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES


def find_dot(target: Target) -> Dot | None:
    """What multiplies integers on a CPU; None where nothing does it well."""
    return next((dot for dot in DOTS if target.has(dot.feature)), None)


def zero_of(fmt: Format, instruction: DotInstruction) -> int:
    """The quant, as the instruction takes it, that stands for zero."""
    if fmt.signed:
        return 0 if instruction.signed else 1 << fmt.quant_bits - 1
    return fmt.zero


def is_integer(plan: CpuPlan, kernel: CpuKernel, section: Section, product: Node) -> bool:
    """Whether a kernel computes a product by integers."""
    spec = plan.weight(product.arg)
    return kernel.dot is not None and _suits(kernel.dot, kernel.limbs, section, spec)


def _suits(dot: Dot, limbs: int, section: Section, spec: WeightSpec) -> bool:
    fmt = spec.block_format
    served = 0 < fmt.quant_bits <= dot.quant_bits and (limbs == 1 or not dot.instruction.pairs)
    # Inf and NaN among scales come out right only where elements are scaled one by one
    return served and spec.finite and schedule_of(section) == COLUMNS


def more_exact(plan: CpuPlan, precision: str) -> list[str]:
    """The weights, by name, whose products are computed in f32 though `precision` asks for less."""
    found = {
        plan.graph.names[product.arg]: None
        for kernel in plan.kernels
        for section in kernel.work.sections
        for product in section.products
        if DIGITS[precision] != 1 or not is_integer(plan, kernel, section, product)
    }
    return [] if precision == "f32" else list(found)


def tile_of(target: Target, m: int, limbs: int = 3) -> Tile:
    """How many rows and groups of columns are multiplied together where x has m rows.

    The last tile overlaps the one before it, so a tile never has more rows than x; a handful of
    values serve every m (that is what the M classes are on a CPU).
    """
    dot, few = find_dot(target), _few_rows(target)
    if m > 2 * few:
        return Tile(few) if dot is None else dot.many[limbs == 1]
    tiles = max(1, -(-m // few))
    return Tile(max(1, -(-m // tiles)))


def _few_rows(target: Target) -> int:
    dot = find_dot(target)
    return (dot.few if dot is not None else _FLOATS[target.vector_registers]).rows


def m_class(target: Target, m: int) -> int:
    """The class of M: the rows of a tile, or the least M of many rows. Plans of one are equal."""
    few = _few_rows(target)
    return 2 * few + 1 if m > 2 * few else tile_of(target, m).rows


def make_plan(graph: Graph, target: Target, m: int, precision: str = "f32") -> CpuPlan:
    """Plan a graph for a CPU and m rows of x; plans of one M class are equal."""
    kernels, temps = split(graph)
    plan: CpuPlan = Plan(graph, target, (), temps)
    return replace(plan, kernels=tuple(_scheduled(plan, k, m, precision) for k in kernels))


def _scheduled(plan: CpuPlan, kernel: Kernel, m: int, precision: str) -> CpuKernel:
    m = 1 if kernel.uniform else m
    dot, limbs = find_dot(plan.target), DIGITS[precision]
    specs = [(s, plan.weight(p.arg)) for s in kernel.sections for p in s.products]
    if dot is None or not any(_suits(dot, limbs, s, spec) for s, spec in specs):
        dot, limbs = None, 0
    tile = tile_of(plan.target, m, limbs)
    if dot is None and tile.groups > 1:
        tile = _FLOATS[plan.target.vector_registers]
    return CpuKernel(kernel, tile, dot, limbs)


def schedule_of(section: Section) -> str:
    """Name the way in which a section is computed: `COLUMNS` or `DOT`."""
    aligned = all(p.start % LANES == 0 for p in section.products)
    return COLUMNS if aligned and section.width >= _NARROW else DOT
