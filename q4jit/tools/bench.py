"""`q4jit bench`: the speed of q4jit's kernels and of every peer that is here, in one run.

For each weight and M all entrants are made ready and held against float64, then they run in turns,
several rounds, and medians count. What is wrong has no time.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, Q4JitError
from q4jit.precision import BOUNDS, FUNCTION_BOUND, relative_error
from q4jit.progress import progress
from q4jit.tools import aot, ratios
from q4jit.tools.peers import (
    LIMITS,
    PEAKS,
    READ,
    AbsentError,
    Arena,
    Entrant,
    Running,
    Work,
    count_copies,
)
from q4jit.tools.selftest import commit, product
from q4jit.weights.reference import Doubles, exact_products, random_weight, random_x
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Report = dict[str, Any]
Copies = tuple[tuple[QuantizedTensor, ...], ...]

_QUICK_ROWS: Final = (1, 8)
_ROUNDS: Final = 7
_QUICK_ROUNDS: Final = 3
_VERSION: Final = 1
# two products with errors of their own go into each result; in f32 it is the contract of functions
_GATED_BOUNDS: Final = {"f32": FUNCTION_BOUND, "f16": 3 * BOUNDS["f16"], "i8": 3 * BOUNDS["i8"]}


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of target where nothing else is asked for."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    precisions: tuple[str, ...]


GPU: Final = Defaults(
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)),
    rows=(1, 8, 64, 512),
    precisions=tuple(BOUNDS),
)
CPU: Final = Defaults(
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (576, 1536), (576, 576)),
    rows=(1, 4, 8, 512),
    precisions=("f32", "i8"),
)


@dataclass(frozen=True)
class Request:
    """What is measured; None: what suits the target.

    rows: numbers of rows M of x. fused: also what a bias and SiLU gating cost.
    """

    format: str = "Q4_0"
    shapes: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    precisions: tuple[str, ...] | None = None
    fused: bool = False
    quick: bool = False


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


# --- work -----------------------------------------------------------------------------------------


def bare(x: Any, gate: Any, up: Any) -> Any:
    """Two products."""
    return x @ gate, x @ up


def gated(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Any:
    """Two products with bias and SiLU gating."""
    g = x @ gate + gate_bias
    return g / (1 + np.exp(-g)) * (x @ up + up_bias)


class _Shape:
    """Weights [K, N] in copies that no cache keeps (or one, for 0 bytes), and work for each M."""

    def __init__(self, fmt: str, k: int, n: int, rows: Sequence[int], total_bytes: int) -> None:
        self.k, self.n, self.format = k, n, fmt
        self._x = random_x(max(rows), k)
        self._weights = [random_weight(fmt, k, n, seed=i) for i in range(2)]
        self._total_bytes = total_bytes

    @functools.cached_property
    def _gate(self) -> tuple[Doubles, Doubles]:
        return exact_products(self._x, self._weights[:1])

    @functools.cached_property
    def _up(self) -> tuple[Doubles, Doubles]:
        return exact_products(self._x, self._weights[1:])

    @functools.cached_property
    def _singles(self) -> Copies:
        return self._copies(self._weights[:1])

    @functools.cached_property
    def _pairs(self) -> Copies:
        return self._copies(self._weights)

    def _copies(self, weights: Sequence[QuantizedTensor]) -> Copies:
        count = count_copies(self._total_bytes, sum(w.nbytes for w in weights))
        return (tuple(weights), *(tuple(map(_copy, weights)) for _ in range(count - 1)))

    def product(self, m: int) -> Work:
        """x @ w."""
        error = functools.partial(_product_error, self._gate)
        return Work(product, self._x[:m], self._singles, (), lambda ys: error(ys[0]))

    def bare(self, m: int) -> Work:
        """Two products."""
        return Work(bare, self._x[:m], self._pairs, (), self._bare_error)

    def gated(self, m: int) -> Work:
        """Two products with bias and SiLU gating."""
        biases = tuple(random_x(2, self.n))
        error = functools.partial(self._gated_error, biases)
        return Work(gated, self._x[:m], self._pairs, biases, lambda ys: error(ys[0]))

    def _bare_error(self, found: Sequence[Floats]) -> float | None:
        exacts = (self._gate, self._up)
        errors = [_product_error(exact, y) for exact, y in zip(exacts, found, strict=True)]
        known = [error for error in errors if error is not None]
        return max(known) if len(known) == len(errors) else None

    def _gated_error(self, biases: Sequence[Floats], found: Floats) -> float | None:
        m = len(found)
        g, u = self._gate[0][:m] + biases[0], self._up[0][:m] + biases[1]
        exact = g / (1 + np.exp(-g)) * u
        with np.errstate(all="ignore"):  # a wrong result may be anything
            error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        return error if np.isfinite(error) else None


def _product_error(exact: tuple[Doubles, Doubles], found: Floats) -> float | None:
    y, size = exact
    return relative_error(found, y[: len(found)], size[: len(found)])


def _copy(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(w.raw.tobytes(), shape=w.shape, format=w.format)


# --- turns ----------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    entrant: Entrant
    bound: float
    note: str = ""
    error: float | None = None
    wrong: bool = False
    message: str = ""
    us: list[float] = field(default_factory=list)

    def judge(self, error: float | None) -> None:
        """Reject results that are wrong, with all their times."""
        self.error = error
        if error is None or error > self.bound:
            found = "results are NaN or Inf" if error is None else f"error {error:.1e}"
            self.reject(f"wrong: {found}, allowed are {self.bound:.0e}")
            self.wrong = True

    def reject(self, message: str) -> None:
        self.message = message
        self.us.clear()


def contest(entrants: Sequence[tuple[Entrant, Work, float]], rounds: int) -> list[_Outcome]:
    """Check and time entrants, each with its work and the bound of its error, in turns."""
    outcomes = [_Outcome(entrant, bound) for entrant, _, bound in entrants]
    with contextlib.ExitStack() as stack:
        ready: list[tuple[_Outcome, Running]] = []
        for outcome, (entrant, work, _) in zip(outcomes, entrants, strict=True):
            with _told(outcome):
                running = stack.enter_context(entrant.open(work))
                running.poison()
                running.us()
                outcome.note = running.note
                outcome.judge(running.error())
                ready.append((outcome, running))
        for _ in range(rounds):
            for outcome, running in ready:
                if not outcome.message:
                    with _told(outcome):
                        outcome.us.append(running.us())
        for outcome, running in ready:
            if not outcome.message:
                with _told(outcome):
                    outcome.judge(running.error())
    return outcomes


@contextlib.contextmanager
def _told(outcome: _Outcome) -> Iterator[None]:
    """Let an outcome hold what goes wrong: RuntimeError is PyTorch's, out of memory among it."""
    try:
        yield
    except AbsentError as reason:
        outcome.reject(f"not present: {reason}")
    except (Q4JitError, RuntimeError, MemoryError) as error:
        outcome.reject(f"{type(error).__name__}: {' '.join(str(error).split())}")


