"""The search for the fastest kernels of a product: candidates compiled, checked, then timed.

All candidates are compiled at once, in threads. Each is run on random data with every row and
column held against float64 before it has a time: a wrong one cannot win. The fastest few are timed
once more, in turns, because clocks drift. What was tried is kept (`tunings`), so that a second
search measures only candidates that are new, or whose text has changed since.
"""

import functools
import hashlib
import itertools
import operator
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import CompileError, DeviceError, TuningError
from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip import tunings
from q4jit.hip.candidates import candidates, constants_of, schedules_for
from q4jit.hip.choices import keys_of
from q4jit.hip.classes import m_class, most_rows
from q4jit.hip.harness import Bench, Built, rotated_bytes
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.schedule import make_plan
from q4jit.hip.tunings import Constants, Key, Machine, Trial
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, relative_error
from q4jit.progress import progress
from q4jit.runtime.driver import Device
from q4jit.targets import Target
from q4jit.weights.reference import Doubles, exact_products, random_weight, random_x, rotated_copies
from q4jit.weights.tensor import QuantizedTensor

_LARGE_ROWS: Final = 2048  # stand for every M of the last class
_FINALISTS: Final = 4
_FINAL_ROUNDS: Final = 3
_REASON_LETTERS: Final = 1000
_SHOWN_LETTERS: Final = 100
_TUNING: Final = threading.Lock()  # times are taken by one search at a time

Results = dict[Key, tuple[Trial, ...]]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Kernels that may serve a product, being compiled; text: the begin of their text's hash."""

    key: Key
    schedule: str
    constants: Constants
    built: Built
    text: str

    @property
    def place(self) -> tuple[str, Constants]:
        """What it is among the trials of its key."""
        return self.schedule, self.constants


def products(x: Any, *weights: Any) -> Any:
    """The sum of products that share x: one kernel computes them all."""
    return functools.reduce(operator.add, [x @ w for w in weights])


def key_for(target: Target, k: int, n: int, formats: Sequence[str], m: int, precision: str) -> Key:
    """The key of a product of m rows."""
    return Key(k, n, "+".join(formats), m_class(target, m, PlanOptions(precision)), precision)


def rows_of(target: Target, key: Key) -> int:
    """The number of rows at which a class of M is timed: its largest, 2048 for the last class."""
    return most_rows(target, key.m, PlanOptions(key.precision)) or _LARGE_ROWS


def machine_of(bench: Bench) -> Machine:
    """What the times of a bench are filed under."""
    return Machine(bench.device.name, bench.target.arch, bench.fingerprint)


def ensure(device: Device, graph: Graph, m: int, plan_options: PlanOptions) -> None:
    """Search for the products of a function's kernels, where nothing is known of them yet.

    Raises TuningError where every candidate of one was rejected, and DeviceError.
    """
    with _TUNING, Bench(device) as bench:
        keys = keys_of(make_plan(graph, bench.target, m, plan_options), m, plan_options)
        known, machine = tunings.stored(), machine_of(bench)
        missing = [key for key in keys if not tunings.best(known.get((machine, key), ()))]
        for key, trials in search(bench, missing).items():
            if tunings.best(trials) is None:
                raise TuningError(f"{key} on {device}: all rejected\n" + table({key: trials}))


def search(bench: Bench, keys: Iterable[Key]) -> Results:
    """Try every candidate of every key that was not tried yet; all trials, old and new.

    They are kept as soon as a key is done: a search that is ended early goes on where it was.
    Raises DeviceError where the device has no memory for the weights, or is lost.
    """
    machine, known = machine_of(bench), tunings.stored()
    offered = {key: tuple(_candidates(bench, key)) for key in sorted(set(keys))}
    found = {key: _still_true(known.get((machine, key), ()), cs) for key, cs in offered.items()}
    for key, trials in found.items():
        if len(trials) < len(known.get((machine, key), ())):  # of kernels that are no more
            tunings.keep(machine, key, tuple(trials.values()))
    fresh = [c for key, cs in offered.items() for c in cs if c.place not in found[key]]
    for shape, of_shape in itertools.groupby(progress(fresh, "tuning"), _shape):
        rows = max(rows_of(bench.target, c.key) for c in fresh if _shape(c) == shape)
        trier = _Trier(bench, *shape, rows)
        for key, members in itertools.groupby(of_shape, lambda c: c.key):
            trials = found[key] | {c.place: trier.tried(c) for c in members}
            found[key] = trier.finals(offered[key], trials)
            tunings.keep(machine, key, tuple(found[key].values()))
    return {key: tuple(trials.values()) for key, trials in found.items()}


def _shape(candidate: Candidate) -> tuple[int, int, str]:
    return candidate.key.k, candidate.key.n, candidate.key.format


def _candidates(bench: Bench, key: Key) -> Iterator[Candidate]:
    """All candidates of a key; their compilation begins."""
    m, formats = rows_of(bench.target, key), key.format.split("+")
    weights = [WeightSpec(name, key.k, key.n) for name in formats]
    graph = trace(products, (array_spec((m, key.k)), *weights))
    for schedule in schedules_for(bench.target, key):
        plan = make_plan(graph, bench.target, m, PlanOptions(key.precision, None, schedule))
        (kernel,) = (kernel for kernel in plan.kernels if kernel.work.sections)
        for variant in candidates(plan.target, kernel, m):
            built = bench.compile(_with(plan, kernel, variant))
            constants = tuple(constants_of(variant).items())
            yield Candidate(key, schedule, constants, built, _text_hash(built))


