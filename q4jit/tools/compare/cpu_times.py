"""How long calls on the CPU take, made from Python one after the other."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from q4jit.tools.compare.arena import Running
from q4jit.tools.compare.work import Floats, TimedCall

_CALLS_S: Final = 0.03
_WARM_CALLS: Final = 3
# until threads of the library before have stopped spinning: OpenBLAS's took PyTorch's product from
# 40 µs to 8 ms after 50 ms, and no longer after 100
_REST_S: Final = 0.15


def rest() -> None:
    """Wait until threads of the library that ran before no longer spin."""
    time.sleep(_REST_S)


def timed_us(calls: Sequence[Callable[[], object]]) -> float:
    """The median of microseconds of calls, which take turns for some time."""
    rest()
    taken: list[float] = []
    start = time.perf_counter()
    for call in calls[:_WARM_CALLS]:
        call()
        if time.perf_counter() - start > _CALLS_S:
            break
    start = time.perf_counter()
    end = start + _CALLS_S
    for call in itertools.cycle(calls):
        call()
        now = time.perf_counter()
        # one by one: a thread of another library that still spins stops a call for milliseconds
        taken.append(now - start)
        if now > end:
            break
        start = now
    return statistics.median(taken) * 1e6


def running_of(
    calls: Sequence[Callable[[], object]],
    outputs: Sequence[Floats],
    work: TimedCall,
    note: str = "",
) -> Running:
    """Return an entrant whose calls take turns, and all write to the same `outputs`."""

    def poison() -> None:
        for array in outputs:
            array.fill(np.nan)

    return Running(functools.partial(timed_us, calls), poison, lambda: work.error(outputs), note)
