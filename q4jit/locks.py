"""The one lock under which anything is made once: traces, compilations, loads, repacked weights.

A fork waits for it, so a child never inherits a half-made thing or a lock that nobody will release.
A call takes it only where its shapes, or one of its weights, are new to the process.
"""

import os
import threading
from typing import Final

BUILD: Final = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=BUILD.acquire, after_in_parent=BUILD.release, after_in_child=BUILD.release
    )
