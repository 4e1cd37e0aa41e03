"""Find the user's source line for an error, and mark the place in it with a caret."""

import functools
import itertools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType
from typing import Final, ParamSpec, TypeVar

import numpy as np

from q4jit.errors import TraceError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# with the separator at the end, because the folder q4jit_plots is not part of q4jit
_PACKAGE: Final = f"{Path(__file__).parents[1]}{os.sep}"
_NUMPY: Final = f"{Path(np.__file__).parent}{os.sep}"


_refusals: ContextVar[list[TraceError] | None] = ContextVar("refusals", default=None)


@contextmanager
def collect_refusals() -> Iterator[list[TraceError]]:
    """Return a list that receives each TraceError that `located` methods raise in this context.

    The traced function may catch one, and would then take a branch that NumPy does not take.
    """
    refusals: list[TraceError] = []
    token = _refusals.set(refusals)
    try:
        yield refusals
    finally:
        _refusals.reset(token)


def located(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `method` with the user's line and a caret added to each TraceError that it raises."""

    @functools.wraps(method)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except TraceError as error:
            line = user_line()
            if "\n\n" not in str(error) and line:  # else an inner method has added the line already
                error = TraceError(f"{error}\n\n{line}")
            refusals = _refusals.get()
            if refusals is not None:
                refusals.append(error)
            raise error from None

    return wrapper


def user_level() -> int:
    """Return the `stacklevel` by which a caller of `warnings.warn` names the user's line."""
    return 1 + len(list(_inner_frames(sys._getframe(1))))


def _inner_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those around it as long as they are in q4jit or NumPy."""
    while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, _NUMPY)):
        yield frame
        frame = frame.f_back


def user_line() -> str:
    """Return the innermost line outside q4jit and NumPy, with a caret below, or ""."""
    *_, inner = _inner_frames(sys._getframe())
    frame = inner.f_back
    if frame is None:
        return ""
    return marked_line(frame.f_code, frame.f_lineno, frame.f_lasti)


def is_users(code: CodeType) -> bool:
    """Return whether code belongs neither to q4jit nor to NumPy."""
    return not code.co_filename.startswith((_PACKAGE, _NUMPY))


def marked_line(code: CodeType, line: int, lasti: int) -> str:
    """Return a line with a caret below the instruction `lasti` of `code`."""
    text = f"  File {code.co_filename!r}, line {line}, in {code.co_name}"
    source = linecache.getline(code.co_filename, line).rstrip("\n")
    if not source.strip():
        return text
    indent = len(source) - len(source.lstrip())
    text += f"\n    {source.strip()}"
    span = _column_span(code, lasti, line, len(source))
    if span is not None:
        # co_positions counts UTF-8 bytes, the terminal counts characters
        raw = source.encode()
        first, last = (len(raw[:column].decode(errors="replace")) for column in span)
        text += f"\n    {' ' * (first - indent)}{'^' * max(1, last - first)}"
    return text


def _column_span(code: CodeType, lasti: int, line: int, length: int) -> tuple[int, int] | None:
    """Return the bytes of `line` that the instruction `lasti` comes from, if they are known."""
    positions = next(itertools.islice(code.co_positions(), lasti // 2, None), None)
    if positions is None:
        return None
    first_line, last_line, first, last = positions
    if first_line != line or first is None or last is None:
        return None
    line_end = length * 4  # a character has at most 4 bytes in UTF-8
    return first, last if last_line == line else line_end
