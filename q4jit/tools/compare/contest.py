"""Entrants checked, then timed in turns."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from q4jit.errors import Q4JitError
from q4jit.tools.compare.arena import AbsentError, Entrant, Running
from q4jit.tools.compare.work import TimedCall


@dataclass
class Outcome:
    """What became of an entrant: its times (none where it is wrong or absent), and its error."""

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
        """Drop all times; `message` says why."""
        self.message = message
        self.us.clear()


def contest(entrants: Sequence[tuple[Entrant, TimedCall, float]], rounds: int) -> list[Outcome]:
    """Check and time entrants, each with its work and the bound of its error, in turns."""
    outcomes = [Outcome(entrant, bound) for entrant, _, bound in entrants]
    with contextlib.ExitStack() as stack:
        ready: list[tuple[Outcome, Running]] = []
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
def _told(outcome: Outcome) -> Iterator[None]:
    """Let an outcome hold what goes wrong: RuntimeError is PyTorch's, out of memory among it."""
    try:
        yield
    except AbsentError as reason:
        outcome.reject(f"not present: {reason}")
    except (Q4JitError, RuntimeError, MemoryError) as error:
        outcome.reject(f"{type(error).__name__}: {' '.join(str(error).split())}")
