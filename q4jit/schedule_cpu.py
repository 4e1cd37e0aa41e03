"""How a CPU computes the kernels of a plan: rows a tile, weight layouts, a kernel's arguments."""

from dataclasses import dataclass, replace
from typing import Final

from q4jit.formats import FORMATS
from q4jit.ir import Graph
from q4jit.layouts import GGUF, INTERLEAVED16, LANES, Interleaved
from q4jit.plan import Kernel, Plan, Section, Slot, split
from q4jit.targets import Target

# Below this width most lanes of a group of 16 columns would be idle: take columns one by one.
_NARROW: Final = 8
# Rows of x that share one decoding of the weights; more would spill accumulators.
_ROWS_32_REGISTERS: Final = 8
_ROWS_16_REGISTERS: Final = 4

_ARGUMENTS: Final = {"load": "array", "scalar": "scalar", "ids": "ids"}  # slots by operation

COLUMNS: Final = "columns"
"""16 columns at a time from the interleaved layout."""
DOT: Final = "dot"
"""One column at a time from GGUF rows: narrow results, slices that do not start at a group."""


@dataclass(frozen=True)
class CpuKernel(Kernel):
    """A kernel for the CPU; `rows_per_tile` rows of x share one decoding of the weights."""

    rows_per_tile: int = 1

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.uniform or self.decoded is not None:
            return super().rows_class
        return "1 row a tile" if self.rows_per_tile == 1 else f"{self.rows_per_tile} rows a tile"

    def slots(self) -> tuple[Slot, ...]:
        """The arguments in order.

        Beside the plan's own: `pool`, `x` (the prologue's result) and `exponent` (its power-of-two
        scale per row).
        """
        found: dict[Slot, None] = {Slot("pool"): None, Slot("m"): None}
        for node in self.leaves():
            if node.op in _ARGUMENTS:
                found[Slot(_ARGUMENTS[node.op], node.arg)] = None
        for section in self.sections:
            for product in section.products:
                found[Slot("weight", product.arg, layout(section))] = None
        stores = [*self.loads, *self.rows, *(t for s in self.sections for t in s.stores)]
        if self.decoded is not None:
            node = self.decoded.node
            whole = node.op == "dequantize"
            found[Slot("weight", node.arg, INTERLEAVED16 if whole else GGUF)] = None
            stores.append(self.decoded)
        for store in stores:
            found[Slot(store.buffer.kind, store.buffer.index)] = None
        if self.x is not None:
            found |= {Slot("x"): None, Slot("exponent"): None}
        return tuple(found)


CpuPlan = Plan[CpuKernel]


def layout(section: Section) -> str:
    """The weight layout that the section's schedule reads."""
    return INTERLEAVED16 if section.schedule == COLUMNS else GGUF


def groups(section: Section) -> int:
    """Tasks of 16 columns."""
    return -(-section.width // LANES)


def interleaved(plan: CpuPlan, arg: int) -> Interleaved:
    """The interleaved layout of a weight argument."""
    spec = plan.weight(arg)
    return Interleaved(FORMATS[spec.format], spec.k, spec.n)


def padded_k(plan: CpuPlan, kernel: CpuKernel) -> int:
    """Floats in a row of the prologue's result: K in whole blocks of every weight it meets."""
    products = (p for s in kernel.sections for p in s.products)
    return max((interleaved(plan, p.arg).padded_k for p in products), default=0)


def rows_per_tile(target: Target, m: int) -> int:
    """How many rows of x share one decoding of the weights when x has m rows.

    The last tile overlaps the one before it, so a tile never has more rows than x; a handful of
    values serve every m (that is what the M classes are on a CPU).
    """
    most = _ROWS_32_REGISTERS if target.vector_registers >= 32 else _ROWS_16_REGISTERS
    if m > 2 * most:
        return most
    tiles = -(-m // most)
    return max(1, -(-m // max(1, tiles)))


def make_plan(graph: Graph, target: Target, m: int) -> CpuPlan:
    """Plan a graph for a CPU and m rows of x; plans of one M class are equal."""
    kernels, temps = split(graph)
    scheduled = (
        CpuKernel(
            k.name,
            k.rows,
            k.x,
            tuple(replace(s, schedule=_schedule(s)) for s in k.sections),
            k.loads,
            k.uniform,
            k.decoded,
            rows_per_tile(target, 1 if k.uniform else m),
        )
        for k in kernels
    )
    return Plan(graph, target, tuple(scheduled), temps)


def _schedule(section: Section) -> str:
    aligned = all(p.start % LANES == 0 for p in section.products)
    return COLUMNS if aligned and section.width >= _NARROW else DOT
