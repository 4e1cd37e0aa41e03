"""Ids while a function is traced: row numbers for `w.rows(ids)`, experts for `w[ids]`."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import located
from q4jit.frontend.graph import Node
from q4jit.frontend.refusals import refuse
from q4jit.frontend.shapes import show_shape


def refuse_ids(ids: "SymbolicIds", action: str, more: str = "") -> NoReturn:
    """Raise TraceError: row numbers cannot do an action, in which {} stands for them.

    more: the end of the cure.
    """
    name = ids._name
    numbers = f"pass {name}.astype(np.float32) for numbers (in PyTorch {name}.float())"
    refuse(
        action.format(f"row numbers ({name}: {ids._show()})"),
        f"use w.rows({name}), or {numbers}{more}",
    )


def _forbidden(action: str, more: str = "") -> Callable[..., Any]:
    # Any: stands in for dunder methods of many signatures; none of them returns
    @located
    def method(self: "SymbolicIds", *args: object, **kwargs: object) -> NoReturn:
        refuse_ids(self, action, more)

    return method


class SymbolicIds:
    """Ids of the function being traced. Only `w.rows(ids)` and `w[ids]` take them."""

    __slots__ = ("_builder", "_node")

    def __init__(self, builder: Builder, node: Node) -> None:
        self._builder = builder
        self._node = node

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        return np.ndarray

    def __repr__(self) -> str:
        return f"<traced {self._show()}>"

    @property
    def _name(self) -> str:
        """What the caller writes for these numbers: the parameter, or a leaf of a container."""
        return self._builder.show_argument(self._node.arg).strip("'\"")

    def _show(self) -> str:
        return f"ids {show_shape(self._node.shape)}"

    def __copy__(self) -> "SymbolicIds":
        return self

    def __deepcopy__(self, memo: object) -> "SymbolicIds":
        return self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(refuse_ids)(self, f"use the attribute .{name} of {{}}")

    @located
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *rest: object, **_: object) -> NoReturn:
        refuse_ids(
            self, "use @ with {}" if ufunc is np.matmul else f"use np.{ufunc.__name__} with {{}}"
        )

    @located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        refuse_ids(self, f"use np.{function.__name__} with {{}}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _forbidden(
        "do arithmetic with {}"
    )
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __add__
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __add__
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __add__
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __add__
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __add__
    __matmul__ = __rmatmul__ = _forbidden("use @ with {}")
    __lt__ = __le__ = __gt__ = __ge__ = _forbidden("compare {}")
    __eq__ = __ne__ = __lt__
    __hash__ = object.__hash__

    # a captured weight's rows(ids) asks for the values too
    __array__ = _forbidden("read the values of {}", "; pass a captured weight as an argument")
    __bool__ = _forbidden("branch on {}")
    __int__ = __index__ = __float__ = __complex__ = _forbidden("convert {} to a number")
    __len__ = _forbidden("take len() of {}")
    __iter__ = __contains__ = _forbidden("iterate over {}")
    __getitem__ = __setitem__ = _forbidden("index {}")
