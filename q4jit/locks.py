"""The global lock: compilations, loads and repacked weights are made while it is held.

A fork waits for the lock, so a child never inherits a half-made object or a lock that nobody will
release. A call takes the lock only if its shapes or one of its weights are new to the process.
"""

import os
import threading
from typing import Final

BUILD: Final = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=BUILD.acquire, after_in_parent=BUILD.release, after_in_child=BUILD.release
    )
