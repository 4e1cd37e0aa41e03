"""Progress bars of long work, on standard error."""

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """Return `items` with a progress bar on standard error.

    Without tqdm, or if standard error is no terminal, about five lines are printed instead.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm  # late: optional

        return tqdm(items, what)
    return _with_lines(items, what)


def _with_lines(items: Sequence[T], what: str) -> Iterator[T]:
    step = max(1, len(items) // 4)
    for i, item in enumerate(items):
        if i % step == 0:
            sys.stderr.write(f"{what} {i + 1} of {len(items)}\n")
        yield item
