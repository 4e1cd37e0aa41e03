"""Symbolic arrays and weights: they speak NumPy's protocols, and each operation becomes a node.

Whatever would leak a symbol silently (`bool`, `float`, `len`, `np.asarray`, `out=`, …) is refused.
"""

from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np

from q4jit.errors import TraceError
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
from q4jit.frontend.refusals import ACCEPTED, forbidden, unsupported
from q4jit.frontend.shapes import Lead, show_shape
from q4jit.frontend.specs import WeightSpec
from q4jit.weights.tensor import QuantizedTensor

_WEIGHT_IN_ARITHMETIC: Final = (
    "found a quantised weight as an operand of element-wise arithmetic: accepted is x @ w"
)


def _binary(op: str, swap: bool = False) -> Callable[["SymbolicArray", object], "SymbolicArray"]:
    @located
    def method(self: "SymbolicArray", other: object) -> "SymbolicArray":
        left, right = self._node, self._operand(other)
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
        """The shape; leading axes are opaque, because one kernel serves every length."""
        return tuple(d if isinstance(d, int) else _OpaqueLength(d) for d in self._node.shape)

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

    def _operand(self, value: object) -> Node:
        if isinstance(value, SymbolicArray):
            if value._builder is not self._builder:
                raise TraceError("found a traced value of another call: accepted are this call's")
            return value._node
        if isinstance(value, bool | int | float | np.number | np.bool_):
            if isinstance(value, complex | np.complexfloating):
                raise TraceError(f"found the complex number {value!r}: accepted are real ones")
            return constant(self._builder, value)
        if isinstance(value, SymbolicWeight):
            raise TraceError(_WEIGHT_IN_ARITHMETIC)
        if isinstance(value, SymbolicIds):
            refuse_ids(value, "an operand of arithmetic")
        if isinstance(value, np.ndarray):
            if value.ndim == 0 and value.dtype.kind in "biuf":
                return constant(self._builder, value)
            raise TraceError(
                f"found a captured array of shape {value.shape} and dtype {value.dtype}: accepted "
                "is an argument; pass it to the function"
            )
        raise TraceError(f"found an operand of type {type(value).__name__}: {ACCEPTED}")

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

    __bool__ = forbidden("the truth value", "a branch must use np.where")
    __int__ = __index__ = forbidden("an int()", "keep it an array")
    __float__ = forbidden("a float()", "keep it an array")
    __complex__ = forbidden("a complex()", "keep it an array")
    __len__ = forbidden("the len()", "use the last dimension, x.shape[-1]")
    __iter__ = forbidden("iteration", "use slices of the last axis")
    __contains__ = forbidden("a membership test", "use comparisons and np.where")
    __setitem__ = forbidden("assignment into an element", "build a new value with np.where")
    __array__ = forbidden("a conversion to a NumPy array", ACCEPTED)
    __floordiv__ = __rfloordiv__ = forbidden("the // operator", ACCEPTED)
    __mod__ = __rmod__ = forbidden("the % operator", ACCEPTED)
    __divmod__ = __rdivmod__ = forbidden("divmod()", ACCEPTED)
    __round__ = forbidden("round()", ACCEPTED)
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = forbidden("a shift", ACCEPTED)
    __xor__ = __rxor__ = forbidden("the ^ operator", ACCEPTED)
    __rpow__ = forbidden("an exponent", "use np.exp and np.log")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(unsupported)(f"the attribute .{name} of a traced array")

    @located
    def __pow__(self, exponent: object) -> "SymbolicArray":
        return self._of(power(self._builder, self._node, exponent))

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
            raise TraceError("found an index that is a traced value: use np.where")
        return self._of(sliced(self._builder, self._node, index))

    @located
    def sum(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """The sum over the last axis."""
        return _sum(self, axis, keepdims=keepdims, **rest)

    @located
    def mean(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """The mean over the last axis."""
        return _mean(self, axis, keepdims=keepdims, **rest)

    @located
    def clip(self, a_min: object = None, a_max: object = None, **rest: object) -> object:
        """The values held between two bounds."""
        return _clip(self, a_min, a_max, **rest)

    @located
    def astype(self, dtype: object, **rest: object) -> "SymbolicArray":
        """The value itself for f32, which is all that a kernel computes in."""
        if rest or np.dtype(dtype) != np.float32:  # type: ignore[call-overload]  # any object
            raise TraceError(f"found astype({dtype!r}): accepted is np.float32")
        return self._of(self._builder.number(self._node))

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> "SymbolicArray":
        name = ufunc.__name__
        if method != "__call__":
            unsupported(f"np.{name}.{method}")
        if kwargs.pop("out", None) is not None:
            raise TraceError(
                f"found out= (or an in-place operation on a real array) in np.{name}: accepted "
                "are new values; out= belongs to the call of the decorated function"
            )
        if kwargs:
            unsupported(f"np.{name} with {', '.join(f'{k}=' for k in sorted(kwargs))}")
        if name == "matmul":
            return _matmul(*inputs)
        if name in {"power", "float_power"}:
            if not isinstance(inputs[0], SymbolicArray):
                unsupported("a traced exponent")
            return inputs[0].__pow__(inputs[1])
        operands = [self._operand(value) for value in inputs]
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
        """The weights as f32 [K, N]; accepted as a result of the function only."""
        return SymbolicArray(self._builder, self._builder.dequantize(self._arg))

    @located
    def rows(self, ids: object) -> SymbolicArray:
        """GGUF rows as f32 [*ids.shape, K]; accepted as a result of the function only."""
        if not isinstance(ids, SymbolicIds):
            found = repr(ids) if isinstance(ids, SymbolicArray) else type(ids).__name__
            raise TraceError(
                f"found w.rows of {found}: accepted is an int32 or int64 array [M]; pass it as an "
                "argument"
            )
        if ids._builder is not self._builder:
            raise TraceError("found a traced value of another call: accepted are this call's")
        return SymbolicArray(self._builder, self._builder.rows(self._arg, ids._node))

    @located
    def __rmatmul__(self, other: object) -> SymbolicArray:
        return _matmul(other, self)

    @located
    def __matmul__(self, other: object) -> NoReturn:
        raise TraceError("found w @ something: accepted is x @ w, the weight on the right")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(unsupported)(f"the attribute .{name} of a quantised weight")

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> SymbolicArray:
        if ufunc is np.matmul and method == "__call__" and not kwargs:
            return _matmul(*inputs)
        raise TraceError(f"found np.{ufunc.__name__} of a quantised weight: accepted is x @ w")

    @located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        raise TraceError(f"found np.{function.__name__} of a quantised weight: accepted is x @ w")

    @located
    def _arithmetic(self, *others: object) -> NoReturn:
        raise TraceError(_WEIGHT_IN_ARITHMETIC)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _arithmetic
    __neg__ = __pos__ = __abs__ = __invert__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = _arithmetic
    __eq__ = __ne__ = _arithmetic
    __hash__ = object.__hash__

    __array__ = forbidden("a conversion to a NumPy array", "accepted is x @ w")
    __bool__ = forbidden("the truth value", "accepted is x @ w")
    __float__ = __int__ = forbidden("a conversion to a number", "accepted is x @ w")
    __len__ = forbidden("the len()", "use w.shape")
    __iter__ = forbidden("iteration", "accepted is x @ w")
    __getitem__ = forbidden("an index into a weight", "slice the result: (x @ w)[..., a:b]")


class _OpaqueLength:
    """The length of a leading axis: one kernel serves every length, so it has no value."""

    __slots__ = ("_dim",)

    def __init__(self, dim: Lead) -> None:
        self._dim = dim

    def __repr__(self) -> str:
        return str(self._dim)

    __index__ = __int__ = __float__ = __bool__ = forbidden(
        "the number of rows", "the kernel serves any number; only x.shape[-1] is a number"
    )
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __index__
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __index__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __index__
    __hash__ = object.__hash__


def _matmul(x: object, w: object) -> SymbolicArray:
    if isinstance(w, SymbolicWeight):
        if isinstance(x, SymbolicArray):
            if x._builder is not w._builder:
                raise TraceError("found a traced value of another call: accepted are this call's")
            return SymbolicArray(x._builder, x._builder.matmul(x._node, w._arg))
        if isinstance(x, SymbolicWeight):
            raise TraceError("found a product of two weights: accepted is x @ w, x an f32 array")
        raise TraceError(
            f"found {type(x).__name__} @ w: accepted is a traced f32 array; pass it as an argument"
        )
    if isinstance(w, QuantizedTensor):
        raise TraceError(f"found the captured weight {w!r}: accepted is an argument; pass it")
    if isinstance(w, SymbolicIds):
        refuse_ids(w, "an operand of @")
    found = f"f32 {show_shape(w._node.shape)}" if isinstance(w, SymbolicArray) else type(w).__name__
    raise TraceError(
        f"found a plain matrix ({found}) on the right of @: accepted is a "
        'QuantizedTensor; quantize(w, "F32") makes one without loss'
    )


def _sum(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    keep = _keeps_dims(rest)
    check_reduction({"dtype": dtype, "out": out, **rest})
    return a._of(total(a._builder, a._node, axis, keep))


def _mean(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    keep = _keeps_dims(rest)
    check_reduction({"dtype": dtype, "out": out, **rest})
    return a._of(mean(a._builder, a._node, axis, keep))


def _keeps_dims(rest: dict[str, object]) -> bool:
    """Take keepdims= out of a reduction's arguments."""
    keepdims = rest.pop("keepdims", False)
    return keepdims is not np._NoValue and bool(keepdims)


def _clip(
    a: object, a_min: object = None, a_max: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    low, high = rest.pop("min", a_min), rest.pop("max", a_max)
    symbol = next(v for v in (a, low, high) if isinstance(v, SymbolicArray))
    if out is not None or any(v is not None for v in rest.values()):
        unsupported("np.clip with out=, where= or dtype=")
    node = symbol._operand(a)
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None and bound is not np._NoValue:
            node = symbol._builder.apply(op, node, symbol._operand(bound))
    return SymbolicArray(symbol._builder, node)


def _where(condition: object, *values: object) -> SymbolicArray:
    if len(values) != 2:
        unsupported("np.where without both values")
    symbol = next(v for v in (condition, *values) if isinstance(v, SymbolicArray))
    return symbol._apply("where", *(symbol._operand(v) for v in (condition, *values)))


_FUNCTIONS: Final[dict[Callable[..., object], Callable[..., object]]] = {
    np.sum: _sum,
    np.mean: _mean,
    np.clip: _clip,
    np.where: _where,
}
