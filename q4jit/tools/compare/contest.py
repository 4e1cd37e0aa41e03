"""Check entrants, then time them in turns."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from q4jit.errors import Q4JitError
from q4jit.tools.compare.arena import AbsentError, Entrant, Running
from q4jit.tools.compare.work import TimedCall


@dataclass
class Outcome:
    """The outcome of an entrant.

    Attributes:
        entrant: the entrant.
        bound: the largest accepted error.
        note: how the entrant computes.
        error: its error; None if it has none.
        wrong: whether its results exceed the bound or contain NaN or Inf.
        message: why there are no times.
        us: microseconds of a call, one per round; empty if it is wrong, absent or failed.
    """

    entrant: Entrant
    bound: float
    note: str = ""
    error: float | None = None
    wrong: bool = False
    message: str = ""
    us: list[float] = field(default_factory=list)

    def judge(self, error: float | None) -> None:
        """Record an error, and reject the entrant if its results are wrong."""
        self.error = error
        if error is None or error > self.bound:
            problem = (
                "results contain NaN or Inf"
                if error is None
                else f"error {error:.1e} exceeds the bound {self.bound:.0e}"
            )
            self.reject(f"wrong: {problem}")
            self.wrong = True

    def reject(self, message: str) -> None:
        """Drop all times; `message` says why."""
        self.message = message
        self.us.clear()


def contest(entrants: Sequence[tuple[Entrant, TimedCall, float]], rounds: int) -> list[Outcome]:
    """Check entrants, each given with its call and bound, and time them in turns."""
    outcomes = [Outcome(entrant, bound) for entrant, _, bound in entrants]
    with contextlib.ExitStack() as stack:
        ready: list[tuple[Outcome, Running]] = []
        for outcome, (entrant, work, _) in zip(outcomes, entrants, strict=True):
            with _failures_recorded(outcome):
                running = stack.enter_context(entrant.open(work))
                running.poison()
                running.us()
                outcome.note = running.note
                outcome.judge(running.error())
                ready.append((outcome, running))
        for _ in range(rounds):
            for outcome, running in ready:
                if not outcome.message:
                    with _failures_recorded(outcome):
                        outcome.us.append(running.us())
        for outcome, running in ready:
            if not outcome.message:
                with _failures_recorded(outcome):
                    outcome.judge(running.error())
    return outcomes


@contextlib.contextmanager
def _failures_recorded(outcome: Outcome) -> Iterator[None]:
    """Reject an outcome on errors that an entrant may raise.

    PyTorch raises RuntimeError, also when it is out of memory.
    """
    try:
        yield
    except AbsentError as reason:
        outcome.reject(f"not available: {reason}")
    except (Q4JitError, RuntimeError, MemoryError) as error:
        outcome.reject(f"{type(error).__name__}: {' '.join(str(error).split())}")
