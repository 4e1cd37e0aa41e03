"""The global lock: compilations, loads and repacked weights are made while it is held.

A fork waits for the lock, so a child never inherits a half-made object or a lock that nobody will
release. A call takes the lock only if its shapes or one of its weights are new to the process.
"""

import logging  # noqa: F401 - see below
import os
import threading
from typing import Any, Final

BUILD: Final = threading.RLock()

# A fork calls these in the reverse order of registration. `logging` is imported above, so BUILD is
# acquired before logging's lock, which a warning under BUILD may take (`logging.captureWarnings`).
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=BUILD.acquire, after_in_parent=BUILD.release, after_in_child=BUILD.release
    )


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
