"""The interface of an arena, where entrants run, and of an entrant.

An entrant opens for a call: it copies the arguments to where it reads them, as often as needed so
that no cache holds all weights, and then runs on request, so that several entrants can take turns.
A library that is not installed is recorded with the reason.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from q4jit.floats import FloatType
from q4jit.tools.compare.work import TimedCall

READ: Final = "read"
PEAKS: Final = {"f32": "FMA peak", "i8": "dot peak"}
"""The limit of many rows on a CPU, by precision."""
LIMITS: Final = frozenset({READ, *PEAKS.values()})


class AbsentError(Exception):
    """A peer is not installed, or does not support a call; the message says why."""


@dataclass(frozen=True)
class Running:
    """An entrant that is ready to run.

    Attributes:
        us: runs calls for some milliseconds and returns the microseconds of one.
        poison: sets the results to NaN.
        error: returns the error of the last results; None if they contain NaN or Inf.
        note: how the entrant computes, for the tables.
    """

    us: Callable[[], float]
    poison: Callable[[], None]
    error: Callable[[], float | None]
    note: str = ""


@dataclass(frozen=True)
class Entrant:
    """Something that computes a call, or a limit.

    Attributes:
        name: its name in the tables.
        precision: the precision whose bound its error must meet.
        open: prepares a call. May raise AbsentError.
        own: whether it is q4jit.
    """

    name: str
    precision: str
    open: Callable[[TimedCall], AbstractContextManager[Running]]
    own: bool = False


class Arena(Protocol):
    """Where entrants run.

    Attributes:
        target: the target in words.
        about: facts about the device and the compiler, for reports.
        absent: names of the peers that are not available, with the reasons.
    """

    target: str
    about: dict[str, Any]
    absent: dict[str, str]

    def begin(self, work: TimedCall, precision: str) -> None:
        """Start to compile q4jit's kernels; errors are raised when they run."""

    def own(self, precision: str) -> Entrant:
        """Return q4jit with a precision."""

    def read(self) -> Entrant:
        """Return a read of as many bytes as the weights of a call have."""

    def peaks(self) -> list[Entrant]:
        """Return loops of as many multiply-adds as a call has, which read nothing."""

    def peers(self, dtype: FloatType) -> list[Entrant]:
        """Return the peers that are available, for calls whose arrays have a dtype."""

    def rotated_bytes(self) -> int:
        """Return how many bytes of weights exceed every cache; 0 to keep one in the cache."""

    def close(self) -> None:
        """Free what the arena holds."""


def available(absent: dict[str, str], makers: Mapping[str, Callable[[], Entrant]]) -> list[Entrant]:
    """Return the entrants that can be made, and add the others to `absent` with the reason."""
    entrants = []
    for name, make in makers.items():
        try:
            entrants.append(make())
        except AbsentError as reason:
            absent[name] = str(reason)
    return entrants
