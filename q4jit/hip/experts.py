"""Products with chosen experts on a GPU: whether their vectors are sorted first, and by what.

Up to 16 vectors are multiplied one by one, in one launch. Of more, the vectors of one expert share
its decoded weights in tiles of a few: a launch of `sort_experts` finds the tiles on the device.
"""

from dataclasses import replace
from typing import Final

from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.classes import FEW_ROWS, m_class
from q4jit.hip.kernel import GEMV, SORT_EXPERTS, HipKernel
from q4jit.plan.kernels import Kernel, Section
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target
from q4jit.weights.layouts import GGUF, TILES16, Planar
from q4jit.weights.tiles import Tiles

_MOST_SINGLE_VECTORS: Final = 16
_MOST_EXPERTS: Final = 2048  # their counts fit in shared memory
_SORT_THREADS: Final = 1024


def are_sorted(
    graph: Graph, work: Kernel, target: Target, m: int, plan_options: PlanOptions
) -> bool:
    """Return whether the vectors of a kernel's experts are sorted; it is the same for a class of M.

    m: the rows of the call.
    """
    if work.chosen is None or plan_options.schedule not in {None, GEMV}:
        return False
    rows = 1 if work.uniform else _least_rows(m_class(target, m, plan_options))
    are_many = rows * work.copies > _MOST_SINGLE_VECTORS
    return are_many and all(experts_of(graph, s) <= _MOST_EXPERTS for s in work.sections)


def _least_rows(rows_class: int) -> int:
    """Return a number of rows that all of a class have at least."""
    return next((few for few in reversed(FEW_ROWS) if few < rows_class), 0) + 1


def experts_of(graph: Graph, section: Section) -> int:
    """Return the experts that ids may choose for the products of a section."""
    specs = [graph.signature[product.arg] for product in section.products]
    return min(spec.experts for spec in specs if isinstance(spec, WeightSpec))


def matrix_bytes(spec: WeightSpec, layout: str) -> int:
    """Return the bytes of an expert's matrix in a layout, and so from one expert to the next."""
    if layout == GGUF:
        return spec.n * spec.block_format.column_bytes(spec.k)
    if layout == TILES16:
        return Tiles(spec.block_format, spec.k, spec.n).size_bytes
    return Planar(spec.block_format.repacked, spec.k, spec.n).size_bytes


def sort_kernel(kernel: HipKernel) -> HipKernel:
    """Return the launch that sorts the vectors for a product's kernel."""
    work = kernel.work
    name = f"{work.name}_sort"
    sort = replace(work, name=name, rows=(), x=None, sections=(), loads=(), sorted_by=work.chosen)
    return HipKernel(
        sort,
        SORT_EXPERTS,
        block_size=_SORT_THREADS,
        rows_per_tile=kernel.rows_per_tile,
        experts=kernel.experts,
    )


def without_repeated_sorts(kernels: list[HipKernel]) -> list[HipKernel]:
    """Return launches without a sort that repeats the one before it."""
    kept: list[HipKernel] = []
    last: tuple[object, ...] | None = None
    for kernel in kernels:
        if kernel.schedule == SORT_EXPERTS:
            work = kernel.work
            assert work.sorted_by is not None
            same = work.sorted_by.id, work.uniform, work.copies
            wanted = (*same, kernel.rows_per_tile, kernel.experts)
            if wanted == last:
                continue
            last = wanted
        kept.append(kernel)
    return kept
