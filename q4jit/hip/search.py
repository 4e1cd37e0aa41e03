"""Search for the fastest kernels of a product: compile all candidates, check them, time them.

Threads compile the candidates. Each candidate first runs on random data, and every row and column
is compared with float64; wrong results are not timed. The fastest few are timed again in turns,
because clocks drift. The trials are kept (`tunings`), so a second search measures only candidates
that are new or whose text has changed.
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

from q4jit.errors import CompileError, DeviceError, TuningError, shortened
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
from q4jit.hip.tunings import Constants, Identity, Key, Machine, Trial
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, relative_error
from q4jit.progress import progress
from q4jit.runtime.driver import Device
from q4jit.targets import Target
from q4jit.weights.reference import Doubles, exact_products, random_weight, random_x, rotated_copies
from q4jit.weights.tensor import QuantizedTensor

_LARGE_ROWS: Final = 2048  # represent every M of the last class
_FINALISTS: Final = 4
_FINAL_ROUNDS: Final = 3
_REASON_LETTERS: Final = 1000
_SHOWN_LETTERS: Final = 100
_SEARCHING: Final = threading.Lock()  # two searches at a time would disturb each other's times

Results = dict[Key, tuple[Trial, ...]]
Trials = dict[Identity, Trial]
"""The trials of one product."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """Kernels that may serve a product.

    Attributes:
        key: the product.
        schedule: the schedule.
        constants: the constants.
        built: the kernels; their compilation has begun.
        text: the first 16 digits of a hash of the kernels' text.
    """

    key: Key
    schedule: str
    constants: Constants
    built: Built
    text: str

    @property
    def identity(self) -> Identity:
        """Return what distinguishes the candidate from the others of its product."""
        return self.schedule, self.constants


def products(x: Any, *weights: Any) -> Any:
    """Return the sum of products that share x; one kernel computes them all."""
    return functools.reduce(operator.add, [x @ w for w in weights])


def key_for(target: Target, k: int, n: int, formats: Sequence[str], m: int, precision: str) -> Key:
    """Return the key of a product with m rows."""
    return Key(k, n, "+".join(formats), m_class(target, m, PlanOptions(precision)), precision)


def rows_of(target: Target, key: Key) -> int:
    """Return the number of rows that a class of M is timed with: its largest, or 2048."""
    return most_rows(target, key.m, PlanOptions(key.precision)) or _LARGE_ROWS


def machine_of(bench: Bench) -> Machine:
    """Return the machine that the times of a bench belong to."""
    return Machine(bench.device.name, bench.target.arch, bench.fingerprint)


def ensure(device: Device, graph: Graph, m: int, plan_options: PlanOptions) -> None:
    """Search for the products of a function's kernels that have no trials yet.

    Raises TuningError if every candidate of a product is rejected, and DeviceError.
    """
    with _SEARCHING, Bench(device) as bench:
        keys = keys_of(make_plan(graph, bench.target, m, plan_options), m, plan_options)
        known, machine = tunings.stored(), machine_of(bench)
        missing = [key for key in keys if not tunings.best(known.get((machine, key), ()))]
        for key, trials in search(bench, missing).items():
            if tunings.best(trials) is None:
                raise TuningError(
                    f"every candidate for {key} on {device} was rejected:\n{table({key: trials})}"
                )


def search(bench: Bench, keys: Iterable[Key]) -> Results:
    """Measure the candidates of each key that have no trial yet; return all trials, old and new.

    The trials of a key are kept as soon as it is done, so an interrupted search can be continued.
    Raises DeviceError if the device has too little memory for the weights, or is lost.
    """
    machine, known = machine_of(bench), tunings.stored()
    offered = {key: tuple(_candidates(bench, key)) for key in sorted(set(keys))}
    results = {key: _still_valid(known.get((machine, key), ()), cs) for key, cs in offered.items()}
    for key, trials in results.items():
        if len(trials) < len(known.get((machine, key), ())):  # some kernels no longer exist
            tunings.keep(machine, key, tuple(trials.values()))
    fresh = [c for key, cs in offered.items() for c in cs if c.identity not in results[key]]
    for shape, of_shape in itertools.groupby(progress(fresh, "tuning"), _shape):
        rows = max(rows_of(bench.target, c.key) for c in fresh if _shape(c) == shape)
        measurer = _Measurer(bench, *shape, rows)
        for key, members in itertools.groupby(of_shape, lambda c: c.key):
            trials = results[key] | {c.identity: measurer.measure(c) for c in members}
            results[key] = measurer.finals(offered[key], trials)
            tunings.keep(machine, key, tuple(results[key].values()))
    return {key: tuple(trials.values()) for key, trials in results.items()}


def _shape(candidate: Candidate) -> tuple[int, int, str]:
    return candidate.key.k, candidate.key.n, candidate.key.format


def _candidates(bench: Bench, key: Key) -> Iterator[Candidate]:
    """Yield all candidates of a key, and begin to compile them."""
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


def _still_valid(trials: Sequence[Trial], offered: Sequence[Candidate]) -> Trials:
    """Return the trials of candidates that still exist and still have the measured text."""
    texts = {candidate.identity: candidate.text for candidate in offered}
    return {t.identity: t for t in trials if texts.get(t.identity) == t.text}


# --- one product ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Measurer:
    """A bench with random data for the candidates of one shape of weights.

    Attributes:
        bench: the bench.
        k: K, the elements of a column of each weight.
        n: columns of each weight.
        format: the formats of the weights, joined by `+`.
        rows: the most rows of x that a candidate needs.
        copies: copies of the weights, which take turns so that no cache keeps them.
        x: random data [rows, k].
    """

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
        """Return the result in float64, and √(Σ(xw)² + K·2⁻¹⁴⁹), which errors are relative to."""
        return exact_products(self.x, self.copies[0])

    def measure(self, candidate: Candidate) -> Trial:
        """Compare a candidate's results with float64; if they are right, time it."""
        trial = functools.partial(
            Trial, candidate.schedule, candidate.constants, candidate.text, date=tunings.today()
        )
        try:
            error = self._error(candidate)
            if error is None:
                return trial(us=None, error=None, rejected="wrong: results are NaN or Inf")
            bound = BOUNDS[candidate.key.precision]
            if error > bound:
                wrong = f"wrong: error {error:.1e}, the bound is {bound:.0e}"
                return trial(us=None, error=error, rejected=wrong)
            return trial(us=self._call_us(candidate), error=error, rejected="")
        except CompileError as failure:
            return trial(us=None, error=None, rejected=_reason(failure))
        except DeviceError as failure:
            self.bench.upload((self.x[:1],))  # raises DeviceError again if the device is lost
            return trial(us=None, error=None, rejected=_reason(failure))

    def _error(self, candidate: Candidate) -> float | None:
        """Return the largest rms error of a row; None if a result is NaN or Inf.

        The candidate runs with two numbers of rows if its class has them: one fills all tiles, the
        other does not.
        """
        most = rows_of(self.bench.target, candidate.key)
        y, size = self.exact
        errors = []
        for m in {most, most - 1 if most > 2 else most}:  # M = 1 and M = 2 are different classes
            (result,) = self.bench.run(candidate.built, (self.x[:m], *self.copies[0]))
            error = relative_error(result, y[:m], size[:m])
            if error is None:
                return None
            errors.append(error)
        return max(errors)

    def _call_us(self, candidate: Candidate) -> float:
        x = self.x[: rows_of(self.bench.target, candidate.key)]

        def calls_on(stream: int) -> list[Callable[[], object]]:
            (x_there,) = self.bench.upload((x,), stream)
            calls = [(x_there, *weights) for weights in self.copies]
            (out,) = self.bench.outputs(candidate.built, calls[0])
            launch = self.bench.bind(candidate.built, calls[0])
            for args in calls:
                launch.prepare(args)
            return [functools.partial(launch, args, out) for args in calls]

        return self.bench.replay_us(calls_on)

    def finals(self, offered: Sequence[Candidate], trials: Trials) -> Trials:
        """Time the fastest few again in turns; return the trials with the median times."""
        timed = [c for c in offered if trials[c.identity].us is not None]
        best = sorted(timed, key=lambda c: trials[c.identity].us or 0.0)[:_FINALISTS]
        if len(best) == 1:
            return trials
        rounds = [[self._call_us(c) for c in best] for _ in range(_FINAL_ROUNDS)]
        medians = map(statistics.median, zip(*rounds, strict=True))
        again = {
            c.identity: replace(trials[c.identity], us=us, date=tunings.today())
            for c, us in zip(best, medians, strict=True)
        }
        return trials | again


def _copy(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(w.raw, shape=w.shape, format=w.format)


def _reason(failure: Exception) -> str:
    """Return the text of an error in one line, as a file of tunings can store it."""
    text = " ".join(f"{type(failure).__name__}: {failure}".split())
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return visible[:_REASON_LETTERS]


# --- the table of trials --------------------------------------------------------------------------


def table(results: Results) -> str:
    """Return a table of the trials of each key, the fastest first; `*` marks the chosen one."""
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
                lines.append(f"{'':23}rejected: {shortened(trial.rejected, _SHOWN_LETTERS)}")
        if chosen is None:
            lines.append(f"  all {len(trials)} candidates were rejected")
    return "\n".join(lines)
