"""What a self-test finds out: outcomes, times, and how the run ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class CaseOutcome:
    """What became of a case; `error` is None where there is no number, and `message` says why.

    passed: None where the case was not run.
    """

    case: str
    group: str
    m: int
    error: float | None
    bound: float
    passed: bool | None
    message: str = ""


@dataclass(frozen=True)
class Timing:
    """The time of one product with Q4_0, whose weights come from memory; None where it failed.

    gb_per_s: of the weights; fraction: of what a copy within the device's memory reads and writes.
    """

    schedule: str
    precision: str
    k: int
    n: int
    m: int
    us: float | None
    gb_per_s: float | None
    fraction: float | None
    message: str = ""


@dataclass
class Findings:
    """What is known so far; ended_by: the exception that ended the run early, else empty."""

    cases: list[CaseOutcome] = field(default_factory=list)
    copy: dict[str, Any] = field(default_factory=lambda: {"gb_per_s": None, "message": "not run"})
    timings: list[Timing] = field(default_factory=list)
    ended_by: str = ""
    start: float = field(default_factory=time.perf_counter)


def attempt(action: Callable[[], T]) -> T | Exception:
    """Return what an action gives, or the error that it raises, for the report."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a report of every error is what this is for
        return error


def told(error: BaseException) -> str:
    """Return an error in a line: its kind, and what it says."""
    return f"{type(error).__name__}: {error}"
