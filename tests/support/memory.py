"""Measure the memory of a call."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

MB: Final = 1 << 20


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak memory of a call, with its result, above the memory before the call."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
