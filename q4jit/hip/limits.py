"""What an arch can run: block sizes, and constants for which a block has waves and room enough."""

from typing import Final

from q4jit.errors import TargetError
from q4jit.hip.gemv_matrix_sizes import sizes_of
from q4jit.hip.kernel import MATRIX_COLUMNS, UNIT_ELEMENTS, HipKernel
from q4jit.hip.memory import gemv_bytes, split_quads, tile_halves_has_room
from q4jit.targets import HipArch, Target

_WARPGROUP_WAVES: Final = 4
_LEAST_COPIERS: Final = 64  # threads of a block that copy x


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


def can_run_gemv(arch: HipArch, kernel: HipKernel) -> bool:
    """Whether a `gemv` has a lane for each result, room for x, and something to load ahead."""
    units = -(-_k(kernel) // UNIT_ELEMENTS)
    return (
        kernel.rows_per_tile * kernel.columns <= kernel.lanes
        and kernel.block_size % arch.wave == 0
        and kernel.block_size <= arch.max_block_size
        and gemv_bytes(kernel) <= arch.lds_bytes
        and (kernel.ahead - 1) * kernel.lanes < units
    )


def can_run_gemv_matrix(arch: HipArch, kernel: HipKernel) -> bool:
    """Whether a `gemv_matrix` has something to do for every wave, and room for x and its sums."""
    sizes = sizes_of(arch, kernel)
    return (
        kernel.splits <= arch.cluster_blocks
        and kernel.block_size <= arch.max_block_size
        and sizes.waves_k * sizes.splits <= sizes.quads
        and (sizes.ahead == 1 or sizes.round_quads - sizes.waves_k < sizes.split_quads)
        and sizes.suffices
    )


def can_run_tile_halves(arch: HipArch, kernel: HipKernel) -> bool:
    """Whether waves and blocks share a `tile_halves` evenly, and have room to add their sums up."""
    waves_n, rest = divmod(kernel.columns, MATRIX_COLUMNS * kernel.wave_panels)
    waves_k = kernel.waves_k(arch.wave)
    return (
        rest == 0
        and waves_n * waves_k * arch.wave == kernel.block_size
        and _LEAST_COPIERS <= kernel.block_size <= arch.max_block_size
        and (waves_n % _WARPGROUP_WAVES == 0 or not kernel.warpgroups)
        and max(kernel.stage_units // 4, 1) % waves_k == 0
        and kernel.splits <= min(arch.cluster_blocks, kernel.rows_per_tile)
        and (kernel.splits == 1 or kernel.stage_units <= 4 * split_quads(kernel))
        and tile_halves_has_room(arch, kernel)
    )


def _k(kernel: HipKernel) -> int:
    return kernel.section.products[0].operands[0].width
