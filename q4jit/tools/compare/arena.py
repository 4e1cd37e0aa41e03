"""Where entrants run, and what an entrant is.

An entrant opens for a piece of work: it brings the arguments where it reads them, in copies that no
cache keeps, and runs when it is asked to, so that several can take turns. A library that is not
here has a reason instead.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from q4jit.tools.compare.work import TimedCall

READ: Final = "read"
PEAKS: Final = {"f32": "FMA peak", "i8": "dot peak"}
"""By precision, what many rows are held against on a CPU."""
LIMITS: Final = frozenset({READ, *PEAKS.values()})


class AbsentError(Exception):
    """Why a peer is not here, or cannot do a piece of work."""


@dataclass(frozen=True)
class Running:
    """An entrant that is ready.

    us: runs for some milliseconds, and gives the microseconds of a call. poison: makes the results
    NaN. error: of the last results, None where they are no numbers. note: how it is computed.
    """

    us: Callable[[], float]
    poison: Callable[[], None]
    error: Callable[[], float | None]
    note: str = ""


@dataclass(frozen=True)
class Entrant:
    """Something that does a piece of work; precision: whose bound its error has; own: q4jit's."""

    name: str
    precision: str
    open: Callable[[TimedCall], AbstractContextManager[Running]]
    own: bool = False


class Arena(Protocol):
    """Where entrants run."""

    target: str
    about: dict[str, Any]
    absent: dict[str, str]

    def begin(self, work: TimedCall, precision: str) -> None:
        """Begin to compile q4jit's kernels; what fails is told when they run."""

    def own(self, precision: str) -> Entrant:
        """q4jit, as its calls run."""

    def read(self) -> Entrant:
        """A read of as many bytes as the weights of a call have."""

    def peaks(self) -> list[Entrant]:
        """How long as many multiply-adds take where nothing is read."""

    def peers(self) -> list[Entrant]:
        """What else computes a product here."""

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps; 0: one weight that stays in the cache."""

    def close(self) -> None:
        """End what was begun."""


def present(absent: dict[str, str], found: Mapping[str, Callable[[], Entrant]]) -> list[Entrant]:
    """Those that are here; what is not gets its reason."""
    here = []
    for name, find in found.items():
        try:
            here.append(find())
        except AbsentError as reason:
            absent[name] = str(reason)
    return here
