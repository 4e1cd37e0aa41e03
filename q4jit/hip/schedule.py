"""How a GPU computes the kernels of a plan: which template serves them, with which constants.

A kernel of the split becomes one launch per section, and one before them where something must be
known row by row first (`rows`). The classes of M, of which each has kernels of its own:

    M = 1, 2, 3…4, 5…8, 9…16   gemv_matrix   16 columns a wave on matrix units: blocks of 18 bytes
                                             (one row on RDNA 3 by dot products of f16; up to
                                             4 rows on NVIDIA's, which take tile_halves for more)
                               gemv          a wave computes columns, up to 8 rows share a decoding
                               gemv_dot      the same by dot products of int8, for precision `i8`
    M ≥ 17                     tile          64 × 64 results a block, on matrix units or by FMA
    M = 17…32, 33…64, 65…512,  tile_halves   32, 64 or 128 × 64 to 256 on matrix units: blocks of
        ≥ 513                                18 bytes

On matrix units M = 1 and M = 16 read weights in one layout, so that a device keeps them once.

`element` is the plan that this project grew from: one block per result. It serves every M and is
what the others are checked and timed against.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from q4jit.errors import TargetError
from q4jit.frontend.graph import REDUCTIONS, Graph, reachable
from q4jit.hip.choices import as_chosen, choice_for
from q4jit.hip.classes import MOST_FEW_ROWS
from q4jit.hip.kernel import (
    BF16_TERMS,
    DEQUANTIZE,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    LOOKUP,
    ROWS,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
    HipKernel,
    HipPlan,
)
from q4jit.hip.limits import check_block_size
from q4jit.hip.problem import Problem
from q4jit.hip.rules import ROWS_OF_HALVES_THREADS
from q4jit.hip.sizing import sized, unsized
from q4jit.hip.tunings import Choice, Tuned
from q4jit.plan.kernels import Buffer, Kernel, Plan, Section, Store
from q4jit.plan.options import PlanOptions
from q4jit.plan.split import split
from q4jit.targets import Target
from q4jit.weights.layouts import TILES16

_DECODERS: Final = {"dequantize": DEQUANTIZE, "rows": LOOKUP}


def make_plan(
    graph: Graph, target: Target, m: int, plan_options: PlanOptions, tuned: Tuned | None = None
) -> HipPlan:
    """Plan a graph for a GPU and m rows of x; plans of one M class are equal.

    tuned: asked for the schedule and constants of each product, where `plan_options` leaves them
    open.
    Raises TargetError for a block size or a schedule that the arch cannot run, and TuningError for
    what `tuned` gives and `candidates` does not.
    """
    check_block_size(target, plan_options.block_size)
    if (plan_options.block_size, plan_options.schedule, plan_options.layout) != (None, None, None):
        tuned = None
    works, temps = split(graph)
    kernels: list[HipKernel] = []
    for work in works:
        problem = Problem(graph, target, 1 if work.uniform else m, plan_options)
        kernels += _launches(problem, work, tuned)
    return Plan(graph, target, tuple(kernels), temps)


def _launches(problem: Problem, work: Kernel, tuned: Tuned | None) -> list[HipKernel]:
    """Schedule one kernel of the split: the passes in their order, each with its job."""
    if work.decoded is not None:
        return [unsized(problem, work, _DECODERS[work.decoded.node.op])]
    # what was measured for the products of each section
    choices = [choice_for(problem, section, tuned) for section in work.sections]
    # a schedule for each section, and then one way for all to split x
    wanted = [
        _schedule(problem, work, section, choice)
        for section, choice in zip(work.sections, choices, strict=True)
    ]
    schedules = _agreed(wanted)
    # a launch for what must be known row by row, and one per section
    rows = _rows_kernel(problem, work, schedules)
    parts = _parts(work, () if rows is None else rows.work.rows)
    # constants by rule, and instead of them those that were measured
    by_rule = [sized(problem, *each) for each in zip(parts, schedules, strict=True)]
    products = [as_chosen(problem, *each) for each in zip(by_rule, choices, strict=True)]
    return products if rows is None else [rows, *products]


def _schedule(problem: Problem, work: Kernel, section: Section, choice: Choice | None) -> str:
    """The schedule of a section: as measured, as asked for, or by rule."""
    asked = problem.plan_options.schedule if choice is None else choice.trial.schedule
    if asked is not None:
        _check_schedule(problem, work, section, asked)
        return asked
    suits_tiles = problem.suits_tiles(section)
    if problem.m > MOST_FEW_ROWS:
        if suits_tiles:
            return TILE_HALVES
        return TILE_MATRIX if problem.suits_matrix(section) else TILE_FMA
    if suits_tiles:
        return GEMV_MATRIX if problem.m <= problem.rules.gemv_matrix_rows else TILE_HALVES
    return GEMV_DOT if problem.suits_dot(section) else GEMV


def _check_schedule(problem: Problem, work: Kernel, section: Section, schedule: str) -> None:
    """Raise TargetError where the arch or the weights of a section do not suit a schedule."""
    if schedule == TILE_MATRIX and not problem.suits_matrix(section):
        raise TargetError(
            f"schedule {schedule!r} on {problem.target} for {work.name}: accepted are archs "
            "with matrix units and block formats with finite scales"
        )
    if schedule in {GEMV_MATRIX, TILE_HALVES} and not problem.suits_tiles(section):
        raise TargetError(
            f"schedule {schedule!r} on {problem.target} for {work.name}: accepted are archs "
            f"with matrix units, blocks of 18 bytes with finite scales, and the layout "
            f"{TILES16!r}"
        )
    if schedule == GEMV_DOT and not problem.suits_dot(section):
        raise TargetError(
            f"schedule {schedule!r} with precision {problem.plan_options.precision!r} for "
            f"{work.name}: accepted are precision 'i8' and block formats with finite "
            "scales"
        )


def _agreed(schedules: Sequence[str]) -> list[str]:
    """The schedules of all sections, for which x is split in one way."""
    if TILE_MATRIX in schedules:
        instead = TILE_MATRIX
    elif GEMV_DOT in schedules:
        instead = GEMV_MATRIX
    else:
        return list(schedules)
    return [instead if name == TILE_HALVES else name for name in schedules]


def _rows_kernel(problem: Problem, work: Kernel, schedules: Sequence[str]) -> HipKernel | None:
    """What must be known row by row before the products; None where that is nothing."""
    x, rows, plan_options = work.x, work.rows, problem.plan_options
    bf16_terms = BF16_TERMS[plan_options.precision] if TILE_MATRIX in schedules else 0
    f16_terms = problem.f16_terms if TILE_HALVES in schedules else 0
    int8 = GEMV_DOT in schedules
    keeps_x = x is not None and any(node.op in REDUCTIONS for node in reachable((x,)))
    if not (rows or bf16_terms or f16_terms or int8 or (keeps_x and TILE_FMA in schedules)):
        return None
    if x is not None and keeps_x:
        rows = (*rows, Store(x, Buffer("x", 0, x.width)))
    work = replace(work, name=f"{work.name}_rows", rows=rows, sections=())
    kernel = unsized(
        problem,
        _without_unused_loads(work),
        ROWS,
        bf16_terms=bf16_terms,
        f16_terms=f16_terms,
        int8=int8,
        warpgroups=f16_terms > 0 and problem.in_warpgroups,
    )
    is_free = f16_terms and plan_options.block_size is None
    return replace(kernel, block_size=ROWS_OF_HALVES_THREADS) if is_free else kernel


def _parts(work: Kernel, known: tuple[Store, ...]) -> Iterator[Kernel]:
    """One kernel per section, which reads what is known row by row."""
    loads = _distinct((*work.loads, *known))
    for i, section in enumerate(work.sections):
        number = f"_{i}" if len(work.sections) > 1 else ""
        part = replace(work, name=f"{work.name}{number}", rows=(), sections=(section,), loads=loads)
        yield _without_unused_loads(part)


def _distinct(stores: tuple[Store, ...]) -> tuple[Store, ...]:
    """One store per value: a value that is returned twice is read from its first buffer."""
    return tuple({s.node.id: s for s in reversed(stores)}.values())


def _without_unused_loads(kernel: Kernel) -> Kernel:
    """Leave out values of earlier kernels that this one does not read."""
    roots = [s.node for s in kernel.rows] + [t.node for s in kernel.sections for t in s.stores]
    roots += [kernel.x] if kernel.x is not None else []
    stop = {s.node.id for s in kernel.loads}
    inside = {p.id for s in kernel.sections for p in s.products}
    used, seen = set[int](), set[int]()
    while roots:
        node = roots.pop()
        if node.id in stop:
            used.add(node.id)
        elif node.id not in seen and node.id not in inside:
            seen.add(node.id)
            roots.extend(node.operands)
    return replace(kernel, loads=tuple(s for s in kernel.loads if s.node.id in used))
