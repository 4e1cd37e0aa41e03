"""Times of calls on the CPU, made from Python one after the other."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from q4jit.tools.compare.arena import Running
from q4jit.tools.compare.work import Floats, TimedCall

_CALLS_S: Final = 0.03  # for which the calls of a turn are timed
_WARM_CALLS: Final = 3
# until the threads of the previous library stop spinning: after a pause of 50 ms, OpenBLAS's still
# slowed PyTorch's product from 40 µs to 8 ms; after 100 ms they did not
_REST_S: Final = 0.15


def rest() -> None:
    """Wait until the threads of the previous library stop spinning."""
    time.sleep(_REST_S)


def timed_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median microseconds of calls, which take turns for about 30 ms."""
    rest()
    seconds: list[float] = []
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
        # each call on its own: a thread that still spins can delay one call by milliseconds
        seconds.append(now - start)
        if now > end:
            break
        start = now
    return statistics.median(seconds) * 1e6


def running_of(
    calls: Sequence[Callable[[], object]],
    outputs: Sequence[Floats],
    work: TimedCall,
    note: str = "",
) -> Running:
    """Return an entrant whose calls take turns and all write to `outputs`."""

    def poison() -> None:
        for array in outputs:
            array.fill(np.nan)

    return Running(functools.partial(timed_us, calls), poison, lambda: work.error(outputs), note)