# --- rows -----------------------------------------------------------------------------------------


def measure(arena: Arena, request: Request, default: Defaults) -> Iterator[list[Row]]:
    """The rows of each weight and M as soon as they are known, that of the read first."""
    shapes = request.shapes or (default.shapes[:1] if request.quick else default.shapes)
    rows = request.rows or (_QUICK_ROWS if request.quick else default.rows)
    rounds = _QUICK_ROUNDS if request.quick else _ROUNDS
    precisions = request.precisions or default.precisions
    peaks, peers = arena.peaks(), arena.peers()
    shape: _Shape | None = None
    places = [(k, n, m) for k, n in shapes for m in rows]
    for k, n, m in progress(places, f"{_place(arena)}, {request.format}"):
        if shape is None or (shape.k, shape.n) != (k, n):
            shape = None  # its copies are free now
            shape = _Shape(request.format, k, n, rows, arena.rotated_bytes())
            _begin(arena, shape, rows, precisions, request.fused)
        work = shape.product(m)
        own = [arena.own(precision) for precision in precisions]
        everyone = (arena.read(), *peaks, *own, *peers)
        entrants = [(each, work, BOUNDS[each.precision]) for each in everyone]
        yield _rows(shape, work, "product", contest(entrants, rounds))
        if request.fused:
            yield _fused_rows(arena, shape, m, own, rounds)


def _place(arena: Arena) -> str:
    threads = f", {ratios.threads(arena.about)}" if "threads" in arena.about else ""
    return f"{arena.target}{threads}"


def _begin(
    arena: Arena, shape: _Shape, rows: Sequence[int], precisions: Sequence[str], fused: bool
) -> None:
    for m in rows:
        works = [shape.product(m), *((shape.bare(m), shape.gated(m)) if fused else ())]
        for precision in precisions:
            for work in works:
                arena.begin(work, precision)


