"""The memory of kernels: shared memory of a thread block, and scratch memory between launches.

The shared memory counted here decides which constants are possible, and texts print it as
`LDS_BYTES`. `tests/hip/test_memory.py` compares it with the arrays that the texts declare.
"""

from typing import Final

from q4jit.hip import kernel as kernels
from q4jit.hip.classes import HALVES_TILE_ROWS, MOST_FEW_ROWS, TALL_TILE_ROWS
from q4jit.hip.gemv_matrix_sizes import RESERVE_BYTES, sizes_of
from q4jit.hip.kernel import (
    ELEMENT,
    ELEMENT_TRANSPOSED,
    QUAD_ELEMENTS,
    ROWS,
    UNIT_ELEMENTS,
    HipKernel,
    HipPlan,
)
from q4jit.hip.tile_halves_sizes import TileHalvesSizes, TransposedSizes, tile_halves_sizes
from q4jit.plan.kernels import Kernel, Slot
from q4jit.targets import HipArch

ELEMENT_STAGE_UNITS: Final = 128
"""Units of a column that an `element` decodes into shared memory at a time."""
MOST_STAGES_BYTES: Final = 32 << 10
"""The most shared memory that the stages of x take, on any platform."""

SUMS_OF_ROUND: Final = 8
"""Sums of each thread of a `gemv_transposed` that its waves add up at a time."""

_F32_BYTES: Final = 4
_F16_BYTES: Final = 2
_ALIGNED_BYTES: Final = 16  # the alignment of every array in shared memory

# --- shared memory of a block ---------------------------------------------------------------------


