"""The global lock: compilations, loads and repacked weights are made while it is held.

A fork waits for the lock, so a child never inherits a half-made object or a lock that nobody will
release. A call takes the lock only if its shapes or one of its weights are new to the process.
"""

import contextlib
import logging  # noqa: F401 - see below
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Final

BUILD: Final = threading.RLock()

# A fork calls these in the reverse order of registration. `logging` is imported above, so BUILD is
# acquired before logging's lock, which a message under BUILD may take if sys.stderr is a log.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=BUILD.acquire, after_in_parent=BUILD.release, after_in_child=BUILD.release
    )


class _Waiting(threading.local):
    """The warnings of a thread that wait until it has released BUILD."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, type[Warning]]] = []


_waiting: Final = _Waiting()


def warn(message: str, category: type[Warning]) -> None:
    """Warn now, or after BUILD is released if this thread holds it.

    A warning calls the user's code (`warnings.showwarning`, handlers of a log), which may wait for
    a thread that needs BUILD. Code that warns under BUILD has
    `with warnings_later(), BUILD:` around it.
    """
    if _holds_build():
        _waiting.warnings.append((message, category))
    else:
        warnings.warn(message, category, stacklevel=3)


@contextlib.contextmanager
def warnings_later() -> Iterator[None]:
    """Keep the warnings of the body until it has ended and BUILD is released."""
    try:
        yield
    finally:
        if not _holds_build():
            waiting, _waiting.warnings = _waiting.warnings, []
            for message, category in waiting:
                warnings.warn(message, category, stacklevel=4)  # the caller of the function


def _holds_build() -> bool:
    lock: Any = BUILD
    return bool(lock._is_owned())  # what threading.Condition asks; gevent's lock has it as well


def is_exiting() -> bool:
    """Return whether the interpreter is about to end: functions given to `atexit` are running.

    Functions given to `atexit` from then on would not be called.
    """
    return not threading.main_thread().is_alive()


def keep_at_exit(owned: Any) -> Any:
    """Return an object of llvmlite; if the interpreter is about to end, it will not be freed.

    llvmlite frees nothing at the end either, but it learns of the end from `atexit`: too late if
    it was imported by a function that `atexit` called.
    """
    if is_exiting():
        owned.detach()
    return owned
