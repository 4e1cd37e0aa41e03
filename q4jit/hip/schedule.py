"""Plan a graph for a GPU: choose a template and its constants for each kernel.

A kernel of the graph becomes one launch per section. If the sections need values that are computed
once per row of x, a launch of `rows` comes first. Each class of M has kernels of its own:

    M                 schedule      what it computes
    1, 2, 3…4,        gemv_matrix   a panel of 16 columns per wave on matrix units, for blocks of
    5…8, 9…16                       18 bytes. RDNA 3 multiplies one row by f16 dot products; NVIDIA
                                    takes tile_halves for more than 4 rows.
                      gemv          a few columns per wave; up to 8 rows share the decoded weights
                      gemv_dot      like gemv, by int8 dot products, for precision `i8`
    17 or more        tile_matrix   a tile of 64 × 64 results per thread block, on matrix units
                      tile_fma      the same with fused multiply-adds
    17…32, 33…64,     tile_halves   a tile of 32, 64 or 128 rows × 64 to 256 columns per thread
    65…512, ≥ 513                   block on matrix units, for blocks of 18 bytes

`gemv_matrix` and `tile_halves` read weights in the same layout, so a device keeps one
copy for every M.

Products with `w.T` sum over the columns of w, whose copies they share with products with w:

    M from 3       tile_halves_      like tile_halves, for Q4_0 on NVIDIA: a lane decodes pairs of
    (f16: 2)       transposed        columns and multiplies values, as scales differ along the sum
    up to 16       gemv_transposed   otherwise: a lane has a sum for each element of its unit, over
                                     the columns of a split; then `add_splits` adds up the splits
    17 or more     tile_transposed   otherwise: like tile_fma

The schedule `element` computes one result per thread block (`element_transposed` with `w.T`). It
serves every M, and the other schedules are checked and timed against it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from q4jit.errors import TargetError
from q4jit.frontend.graph import REDUCTIONS, Graph, Node, reachable
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.choices import choice_for, with_choice
from q4jit.hip.classes import MANY_ROWS, MOST_FEW_ROWS
from q4jit.hip.experts import (
    are_sorted,
    experts_of,
    sort_kernel,
    without_repeated_sorts,
)
from q4jit.hip.kernel import (
    BF16_TERMS,
    DEQUANTIZE,
    ELEMENT,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    GEMV_TRANSPOSED,
    LOOKUP,
    QUAD_ELEMENTS,
    ROWS,
    TILE_FMA,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    TILE_MATRIX,
    TILE_TRANSPOSED,
    HipKernel,
    HipPlan,
)
from q4jit.hip.limits import check_block_size
from q4jit.hip.problem import Problem
from q4jit.hip.rules import F16_ROWS_THREADS
from q4jit.hip.sizing import sized, unsized
from q4jit.hip.transposed import MOST_TRANSPOSED_ROWS, counterpart, in_two_launches
from q4jit.hip.tunings import Choice, Measured
from q4jit.plan.kernels import Buffer, Kernel, Plan, Section, Store
from q4jit.plan.options import PlanOptions
from q4jit.plan.split import split
from q4jit.targets import Target
from q4jit.weights.layouts import GGUF, PLANAR, TILES16
from q4jit.weights.tiles import are_plain, suits_tiles16

# their blocks would compute the sums of the same row again
_KEEP_X: Final = frozenset({TILE_FMA, GEMV_TRANSPOSED, TILE_TRANSPOSED})
# `gemv_matrix` shares the work of finding codes of zero among lanes, which `tile_halves` does not
_MOST_DECODED_ROWS: Final = 8
# the layouts that look-ups read; the first is made for weights in GGUF blocks
_READ_BY_ROWS: Final = (PLANAR, GGUF, TILES16)
_DECODERS: Final = {"dequantize": DEQUANTIZE, "rows": LOOKUP}


def make_plan(
    graph: Graph,
    target: Target,
    m: int,
    plan_options: PlanOptions,
    measured: Measured | None = None,
) -> HipPlan:
    """Plan a graph for a GPU and m rows of x. Every m of a class gives the same plan.

    Args:
        graph: the traced function.
        target: the GPU's arch.
        m: the number of rows of x.
        plan_options: what the caller fixed.
        measured: looks up the measured schedule and constants of a product; not used if the plan
            options fix a block size, a schedule or a layout.

    Raises:
        TargetError: the arch cannot run the block size or the schedule.
        TuningError: `measured` returns constants that are not among the candidates.
    """
    check_block_size(target, plan_options.block_size)
    if (plan_options.block_size, plan_options.schedule, plan_options.layout) != (None, None, None):
        measured = None
    works, temps = split(graph)
    kernels: list[HipKernel] = []
    for work in works:
        by_expert = are_sorted(graph, work, target, m, plan_options)
        problem = Problem(graph, target, _planned_rows(work, m, by_expert), plan_options)
        launches = _launches(problem, work, measured)
        kernels += _sorted_first(graph, launches) if by_expert else launches
    return Plan(graph, target, tuple(without_repeated_sorts(kernels)), temps)


def _sorted_first(graph: Graph, launches: list[HipKernel]) -> list[HipKernel]:
    """Return the launches of products whose vectors are sorted by expert, after the sort."""
    result: list[HipKernel] = []
    for kernel in launches:
        if kernel.work.chosen is None:  # values of rows before the products
            result.append(kernel)
            continue
        by_expert = replace(kernel, experts=experts_of(graph, kernel.section))
        result += [sort_kernel(by_expert), by_expert]
    return result


def _planned_rows(work: Kernel, m: int, by_expert: bool) -> int:
    """Return the number of rows that a kernel is planned for.

    Where a row has several vectors, their number depends on M in another way than the class of M
    does. Few vectors of experts are computed one by one, and others are taken for many.
    """
    if by_expert or (work.copies > 1 and work.chosen is None):
        return MANY_ROWS
    return 1 if work.uniform or work.chosen is not None else m


def _launches(problem: Problem, work: Kernel, measured: Measured | None) -> list[HipKernel]:
    """Return the launches of one kernel of the graph, in their order."""
    _check_layout(problem, work)
    if work.decoded is not None:
        return [_decoder(problem, work, work.decoded.node)]
    if work.is_transposed or work.chosen is not None:
        measured = None  # products with w were measured
    choices = [choice_for(problem, section, measured) for section in work.sections]
    wanted = [
        _schedule(problem, work, section, choice)
        for section, choice in zip(work.sections, choices, strict=True)
    ]
    schedules = _agreed(wanted)
    rows = _rows_kernel(problem, work, schedules)
    parts = _parts(work, () if rows is None else rows.work.rows)
    by_rule = [sized(problem, *each) for each in zip(parts, schedules, strict=True)]
    products = [with_choice(problem, *each) for each in zip(by_rule, choices, strict=True)]
    launches = [launch for kernel in products for launch in _split(kernel)]
    return launches if rows is None else [rows, *launches]


def _decoder(problem: Problem, work: Kernel, node: Node) -> HipKernel:
    """Return the kernel that decodes a whole weight, or rows of it."""
    kernel = unsized(problem, work, _DECODERS[node.op])
    spec = problem.graph.signature[node.arg]
    assert isinstance(spec, WeightSpec)
    if node.op != "rows" or problem.plan_options.layout is not None:
        return kernel
    return replace(kernel, layout=spec.rows_layout(_READ_BY_ROWS))


def _split(kernel: HipKernel) -> list[HipKernel]:
    """Return the launches of a kernel: two if others add up the sums of its blocks."""
    return [
        replace(launch, work=_without_unused_loads(launch.work))
        for launch in in_two_launches(kernel)
    ]


def _schedule(problem: Problem, work: Kernel, section: Section, choice: Choice | None) -> str:
    """Return the schedule of a section: measured, fixed by the caller, or by rule."""
    asked = problem.plan_options.schedule if choice is None else choice.trial.schedule
    if asked is not None:
        _check_schedule(problem, work, section, asked)
        return counterpart(asked) if work.is_transposed else asked
    if work.chosen is not None:
        return GEMV
    if work.is_transposed:
        return _transposed_schedule(problem, section)
    # one copy of a weight serves all products of a function
    suits_panels = problem.suits_panels(section) and not problem.has_transposed(section)
    if problem.m > MOST_FEW_ROWS:
        if suits_panels:
            return TILE_HALVES
        return TILE_MATRIX if problem.suits_matrix(section) else TILE_FMA
    if suits_panels:
        most = problem.rules.gemv_matrix_rows
        if not problem.are_plain(section):
            most = max(most, _MOST_DECODED_ROWS)
        return GEMV_MATRIX if problem.m <= most else TILE_HALVES
    return GEMV_DOT if problem.suits_dot(section) else GEMV


def _transposed_schedule(problem: Problem, section: Section) -> str:
    """Return the schedule of products with `w.T`, by rule."""
    most_rows = MOST_TRANSPOSED_ROWS[problem.transposed_f16_terms]
    if problem.m > most_rows and problem.suits_transposed_panels(section):
        return TILE_HALVES_TRANSPOSED
    return GEMV_TRANSPOSED if problem.m <= MOST_FEW_ROWS else TILE_TRANSPOSED


def _check_schedule(problem: Problem, work: Kernel, section: Section, schedule: str) -> None:
    """Raise TargetError if the arch or the weights of a section do not suit a schedule."""
    needs = ""
    if work.chosen is not None and schedule not in {GEMV, ELEMENT}:
        needs = "products that have no ids of experts"
    elif schedule == TILE_MATRIX and not problem.suits_matrix(section):
        needs = "an arch with matrix units, and block formats with finite scales"
    elif schedule in {GEMV_MATRIX, TILE_HALVES} and not problem.suits_panels(section):
        needs = f"an arch with matrix units, blocks with finite scales, and the layout {TILES16!r}"
    elif schedule == TILE_HALVES_TRANSPOSED and not problem.suits_transposed_panels(section):
        needs = (
            "a GPU of NVIDIA, blocks of 18 bytes with finite scales, the layout "
            f"{TILES16!r}, and slices that begin at a multiple of {QUAD_ELEMENTS}"
        )
    elif schedule == GEMV_DOT and not problem.suits_dot(section):
        needs = "precision 'i8' and block formats with finite scales"
    if needs:
        raise TargetError(
            f"schedule {schedule!r} cannot compute {work.name} on {problem.target} with precision "
            f"{problem.plan_options.precision!r}: it needs {needs}"
        )


def _check_layout(problem: Problem, work: Kernel) -> None:
    """Raise TargetError if only matrix units can read the weights in the layout that was asked for.

    Vector units read blocks like those of Q4_0 in `tiles16`, too, and look-ups read all.
    """
    if problem.plan_options.layout != TILES16:
        return
    weights = [w for section in work.sections for w in problem.weights(section)]
    is_read_by = are_plain
    if work.decoded is not None:
        weights = [spec for spec in problem.graph.signature if isinstance(spec, WeightSpec)]
        is_read_by = suits_tiles16 if work.decoded.node.op == "rows" else are_plain
    is_read = work.decoded is None and not work.is_transposed
    if is_read and all(map(problem.suits_panels, work.sections)):
        asked = problem.plan_options.schedule
        if asked is None or asked in {GEMV_MATRIX, TILE_HALVES}:
            return
    for weight in weights:
        if not is_read_by(weight.block_format):
            raise TargetError(
                f"layout {TILES16!r} of {weight.format} suits products with w on matrix units, not "
                f"{work.name} on {problem.target}; leave the layout to q4jit"
            )


def _agreed(schedules: Sequence[str]) -> list[str]:
    """Return the schedules of all sections, changed so that all split x in the same way."""
    if TILE_MATRIX in schedules:
        instead = TILE_MATRIX
    elif GEMV_DOT in schedules:
        instead = GEMV_MATRIX
    else:
        return list(schedules)
    return [instead if name == TILE_HALVES else name for name in schedules]


def _rows_kernel(problem: Problem, work: Kernel, schedules: Sequence[str]) -> HipKernel | None:
    """Return the kernel that computes values per row before the products, if there are any."""
    x, rows, plan_options = work.x, work.rows, problem.plan_options
    bf16_terms = BF16_TERMS[plan_options.precision] if TILE_MATRIX in schedules else 0
    exact_x = TILE_HALVES in schedules and x is not None and problem.takes_one_tile_term(x)
    f16_terms = problem.f16_terms if TILE_HALVES in schedules else 0
    if TILE_HALVES_TRANSPOSED in schedules:
        f16_terms = problem.transposed_f16_terms
    int8 = GEMV_DOT in schedules
    sums = [
        problem.x_sums(section)
        for section, schedule in zip(work.sections, schedules, strict=True)
        if schedule == TILE_HALVES
    ]
    keeps_x = x is not None and any(node.op in REDUCTIONS for node in reachable((x,)))
    if not (
        rows or bf16_terms or f16_terms or int8 or (keeps_x and not _KEEP_X.isdisjoint(schedules))
    ):
        return None
    if x is not None and keeps_x:
        rows = (*rows, Store(x, Buffer("x", 0, x.width)))
    work = replace(work, name=f"{work.name}_rows", rows=rows, sections=())
    kernel = unsized(
        problem,
        _without_unused_loads(work),
        ROWS,
        bf16_terms=bf16_terms,
        f16_terms=1 if exact_x else f16_terms,
        exact_x=exact_x,
        int8=int8,
        warpgroups=f16_terms > 0 and problem.in_warpgroups,
        x_sums=max(sums, default=0),
    )
    is_free = f16_terms and plan_options.block_size is None
    return replace(kernel, block_size=F16_ROWS_THREADS) if is_free else kernel


def _parts(work: Kernel, known: tuple[Store, ...]) -> Iterator[Kernel]:
    """Yield one kernel per section; it reads the values that were computed per row."""
    loads = _distinct((*work.loads, *known))
    for i, section in enumerate(work.sections):
        number = f"_{i}" if len(work.sections) > 1 else ""
        part = replace(work, name=f"{work.name}{number}", rows=(), sections=(section,), loads=loads)
        yield _without_unused_loads(part)


def _distinct(stores: tuple[Store, ...]) -> tuple[Store, ...]:
    """Return one store per value: a value that is returned twice is read from its first buffer."""
    return tuple({s.node.id: s for s in reversed(stores) if s.buffer.is_exact}.values())


def _without_unused_loads(kernel: Kernel) -> Kernel:
    """Remove the loads of values that a kernel does not use."""
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
