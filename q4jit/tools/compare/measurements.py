"""Measure entrants for each weight and M."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from q4jit.precision import BOUNDS, FUNCTION_BOUND
from q4jit.progress import progress
from q4jit.tools.compare.arena import LIMITS, PEAKS, READ, Arena, Entrant
from q4jit.tools.compare.contest import Outcome, contest
from q4jit.tools.compare.request import BenchRequest, Defaults
from q4jit.tools.compare.work import TimedCall, WeightShape
from q4jit.tools.text import counted
from q4jit.weights.formats import FORMATS

_QUICK_ROWS: Final = (1, 8)
_ROUNDS: Final = 7
_QUICK_ROUNDS: Final = 3
# a gated result combines the errors of two products; in f32 the contract of functions applies
_GATED_BOUNDS: Final = {"f32": FUNCTION_BOUND, "f16": 3 * BOUNDS["f16"], "i8": 3 * BOUNDS["i8"]}


@dataclass(frozen=True)
class Measurement:
    """What was measured for an entrant, a weight [K, N] and M rows of x.

    Its fields are the keys of the "rows" of a report.

    Attributes:
        dtype: the float type of x, of the other arrays and of the results.
        kind: `product`, `bare` (two products) or `gated` (two products, bias and SiLU gating).
        name: the name of the entrant.
        own: whether the entrant is q4jit.
        note: how the entrant computes.
        weight_bytes: the size of the call's weights in their block format.
        us: the median time; None if there is no time, for the reason in `message`.
        rounds_us: the time of each round.
        gb_per_s: `weight_bytes` per time, whatever form of the weight the entrant reads.
        of_read: the fraction of the speed of a read of as many bytes.
        of_peak: the fraction of the speed of as many multiply-adds (q4jit on a CPU only).
        tflops: the speed in TFLOP/s.
        error: the error of the results; None if they contain NaN or Inf.
        bound: the largest accepted error.
        wrong: whether the results are wrong.
        message: why there is no time.
        ratios: the time of each other entrant divided by this one's.
        cost: what gating adds to the time of the two products, as a fraction.
    """

    k: int
    n: int
    format: str
    dtype: str
    m: int
    kind: str
    name: str
    own: bool
    precision: str
    note: str
    weight_bytes: int
    us: float | None = None
    rounds_us: tuple[float, ...] = ()
    gb_per_s: float | None = None
    of_read: float | None = None
    of_peak: float | None = None
    tflops: float | None = None
    error: float | None = None
    bound: float = 0.0
    wrong: bool = False
    message: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    cost: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the results are wrong, or q4jit has no time."""
        return self.wrong or (self.own and self.us is None)


def measure(arena: Arena, request: BenchRequest, default: Defaults) -> Iterator[list[Measurement]]:
    """Yield the measurements of each weight and M as soon as they are known, the read first."""
    whole = FORMATS[request.format].block_elements
    fitting = [(k, n) for k, n in default.shapes if k % whole == 0]
    shapes = request.shapes or (fitting[:1] if request.quick else fitting)
    rows = request.rows or (_QUICK_ROWS if request.quick else default.rows)
    rounds = _QUICK_ROUNDS if request.quick else _ROUNDS
    precisions = request.precisions or default.precisions
    peaks, peers = arena.peaks(), arena.peers(request.dtype)
    shape: WeightShape | None = None
    products = [(k, n, m) for k, n in shapes for m in rows]
    for k, n, m in progress(products, f"{arena_name(arena)}, {request.format}"):
        if shape is None or (shape.k, shape.n) != (k, n):
            shape = None  # frees its copies before the next ones are made
            shape = WeightShape(request.format, k, n, rows, arena.rotated_bytes(), request.dtype)
            _begin(arena, shape, rows, precisions, request.fused)
        work = shape.product(m)
        own = [arena.own(precision) for precision in precisions]
        entrants = (arena.read(), *peaks, *own, *peers)
        bounded = [(entrant, work, BOUNDS[entrant.precision]) for entrant in entrants]
        yield _measurements(shape, work, "product", contest(bounded, rounds))
        if request.fused:
            yield _fused_measurements(arena, shape, m, own, rounds)