def shared_bytes(plan: HipPlan, kernel: HipKernel) -> int:
    """Return the bytes of shared memory that a block of a kernel has."""
    # the waves exchange a number each
    exchanges = adds_up_blocks(kernel) + finds_largest(kernel) + finds_maximum(kernel)
    waves_bytes = kernel.block_size // plan.target.hip.wave * _F32_BYTES
    array_bytes = -(-waves_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return _staged_bytes(plan, kernel) + exchanges * array_bytes


def generic_bytes(arch: HipArch, block_size: int) -> int:
    """Return the bytes of shared memory that a block of a plain product has."""
    stage_elements = ELEMENT_STAGE_UNITS * UNIT_ELEMENTS
    return (stage_elements + block_size // arch.wave) * _F32_BYTES


def adds_up_blocks(kernel: HipKernel) -> bool:
    """Whether the threads of a block add up a number of each."""
    splits_x = kernel.schedule == ROWS and bool(
        kernel.int8 or kernel.bf16_terms or kernel.f16_terms
    )
    adds_up = kernel.schedule in {ELEMENT, ELEMENT_TRANSPOSED}
    return adds_up or splits_x or _reduces_rows(kernel.work, "sum")


def finds_maximum(kernel: HipKernel) -> bool:
    """Whether the threads of a block find the maximum of a row of values, as NumPy means it."""
    return _reduces_rows(kernel.work, "max")


def finds_largest(kernel: HipKernel) -> bool:
    """Whether the threads of a block find the largest number of a row."""
    return kernel.schedule == ROWS and bool(kernel.f16_terms)


def _reduces_rows(work: Kernel, op: str) -> bool:
    return any(node.op == op and node.operands[0].width > 1 for node in work.leaves())


def _staged_bytes(plan: HipPlan, kernel: HipKernel) -> int:
    """Return the bytes of the arrays that the template of a schedule declares."""
    arch = plan.target.hip
    match kernel.schedule:
        case kernels.ELEMENT:
            return ELEMENT_STAGE_UNITS * UNIT_ELEMENTS * _F32_BYTES
        case kernels.GEMV:
            return gemv_bytes(kernel)
        case kernels.GEMV_MATRIX:
            return sizes_of(arch, kernel).used_bytes
        case kernels.GEMV_TRANSPOSED:
            formats = [plan.weight(p.arg).block_format for p in kernel.section.products]
            is_late = kernel.scales_late and any(fmt.minimum_at is None for fmt in formats)
            return gemv_transposed_bytes(kernel.rows_per_tile, kernel.block_size, is_late)
        case kernels.SORT_EXPERTS:
            # the first places, the sums of earlier threads, and the number of tiles
            return (sort_slots(kernel) + kernel.block_size + 1) * _F32_BYTES
        case kernels.ADD_SPLITS:
            return kernel.block_size * _F32_BYTES
        case kernels.TILE_FMA | kernels.TILE_TRANSPOSED:
            return 2 * UNIT_ELEMENTS * (kernel.rows_per_tile + 1) * _F32_BYTES
        case kernels.TILE_MATRIX:
            return _tile_matrix_bytes(plan, kernel)
        case kernels.TILE_HALVES | kernels.TILE_HALVES_TRANSPOSED:
            return tile_halves_sizes(arch, kernel).staged_bytes
    return 0


def sort_slots(kernel: HipKernel) -> int:
    """Return how many parts of a call's ids a `sort_experts` counts: chunks times experts."""
    return kernel.experts * max(1, kernel.block_size // kernel.experts)


def gemv_bytes(kernel: HipKernel) -> int:
    """Return the shared memory of a `gemv`: the stage of each row of x, padded per unit."""
    stride_bytes = (UNIT_ELEMENTS + 4) * _F32_BYTES
    return kernel.rows_per_tile * kernel.ahead * kernel.lanes * stride_bytes


def gemv_transposed_bytes(rows: int, block_size: int, is_late: bool) -> int:
    """Return the bytes of x at a column for each thread, and of the sums that waves add up.

    Where scales are applied late, rough elements of x are apart, and a number names their stage.
    """
    staged = (2 if is_late else 1) * rows * block_size
    sums = SUMS_OF_ROUND * (block_size + 4)
    return (staged + sums + is_late) * _F32_BYTES


def _tile_matrix_bytes(plan: HipPlan, kernel: HipKernel) -> int:
    """Return the bytes of x in terms, of a tile of w with its scales, of sums of x, and a flag."""
    stride_bytes = (UNIT_ELEMENTS + 8) * _F16_BYTES
    columns = kernel.columns
    scales_bytes = 2 * columns * _F32_BYTES
    formats = [plan.weight(product.arg).block_format for product in kernel.section.products]
    if any(fmt.minimum_at is not None for fmt in formats):
        halves = any(fmt.minimum_at is not None and fmt.sub_block_elements < 32 for fmt in formats)
        scales_bytes += (2 if halves else 1) * columns * _F32_BYTES + 16 * stride_bytes
    return stride_bytes * (kernel.bf16_terms * kernel.rows_per_tile + columns) + scales_bytes + 4


def tile_halves_has_room(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether shared memory holds the partial sums of a `tile_halves`."""
    return TileHalvesSizes(arch, kernel).sums_bytes <= arch.lds_bytes - RESERVE_BYTES


def transposed_has_room(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether shared memory holds the stages and sums of a `tile_halves_transposed`."""
    return TransposedSizes(arch, kernel).staged_bytes <= arch.lds_bytes - RESERVE_BYTES


def f16_unit_bytes(kernel: HipKernel, rows: int) -> int:
    """Return the bytes of a unit of x, split into terms of f16."""
    return kernel.f16_terms * rows * UNIT_ELEMENTS * _F16_BYTES


def split_quads(kernel: HipKernel) -> int:
    """Return the quads of a column in one split of K."""
    k = kernel.section.products[0].operands[0].width
    return -(-k // (QUAD_ELEMENTS * kernel.splits))


def _results_bytes(kernel: HipKernel) -> int:
    """Return the bytes of a thread block's results, for all products."""
    return len(kernel.section.products) * kernel.rows_per_tile * kernel.columns * _F32_BYTES


# --- scratch memory -------------------------------------------------------------------------------


def scratch(kernel: HipKernel, m: int) -> dict[Slot, int]:
    """Return the scratch slots of a kernel and the bytes of each for m rows.

    A `rows` kernel writes them, and the kernels of the products after it read them. A
    `gemv_transposed` writes the sums of its splits, and an `add_splits` reads them.
    """
    rows = kernel.work.rows_of(m)
    k = kernel.work.x.width if kernel.work.x is not None else 0
    units = k // UNIT_ELEMENTS
    results = sum(len(section.products) * section.width for section in kernel.work.sections)
    sizes = {
        "split_sums": 4 * kernel.splits * rows * results,
        "x": 4 * rows * k,
        "x_terms": _f16_terms_bytes(kernel, rows, k)
        if kernel.f16_terms
        else 2 * kernel.bf16_terms * rows * k,
        "x_rough": 4 * rows,
        "x_quants": rows * k,
        "x_scales": 4 * rows * (units if kernel.int8 else 1),
        "x_sums": _f16_sums_bytes(kernel, rows, k) if kernel.f16_terms else 4 * rows * units,
        "expert_order": 4 * rows,
        "expert_tiles": 4 * 3 * most_tiles(kernel, rows),
    }
    return {slot: sizes[slot.kind] for slot in kernel.slots() if slot.kind in sizes}


def _f16_sums_bytes(kernel: HipKernel, rows: int, k: int) -> int:
    """Return the bytes of the sums of x beside its f16 terms: of whole quads and tiles."""
    padded = -(-rows // TALL_TILE_ROWS) * TALL_TILE_ROWS
    return 4 * kernel.x_sums * padded * (-(-k // QUAD_ELEMENTS) * QUAD_ELEMENTS // UNIT_ELEMENTS)


def most_tiles(kernel: HipKernel, vectors: int) -> int:
    """Return the most tiles that the vectors of a call sorted by expert are in."""
    return -(-vectors // kernel.rows_per_tile) + min(vectors, kernel.experts)


def _f16_terms_bytes(kernel: HipKernel, rows: int, k: int) -> int:
    """Return the bytes of x in f16 terms: whole quads and tiles, and room for the last copy."""
    row_bytes = kernel.f16_terms * -(-k // QUAD_ELEMENTS) * QUAD_ELEMENTS * _F16_BYTES
    tiles = (MOST_FEW_ROWS, *HALVES_TILE_ROWS)  # beyond them there are several
    tile_rows = next((tile for tile in tiles if rows <= tile), TALL_TILE_ROWS)
    return -(-rows // tile_rows) * tile_rows * row_bytes + MOST_STAGES_BYTES // 2
