"""Find the user's source line for an error, and mark the place in it with a caret."""

import dis
import functools
import itertools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Final, ParamSpec, TypeVar

import numpy as np

from q4jit.errors import TraceError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _folder(function: FunctionType) -> str:
    """Return the folder of a package, as the code of its modules names it.

    function: one of a module in a folder of the package. In a bundle `__file__` names another
    folder. The separator is at the end, because q4jit_plots is not part of q4jit.
    """
    return f"{Path(function.__code__.co_filename).parents[1]}{os.sep}"


_PACKAGE: Final = _folder(_folder)  # type: ignore[arg-type]  # every def is a FunctionType
_NUMPY: Final = _folder(np.iterable)  # type: ignore[arg-type]  # the same; in numpy/lib
_RETURNS: Final = frozenset({"RETURN_VALUE", "RETURN_CONST"})

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
    while frame is not None and not is_users(frame.f_code):
        yield frame
        frame = frame.f_back


def user_line() -> str:
    """Return the innermost line outside q4jit and NumPy, with a caret below, or ""."""
    frame = _user_frame()
    return "" if frame is None else marked_line(frame.f_code, frame.f_lineno, frame.f_lasti)


def is_users(code: CodeType) -> bool:
    """Return whether code belongs neither to q4jit nor to NumPy."""
    return not code.co_filename.startswith((_PACKAGE, _NUMPY))


def marked_line(code: CodeType, line: int, lasti: int | None) -> str:
    """Return a line with a caret below the instruction `lasti` of `code`, unless that is None."""
    text = f"  File {code.co_filename!r}, line {line}, in {code.co_name}"
    source, span = _source(code, line, lasti)
    if not source.strip():
        return text
    indent = len(source) - len(source.lstrip())
    text += f"\n    {source.strip()}"
    if span is not None:
        first, last = span
        text += f"\n    {' ' * (first - indent)}{'^' * max(1, last - first)}"
    return text


def result_line(code: CodeType) -> str:
    """Return the line of a function's result, with a caret; the first line if there are several."""
    steps = list(dis.get_instructions(code))
    returns = [i for i, step in enumerate(steps) if step.opname in _RETURNS]
    # the value is made by the step before; Python 3.12 has one step for constants
    values = [steps[i - (steps[i].opname == "RETURN_VALUE")] for i in returns]
    lines = {step.positions.lineno for step in values if step.positions}
    line = lines.pop() if len(lines) == 1 else None
    if line is None:
        return marked_line(code, code.co_firstlineno, None)
    is_one_value = len(returns) == 1 and not steps[returns[0]].is_jump_target
    return marked_line(code, line, values[0].offset if is_one_value else None)


def marked_code() -> str:
    """Return the code that the carets of `user_line` mark, or "" if it is not known."""
    frame = _user_frame()
    if frame is None:
        return ""
    source, span = _source(frame.f_code, frame.f_lineno, frame.f_lasti)
    return source[slice(*span)] if span else ""


def _user_frame() -> FrameType | None:
    *_, outermost = _inner_frames(sys._getframe())
    return outermost.f_back


def _source(code: CodeType, line: int, lasti: int | None) -> tuple[str, tuple[int, int] | None]:
    """Return a line, and the first and last column of the code of an instruction in it."""
    source = linecache.getline(code.co_filename, line).rstrip("\n")
    span = None if lasti is None else _column_span(code, lasti, line, len(source))
    if span is None:
        return source, None
    # co_positions counts UTF-8 bytes, the terminal counts characters
    raw = source.encode()
    first, last = (len(raw[:column].decode(errors="replace")) for column in span)
    return source, (first, last)


def _column_span(code: CodeType, lasti: int, line: int, length: int) -> tuple[int, int] | None:
    """Return the bytes of `line` that the instruction `lasti` comes from, if they are known."""
    positions = next(itertools.islice(code.co_positions(), lasti // 2, None), None)
    if positions is None:
        return None
    first_line, last_line, first, last = positions
    if first_line != line or first is None or last is None:
        return None
    if (last_line, last) == (line, first):  # Python 3.12: the constant that a lambda returns
        return None
    line_end = length * 4  # a character has at most 4 bytes in UTF-8
    return first, last if last_line == line else line_end
