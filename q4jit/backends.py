"""The table of back ends. Each registers one object with its stages; see `pipeline.Backend`."""

from collections.abc import Callable
from typing import Final

from q4jit.cpu.backend import BACKEND as CPU
from q4jit.errors import TargetError
from q4jit.pipeline import Backend
from q4jit.targets import Target


def find_backend(target: Target) -> Backend:
    """Return the back end of a target. Raises TargetError where there is none."""
    try:
        return _BACKENDS[target.backend]()
    except KeyError:
        known = " and ".join(map(repr, _BACKENDS))
        raise TargetError(
            f"no back end {target.backend!r} for {target}: there are {known}"
        ) from None


def _hip() -> Backend:
    from q4jit.hip.backend import BACKEND  # late: it takes 20 ms, and many processes use no GPU

    return BACKEND


# The CPU's is imported at once: the pool of threads must register its exit handler early.
_BACKENDS: Final[dict[str, Callable[[], Backend]]] = {"cpu": lambda: CPU, "hip": _hip}
