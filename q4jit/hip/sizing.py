"""Choose a kernel's columns, waves, splits and stages by the rules of its platform."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from q4jit.errors import TargetError
from q4jit.hip import kernel as kernels
from q4jit.hip.classes import MOST_FEW_ROWS, TILE_ROWS
from q4jit.hip.kernel import (
    BF16_TERMS,
    BLOCK_SIZE,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    MATRIX_COLUMNS,
    QUAD_ELEMENTS,
    TILE_FMA,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    TILE_MATRIX,
    TILE_TRANSPOSED,
    UNIT_ELEMENTS,
    HipKernel,
)
from q4jit.hip.limits import (
    can_run_gemv_matrix,
    can_run_tile_halves,
    can_run_tile_halves_transposed,
)
from q4jit.hip.memory import f16_unit_bytes
from q4jit.hip.problem import Problem
from q4jit.hip.rules import (
    GEMV_LANES,
    GEMV_MOST_ROWS,
    TRANSPOSED_STAGES,
    TRANSPOSED_WAVES,
    Kind,
    rules_of,
)
from q4jit.hip.transposed import TILE_COLUMNS, gemv_constants, tile_constants
from q4jit.hip.weight import KernelWeight
from q4jit.plan.kernels import Kernel, Section
from q4jit.targets import HipArch
from q4jit.weights.layouts import PLANAR, TILES16
from q4jit.weights.tiles import are_plain

_MOST_STAGE_UNITS: Final = 16
_BESIDE_ROWS: Final = 2  # of the eight of an instruction, for each of the four units of a quad
# they determine the block size
_TILES: Final = frozenset(
    {TILE_FMA, TILE_MATRIX, TILE_HALVES, TILE_TRANSPOSED, TILE_HALVES_TRANSPOSED}
)


def unsized(problem: Problem, work: Kernel, schedule: str, **constants: Any) -> HipKernel:
    """Return a kernel with these constants and those that the caller fixed."""
    asked = None if schedule in _TILES else problem.plan_options.block_size
    kernel = HipKernel(
        work,
        schedule,
        block_size=asked or BLOCK_SIZE,
        layout=problem.plan_options.layout or PLANAR,
    )
    return replace(kernel, **constants)


def sized(problem: Problem, work: Kernel, schedule: str) -> HipKernel:
    """Return a kernel of one section with constants by rule.

    Raises TargetError if shared memory has no room for the sums of its products.
    """
    match schedule:
        case kernels.GEMV | kernels.GEMV_DOT:
            return _gemv(problem, work, schedule)
        case kernels.GEMV_MATRIX:
            return _gemv_matrix(problem, work)
        case kernels.TILE_HALVES:
            return _tile_halves(problem, work)
        case kernels.TILE_HALVES_TRANSPOSED:
            return _tile_halves_transposed(problem, work)
        case kernels.TILE_FMA | kernels.TILE_MATRIX:
            bf16_terms = (
                BF16_TERMS[problem.plan_options.precision] if schedule == TILE_MATRIX else 0
            )
            tile = {"rows_per_tile": TILE_ROWS, "columns": TILE_COLUMNS}
            return unsized(problem, work, schedule, **tile, bf16_terms=bf16_terms)
        case kernels.GEMV_TRANSPOSED:
            return unsized(problem, work, schedule, **gemv_constants(problem, work))
        case kernels.TILE_TRANSPOSED:
            return unsized(problem, work, schedule, **tile_constants(problem, work))
    return unsized(problem, work, schedule)


# --- products by vector units ---------------------------------------------------------------------


def _gemv(problem: Problem, work: Kernel, schedule: str) -> HipKernel:
    rows = min(problem.m_class, GEMV_MOST_ROWS if schedule == GEMV else MOST_FEW_ROWS)
    lanes = _lanes(problem.arch, work)
    columns = (
        problem.rules.columns_of_gemv(rows, _unit_registers(problem, work))
        if schedule == GEMV
        else problem.rules.dot_columns[rows]
    )
    return unsized(
        problem,
        work,
        schedule,
        rows_per_tile=rows,
        columns=min(columns, lanes),
        lanes=lanes,
        int8=schedule == GEMV_DOT,
        scales_late=problem.has_finite_blocks(work.sections[0]),
    )


def _unit_registers(problem: Problem, work: Kernel) -> int:
    """Return the registers for a unit of a column of each product, as it is stored."""
    weights = problem.weights(work.sections[0])
    return sum(KernelWeight(spec, PLANAR, frozenset()).stored_registers for spec in weights)


def _lanes(arch: HipArch, work: Kernel) -> int:
    """Return how many threads share a column: 32, or half if K has too few units for them."""
    k = max(product.operands[0].width for product in work.sections[0].products)
    units = -(-k // UNIT_ELEMENTS)
    least, most = GEMV_LANES
    lanes = min(arch.wave, most)
    while lanes > least and units <= lanes // 2:
        lanes //= 2
    return lanes


# --- few rows on matrix units ---------------------------------------------------------------------


def _gemv_matrix(problem: Problem, work: Kernel) -> HipKernel:
    """Return a `gemv_matrix` with the first tiling that K and shared memory allow."""
    arch, rules, (section,) = problem.arch, problem.rules, work.sections
    rows = min(problem.m_class, MOST_FEW_ROWS)
    exact_x = work.x is not None and problem.takes_one_term(work.x)
    base = unsized(
        problem,
        work,
        GEMV_MATRIX,
        layout=TILES16,
        rows_per_tile=rows,
        f16_terms=1 if exact_x else problem.f16_terms,
        exact_x=exact_x,
        x_sums=problem.x_sums(section),
        pairs=rows <= rules.pair_rows,
    )
    base = replace(base, units_beside=_has_units_beside(problem, section, base))
    for splits, waves_n, waves_k in _tilings(problem, section, rows):
        kernel = in_waves(arch, replace(base, splits=splits), waves_n, waves_k)
        if can_run_gemv_matrix(arch, kernel):
            ahead = replace(kernel, ahead=_quads_ahead(problem, section, rows))
            return ahead if can_run_gemv_matrix(arch, ahead) else kernel
    if problem.plan_options.block_size is None and problem.plan_options.schedule is None:
        return _gemv(problem, work, GEMV)
    raise TargetError(
        f"no room in shared memory for the sums of the {len(section.products)} products of "
        f"{work.name}: schedule {GEMV_MATRIX!r} on {problem.target} with "
        f"block_size={base.block_size}; use a smaller block_size, fewer products in one function, "
        "or schedule='gemv'"
    )


def _quads_ahead(problem: Problem, section: Section, rows: int) -> int:
    """Return how many quads a wave loads before their turn.

    Other formats than Q4_0 take more registers, so that 28 waves would spill. Measured on an H200,
    4096 × 14336, M = 1 and 2: one quad takes 10 and 20 % less time than two.
    """
    is_short = rows <= problem.rules.light_rows and not problem.are_plain(section)
    return 1 if is_short else problem.rules.ahead


def _has_units_beside(problem: Problem, section: Section, kernel: HipKernel) -> bool:
    """Return whether an instruction has rows for the x of all four units of a quad.

    Then each of the four lanes that share a column applies the scales of one unit, not of all.
    """
    is_light = kernel.rows_per_tile * kernel.f16_terms <= _BESIDE_ROWS
    formats = (w.block_format for w in problem.weights(section))
    return problem.arch.is_nvidia and is_light and not any(map(are_plain, formats))


def in_waves(arch: HipArch, kernel: HipKernel, waves_n: int, waves_k: int) -> HipKernel:
    """Return a kernel whose blocks have waves_n × waves_k waves.

    waves_n waves compute different columns; waves_k waves share columns, each with a part of K.
    """
    return replace(
        kernel,
        columns=MATRIX_COLUMNS * kernel.wave_panels * waves_n,
        block_size=arch.wave * waves_n * waves_k,
    )


def _tilings(problem: Problem, section: Section, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield splits, waves_n and waves_k of a `gemv_matrix`, the preferred ones first.

    With them, each compute unit has one block.
    """
    rules, is_light = problem.rules, rows <= problem.rules.light_rows
    k, panels = section.products[0].operands[0].width, -(-section.width // MATRIX_COLUMNS)
    takes_few_registers = is_light or problem.are_plain(section)
    waves, most_waves = rules.waves_of(len(section.products), takes_few_registers)
    for splits in (1,) if is_light and k < rules.long_k else rules.splits:
        unit_panels = -(-panels * splits // problem.arch.compute_units)
        if splits > 1 and unit_panels > most_waves:
            continue  # the panels fill every compute unit without splits
        has_many = unit_panels > (rules.many_panels - 1 if is_light else waves)
        for tiling in _divided(problem, unit_panels, most_waves if has_many else waves):
            yield splits, *tiling


def _divided(problem: Problem, waves_n: int, waves: int) -> list[tuple[int, int]]:
    """Return pairs of waves_n and waves_k, the preferred ones first.

    Their product is at most `waves`, or the number of waves in the caller's block size.
    """
    if problem.plan_options.block_size is None:
        waves_n, even = min(waves_n, waves), problem.rules.even_waves
        most = waves // waves_n
        # fewer than half of the waves would hide too little latency
        even_ones = [k for k in range(most, most // 2, -1) if waves_n * k % even == 0]
        return [(waves_n, k) for k in dict.fromkeys([*even_ones, *range(most, 0, -1)])]
    waves = problem.plan_options.block_size // problem.arch.wave
    divisors = [n for n in range(1, waves + 1) if waves % n == 0]
    return [(n, waves // n) for n in sorted(divisors, key=lambda n: abs(n - waves_n))]


# --- many rows on matrix units --------------------------------------------------------------------


def _tile_halves(problem: Problem, work: Kernel) -> HipKernel:
    """Return a `tile_halves`: for one tile of rows small blocks that share K, else wide blocks."""
    arch, rules, rows, (section,) = problem.arch, problem.rules, problem.m_class, work.sections
    folded = problem.may_fold and problem.suits_f16(section) and problem.are_plain(section)
    exact_x = not folded and work.x is not None and problem.takes_one_tile_term(work.x)
    may_be_tall, has_wide = folded and problem.in_warpgroups, problem.has_wide_codes(section)
    tile_rows = rules.tile_rows(arch, section, rows, may_be_tall, has_wide)
    kind: Kind = "folded" if folded else "plain" if problem.are_plain(section) else "other"
    columns, waves = rules.tile_shape(arch, section, rows, tile_rows, kind)
    base = unsized(
        problem,
        work,
        TILE_HALVES,
        layout=TILES16,
        block_size=arch.wave * waves,
        columns=columns,
        f16_terms=1 if exact_x else problem.f16_terms,
        exact_x=exact_x,
        warpgroups=problem.in_warpgroups,
        folded=folded,
        x_sums=problem.x_sums(section),
    )
    base = staged(arch, base, tile_rows, 2)
    most = rules.most_tile_splits(arch, rows, -(-section.width // columns))
    split = [replace(base, splits=n) for n in (8, 4, 2) if n <= most]
    return next((kernel for kernel in split if can_run_tile_halves(arch, kernel)), base)


def staged(arch: HipArch, kernel: HipKernel, rows: int, stages: int) -> HipKernel:
    """Return a kernel with tiles of `rows` rows and the units of x that each stage has room for."""
    stage_bytes = rules_of(arch).stages_bytes // stages
    units = min(stage_bytes // f16_unit_bytes(kernel, rows), _MOST_STAGE_UNITS)
    return replace(kernel, rows_per_tile=rows, stage_units=units, stages=stages)


def _tile_halves_transposed(problem: Problem, work: Kernel) -> HipKernel:
    """Return a `tile_halves_transposed`: four waves to a quad of w's columns."""
    arch, rules, rows, (section,) = problem.arch, problem.rules, problem.m_class, work.sections
    f16_terms = problem.transposed_f16_terms
    tile_rows = rules.transposed_tile_rows(arch, section, rows, f16_terms)
    base = unsized(
        problem,
        work,
        TILE_HALVES_TRANSPOSED,
        layout=TILES16,
        block_size=TRANSPOSED_WAVES * arch.wave,
        columns=QUAD_ELEMENTS,
        wave_panels=QUAD_ELEMENTS // MATRIX_COLUMNS // TRANSPOSED_WAVES,
        rows_per_tile=tile_rows,
        f16_terms=f16_terms,
        warpgroups=problem.in_warpgroups,
        folded=f16_terms == 1,
    )
    most = rules.most_transposed_splits(arch, section, rows, tile_rows)
    tries = (
        replace(base, splits=splits, stage_units=units, stages=stages)
        for splits in (8, 4, 2, 1)
        for units, stages in TRANSPOSED_STAGES
        if splits == 1 or splits <= most
    )
    return next(each for each in tries if can_run_tile_halves_transposed(arch, each))
