"""Find the user's line that changes a container, by running the function once more."""

import contextlib
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Final

from q4jit.frontend.carets import is_users, marked_line

_LONGEST_S: Final = 2.0  # of a search, in seconds: each instruction is looked at


def changing_line(function: Callable[[], object], is_changed: Callable[[], bool]) -> str:
    """Run a function and return its line after which `is_changed()` is true, with a caret.

    Return "" if no line of Python's changes anything, or if the search takes too long.
    """
    end = time.monotonic() + _LONGEST_S
    place: tuple[CodeType, int, int] | None = None  # of the instruction that runs now
    line = ""

    def follow(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal place, line
        if line or time.monotonic() > end:
            return None
        if place is not None and is_changed():
            line = marked_line(*place)
            return None
        frame.f_trace_opcodes = True
        at = frame.f_back if event == "return" else frame
        if at is not None and is_users(at.f_code):
            place = at.f_code, at.f_lineno, at.f_lasti
        return follow

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        with contextlib.suppress(Exception):  # another result than at first: then there is no line
            function()
    finally:
        sys.settrace(before)
    return line
