"""The candidates: the schedules and constants that a search tries for a product."""

import itertools
from dataclasses import replace
from typing import Final

from q4jit.hip import kernel as kernels
from q4jit.hip.classes import MOST_FEW_ROWS, TALL_TILE_ROWS, TILE_ROWS
from q4jit.hip.kernel import (
    GEMV,
    GEMV_DOT,
    MATRIX_COLUMNS,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
    HipKernel,
)
from q4jit.hip.limits import can_run_gemv, can_run_gemv_matrix, can_run_tile_halves
from q4jit.hip.problem import suit_panels
from q4jit.hip.rules import rules_of
from q4jit.hip.sizing import in_waves, staged
from q4jit.hip.tunings import Constant, Key
from q4jit.targets import HipArch, Target
from q4jit.weights.formats import FORMATS

# schedule, M, precision and weights determine the other constants
_SEARCHED: Final = (
    "ahead",
    "block_size",
    "columns",
    "lanes",
    "layout",
    "rows_per_tile",
    "splits",
    "stage_units",
    "stages",
    "wave_panels",
)
_TRIED_SPLITS: Final = (1, 2, 4, 8)
_MOST_SPLIT_BLOCKS: Final = 4  # per compute unit, if blocks share columns
_MOST_RESIDENT: Final = 1024  # threads whose registers fit into a compute unit


def schedules_for(target: Target, key: Key) -> tuple[str, ...]:
    """Return the schedules to try for weights with finite scales."""
    formats = [FORMATS[name] for name in key.format.split("+")]
    in_blocks = all(fmt.float_type is None for fmt in formats)
    has_matrix = target.hip.matrix is not None
    if has_matrix and suit_panels(formats):
        is_few = key.m <= MOST_FEW_ROWS
        if not is_few:
            return (TILE_HALVES,)
        tried = rules_of(target.hip).tried
        return tried[min(rows for rows in tried if rows >= key.m)]
    if key.m > MOST_FEW_ROWS:
        return (TILE_MATRIX, TILE_FMA) if has_matrix and in_blocks else (TILE_FMA,)
    return (GEMV, GEMV_DOT) if key.precision == "i8" and in_blocks else (GEMV,)


def constants_of(kernel: HipKernel) -> dict[str, Constant]:
    """Return the constants of a kernel that a search can choose, by name."""
    return {name: getattr(kernel, name) for name in _SEARCHED}


def candidates(target: Target, kernel: HipKernel, m: int) -> tuple[HipKernel, ...]:
    """Return the variants of a kernel that the arch can run for m rows, itself first."""
    arch = target.hip
    match kernel.schedule:
        case kernels.GEMV:
            variants = _of_gemv(arch, kernel)
        case kernels.GEMV_MATRIX:
            variants = _of_gemv_matrix(arch, kernel)
        case kernels.TILE_HALVES:
            variants = _of_tile_halves(arch, kernel, m)
        case _:
            variants = []
    return tuple(dict.fromkeys([kernel, *variants]))


def _of_gemv(arch: HipArch, kernel: HipKernel) -> list[HipKernel]:
    tried = [
        replace(kernel, columns=columns, block_size=block_size, ahead=ahead)
        for columns, block_size, ahead in itertools.product(
            (1, 2, 4, 8), (64, 128, 256, 512), (1, 2, 4)
        )
    ]
    return [variant for variant in tried if can_run_gemv(arch, variant)]


def _of_gemv_matrix(arch: HipArch, kernel: HipKernel) -> list[HipKernel]:
    panels = -(-kernel.section.width // MATRIX_COLUMNS)
    variants = []
    for splits, blocks, threads, ahead in itertools.product(
        _TRIED_SPLITS, (1, 2, 4), (256, 512, 896, 1024), (1, 2)
    ):
        waves_n = -(-panels * splits // (arch.compute_units * blocks))
        waves_k = threads // arch.wave // waves_n
        variant = in_waves(arch, replace(kernel, ahead=ahead, splits=splits), waves_n, waves_k)
        is_resident = blocks * variant.block_size <= _MOST_RESIDENT
        if waves_k and is_resident and can_run_gemv_matrix(arch, variant):
            variants.append(variant)
    return variants


def _of_tile_halves(arch: HipArch, kernel: HipKernel, m: int) -> list[HipKernel]:
    panels = -(-kernel.section.width // MATRIX_COLUMNS)
    has_full_tiles = kernel.rows_per_tile >= TILE_ROWS
    variants = []
    for staged_kernel, splits, wave_panels, waves_k in itertools.product(
        _staged_variants(arch, kernel, m), _TRIED_SPLITS, (1, 2), (1, 2)
    ):
        # numbers of waves for which one or two blocks per compute unit have all columns
        per_wave = arch.compute_units * wave_panels
        even = {-(-panels * splits // (per_wave * blocks)) for blocks in (1, 2)}
        tried = {4, 8, 12, 16} if has_full_tiles or kernel.warpgroups else {4, 8} | even
        for waves_n in sorted(tried):
            base = replace(staged_kernel, splits=splits, wave_panels=wave_panels)
            variant = in_waves(arch, base, waves_n, waves_k)
            blocks = -(-panels // (waves_n * wave_panels)) * splits
            suits = splits == 1 or blocks <= _MOST_SPLIT_BLOCKS * arch.compute_units
            if suits and can_run_tile_halves(arch, variant):
                variants.append(variant)
    return variants


def _staged_variants(arch: HipArch, kernel: HipKernel, m: int) -> list[HipKernel]:
    """Return a kernel with each number of rows per tile and of stages that is worth trying."""
    if not kernel.warpgroups or kernel.rows_per_tile < TILE_ROWS:
        return [kernel]
    is_tall = kernel.folded and m > TILE_ROWS
    rows = (TILE_ROWS, TALL_TILE_ROWS) if is_tall else (TILE_ROWS,)
    return [staged(arch, kernel, *each) for each in itertools.product(rows, (2, 4))]