def _with(plan: HipPlan, kernel: HipKernel, variant: HipKernel) -> HipPlan:
    return replace(plan, kernels=tuple(variant if k is kernel else k for k in plan.kernels))


def _text_hash(built: Built) -> str:
    text = "\0".join(source.text for source in built.sources)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _still_true(
    trials: Sequence[Trial], offered: Sequence[Candidate]
) -> dict[tuple[str, Constants], Trial]:
    """The trials of candidates that there still are, with the text that was tried."""
    texts = {candidate.place: candidate.text for candidate in offered}
    by_place = {(trial.schedule, trial.constants): trial for trial in trials}
    return {place: trial for place, trial in by_place.items() if texts.get(place) == trial.text}


# --- one product ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Trier:
    """Runs candidates for weights [k, n] with random data; rows: the most that they are given."""

    bench: Bench
    k: int
    n: int
    format: str
    rows: int
    copies: list[tuple[QuantizedTensor, ...]] = field(init=False)
    x: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        formats = enumerate(self.format.split("+"))
        first = tuple(random_weight(name, self.k, self.n, seed=i) for i, name in formats)
        count = rotated_copies(rotated_bytes(self.bench.device), sum(w.nbytes for w in first))
        self.copies = [first, *(tuple(map(_copy, first)) for _ in range(count - 1))]
        self.x = random_x(self.rows, self.k)

    @functools.cached_property
    def exact(self) -> tuple[Doubles, Doubles]:
        """The result for x in float64, and √(Σ(xw)² + K·2⁻¹⁴⁹), which errors are relative to."""
        return exact_products(self.x, self.copies[0])

    def tried(self, candidate: Candidate) -> Trial:
        """What becomes of a candidate: held against float64, then timed."""
        trial = functools.partial(
            Trial, candidate.schedule, candidate.constants, candidate.text, date=tunings.today()
        )
        try:
            error = self._error(candidate)
            if error is None:
                return trial(us=None, error=None, rejected="wrong: results are NaN or Inf")
            bound = BOUNDS[candidate.key.precision]
            if error > bound:
                wrong = f"wrong: error {error:.1e}, allowed are {bound:.0e}"
                return trial(us=None, error=error, rejected=wrong)
            return trial(us=self._call_us(candidate), error=error, rejected="")
        except CompileError as failure:
            return trial(us=None, error=None, rejected=_reason(failure))
        except DeviceError as failure:
            self.bench.upload((self.x[:1],))  # raises it again where the device is lost
            return trial(us=None, error=None, rejected=_reason(failure))

    def _error(self, candidate: Candidate) -> float | None:
        """The largest rms error of a row; None where there is no number.

        Two numbers of rows, where the class has them: full tiles, and one that is not.
        """
        most = rows_of(self.bench.target, candidate.key)
        y, size = self.exact
        errors = []
        for m in {most, most - 1 if most > 2 else most}:  # M = 2 is a class of its own
            (found,) = self.bench.run(candidate.built, (self.x[:m], *self.copies[0]))
            error = relative_error(found, y[:m], size[:m])
            if error is None:
                return None
            errors.append(error)
        return max(errors)

    def _call_us(self, candidate: Candidate) -> float:
        x = self.x[: rows_of(self.bench.target, candidate.key)]

        def calls_on(stream: int) -> list[Callable[[], object]]:
            (there,) = self.bench.upload((x,), stream)
            calls = [(there, *weights) for weights in self.copies]
            (out,) = self.bench.outputs(candidate.built, calls[0])
            launch = self.bench.bind(candidate.built, calls[0])
            for args in calls:
                launch.prepare(args)
            return [functools.partial(launch, args, out) for args in calls]

        return self.bench.replay_us(calls_on)

    def finals(
        self, offered: Sequence[Candidate], trials: dict[tuple[str, Constants], Trial]
    ) -> dict[tuple[str, Constants], Trial]:
        """The trials, the fastest few of them timed again: in turns, and the median counts."""
        timed = [c for c in offered if trials[c.place].us is not None]
        best = sorted(timed, key=lambda c: trials[c.place].us or 0.0)[:_FINALISTS]
        if len(best) == 1:
            return trials
        rounds = [[self._call_us(c) for c in best] for _ in range(_FINAL_ROUNDS)]
        medians = map(statistics.median, zip(*rounds, strict=True))
        again = {
            c.place: replace(trials[c.place], us=us, date=tunings.today())
            for c, us in zip(best, medians, strict=True)
        }
        return trials | again


def _copy(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(w.raw, shape=w.shape, format=w.format)


def _reason(failure: Exception) -> str:
    """An error in a line that a file of tunings accepts."""
    text = " ".join(f"{type(failure).__name__}: {failure}".split())
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return visible[:_REASON_LETTERS]


# --- what was tried -------------------------------------------------------------------------------


def table(results: Results) -> str:
    """What was tried for each key, the fastest first; `*` is chosen."""
    lines: list[str] = []
    for key, trials in results.items():
        chosen = tunings.best(trials)
        lines += [str(key), f"  {'µs':>9}{'error':>10}  candidate"]
        for trial in sorted(trials, key=lambda t: (t.us is None, t.us or 0.0, t.name)):
            mark = "*" if trial is chosen else " "
            us = "-" if trial.us is None else f"{trial.us:.2f}"
            error = "-" if trial.error is None else f"{trial.error:.1e}"
            lines.append(f"{mark} {us:>9}{error:>10}  {trial.name}")
            if trial.rejected:
                lines.append(f"{'':23}rejected: {_short(trial.rejected)}")
        if chosen is None:
            lines.append(f"  no candidate is left: {len(trials)} rejected")
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 1] + "…"