def _fused_rows(
    arena: Arena, shape: _Shape, m: int, own: Sequence[Entrant], rounds: int
) -> list[Row]:
    plain, fused = shape.bare(m), shape.gated(m)
    entrants: list[tuple[Entrant, Work, float]] = [(arena.read(), plain, BOUNDS["f32"])]
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


def _cost(plain: _Outcome, fused: _Outcome) -> float | None:
    """The median over the rounds, in which both ran one after the other."""
    ratios = [b / a - 1 for a, b in zip(plain.us, fused.us, strict=False)]
    return statistics.median(ratios) if ratios else None


def _rows(shape: _Shape, work: Work, kind: str, outcomes: Sequence[_Outcome]) -> list[Row]:
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


# --- the report -----------------------------------------------------------------------------------


def new_report(command: Sequence[str]) -> Report:
    """A report without runs. command: as it was given."""
    return {
        "bench_version": _VERSION,
        "q4jit": aot.version(),
        "commit": commit(Path(__file__).parents[2]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
        "ended_by": "",
        "runs": [],
    }


def run(report: Report, arena: Arena, request: Request, default: Defaults) -> bool:
    """Measure on an arena; rows go to the terminal and into the report as they come.

    Returns whether nothing failed.
    """
    rows: list[dict[str, Any]] = []
    about = {"target": arena.target, **arena.about, "format": request.format}
    report["runs"].append({**about, "absent": arena.absent, "rows": rows})
    _say(f"{_place(arena)}: {about['device']}, {_short(about['compiler'])}")
    good, is_first = True, True
    for found in measure(arena, request, default):
        if is_first:
            for name, reason in arena.absent.items():
                _say(f"{name}: not present: {reason}")
        for line in table_lines(found, heading=is_first):
            _say(line)
        is_first = False
        rows.extend(dataclasses.asdict(row) for row in found)
        good = good and not any(row.failed for row in found)
    return good


def _short(compiler: str) -> str:
    """A compiler without its options, which the report holds."""
    return compiler.split(" -")[0]


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")  # a progress bar may stand in this line
        sys.stderr.flush()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def to_json(report: Report) -> str:
    """A report as text."""
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """A report from a file. Raises FormatError for a file that is none, and OSError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is no report of q4jit bench: {error}") from None
    version = found.get("bench_version") if isinstance(found, dict) else None
    if version != _VERSION:
        raise FormatError(
            f"{path}: found bench_version {version!r}, accepted is a file that q4jit bench --json "
            f"of version {_VERSION} wrote"
        )
    return dict(found)


# --- tables ---------------------------------------------------------------------------------------

_TITLE: Final = 50  # letters of its column
_KINDS: Final = {"product": "", "bare": ", two products", "gated": ", bias and SiLU gating"}


def table_lines(rows: Sequence[Row], *, heading: bool) -> Iterator[str]:
    """The rows of a weight and M, aligned; `×` columns: how many times faster q4jit is."""
    own = [row.name for row in rows if row.own and row.kind != "bare"]
    if heading:
        ratios = "".join(f"{'× ' + name.split()[-1]:>8}" for name in own)
        yield f"{'':{_TITLE}}{'µs':>10}{'GB/s':>8}{'of read':>9}{'TFLOP/s':>9}{'error':>9}{ratios}"
    first = rows[0]
    yield f"{first.format} [{first.k}, {first.n}], M = {first.m}"
    for row in rows:
        note = f" ({row.note})" if row.note and row.name not in LIMITS else ""
        title = f"  {row.name}{_KINDS[row.kind]}"
        if len(title + note) <= _TITLE:
            title, note = title + note, ""
        if row.us is None:
            yield f"{title:{_TITLE}}  {row.message}"
            continue
        speed = f"{row.us:10.2f}{_number(row.gb_per_s, '.0f', 8)}{_number(row.of_read, '.0%', 9)}"
        error = None if row.name in LIMITS else row.error
        work = f"{_number(row.tflops, '.3g', 9)}{_number(error, '.1e', 9)}"
        # the other way round than row.ratios: how many times its time is q4jit's
        shown = (
            ""
            if row.own or row.name in LIMITS
            else "".join(
                _number(1 / row.ratios[name] if name in row.ratios else None, ".2f", 8)
                for name in own
            )
        )
        cost = "" if row.cost is None else f"  costs {row.cost:+.1%}"
        yield f"{title:{_TITLE}}{speed}{work}{shown}{cost}{note}"


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def markdown(reports: Sequence[Report]) -> str:
    """The tables of reports, as docs/performance.md holds them."""
    lines: list[str] = []
    for report in reports:
        for found in _on_gpus(report):
            lines += [*_markdown_head(report, found), "", *_markdown_products(found["rows"])]
            lines += [*_markdown_fused(found), ""]
        if runs := on_cpu(report):
            lines += [*_markdown_head(report, runs[0]), *ratios.markdown(runs)]
            lines += [*itertools.chain.from_iterable(map(_markdown_fused, runs)), ""]
    return "\n".join(lines)


def on_cpu(report: Report) -> list[dict[str, Any]]:
    """The runs of a report on the CPU, one for each number of threads, that have rows."""
    return [run for run in report["runs"] if "threads" in run and run["rows"]]


def _on_gpus(report: Report) -> list[dict[str, Any]]:
    return [run for run in report["runs"] if "threads" not in run]


def _markdown_head(report: Report, found: dict[str, Any]) -> Iterator[str]:
    commit_ = (report["commit"] or "unknown")[:12]
    cached = ", the weight in the cache" if found.get("cached") else ""
    yield f"{found['device']} (`{found['target']}`), {found['format']}{cached}"
    yield ""
    yield f"- date {report['date']}, commit {commit_}, q4jit {report['q4jit']}"
    yield f"- driver {found['driver']}; compiler {_short(found['compiler'])}"
    yield f"- `{' '.join(report['command'])}`"
    for name, reason in found["absent"].items():
        yield f"- {name}: not present: {reason}"


def _markdown_products(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    products = [row for row in rows if row["kind"] == "product"]
    own = list(dict.fromkeys(row["name"] for row in products if row["own"]))
    names = dict.fromkeys(row["name"] for row in products if row["name"] not in LIMITS)
    peers = [name for name in names if name not in own]
    heads = ["K, N", "M", "read", *(f"{name} (of read; error)" for name in own)]
    heads += [f"{name} (× {', '.join(o.split()[-1] for o in own)})" for name in peers]
    yield "µs; in brackets the fraction of the read's speed and the error, or how many times"
    yield "faster q4jit is, by precision:"
    yield ""
    yield from _markdown_rows(heads)
    for k, n, m in dict.fromkeys((row["k"], row["n"], row["m"]) for row in products):
        here = {r["name"]: r for r in products if (r["k"], r["n"], r["m"]) == (k, n, m)}
        cells = [f"{k}, {n}", str(m), _cell(here.get(READ))]
        cells += [_own_cell(here.get(name)) for name in own]
        cells += [_peer_cell(here.get(name), own) for name in peers]
        yield ratios.markdown_row(cells)


def _markdown_fused(run: dict[str, Any]) -> Iterator[str]:
    found = [row for row in run["rows"] if row["kind"] == "gated"]
    if not found:
        return
    on = f" ({ratios.threads(run)})" if "threads" in run else ""
    yield ""
    yield f"Bias and SiLU gating, over the two bare products{on}:"
    yield ""
    yield from _markdown_rows(["K, N", "M", "kernels", "µs", "cost", "error"])
    for row in found:
        cost = "-" if row["cost"] is None else f"{row['cost']:+.1%}"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        place = [f"{row['k']}, {row['n']}", str(row["m"]), row["name"]]
        yield ratios.markdown_row([*place, _cell(row), cost, error])


def _markdown_rows(heads: Sequence[str]) -> Iterator[str]:
    yield ratios.markdown_row(heads)
    yield "|" + "---|" * len(heads)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["us"] is None:
        return "wrong" if row["wrong"] else "-"
    return f"{row['us']:.3g}" if row["us"] < 100 else f"{row['us']:.0f}"


def _own_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["us"] is None:
        return _cell(row)
    of_read = "-" if row["of_read"] is None else f"{row['of_read']:.0%}"
    return f"{_cell(row)} ({of_read}; {row['error']:.1e})"


def _peer_cell(row: dict[str, Any] | None, own: Sequence[str]) -> str:
    if row is None or row["us"] is None:
        return _cell(row)
    ratios = [f"{1 / row['ratios'][name]:.2f}" if name in row["ratios"] else "-" for name in own]
    return f"{_cell(row)} ({', '.join(ratios)})"
