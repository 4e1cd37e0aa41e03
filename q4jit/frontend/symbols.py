"""Symbolic arrays and weights: they implement NumPy's protocols and record operations as nodes.

Operations that would need a symbol's values (`bool`, `float`, `len`, `np.asarray`, `out=`, …) raise
TraceError.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import located
from q4jit.frontend.graph import Node
from q4jit.frontend.ids import SymbolicIds, refuse_ids
from q4jit.frontend.operations import (
    check_reduction,
    constant,
    elementwise,
    mean,
    power,
    sliced,
    total,
)
from q4jit.frontend.refusals import (
    USE_PRODUCT,
    USE_SUPPORTED,
    forbidden,
    refuse,
    refuse_other_trace,
    unsupported,
)
from q4jit.frontend.shapes import LeadingAxis, show_shape
from q4jit.frontend.specs import WeightSpec
from q4jit.weights.tensor import QuantizedTensor

_COMPUTED: Final = "a value that the kernel computes"
_WEIGHT_ALONE: Final = "compute element by element with a quantised weight"
_OF_WEIGHT: Final = "use x @ w, w.rows(ids), w.dequantize(), w.shape, w.ndim or w.format"
_EXPONENT: Final = (f"use {_COMPUTED} as an exponent", "use np.exp and np.log")
_ROWS_AS_NUMBER: Final = (
    "use the number of rows as a number",
    "a kernel serves any number of them, so only the last dimension, x.shape[-1], is known",
)
_SIGNS: Final = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
}


def _binary(op: str, swap: bool = False) -> Callable[["SymbolicArray", object], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray", other: object) -> "SymbolicArray":
        left, right = self._node, self._operand(other, _SIGNS[op])
        return self._apply(op, *((right, left) if swap else (left, right)))

    return method


def _unary(op: str) -> Callable[["SymbolicArray"], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray") -> "SymbolicArray":
        return self._apply(op, self._node)

    return method


class SymbolicArray:
    """An array (or float) of the function being traced. It has a shape and no values."""

    __slots__ = ("_builder", "_node")

    def __init__(self, builder: Builder, node: Node) -> None:
        self._builder = builder
        self._node = node

    def __repr__(self) -> str:
        return f"<traced f32 {show_shape(self._node.shape)}>"

    @property
    def shape(self) -> tuple[object, ...]:
        """The shape. Leading axes have no value, because one kernel serves every length."""
        return tuple(d if isinstance(d, int) else _RowCount(d) for d in self._node.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._node.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """f32, or bool for a comparison."""
        return np.dtype(np.bool_ if self._node.is_bool else np.float32)

    def _of(self, node: Node) -> "SymbolicArray":
        return SymbolicArray(self._builder, node)

    def _apply(self, op: str, *operands: Node) -> "SymbolicArray":
        return self._of(self._builder.apply(op, *operands))

    def _operand(self, value: object, function: str) -> Node:
        """Return an operand of `function`, such as "+" or "np.exp", as a node."""
        if isinstance(value, SymbolicArray):
            if value._builder is not self._builder:
                refuse_other_trace()
            return value._node
        if isinstance(value, bool | int | float | np.number | np.bool_):
            if isinstance(value, np.complexfloating):
                raise TraceError(
                    expected("a real number", repr(value), where=f"operand of {function}")
                )
            return constant(self._builder, value, function)
        if isinstance(value, SymbolicWeight):
            refuse(_WEIGHT_ALONE, USE_PRODUCT)
        if isinstance(value, SymbolicIds):
            refuse_ids(value, f"use {function} with {{}}")
        if isinstance(value, _RowCount):
            refuse(*_ROWS_AS_NUMBER)
        if isinstance(value, np.ndarray):
            if value.ndim == 0 and value.dtype.kind in "biuf":
                return constant(self._builder, value, function)
            refuse(
                f"use a captured array ({value.dtype} {show_shape(value.shape)}) in {function}",
                "pass it as an argument",
            )
        raise TraceError(
            expected(
                "an array that is an argument, or a real number",
                type(value).__name__,
                where=f"operand of {function}",
            )
        )

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

    def __pos__(self) -> "SymbolicArray":
        return self

    __bool__ = forbidden(f"branch on {_COMPUTED}", "use np.where")
    __int__ = __index__ = forbidden(f"convert {_COMPUTED} to int", "keep it an array")
    __float__ = forbidden(f"convert {_COMPUTED} to float", "keep it an array")
    __complex__ = forbidden(f"convert {_COMPUTED} to complex", "keep it an array")
    __len__ = forbidden(f"take len() of {_COMPUTED}", "use its last dimension, x.shape[-1]")
    __iter__ = forbidden(f"iterate over {_COMPUTED}", "use slices of the last axis")
    __contains__ = forbidden(f"search in {_COMPUTED}", "use comparisons and np.where")
    __setitem__ = forbidden(
        f"assign to elements of {_COMPUTED}", "use np.where to make a new value"
    )
    __array__ = forbidden(f"convert {_COMPUTED} to a NumPy array", USE_SUPPORTED)
    __floordiv__ = __rfloordiv__ = forbidden("compile the // operator", USE_SUPPORTED)
    __mod__ = __rmod__ = forbidden("compile the % operator", USE_SUPPORTED)
    __divmod__ = __rdivmod__ = forbidden("compile divmod()", USE_SUPPORTED)
    __round__ = forbidden("compile round()", USE_SUPPORTED)
    __lshift__ = __rlshift__ = forbidden("compile the << operator", USE_SUPPORTED)
    __rshift__ = __rrshift__ = forbidden("compile the >> operator", USE_SUPPORTED)
    __xor__ = __rxor__ = forbidden("compile the ^ operator", USE_SUPPORTED)
    __rpow__ = forbidden(*_EXPONENT)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(refuse)(f"use the attribute .{name} of an array", USE_SUPPORTED)

    @located
    def __pow__(self, exponent: object) -> "SymbolicArray":
        return self._power(exponent, "**")

    def _power(self, exponent: object, function: str) -> "SymbolicArray":
        if isinstance(exponent, SymbolicArray):
            refuse(*_EXPONENT)
        return self._of(power(self._builder, self._node, exponent, function))

    @located
    def __matmul__(self, other: object) -> "SymbolicArray":
        return _matmul(self, other)

    @located
    def __rmatmul__(self, other: object) -> "SymbolicArray":
        return _matmul(other, self)

    @located
    def __getitem__(self, index: object) -> "SymbolicArray":
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, SymbolicArray) for part in parts):
            refuse(f"index with {_COMPUTED}", "use np.where")
        return self._of(sliced(self._builder, self._node, index))

    @located
    def sum(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """Return the sum over the last axis."""
        return _sum(self, axis, keepdims=keepdims, **rest)

    @located
    def mean(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """Return the mean over the last axis."""
        return _mean(self, axis, keepdims=keepdims, **rest)

    @located
    def clip(self, a_min: object = None, a_max: object = None, **rest: object) -> object:
        """Return the values limited to two bounds."""
        return _clip(self, a_min, a_max, **rest)

    @located
    def astype(self, dtype: object, **rest: object) -> "SymbolicArray":
        """Return the value unchanged, because kernels compute in f32.

        Raises TraceError for another dtype.
        """
        wanted = np.dtype(dtype)  # type: ignore[call-overload]  # any object
        if wanted != np.float32:
            raise TraceError(expected("np.float32", str(wanted), where="astype"))
        if rest:
            unsupported(f"astype with {_keywords(rest)}", "leave it out")
        return self._of(self._builder.number(self._node))

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> "SymbolicArray":
        name = ufunc.__name__
        if method != "__call__":
            unsupported(f"np.{name}.{method}")
        if kwargs.pop("out", None) is not None:
            refuse(
                f"write the result of np.{name} to a NumPy array, by out= or in place",
                "use the new value that it returns, and out= in the call of the decorated function",
            )
        if kwargs:
            cure = "use np.where" if "where" in kwargs else "leave it out"
            unsupported(f"np.{name} with {_keywords(kwargs)}", cure)
        if name == "matmul":
            return _matmul(*inputs)
        if name in {"power", "float_power"}:
            base, exponent = inputs
            if not isinstance(base, SymbolicArray):
                refuse(*_EXPONENT)
            return base._power(exponent, f"np.{name}")
        operands = [self._operand(value, f"np.{name}") for value in inputs]
        return self._of(elementwise(self._builder, name, operands))

    @located
    def __array_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        handler = _FUNCTIONS.get(function)
        if handler is None:
            unsupported(f"np.{function.__name__}")
        return handler(*args, **kwargs)


class SymbolicWeight:
    """A quantised weight [K, N] of the function being traced."""

    __slots__ = ("_arg", "_builder")

    def __init__(self, builder: Builder, arg: int) -> None:
        self._builder = builder
        self._arg = arg

    @property
    def _spec(self) -> WeightSpec:
        spec = self._builder.signature[self._arg]
        assert isinstance(spec, WeightSpec)
        return spec

    def __repr__(self) -> str:
        return f"<traced weight {self._spec}>"

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self._spec.k, self._spec.n

    @property
    def format(self) -> str:
        """The block format's name."""
        return self._spec.format

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @located
    def dequantize(self) -> SymbolicArray:
        """Return the weights as f32 [K, N], which can only be a result of the function."""
        return SymbolicArray(self._builder, self._builder.dequantize(self._arg))

    @located
    def rows(self, ids: object) -> SymbolicArray:
        """Return GGUF rows as f32 [*ids.shape, K], which can only be a result of the function."""
        if not isinstance(ids, SymbolicIds):
            shown = repr(ids) if isinstance(ids, SymbolicArray) else type(ids).__name__
            raise TraceError(
                expected(
                    "an int32 or int64 array [M]",
                    shown,
                    where="w.rows(ids)",
                    cure="pass it as an argument",
                )
            )
        if ids._builder is not self._builder:
            refuse_other_trace()
        return SymbolicArray(self._builder, self._builder.rows(self._arg, ids._node))

    @located
    def __rmatmul__(self, other: object) -> SymbolicArray:
        return _matmul(other, self)

    @located
    def __matmul__(self, other: object) -> NoReturn:
        refuse("multiply with a weight on the left of @", USE_PRODUCT)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(refuse)(f"use the attribute .{name} of a quantised weight", _OF_WEIGHT)

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> SymbolicArray:
        if ufunc is not np.matmul or method != "__call__" or kwargs:
            refuse(f"compute np.{ufunc.__name__} of a quantised weight", USE_PRODUCT)
        return _matmul(*inputs)

    @located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        refuse(f"compute np.{function.__name__} of a quantised weight", USE_PRODUCT)

    @located
    def _arithmetic(self, *others: object) -> NoReturn:
        refuse(_WEIGHT_ALONE, USE_PRODUCT)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _arithmetic
    __neg__ = __pos__ = __abs__ = __invert__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = _arithmetic
    __eq__ = __ne__ = _arithmetic
    __hash__ = object.__hash__

    __array__ = forbidden("convert a quantised weight to a NumPy array", USE_PRODUCT)
    __bool__ = forbidden("branch on a quantised weight", USE_PRODUCT)
    __float__ = __int__ = forbidden("convert a quantised weight to a number", USE_PRODUCT)
    __len__ = forbidden("take len() of a quantised weight", "use w.shape")
    __iter__ = forbidden("iterate over a quantised weight", USE_PRODUCT)
    __getitem__ = forbidden("index a quantised weight", "slice the product, (x @ w)[..., a:b]")


