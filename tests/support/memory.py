"""How much memory a call holds."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

MB: Final = 1 << 20


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory held during a call, over what was held before it (its result included)."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
