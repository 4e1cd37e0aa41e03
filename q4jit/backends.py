"""The table of back ends. Each is one object with its stages (`pipeline.Backend`)."""

from collections.abc import Callable
from typing import Final

from q4jit.cpu.backend import BACKEND as CPU
from q4jit.errors import TargetError, expected
from q4jit.pipeline import Backend
from q4jit.targets import Target


def find_backend(target: Target) -> Backend:
    """Return the back end of a target. Raises TargetError for an unknown one."""
    try:
        return _BACKENDS[target.backend]()
    except KeyError:
        known = " or ".join(map(repr, _BACKENDS))
        raise TargetError(
            expected(known, repr(target.backend), where=f"back end of {target}")
        ) from None


def _hip() -> Backend:
    from q4jit.hip.backend import BACKEND  # late: it takes 20 ms, and many processes use no GPU

    return BACKEND


# The CPU's is imported with this module: its thread pool must register its exit handler early.
_BACKENDS: Final[dict[str, Callable[[], Backend]]] = {"cpu": lambda: CPU, "hip": _hip}