class _RowCount:
    """The length of a leading axis. One kernel serves every length, so it has no value."""

    __slots__ = ("_dim",)

    def __init__(self, dim: LeadingAxis) -> None:
        self._dim = dim

    def __repr__(self) -> str:
        return str(self._dim)

    __index__ = __int__ = __float__ = __bool__ = forbidden(*_ROWS_AS_NUMBER)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __index__
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __index__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __index__
    __hash__ = object.__hash__


def _matmul(x: object, w: object) -> SymbolicArray:
    if isinstance(w, SymbolicWeight):
        if isinstance(x, SymbolicArray):
            if x._builder is not w._builder:
                refuse_other_trace()
            return SymbolicArray(x._builder, x._builder.matmul(x._node, w._arg))
        if isinstance(x, SymbolicWeight):
            refuse("multiply two weights", "use x @ w with a float32 array x")
        raise TraceError(
            expected(
                "a float32 array",
                type(x).__name__,
                where="left operand of @",
                cure="pass it as an argument",
            )
        )
    if isinstance(w, QuantizedTensor):
        refuse(f"use a captured weight ({w!r})", "pass it as an argument")
    if isinstance(w, SymbolicIds):
        refuse_ids(w, "use @ with {}")
    raise TraceError(
        expected(
            "a QuantizedTensor",
            f"f32 {show_shape(w._node.shape)}"
            if isinstance(w, SymbolicArray)
            else type(w).__name__,
            where="right operand of @",
            cure='quantize(w, "F32") makes one without loss',
        )
    )


