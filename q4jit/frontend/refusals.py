"""Refusals: the errors for operations that cannot be compiled."""

from collections.abc import Callable
from typing import Any, Final, NoReturn

from q4jit.errors import TraceError
from q4jit.frontend.carets import located

ACCEPTED: Final = (
    "accepted are @, arithmetic, ** with a small whole exponent, comparisons, np.where exp log "
    "tanh sqrt abs square reciprocal maximum minimum clip sum mean, and slices of the last axis"
)


def unsupported(what: str) -> NoReturn:
    """Raise TraceError for an unsupported operation."""
    raise TraceError(f"found {what}, which cannot be compiled: {ACCEPTED}")


def forbidden(what: str, instead: str) -> Callable[..., Any]:
    """Make a method that refuses to give `what` away while a function is traced."""

    # Any: stands in for dunder methods of many signatures, none of which ever returns
    @located
    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise TraceError(
            f"found {what} of a value that is only known when the kernel runs: {instead}"
        )

    return method
