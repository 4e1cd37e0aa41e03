"""The findings of a self-test: outcomes of cases, times of products, and how the run ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class CaseOutcome:
    """The outcome of a case or check.

    Attributes:
        case: the case in words.
        group: the line of the report's table that counts it.
        m: the number of rows M.
        error: the measured error; None without one, for the reason in `message`.
        bound: the largest accepted error.
        passed: None if the case was not run.
        message: why the case failed or was not run.
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
    """The time of one product with a Q4_0 weight that no cache holds.

    Attributes:
        us: microseconds; this and the next two are None if the timing failed.
        gb_per_s: bytes of the weight per time.
        fraction: `gb_per_s` relative to what a copy within device memory reads and writes.
        message: why the timing failed.
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
    """All findings so far.

    Attributes:
        cases: outcomes of cases and checks.
        copy: the speed of a copy within device memory.
        timings: times of products.
        ended_by: the exception that ended the run early, or "".
        start: when the run began.
    """

    cases: list[CaseOutcome] = field(default_factory=list)
    copy: dict[str, Any] = field(default_factory=lambda: {"gb_per_s": None, "message": "not run"})
    timings: list[Timing] = field(default_factory=list)
    ended_by: str = ""
    start: float = field(default_factory=time.perf_counter)


def attempt(action: Callable[[], T]) -> T | Exception:
    """Return the result of an action, or the error that it raises."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - the report lists every error
        return error


def error_text(error: BaseException) -> str:
    """Return the class of an error and its message, if it has one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