def _sum(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    keepdims = _take_keepdims(rest)
    check_reduction("np.sum", {"dtype": dtype, "out": out, **rest})
    return a._of(total(a._builder, a._node, "np.sum", axis, keepdims))


def _mean(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    keepdims = _take_keepdims(rest)
    check_reduction("np.mean", {"dtype": dtype, "out": out, **rest})
    return a._of(mean(a._builder, a._node, axis, keepdims))


def _take_keepdims(rest: dict[str, object]) -> bool:
    """Remove keepdims= from a reduction's arguments and return it."""
    keepdims = rest.pop("keepdims", False)
    return keepdims is not np._NoValue and bool(keepdims)


def _keywords(names: Iterable[str]) -> str:
    return ", ".join(f"{name}=" for name in sorted(names))


def _clip(
    a: object, a_min: object = None, a_max: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    low, high = rest.pop("min", a_min), rest.pop("max", a_max)
    symbol = next(v for v in (a, low, high) if isinstance(v, SymbolicArray))
    if out is not None or any(v is not None for v in rest.values()):
        unsupported("np.clip with out=, where= or dtype=", "leave them out")
    node = symbol._operand(a, "np.clip")
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None and bound is not np._NoValue:
            node = symbol._builder.apply(op, node, symbol._operand(bound, "np.clip"))
    return SymbolicArray(symbol._builder, node)


def _where(condition: object, *values: object) -> SymbolicArray:
    if len(values) != 2:
        unsupported("np.where without both values", "use np.where(condition, a, b)")
    symbol = next(v for v in (condition, *values) if isinstance(v, SymbolicArray))
    operands = (symbol._operand(v, "np.where") for v in (condition, *values))
    return symbol._apply("where", *operands)


_FUNCTIONS: Final[dict[Callable[..., object], Callable[..., object]]] = {
    np.sum: _sum,
    np.mean: _mean,
    np.clip: _clip,
    np.where: _where,
}
