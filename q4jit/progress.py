"""How far a long piece of work is, on standard error."""

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, told of as they are taken: by a bar on a terminal that tqdm can draw on, else lines.

    There are at most some five lines, so that a log stays short.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm  # late: an extra's package

        return tqdm(items, what)
    return _with_lines(items, what)


def _with_lines(items: Sequence[T], what: str) -> Iterator[T]:
    step = max(1, len(items) // 4)
    for i, item in enumerate(items):
        if i % step == 0:
            sys.stderr.write(f"{what} {i + 1} of {len(items)}\n")
        yield item
