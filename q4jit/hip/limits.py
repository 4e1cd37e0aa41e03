"""What an arch can run: block sizes, and constants that fit its waves and its shared memory."""

from typing import Final

from q4jit.errors import TargetError, expected
from q4jit.hip.gemv_matrix_sizes import sizes_of
from q4jit.hip.kernel import MATRIX_COLUMNS, QUAD_ELEMENTS, UNIT_ELEMENTS, HipKernel
from q4jit.hip.memory import gemv_bytes, split_quads, tile_halves_has_room, transposed_has_room
from q4jit.targets import HipArch, Target

_WARPGROUP_WAVES: Final = 4
_LEAST_TILE_THREADS: Final = 64  # at least that many threads of a tile_halves copy x


def check_block_size(target: Target, block_size: int | None) -> None:
    """Raise TargetError unless the arch can run thread blocks of this size (None: any size)."""
    arch = target.hip
    if block_size is None:
        return
    if block_size % arch.wave or not 0 < block_size <= arch.max_block_size:
        multiple = f"a multiple of {arch.wave} (the threads of a wave) up to {arch.max_block_size}"
        raise TargetError(expected(multiple, str(block_size), where=f"block_size on {target}"))


def can_run_gemv(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether a `gemv` has a lane for each result, room for x, and units to load ahead."""
    units = -(-_k(kernel) // UNIT_ELEMENTS)
    return (
        kernel.rows_per_tile * kernel.columns <= kernel.lanes
        and kernel.block_size % arch.wave == 0
        and kernel.block_size <= arch.max_block_size
        and gemv_bytes(kernel) <= arch.lds_bytes
        and (kernel.ahead - 1) * kernel.lanes < units
    )


def can_run_gemv_matrix(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether a `gemv_matrix` has work for every wave, and room for x and its sums."""
    sizes = sizes_of(arch, kernel)
    return (
        kernel.splits <= arch.cluster_blocks
        and kernel.block_size <= arch.max_block_size
        and sizes.waves_k * sizes.splits <= sizes.quads
        and (sizes.ahead == 1 or sizes.round_quads - sizes.waves_k < sizes.split_quads)
        and sizes.suffices
    )


def can_run_tile_halves(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether a `tile_halves` divides evenly among waves and blocks, with room for sums."""
    waves_n, rest = divmod(kernel.columns, MATRIX_COLUMNS * kernel.wave_panels)
    waves_k = kernel.waves_k(arch.wave)
    return (
        rest == 0
        and waves_n * waves_k * arch.wave == kernel.block_size
        and _LEAST_TILE_THREADS <= kernel.block_size <= arch.max_block_size
        and (waves_n % _WARPGROUP_WAVES == 0 or not kernel.warpgroups)
        and max(kernel.stage_units // 4, 1) % waves_k == 0
        and kernel.splits <= min(arch.cluster_blocks, kernel.rows_per_tile)
        and (kernel.splits == 1 or kernel.stage_units <= 4 * split_quads(kernel))
        and tile_halves_has_room(arch, kernel)
    )


def can_run_tile_halves_transposed(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether blocks can divide N, and shared memory holds their stages and sums."""
    return (
        kernel.splits <= min(arch.cluster_blocks, kernel.rows_per_tile)
        and (kernel.splits == 1 or kernel.splits * QUAD_ELEMENTS <= _k(kernel))
        and transposed_has_room(arch, kernel)
    )


def _k(kernel: HipKernel) -> int:
    return kernel.section.products[0].operands[0].width
