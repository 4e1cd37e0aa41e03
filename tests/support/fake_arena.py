"""An arena for `q4jit bench` that measures nothing: NumPy computes, and the times are given."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from q4jit.floats import FloatType
from q4jit.tools.compare.arena import LIMITS, PEAKS, READ, Entrant, Running
from q4jit.tools.compare.measurements import Measurement, measure
from q4jit.tools.compare.request import GPU, BenchRequest
from q4jit.tools.compare.work import TimedCall, gated

K, N = 64, 37
Fault = Callable[[str, list[np.ndarray[Any, Any]]], None]


class FakeArena:
    """An arena whose entrants compute with NumPy.

    Attributes:
        fault: called with an entrant's name and results; it may change the results or raise.
        times: the time of each entrant in µs.
        turns, poisoned: names of the entrants, in the order of their turns and poisonings.
        begun: (function, precision) of each call to `begin`.
        peak_names: the precisions that have a peak.
    """

    target = "hip:fake"

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault, self.turns, self.poisoned = fault, list[str](), list[str]()
        self.about = {"device": "Fake", "driver": "-", "compiler": "fake 1.0 -O3"}
        self.absent = {"torch int4": "not today"}
        self.begun: list[tuple[Any, str]] = []
        self.times = {READ: 2.0, "q4jit f32": 4.0, "q4jit f16": 2.5, "peer": 8.0}
        self.peak_names: tuple[str, ...] = ()

    def begin(self, work: TimedCall, precision: str) -> None:
        self.begun.append((work.function, precision))

    def entrant(self, name: str, precision: str, *, own: bool = False) -> Entrant:
        return Entrant(name, precision, lambda work: self._open(name, work), own)

    def own(self, precision: str) -> Entrant:
        return self.entrant(f"q4jit {precision}", precision, own=True)

    def read(self) -> Entrant:
        return self.entrant(READ, "f32")

    def peaks(self) -> list[Entrant]:
        return [self.entrant(PEAKS[p], p) for p in self.peak_names]

    def peers(self, dtype: FloatType) -> list[Entrant]:
        return [self.entrant("peer", "i8")]

    def rotated_bytes(self) -> int:
        return 4000

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _open(self, name: str, work: TimedCall) -> Iterator[Running]:
        results: list[np.ndarray[Any, Any]] = []

        def poison() -> None:
            self.poisoned.append(name)
            results[:] = [np.full((len(work.x), N), np.nan)]

        def us() -> float:
            self.turns.append(name)
            values = [w.dequantize().astype(np.float64) for w in work.weights]
            result = work.function(work.x, *values, *work.others)
            results[:] = result if isinstance(result, tuple) else [result]
            if self.fault is not None:
                self.fault(name, results)
            return self.times[name] * (1.5 if work.function is gated else 1)

        yield Running(us, poison, lambda: 0.0 if name in LIMITS else work.error(results), "how")


def measured(arena: FakeArena, **options: Any) -> list[Measurement]:
    """Return the measurements of one product with M = 3, or of what `options` request."""
    request = BenchRequest(shapes=((K, N),), rows=(3,), precisions=("f32", "f16"), **options)
    return [each for group in measure(arena, request, GPU) for each in group]


def fault_of(entrant: str, change: Callable[[Any], None]) -> Fault:
    """Return a fault that changes the first result of one entrant."""

    def fault(name: str, results: list[np.ndarray[Any, Any]]) -> None:
        if name == entrant:
            change(results[0])

    return fault


def one_wrong(y: Any) -> None:
    """Make the last element wrong."""
    y[-1, -1] += 1


def one_missing(y: Any) -> None:
    """Make the last element NaN, as if no kernel had written it."""
    y[-1, -1] = np.nan
