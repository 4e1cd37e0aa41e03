"""Row numbers while a function is traced: `w.rows(ids)` takes them, and nothing else."""

from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np

from q4jit.errors import TraceError
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import located
from q4jit.frontend.graph import Node
from q4jit.frontend.shapes import show_shape

_ONLY_ROWS: Final = (
    "accepted is w.rows(ids); for numbers pass a float32 array, made by .astype(np.float32)"
)


def refuse_ids(ids: "SymbolicIds", what: str) -> NoReturn:
    """Raise TraceError for row numbers that are used as `what`."""
    raise TraceError(f"found integers, {ids._show()}, as {what}: {_ONLY_ROWS}")


def _not_of_ids(what: str) -> Callable[..., Any]:
    # Any: stands in for dunder methods of many signatures, none of which ever returns
    @located
    def method(self: "SymbolicIds", *args: object, **kwargs: object) -> NoReturn:
        refuse_ids(self, what)

    return method


class SymbolicIds:
    """Row numbers of the function being traced: all that takes them is `w.rows(ids)`."""

    __slots__ = ("_builder", "_node")

    def __init__(self, builder: Builder, node: Node) -> None:
        self._builder = builder
        self._node = node

    def __repr__(self) -> str:
        return f"<traced {self._show()}>"

    def _show(self) -> str:
        return f"ids {show_shape(self._node.shape)}"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(refuse_ids)(self, f"the owner of .{name}")

    @located
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *rest: object, **_: object) -> NoReturn:
        if ufunc is np.matmul:
            refuse_ids(self, "an operand of @")
        refuse_ids(self, f"an operand of np.{ufunc.__name__}")

    @located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        refuse_ids(self, f"an argument of np.{function.__name__}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _not_of_ids(
        "an operand of arithmetic"
    )
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __add__
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __add__
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __add__
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __add__
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __add__
    __matmul__ = __rmatmul__ = _not_of_ids("an operand of @")
    __lt__ = __le__ = __gt__ = __ge__ = _not_of_ids("an operand of a comparison")
    __eq__ = __ne__ = __lt__
    __hash__ = object.__hash__

    __array__ = _not_of_ids("known values (of a captured weight's rows? pass it as an argument)")
    __bool__ = _not_of_ids("a truth value")
    __int__ = __index__ = __float__ = __complex__ = _not_of_ids("a number")
    __len__ = _not_of_ids("the argument of len()")
    __iter__ = __contains__ = _not_of_ids("a sequence")
    __getitem__ = __setitem__ = _not_of_ids("the owner of an index")
