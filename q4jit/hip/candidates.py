"""Candidates: what a search tries for a product, schedules and constants."""

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
from q4jit.hip.problem import are_tiles
from q4jit.hip.rules import rules_of
from q4jit.hip.sizing import in_waves, staged
from q4jit.hip.tunings import Constant, Key
from q4jit.targets import HipArch, Target
from q4jit.weights.formats import FORMATS

# the others follow from the schedule, M, the precision and the weights
_CHOSEN: Final = (
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
_TILE_BLOCKS: Final = 4  # per compute unit, at most, where blocks share columns
_MOST_RESIDENT: Final = 1024  # threads of a compute unit, which registers leave room for


def schedules_for(target: Target, key: Key) -> tuple[str, ...]:
    """The schedules worth a try for weights whose scales are finite."""
    formats = [FORMATS[name] for name in key.format.split("+")]
    in_blocks = all(fmt.float_dtype is None for fmt in formats)
    has_matrix = target.hip.matrix is not None
    if has_matrix and are_tiles(formats):
        is_few = key.m <= MOST_FEW_ROWS
        if not is_few:
            return (TILE_HALVES,)
        tried = rules_of(target.hip).tried
        return tried[min(rows for rows in tried if rows >= key.m)]
    if key.m > MOST_FEW_ROWS:
        return (TILE_MATRIX, TILE_FMA) if has_matrix and in_blocks else (TILE_FMA,)
    return (GEMV, GEMV_DOT) if key.precision == "i8" and in_blocks else (GEMV,)


def constants_of(kernel: HipKernel) -> dict[str, Constant]:
    """The constants of a kernel that may be chosen, by name."""
    return {name: getattr(kernel, name) for name in _CHOSEN}


def candidates(target: Target, kernel: HipKernel, m: int) -> tuple[HipKernel, ...]:
    """The legal variants of a kernel with products for m rows, itself first."""
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
    tiles = -(-kernel.section.width // MATRIX_COLUMNS)
    found = []
    for splits, blocks, threads, ahead in itertools.product(
        _TRIED_SPLITS, (1, 2, 4), (256, 512, 896, 1024), (1, 2)
    ):
        waves_n = -(-tiles * splits // (arch.compute_units * blocks))
        waves_k = threads // arch.wave // waves_n
        variant = in_waves(arch, replace(kernel, ahead=ahead, splits=splits), waves_n, waves_k)
        is_resident = blocks * variant.block_size <= _MOST_RESIDENT
        if waves_k and is_resident and can_run_gemv_matrix(arch, variant):
            found.append(variant)
    return found


def _of_tile_halves(arch: HipArch, kernel: HipKernel, m: int) -> list[HipKernel]:
    tiles = -(-kernel.section.width // MATRIX_COLUMNS)
    has_many = kernel.rows_per_tile >= TILE_ROWS
    found = []
    for variant, splits, wave_panels, waves_k in itertools.product(
        _staged_variants(arch, kernel, m), _TRIED_SPLITS, (1, 2), (1, 2)
    ):
        units = arch.compute_units * wave_panels
        even = {-(-tiles * splits // (units * blocks)) for blocks in (1, 2)}
        for waves_n in sorted({4, 8, 12, 16} if has_many or kernel.warpgroups else {4, 8} | even):
            grouped = replace(variant, splits=splits, wave_panels=wave_panels)
            candidate = in_waves(arch, grouped, waves_n, waves_k)
            blocks = -(-tiles // (waves_n * wave_panels)) * splits
            is_full = splits == 1 or blocks <= _TILE_BLOCKS * arch.compute_units
            if is_full and can_run_tile_halves(arch, candidate):
                found.append(candidate)
    return found


def _staged_variants(arch: HipArch, kernel: HipKernel, m: int) -> list[HipKernel]:
    """A kernel with the rows of a tile and the stages of x that are worth a try."""
    if not kernel.warpgroups or kernel.rows_per_tile < TILE_ROWS:
        return [kernel]
    is_tall = kernel.folded and m > TILE_ROWS
    rows = (TILE_ROWS, TALL_TILE_ROWS) if is_tall else (TILE_ROWS,)
    return [staged(arch, kernel, *each) for each in itertools.product(rows, (2, 4))]
