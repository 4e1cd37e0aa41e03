"""Choose the constants of products with `w.T`, whose sums run over the columns of w."""

import math
from dataclasses import replace
from typing import Any, Final

from q4jit.hip import kernel as kernels
from q4jit.hip.classes import TILE_ROWS
from q4jit.hip.kernel import (
    ADD_SPLITS,
    BLOCK_SIZE,
    GEMV_TRANSPOSED,
    TILE_TRANSPOSED,
    UNIT_ELEMENTS,
    HipKernel,
    HipPlan,
)
from q4jit.hip.memory import SUMS_OF_ROUND, gemv_transposed_bytes
from q4jit.hip.problem import Problem
from q4jit.hip.weight import KernelWeight
from q4jit.plan.kernels import Kernel, Section
from q4jit.weights.layouts import PLANAR, TILES16

TILE_COLUMNS: Final = 64
SPLIT_RESULTS: Final = 32
"""Results of a block that adds up splits: whole sectors of memory, and many blocks."""
# By rows of x, the blocks of 256 threads that run at a time; a few more would wait for all others.
# Counted with NVRTC 13.0 for sm_90: of 65536 registers a lane needs 64 to 68 for a row, 106 to 128
# for two (F32: 148) and up to 202 for four. Q6_K and F32 need 105 and 113 for a row.
_BLOCKS_PER_UNIT: Final = {1: 3, 2: 2, 4: 1}
_MANY_REGISTERS: Final = 16
"""Registers of a stored unit beyond which only two blocks run at a time."""
_MOST_ROWS: Final = 4
_FEW_REGISTERS: Final = 8
"""Registers of a stored unit beside which a lane has room for more rows and for units ahead."""
# fewer columns of a wave would take less time than adding up the sums of waves
_LEAST_COLUMNS: Final = 8
# As in `long_sums`: n lanes that share a result may have 16 n terms each.
_MOST_TERMS_SHARED: Final = 16

# measured on an H200, 4096 × 14336: two rows took 25.1 µs, in `tile_halves_transposed` 20.6 with
# one term and 31.0 with two; four rows took 40.6, and 21.2 or 31.3
MOST_TRANSPOSED_ROWS: Final = {1: 1, 2: 2}
"""By f16 terms of x, most rows for `gemv_transposed` where `tile_halves_transposed` is possible."""

_COUNTERPARTS: Final = {
    kernels.ELEMENT: kernels.ELEMENT_TRANSPOSED,
    kernels.GEMV: GEMV_TRANSPOSED,
    kernels.GEMV_DOT: GEMV_TRANSPOSED,
    kernels.GEMV_MATRIX: GEMV_TRANSPOSED,
    kernels.TILE_FMA: TILE_TRANSPOSED,
    kernels.TILE_MATRIX: TILE_TRANSPOSED,
    kernels.TILE_HALVES: TILE_TRANSPOSED,
}
"""The schedules for `w.T` that read weights in the layout of a schedule for w."""


def counterpart(schedule: str) -> str:
    """Return the schedule for `w.T` that a caller means by the name of a schedule for w."""
    return _COUNTERPARTS.get(schedule, schedule)


def layout_of(problem: Problem, section: Section) -> str:
    """Return the layout in which products with w read the weights of a section."""
    in_panels = (
        problem.plan_options.schedule
        in {
            None,
            kernels.GEMV_MATRIX,
            kernels.TILE_HALVES,
        }
        and problem.suits_panels(section)
        and problem.are_plain(section)
    )
    return TILES16 if in_panels else problem.plan_options.layout or PLANAR


def gemv_constants(problem: Problem, work: Kernel) -> dict[str, Any]:
    """Return the constants of a `gemv_transposed`."""
    (section,) = work.sections
    arch, layout = problem.arch, layout_of(problem, section)
    specs = problem.weights(section)
    stored = max(KernelWeight(spec, PLANAR, frozenset()).stored_registers for spec in specs)
    is_light = stored <= _FEW_REGISTERS
    rows = min(problem.m_class, _MOST_ROWS if is_light else _MOST_ROWS // 2)
    block_size = problem.plan_options.block_size or BLOCK_SIZE
    while rows > 1 and gemv_transposed_bytes(rows, block_size, is_late=True) > arch.lds_bytes:
        rows //= 2
    kernel = HipKernel(
        work,
        GEMV_TRANSPOSED,
        block_size=block_size,
        layout=layout,
        rows_per_tile=rows,
        columns=arch.wave * UNIT_ELEMENTS,
    )
    # One row needs none ahead (measured on an H200, 4096 × 14336: 19.3 instead of 22.4 µs): three
    # blocks hide memory's latency, and leave registers for `add_splits`, which can start early.
    return {
        "layout": layout,
        "rows_per_tile": rows,
        "columns": kernel.columns,
        "ahead": 2 if is_light and rows > 1 else 1,
        "scales_late": problem.has_finite_blocks(section),
        "splits": _splits(problem, kernel, 2 if stored > _MANY_REGISTERS else 3),
    }


def _splits(problem: Problem, kernel: HipKernel, most_per_unit: int) -> int:
    """Return how many blocks share a result: enough to fill the GPU and to add up well.

    most_per_unit: the most blocks of `BLOCK_SIZE` threads that run on a compute unit.
    """
    waves = kernel.block_size // problem.arch.wave
    n = kernel.section.products[0].operands[0].width
    row_tiles = -(-problem.m_class // kernel.rows_per_tile)
    per_unit = min(_BLOCKS_PER_UNIT[kernel.rows_per_tile], most_per_unit)
    blocks = per_unit * problem.arch.compute_units * BLOCK_SIZE / kernel.block_size
    full = math.floor(blocks / (kernel.transposed_tiles * row_tiles))
    exact = math.ceil(math.sqrt(n / _MOST_TERMS_SHARED) / waves)
    splits = max(min(full, n // (waves * _LEAST_COLUMNS)), exact, 1)
    return -(-n // split_columns(n, splits, waves))


def split_columns(n: int, splits: int, waves: int) -> int:
    """Return the columns of w in a split: whole turns of the waves of a block."""
    return -(-n // (splits * waves)) * waves


def tile_constants(problem: Problem, work: Kernel) -> dict[str, Any]:
    """Return the constants of a `tile_transposed`."""
    layout = layout_of(problem, work.sections[0])
    return {"layout": layout, "rows_per_tile": TILE_ROWS, "columns": TILE_COLUMNS}


def in_two_launches(kernel: HipKernel) -> list[HipKernel]:
    """Return a `gemv_transposed` and the kernel that adds up its splits; others as they are."""
    if kernel.schedule != GEMV_TRANSPOSED:
        return [kernel]
    work, section = kernel.work, kernel.section
    first = replace(
        work, name=f"{work.name}_splits", sections=(replace(section, stores=()),), loads=work.loads
    )
    last = replace(work, x=None)
    return [
        replace(kernel, work=first),
        HipKernel(last, ADD_SPLITS, columns=SPLIT_RESULTS, splits=kernel.splits),
    ]


def transposed_variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables of the templates for `w.T`."""
    if kernel.schedule not in {GEMV_TRANSPOSED, TILE_TRANSPOSED, ADD_SPLITS}:
        return {}
    n = kernel.section.products[0].operands[0].width
    waves = kernel.block_size // plan.target.hip.wave
    return {
        "n": n,
        "first_k": [kernel.first_k(product) for product in kernel.section.products],
        "split_columns": split_columns(n, kernel.splits, waves),
        "is_quads": kernel.layout == TILES16,
        "sums_of_round": SUMS_OF_ROUND,
        "tiles": kernel.transposed_tiles,
    }
