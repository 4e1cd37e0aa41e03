"""The rows of a comparison: what became of each entrant for each weight and M."""

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

_QUICK_ROWS: Final = (1, 8)
_ROUNDS: Final = 7
_QUICK_ROUNDS: Final = 3
# two products with errors of their own go into each result; in f32 it is the contract of functions
_GATED_BOUNDS: Final = {"f32": FUNCTION_BOUND, "f16": 3 * BOUNDS["f16"], "i8": 3 * BOUNDS["i8"]}


@dataclass(frozen=True)
class Row:
    """What became of an entrant for a weight [K, N] and M rows of x.

    kind: `product`, `bare` (two products), `gated` (the same with bias and SiLU gating). us: the
    median, None where there is no time, and `message` says why. gb_per_s: of the weights' bytes in
    their block format, whoever computes. of_read: of the speed of a read of as many bytes. of_peak:
    of the speed of as many multiply-adds (q4jit on a CPU). ratios: each other entrant's time over
    this one's. cost: of gating over the bare products.
    """

    k: int
    n: int
    format: str
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
        """Whether this is wrong, or q4jit's own and without a time."""
        return self.wrong or (self.own and self.us is None)


def measure(arena: Arena, request: BenchRequest, default: Defaults) -> Iterator[list[Row]]:
    """The rows of each weight and M as soon as they are known, that of the read first."""
    shapes = request.shapes or (default.shapes[:1] if request.quick else default.shapes)
    rows = request.rows or (_QUICK_ROWS if request.quick else default.rows)
    rounds = _QUICK_ROUNDS if request.quick else _ROUNDS
    precisions = request.precisions or default.precisions
    peaks, peers = arena.peaks(), arena.peers()
    shape: WeightShape | None = None
    places = [(k, n, m) for k, n in shapes for m in rows]
    for k, n, m in progress(places, f"{place_of(arena)}, {request.format}"):
        if shape is None or (shape.k, shape.n) != (k, n):
            shape = None  # its copies are free now
            shape = WeightShape(request.format, k, n, rows, arena.rotated_bytes())
            _begin(arena, shape, rows, precisions, request.fused)
        work = shape.product(m)
        own = [arena.own(precision) for precision in precisions]
        everyone = (arena.read(), *peaks, *own, *peers)
        entrants = [(each, work, BOUNDS[each.precision]) for each in everyone]
        yield _rows(shape, work, "product", contest(entrants, rounds))
        if request.fused:
            yield _fused_rows(arena, shape, m, own, rounds)


def place_of(arena: Arena) -> str:
    """Return where entrants run, in words: the target, on the CPU with its threads."""
    threads = f", {counted(arena.about['threads'], 'thread')}" if "threads" in arena.about else ""
    return f"{arena.target}{threads}"


def _begin(
    arena: Arena, shape: WeightShape, rows: Sequence[int], precisions: Sequence[str], fused: bool
) -> None:
    for m in rows:
        works = [shape.product(m), *((shape.bare(m), shape.gated(m)) if fused else ())]
        for precision in precisions:
            for work in works:
                arena.begin(work, precision)


def _fused_rows(
    arena: Arena, shape: WeightShape, m: int, own: Sequence[Entrant], rounds: int
) -> list[Row]:
    plain, fused = shape.bare(m), shape.gated(m)
    entrants: list[tuple[Entrant, TimedCall, float]] = [(arena.read(), plain, BOUNDS["f32"])]
    entrants += [(each, plain, BOUNDS[each.precision]) for each in own]
    entrants += [(each, fused, _GATED_BOUNDS[each.precision]) for each in own]
    outcomes = contest(entrants, rounds)
    split = 1 + len(own)
    bare_rows = _rows(shape, plain, "bare", outcomes[:split])
    gated_rows = _rows(shape, fused, "gated", [outcomes[0], *outcomes[split:]])[1:]
    costs = [_cost(a, b) for a, b in zip(outcomes[1:split], outcomes[split:], strict=True)]
    return [
        *bare_rows[1:],
        *(dataclasses.replace(r, cost=c) for r, c in zip(gated_rows, costs, strict=True)),
    ]


def _cost(plain: Outcome, fused: Outcome) -> float | None:
    """The median over the rounds, in which both ran one after the other."""
    ratios = [b / a - 1 for a, b in zip(plain.us, fused.us, strict=False)]
    return statistics.median(ratios) if ratios else None


def _rows(shape: WeightShape, work: TimedCall, kind: str, outcomes: Sequence[Outcome]) -> list[Row]:
    medians = [statistics.median(o.us) if o.us else None for o in outcomes]
    times = dict(zip((o.entrant.name for o in outcomes), medians, strict=True))
    read_us = times[READ]
    found = []
    for outcome, us in zip(outcomes, medians, strict=True):
        entrant = outcome.entrant
        is_limit, is_peak = entrant.name in LIMITS, entrant.name in PEAKS.values()
        peak_us = times.get(PEAKS.get(entrant.precision, "")) if entrant.own else None
        others = {name: t for name, t in times.items() if name not in {*LIMITS, entrant.name}}
        found.append(
            Row(
                k=shape.k,
                n=shape.n,
                format=shape.format,
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
    return found
