"""The wording of errors for code that cannot be compiled: `cannot X; use Y`."""

import contextlib
import reprlib
from collections.abc import Callable
from typing import Any, Final, NoReturn

from q4jit.errors import TraceError
from q4jit.frontend.carets import located

USE_SUPPORTED: Final = (
    "use @, arithmetic, ** with a small whole exponent, comparisons, slices of the last axis, "
    "np.where, exp, log, tanh, sqrt, abs, square, reciprocal, maximum, minimum, clip, sum, mean, "
    "max, min, var, std and linalg.norm"
)
USE_PRODUCT: Final = "use x @ w"
USE_OTHER_PRODUCT: Final = (
    f"{USE_PRODUCT} for a QuantizedTensor w, np.sum(a * b, -1) for the dot products of rows, or "
    "return both arrays and multiply them outside"
)
ROWS_OR_EXPERTS: Final = "use w.rows(ids), or an ExpertTensor for np.vecmat(x, w[ids])"
INDEX_PRODUCT: Final = "slice the product, (x @ w)[..., a:b]"
USE_SLICE: Final = "use slices of the last axis, as in y[..., a:b]"

_SHOWN_BITS: Final = 64  # Python refuses to print whole numbers of thousands of digits


def refuse(action: str, cure: str) -> NoReturn:
    """Raise TraceError: `cannot {action}; {cure}`."""
    raise TraceError(f"cannot {action}; {cure}")


def unsupported(what: str, cure: str = USE_SUPPORTED) -> NoReturn:
    """Raise TraceError for an operation that cannot be compiled."""
    refuse(f"compile {what}", cure)


def forbidden(action: str, cure: str) -> Callable[..., Any]:
    """Return a method that raises TraceError: `cannot {action}; {cure}`, with the user's line."""

    # Any: stands in for dunder methods of many signatures; none of them returns
    @located
    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        refuse(action, cure)

    return method


def cure_for(value: object, array: str) -> str:
    """Return how to pass a value as an argument; array: NumPy's call for a list of numbers."""
    if isinstance(value, list | tuple):
        return f"call the function with an array of it, {array}"
    return "pass it as an argument"


def refuse_other_trace() -> NoReturn:
    """Raise TraceError for a symbol that an earlier trace left in a closure or a global."""
    refuse(
        "use a value that was traced in another call",
        "compute it in this call, or pass it as an argument",
    )


def show_value(value: Any) -> str:
    """Return a value of the user's on one line, shortened if it is long."""
    # not isinstance(), which a number of rows answers like an int
    if issubclass(type(value), int) and value.bit_length() > _SHOWN_BITS:
        return f"a whole number of {value.bit_length()} bits"
    with contextlib.suppress(ValueError):  # of a list that holds one
        text = reprlib.repr(value)
        if "\n" not in text:
            return text
    return type(value).__name__
