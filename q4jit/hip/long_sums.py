"""Which kernels add their sums over a long K in stretches, so that rounding errors stay small.

A sum of n terms of one sign errs by about 0.24·2^-24·√n of itself, and the sum of n such sums by
1/√n of that. Where it is too much, the sums of a stretch of units are added to totals. A sum of
many stretches also adds up what rounding takes from its total (`add_long` in
`part/common.hip.j2`).
"""

from dataclasses import dataclass
from typing import Final

from q4jit.hip.kernel import (
    GEMV,
    GEMV_MATRIX,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
    TILE_TRANSPOSED,
    UNIT_ELEMENTS,
    HipKernel,
    HipPlan,
)
from q4jit.targets import HipArch

# The units of a stretch: as few as leave at most `_MOST_STRETCHES`. A stretch of `tile_fma` has a
# term for each element. For `gemv` it is enough to sum each unit apart.
_STRETCH_UNITS: Final = {
    TILE_FMA: (8, 16),
    TILE_TRANSPOSED: (8, 16),
    TILE_MATRIX: (32,),
    GEMV: (1,),
    GEMV_MATRIX: (32,),
    TILE_HALVES: (32,),
}
# The most terms of a sum without stretches; a thread's sum may be the whole result. If n threads
# share a result, their sums err apart, and each may have 16·n terms.
_MOST_TERMS: Final = {
    GEMV: 1024,  # 16 or 32 lanes share a result
    TILE_FMA: 64,
    TILE_TRANSPOSED: 64,
    TILE_MATRIX: 32,  # two terms to a unit of Q6_K or Q4_1
    # up to K = 4096 the widest layers, with one wave to a panel, spend no registers
    GEMV_MATRIX: 128,
    TILE_HALVES: 64,
}
# `tile_halves` on AMD in blocks of four waves, whose number shared memory limits: totals find free
# registers. Elsewhere fewer blocks would run at a time, or sums be spilled. There only sums that
# could exceed the bound for products of mixed signs have totals: see docs/precision.md. The same
# holds for `tile_matrix` on NVIDIA: totals made Q8_0 at M = 512 take 1.7 times as long on an H200,
# and the matrix units, which truncate, still erred by 2.4 to 3.6 times the bound of one sign.
_FREE_WAVES: Final = 4
_MOST_FULL_TERMS: Final = 1024
_MOST_TERMS_SHARED: Final = 16
# The most stretches of a total that does not keep what it lost.
_MOST_STRETCHES: Final = 32


@dataclass(frozen=True)
class LongSums:
    """How a kernel adds up.

    Attributes:
        stretch_units: after how many units its sums are added to totals; 0: never.
        keeps_lost: whether what rounding takes from the totals is added up, too.
    """

    stretch_units: int = 0
    keeps_lost: bool = False


def long_sums(plan: HipPlan, kernel: HipKernel) -> LongSums:
    """Return how a kernel adds up."""
    schedule = kernel.schedule
    if schedule not in _STRETCH_UNITS or kernel.precision != "f32":
        return LongSums()
    units = -(-kernel.section.products[0].operands[0].width // UNIT_ELEMENTS)
    threads, terms = 1, units
    if schedule == GEMV:
        threads = kernel.lanes
        terms = units // threads * (1 if kernel.scales_late else UNIT_ELEMENTS)
    elif schedule in {GEMV_MATRIX, TILE_HALVES}:
        threads = kernel.waves_k(plan.target.hip.wave) * kernel.splits
        terms = units // threads
    most = _MOST_TERMS[schedule]
    is_tile = schedule in {TILE_HALVES, TILE_MATRIX}
    if is_tile and not _has_free_registers(plan.target.hip, kernel):
        most = _MOST_FULL_TERMS
    if terms <= max(most, _MOST_TERMS_SHARED * threads):
        return LongSums()
    choices = _STRETCH_UNITS[schedule]
    few = [n for n in choices if units <= n * _MOST_STRETCHES]
    if schedule in {TILE_FMA, TILE_TRANSPOSED, TILE_MATRIX, TILE_HALVES} and few:
        return LongSums(few[0])
    return LongSums(choices[-1], keeps_lost=schedule != GEMV)


def _has_free_registers(arch: HipArch, kernel: HipKernel) -> bool:
    """Return whether tiles on matrix units have registers for totals."""
    if kernel.schedule == TILE_MATRIX:
        return not arch.is_nvidia
    return not arch.is_nvidia and kernel.block_size <= _FREE_WAVES * arch.wave