def arena_name(arena: Arena) -> str:
    """Return an arena in words: its target, and on a CPU the number of threads."""
    threads = f", {counted(arena.about['threads'], 'thread')}" if "threads" in arena.about else ""
    return f"{arena.target}{threads}"


def _begin(
    arena: Arena, shape: WeightShape, rows: Sequence[int], precisions: Sequence[str], fused: bool
) -> None:
    for m in rows:
        calls = [shape.product(m), *((shape.bare(m), shape.gated(m)) if fused else ())]
        for precision in precisions:
            for work in calls:
                arena.begin(work, precision)


def _fused_measurements(
    arena: Arena, shape: WeightShape, m: int, own: Sequence[Entrant], rounds: int
) -> list[Measurement]:
    bare, gated = shape.bare(m), shape.gated(m)
    entrants: list[tuple[Entrant, TimedCall, float]] = [(arena.read(), bare, BOUNDS["f32"])]
    entrants += [(entrant, bare, BOUNDS[entrant.precision]) for entrant in own]
    entrants += [(entrant, gated, _GATED_BOUNDS[entrant.precision]) for entrant in own]
    read, *outcomes = contest(entrants, rounds)
    of_bare, of_gated = outcomes[: len(own)], outcomes[len(own) :]
    _, *measured_bare = _measurements(shape, bare, "bare", [read, *of_bare])
    _, *measured_gated = _measurements(shape, gated, "gated", [read, *of_gated])
    costs = [_cost(b, g) for b, g in zip(of_bare, of_gated, strict=True)]
    return [
        *measured_bare,
        *(dataclasses.replace(g, cost=c) for g, c in zip(measured_gated, costs, strict=True)),
    ]


def _cost(bare: Outcome, gated: Outcome) -> float | None:
    """Return the median of the rounds' ratios: clocks drift less within a round than between."""
    ratios = [g / b - 1 for b, g in zip(bare.us, gated.us, strict=False)]
    return statistics.median(ratios) if ratios else None


def _measurements(
    shape: WeightShape, work: TimedCall, kind: str, outcomes: Sequence[Outcome]
) -> list[Measurement]:
    medians = [statistics.median(o.us) if o.us else None for o in outcomes]
    times = dict(zip((o.entrant.name for o in outcomes), medians, strict=True))
    read_us = times[READ]
    measurements = []
    for outcome, us in zip(outcomes, medians, strict=True):
        entrant = outcome.entrant
        is_limit, is_peak = entrant.name in LIMITS, entrant.name in PEAKS.values()
        peak_us = times.get(PEAKS.get(entrant.precision, "")) if entrant.own else None
        others = {name: t for name, t in times.items() if name not in {*LIMITS, entrant.name}}
        measurements.append(
            Measurement(
                k=shape.k,
                n=shape.n,
                format=shape.format,
                dtype=shape.dtype,
                m=len(work.x),
                kind=kind,
                name=entrant.name,
                own=entrant.own,
                precision=entrant.precision,
                note=outcome.note,
                weight_bytes=work.weight_bytes,
                us=us,
                rounds_us=tuple(outcome.us),
                gb_per_s=None if us is None or is_peak else work.weight_bytes / us * 1e-3,
                of_read=None if is_peak else us and read_us and read_us / us,
                of_peak=us and peak_us and peak_us / us,
                tflops=None if us is None or entrant.name == READ else work.operations / us * 1e-6,
                error=outcome.error,
                bound=outcome.bound,
                wrong=outcome.wrong,
                message=outcome.message,
                ratios={}
                if us is None or is_limit
                else {name: t / us for name, t in others.items() if t is not None},
            )
        )
    return measurements
