"""Symbolic arrays: they implement NumPy's protocols and record operations as nodes.

Operations that would need a symbol's values (`bool`, `float`, `len`, `np.asarray`, `out=`, …) raise
TraceError.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from q4jit.floats import FloatType
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import located, user_line
from q4jit.frontend.cures import cure_of, numpy_name
from q4jit.frontend.experts import product_of
from q4jit.frontend.functions import FUNCTIONS, keywords
from q4jit.frontend.graph import BOOLEAN, Node
from q4jit.frontend.kinds import (
    NUMBER_KINDS,
    PYTHON,
    Kind,
    dtype_of,
    float_type_named,
    kind_of_operator,
    kind_of_ufunc,
    type_of_value,
)
from q4jit.frontend.matrices import SymbolicMatrix
from q4jit.frontend.memory import Memory, check_in_place
from q4jit.frontend.operands import is_truth, kinds_of, operand, promoted_type
from q4jit.frontend.operations import elementwise, power, sliced
from q4jit.frontend.products import refuse_product
from q4jit.frontend.refusals import (
    refuse,
    refuse_other_trace,
    unsupported,
)
from q4jit.frontend.refused_operators import (
    COMPUTED,
    EXPONENT,
    SIGNS,
    RefusedOperators,
)
from q4jit.frontend.row_counts import RowCount
from q4jit.frontend.shapes import LeadingAxis, show_shape


def _binary(op: str, swap: bool = False) -> Callable[["SymbolicArray", object], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray", other: object) -> "SymbolicArray":
        return self._operator(op, *((other, self) if swap else (self, other)))

    return method


def _in_place(op: str) -> Callable[["SymbolicArray", object], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray", other: object) -> "SymbolicArray":
        return self._assign(self._operator(op, self, other), f"{SIGNS[op]}=")

    return method


def _unary(op: str) -> Callable[["SymbolicArray"], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray") -> "SymbolicArray":
        return self._operator(op, self)

    return method


def _reduction(function: Callable[..., object]) -> Callable[..., object]:
    @located
    def method(self: "SymbolicArray", axis: object = None, **rest: object) -> object:
        return FUNCTIONS[function](self, self, axis, **rest)

    return method


# attributes of a traced array that Python's numbers do not have
_OF_ARRAYS: Final = frozenset("shape ndim dtype sum mean max min var std clip astype copy".split())


class SymbolicArray(RefusedOperators):
    """An array (or float) of the function being traced. It has a shape and no values.

    It is an object of its own, as in NumPy: an operation in place gives it another node.
    """

    __slots__ = ("__weakref__", "_builder", "_float_type", "_kind", "_memory", "_node", "_place")

    def __init__(
        self,
        builder: Builder,
        node: Node,
        kind: Kind = np.ndarray,
        memory: Memory | None = None,
        start: int = 0,
        float_type: FloatType | None = "f32",
    ) -> None:
        """Make the symbol of a value.

        kind: the type that a value without axes has in NumPy. memory: the memory that it shares
        with another array, from column `start`; None: memory of its own. float_type: the type that
        it gives to results; None if it adapts to other values.
        """
        self._builder = builder
        self._node = node
        self._kind = np.ndarray if node.shape else kind
        self._float_type = type_of_value(node, float_type)
        self._memory = Memory() if memory is None else memory
        self._memory.add(self, start, node.width)
        self._place = user_line() if node.is_bool else ""

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        if self._kind is None:
            located(refuse)("ask for the type of a computed number", "test the arguments instead")
        return self._kind

    def __repr__(self) -> str:
        return f"<traced {self._float_type or 'f32'} {show_shape(self._node.shape)}>"

    @property
    def shape(self) -> tuple[object, ...]:
        """The shape. Leading axes have no value, because one kernel serves every length."""
        return tuple(
            RowCount(d) if isinstance(d, LeadingAxis) else int(d) for d in self._node.shape
        )

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._node.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that NumPy's rule gives; bool for a comparison."""
        if self._node.is_bool:
            return np.dtype(np.bool_)
        return located(dtype_of)(self._float_type or "f32")

    def _of(
        self, node: Node, kind: Kind = np.ndarray, float_type: FloatType | None = None
    ) -> "SymbolicArray":
        return SymbolicArray(self._builder, node, kind, float_type=float_type)

    def _operator(self, op: str, *values: object) -> "SymbolicArray":
        """Return the result of Python's operator `op`."""
        nodes, kinds = self._nodes(values, SIGNS.get(op, op)), kinds_of(values)
        if op not in BOOLEAN and PYTHON.issuperset(kinds):  # True + True is 2, ~True is -2
            nodes = [self._builder.number(node) for node in nodes]
        elif op == "not" and PYTHON.issuperset(kinds):
            refuse("compile ~ of Python's truth values", "use np.logical_not")
        node = self._builder.apply(op, *nodes)
        return self._of(node, kind_of_operator(op, kinds), promoted_type(values))

    def _ufunc(self, name: str, function: str, *values: object) -> "SymbolicArray":
        """Return the result of NumPy's ufunc `name`; function: what the user called."""
        node = elementwise(self._builder, name, self._nodes(values, function))
        return self._of(node, kind_of_ufunc(node.op, kinds_of(values)), promoted_type(values))

    def _assign(self, result: "SymbolicArray", sign: str) -> "SymbolicArray":
        """Give this array the value of an operation in place; sign: such as "+=".

        Numbers cannot change: the name gets the result, as in Python.
        """
        if not self._node.shape and self._kind is not np.ndarray:
            return result
        self._memory.check_write(self, sign)
        check_in_place(self._node, result._node, sign)
        self._node, self._place = result._node, result._place
        return self

    def _nodes(self, values: Sequence[object], function: str) -> list[Node]:
        """Return the operands of a function; True beside truth values is one, else a number."""
        if not all(map(is_truth, values)):
            return [self._operand(value, function) for value in values]
        return [
            self._operand(value, function)
            if isinstance(value, SymbolicArray)
            else self._builder.truth(bool(value))
            for value in values
        ]

    def _operand(self, value: object, function: str) -> Node:
        return operand(self._builder, value, function)

    __add__, __radd__ = _binary("add"), _binary("add", swap=True)
    __sub__, __rsub__ = _binary("sub"), _binary("sub", swap=True)
    __mul__, __rmul__ = _binary("mul"), _binary("mul", swap=True)
    __truediv__, __rtruediv__ = _binary("div"), _binary("div", swap=True)
    __lt__, __le__ = _binary("lt"), _binary("le")
    __gt__, __ge__ = _binary("gt"), _binary("ge")
    __and__, __rand__ = _binary("and"), _binary("and", swap=True)
    __or__, __ror__ = _binary("or"), _binary("or", swap=True)
    __neg__, __abs__, __invert__ = _unary("neg"), _unary("abs"), _unary("not")

    # object declares == and != as returning bool; arrays compare element by element
    __eq__ = _binary("eq")  # type: ignore[assignment]
    __ne__ = _binary("ne")  # type: ignore[assignment]
    __hash__ = object.__hash__

    __iadd__, __isub__, __imul__ = _in_place("add"), _in_place("sub"), _in_place("mul")
    __itruediv__, __iand__, __ior__ = _in_place("div"), _in_place("and"), _in_place("or")

    @located
    def __pos__(self) -> "SymbolicArray":
        if self._kind in PYTHON:
            kind = kind_of_operator("pos", [self._kind])
            return self._of(self._builder.number(self._node), kind, self._float_type)
        return self._ufunc("positive", "+", self)

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_ARRAYS and object.__getattribute__(self, "_kind") in PYTHON:
            raise AttributeError(name)  # Python goes on to __getattr__
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        if self._kind in PYTHON and not hasattr(self._kind, name):
            assert self._kind is not None
            raise AttributeError(f"{self._kind.__name__!r} object has no attribute {name!r}")
        return located(refuse)(f"use the attribute .{name} of an array", cure_of(name))

    @located
    def __pow__(self, exponent: object) -> "SymbolicArray":
        return self._power(exponent, "**")

    @located
    def __ipow__(self, exponent: object) -> "SymbolicArray":
        return self._assign(self._power(exponent, "**"), "**=")

    def _power(self, exponent: object, function: str) -> "SymbolicArray":
        if isinstance(exponent, SymbolicArray):
            refuse(*EXPONENT)
        kinds = kinds_of((self, exponent))
        kind = kind_of_operator("mul", kinds) if function == "**" else kind_of_ufunc("mul", kinds)
        if function == "np.float_power":
            kind = np.float64
        node = power(self._builder, self._node, exponent, function)
        return self._of(node, kind, promoted_type((self, exponent)))

    @located
    def __matmul__(self, other: object) -> "SymbolicArray":
        return _matmul(self, other)

    @located
    def __rmatmul__(self, other: object) -> "SymbolicArray":
        return _matmul(other, self)

    @located
    def __getitem__(self, index: object) -> "SymbolicArray":
        parts = index if type(index) is tuple else (index,)
        if any(isinstance(part, SymbolicArray) for part in parts):
            refuse(f"index with {COMPUTED}", "use np.where")
        node, start = sliced(self._builder, self._node, index)
        start += self._memory.columns(self).start
        memory = self._memory
        return SymbolicArray(self._builder, node, np.ndarray, memory, start, self._float_type)

    @located
    def copy(self, order: str = "C") -> "SymbolicArray":
        """Return an array of its own with the same values."""
        return self._of(self._node, self._kind, self._float_type)

    __copy__ = copy

    @located
    def __deepcopy__(self, memo: object) -> "SymbolicArray":
        return self.copy()

    _traced_vecmat = staticmethod(product_of)
    sum, mean = _reduction(np.sum), _reduction(np.mean)
    max, min = _reduction(np.max), _reduction(np.min)
    var, std = _reduction(np.var), _reduction(np.std)

    @located
    def clip(self, a_min: object = None, a_max: object = None, **rest: object) -> object:
        """Return the values limited to two bounds."""
        return FUNCTIONS[np.clip](self, self, a_min, a_max, **rest)

    @located
    def astype(self, dtype: object, **rest: object) -> "SymbolicArray":
        """Return the value as another float type. Only results are rounded to it.

        Raises TraceError for another dtype.
        """
        float_type = float_type_named(dtype, "astype")
        if rest:
            unsupported(f"astype with {keywords(rest)}", "leave it out")
        return self._of(self._builder.number(self._node), NUMBER_KINDS[float_type], float_type)

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> "SymbolicArray":
        name = ufunc.__name__
        if not hasattr(np, name):  # of another library
            unsupported(f"{name} of another library than NumPy", cure_of(name))
        if method != "__call__":
            unsupported(f"np.{name}.{method}")
        if kwargs.pop("out", None) is not None:
            refuse(
                f"write the result of np.{name} to a NumPy array, by out= or in place",
                "use the new value that it returns, and out= in the call of the decorated function",
            )
        if kwargs:
            cure = "use np.where" if "where" in kwargs else "leave it out"
            unsupported(f"np.{name} with {keywords(kwargs)}", cure)
        if name in _PRODUCTS:
            return _PRODUCTS[name](*inputs)
        if name in {"power", "float_power"}:
            base, exponent = inputs
            if not isinstance(base, SymbolicArray):
                refuse(*EXPONENT)
            return base._power(exponent, f"np.{name}")
        return self._ufunc(name, f"np.{name}", *inputs)

    @located
    def __array_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        handler = FUNCTIONS.get(function)
        if handler is None:
            unsupported(numpy_name(function), cure_of(function.__name__))
        return handler(self, *args, **kwargs)


def _matmul(x: object, w: object) -> SymbolicArray:
    if not issubclass(type(w), SymbolicMatrix) or not isinstance(x, SymbolicArray):
        refuse_product(x, w)
    assert isinstance(w, SymbolicMatrix)
    if x._builder is not w._builder:
        refuse_other_trace()
    node = x._builder.matmul(x._node, w._arg, w._transposed)
    return x._of(node, float_type=x._float_type)


_PRODUCTS: Final[dict[str, Callable[..., SymbolicArray]]] = {
    "matmul": _matmul,
    "vecmat": product_of,
}
