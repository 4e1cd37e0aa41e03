"""Tracing: run a NumPy function once on symbolic arrays and keep the graph of what it did.

A symbolic array speaks NumPy's protocols, so helpers, loops over static values and closures work
and the function stays ordinary NumPy. Whatever would leak a symbol silently (`bool`, `float`,
`len`, `np.asarray`, `out=`, …) raises a `TraceError` that shows the user's line with a caret.
"""

import functools
import inspect
import itertools
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import numpy as np

from q4jit.errors import TraceError
from q4jit.frontend.graph import (
    ArraySpec,
    Builder,
    Dim,
    Graph,
    IdsSpec,
    Lead,
    Node,
    ScalarSpec,
    Signature,
    WeightSpec,
    show_shape,
)
from q4jit.weights.tensor import QuantizedTensor

__all__ = ["SymbolicArray", "SymbolicIds", "SymbolicWeight", "array_spec", "ids_spec", "trace"]

_MAX_EXPONENT: Final = 16

_P = ParamSpec("_P")
_R = TypeVar("_R")

# with the separator at the end: q4jit_plots stands beside q4jit, not in it
_PACKAGE: Final = f"{Path(__file__).parents[1]}{os.sep}"
_NUMPY: Final = f"{Path(np.__file__).parent}{os.sep}"

_UFUNCS: Final = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "negative": "neg",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "sqrt": "sqrt",
    "absolute": "abs",
    "fabs": "abs",
    "maximum": "maximum",
    "minimum": "minimum",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "invert": "not",
}
_ACCEPTED: Final = (
    "accepted are @, arithmetic, ** with a small whole exponent, comparisons, np.where exp log "
    "tanh sqrt abs square reciprocal maximum minimum clip sum mean, and slices of the last axis"
)

_WEIGHT_IN_ARITHMETIC: Final = (
    "found a quantised weight as an operand of element-wise arithmetic: accepted is x @ w"
)
_ONLY_ROWS: Final = (
    "accepted is w.rows(ids); for numbers pass a float32 array, made by .astype(np.float32)"
)


def trace(
    function: Callable[..., object], signature: Signature, keywords: tuple[str, ...] = ()
) -> Graph:
    """Run `function` on symbols of `signature` and return its graph.

    keywords: the names under which the last arguments are passed. Raises TraceError, with the
    user's line, for everything that cannot be compiled.
    """
    builder = Builder(signature)
    symbols = [_symbol(builder, i) for i in range(len(signature))]
    split = len(symbols) - len(keywords)
    try:
        result = function(*symbols[:split], **dict(zip(keywords, symbols[split:], strict=True)))
    except Exception as error:
        if isinstance(error.__cause__, TraceError):  # NumPy puts an error of its own before ours
            raise error.__cause__ from None
        raise
    name = getattr(function, "__name__", "function")
    if isinstance(result, list):
        _refuse_result(function, f"a list of {len(result)}")
    returns_tuple = isinstance(result, tuple)
    values = tuple(result) if isinstance(result, tuple) else (result,)
    if not values:
        _refuse_result(function, "an empty tuple")
    outputs = []
    for value in values:
        if not isinstance(value, SymbolicArray):
            _refuse_result(function, f"{type(value).__name__} {value!r}")
        if value._builder is not builder:
            _refuse_result(function, "a symbol of another trace")
        outputs.append(builder.number(value._node))
    return Graph(
        _clean_name(name),
        _argument_names(function, signature),
        signature,
        tuple(outputs),
        returns_tuple,
    )


def _argument_names(function: Callable[..., object], signature: Signature) -> tuple[str, ...]:
    names = [_clean_name(name) for name in inspect.signature(function).parameters]
    distinct = len(names) == len(signature) == len(set(names))
    return tuple(names) if distinct else tuple(f"arg{i}" for i in range(len(signature)))


def _clean_name(name: str) -> str:
    clean = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_")
    return clean if clean and not clean[0].isdigit() else f"f_{clean}"


def _refuse_result(function: Callable[..., object], found: str) -> NoReturn:
    code = getattr(function, "__code__", None)
    where = f"\n\n  File {code.co_filename!r}, line {code.co_firstlineno}" if code else ""
    raise TraceError(
        f"{getattr(function, '__name__', 'the function')} returned {found}: accepted is an array "
        f"computed from the arguments, or a tuple of such arrays{where}"
    )


def _symbol(builder: Builder, arg: int) -> object:
    spec = builder.signature[arg]
    if isinstance(spec, ArraySpec):
        return SymbolicArray(builder, builder.load(arg, spec.shape))
    if isinstance(spec, WeightSpec):
        return SymbolicWeight(builder, arg)
    if isinstance(spec, IdsSpec):
        return SymbolicIds(builder, builder.ids(arg))
    if isinstance(spec, ScalarSpec):
        return SymbolicArray(builder, builder.scalar(arg))
    return spec.value


# --- where in the user's code ---------------------------------------------------------------


def _located(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Add the user's line and a caret to a TraceError that leaves `method`."""

    @functools.wraps(method)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except TraceError as error:
            place = _user_line()
            if "\n\n" in str(error) or not place:
                raise
            raise TraceError(f"{error}\n\n{place}") from None

    return wrapper


def _user_line() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, _NUMPY)):
        frame = frame.f_back
    if frame is None:
        return ""
    code, line = frame.f_code, frame.f_lineno
    text = f"  File {code.co_filename!r}, line {line}, in {code.co_name}"
    source = linecache.getline(code.co_filename, line).rstrip("\n")
    if not source.strip():
        return text
    indent = len(source) - len(source.lstrip())
    text += f"\n    {source.strip()}"
    span = _column_span(code, frame.f_lasti, line, len(source))
    if span is not None:
        # co_positions counts UTF-8 bytes, the terminal counts characters
        raw = source.encode()
        first, last = (len(raw[:at].decode(errors="replace")) for at in span)
        text += f"\n    {' ' * (first - indent)}{'^' * max(1, last - first)}"
    return text


def _column_span(code: CodeType, lasti: int, line: int, length: int) -> tuple[int, int] | None:
    positions = next(itertools.islice(code.co_positions(), lasti // 2, None), None)
    if positions is None:
        return None
    first_line, last_line, first, last = positions
    if first_line != line or first is None or last is None:
        return None
    return first, last if last_line == line else length * 4


# --- symbols --------------------------------------------------------------------------------


def _binary(op: str, swap: bool = False) -> Callable[["SymbolicArray", object], "SymbolicArray"]:
    @_located
    def method(self: "SymbolicArray", other: object) -> "SymbolicArray":
        left, right = self._node, self._operand(other)
        return self._apply(op, *((right, left) if swap else (left, right)))

    return method


def _unary(op: str) -> Callable[["SymbolicArray"], "SymbolicArray"]:
    @_located
    def method(self: "SymbolicArray") -> "SymbolicArray":
        return self._apply(op, self._node)

    return method


def _forbidden(what: str, instead: str) -> Callable[..., Any]:
    # Any: stands in for dunder methods of many signatures, none of which ever returns
    @_located
    def method(self: "SymbolicArray", *args: object, **kwargs: object) -> NoReturn:
        raise TraceError(
            f"found {what} of a value that is only known when the kernel runs: {instead}"
        )

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

    def _apply(self, op: str, *operands: Node) -> "SymbolicArray":
        return SymbolicArray(self._builder, self._builder.apply(op, *operands))

    def _operand(self, value: object) -> Node:
        if isinstance(value, SymbolicArray):
            if value._builder is not self._builder:
                raise TraceError("found a traced value of another call: accepted are this call's")
            return value._node
        if isinstance(value, bool | int | float | np.number | np.bool_):
            if isinstance(value, complex | np.complexfloating):
                raise TraceError(f"found the complex number {value!r}: accepted are real ones")
            return self._builder.const(_real(value))
        if isinstance(value, SymbolicWeight):
            raise TraceError(_WEIGHT_IN_ARITHMETIC)
        if isinstance(value, SymbolicIds):
            _refuse_ids(value, "an operand of arithmetic")
        if isinstance(value, np.ndarray):
            if value.ndim == 0 and value.dtype.kind in "biuf":
                return self._builder.const(_real(value))
            raise TraceError(
                f"found a captured array of shape {value.shape} and dtype {value.dtype}: accepted "
                "is an argument; pass it to the function"
            )
        raise TraceError(f"found an operand of type {type(value).__name__}: {_ACCEPTED}")

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

    __bool__ = _forbidden("the truth value", "a branch must use np.where")
    __int__ = __index__ = _forbidden("an int()", "keep it an array")
    __float__ = _forbidden("a float()", "keep it an array")
    __complex__ = _forbidden("a complex()", "keep it an array")
    __len__ = _forbidden("the len()", "use the last dimension, x.shape[-1]")
    __iter__ = _forbidden("iteration", "use slices of the last axis")
    __contains__ = _forbidden("a membership test", "use comparisons and np.where")
    __setitem__ = _forbidden("assignment into an element", "build a new value with np.where")
    __array__ = _forbidden("a conversion to a NumPy array", _ACCEPTED)
    __floordiv__ = __rfloordiv__ = _forbidden("the // operator", _ACCEPTED)
    __mod__ = __rmod__ = _forbidden("the % operator", _ACCEPTED)
    __divmod__ = __rdivmod__ = _forbidden("divmod()", _ACCEPTED)
    __round__ = _forbidden("round()", _ACCEPTED)
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _forbidden("a shift", _ACCEPTED)
    __xor__ = __rxor__ = _forbidden("the ^ operator", _ACCEPTED)
    __rpow__ = _forbidden("an exponent", "use np.exp and np.log")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return _located(_unsupported)(f"the attribute .{name} of a traced array")

    @_located
    def __pow__(self, exponent: object) -> "SymbolicArray":
        if isinstance(exponent, float | np.floating) and float(exponent).is_integer():
            exponent = int(exponent)
        if not isinstance(exponent, int | np.integer) or abs(int(exponent)) > _MAX_EXPONENT:
            # repr() refuses whole numbers of thousands of digits
            short = isinstance(exponent, int) and exponent.bit_length() <= 64
            shown = repr(exponent) if short or isinstance(exponent, float) else "something else"
            raise TraceError(
                f"found ** with the exponent {shown}: accepted are whole numbers from "
                f"-{_MAX_EXPONENT} to {_MAX_EXPONENT} known while tracing (np.sqrt for 0.5)"
            )
        return SymbolicArray(self._builder, self._builder.power(self._node, int(exponent)))

    @_located
    def __matmul__(self, other: object) -> "SymbolicArray":
        return _matmul(self, other)

    @_located
    def __rmatmul__(self, other: object) -> "SymbolicArray":
        return _matmul(other, self)

    @_located
    def __getitem__(self, index: object) -> "SymbolicArray":
        return _getitem(self, index)

    @_located
    def sum(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """The sum over the last axis."""
        return _sum(self, axis, keepdims=keepdims, **rest)

    @_located
    def mean(self, axis: object = None, *, keepdims: bool = False, **rest: object) -> object:
        """The mean over the last axis."""
        return _mean(self, axis, keepdims=keepdims, **rest)

    @_located
    def clip(self, a_min: object = None, a_max: object = None, **rest: object) -> object:
        """The values held between two bounds."""
        return _clip(self, a_min, a_max, **rest)

    @_located
    def astype(self, dtype: object, **rest: object) -> "SymbolicArray":
        """The value itself for f32, which is all that a kernel computes in."""
        if rest or np.dtype(dtype) != np.float32:  # type: ignore[call-overload]  # any object
            raise TraceError(f"found astype({dtype!r}): accepted is np.float32")
        return SymbolicArray(self._builder, self._builder.number(self._node))

    @_located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> "SymbolicArray":
        name = ufunc.__name__
        if method != "__call__":
            _unsupported(f"np.{name}.{method}")
        if kwargs.pop("out", None) is not None:
            raise TraceError(
                f"found out= (or an in-place operation on a real array) in np.{name}: accepted "
                "are new values; out= belongs to the call of the decorated function"
            )
        if kwargs:
            _unsupported(f"np.{name} with {', '.join(f'{k}=' for k in sorted(kwargs))}")
        if name == "matmul":
            return _matmul(*inputs)
        if name in {"power", "float_power"}:
            if not isinstance(inputs[0], SymbolicArray):
                _unsupported("a traced exponent")
            return inputs[0].__pow__(inputs[1])
        operands = [self._operand(value) for value in inputs]
        if name == "square":
            return self._apply("mul", operands[0], operands[0])
        if name == "reciprocal":
            return self._apply("div", self._builder.const(1.0), operands[0])
        if name == "positive":
            return self
        if name == "clip":
            return self._apply("minimum", self._apply("maximum", *operands[:2])._node, operands[2])
        if name not in _UFUNCS:
            _unsupported(f"np.{name}")
        return self._apply(_UFUNCS[name], *operands)

    @_located
    def __array_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        handler = _FUNCTIONS.get(function)
        if handler is None:
            _unsupported(f"np.{function.__name__}")
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

    @_located
    def dequantize(self) -> SymbolicArray:
        """The weights as f32 [K, N]; accepted as a result of the function only."""
        return SymbolicArray(self._builder, self._builder.dequantize(self._arg))

    @_located
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

    @_located
    def __rmatmul__(self, other: object) -> SymbolicArray:
        return _matmul(other, self)

    @_located
    def __matmul__(self, other: object) -> NoReturn:
        raise TraceError("found w @ something: accepted is x @ w, the weight on the right")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return _located(_unsupported)(f"the attribute .{name} of a quantised weight")

    @_located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> SymbolicArray:
        if ufunc is np.matmul and method == "__call__" and not kwargs:
            return _matmul(*inputs)
        raise TraceError(f"found np.{ufunc.__name__} of a quantised weight: accepted is x @ w")

    @_located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        raise TraceError(f"found np.{function.__name__} of a quantised weight: accepted is x @ w")

    @_located
    def _arithmetic(self, *others: object) -> NoReturn:
        raise TraceError(_WEIGHT_IN_ARITHMETIC)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _arithmetic
    __neg__ = __pos__ = __abs__ = __invert__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = _arithmetic
    __eq__ = __ne__ = _arithmetic
    __hash__ = object.__hash__

    __array__ = _forbidden("a conversion to a NumPy array", "accepted is x @ w")
    __bool__ = _forbidden("the truth value", "accepted is x @ w")
    __float__ = __int__ = _forbidden("a conversion to a number", "accepted is x @ w")
    __len__ = _forbidden("the len()", "use w.shape")
    __iter__ = _forbidden("iteration", "accepted is x @ w")
    __getitem__ = _forbidden("an index into a weight", "slice the result: (x @ w)[..., a:b]")


def _refuse_ids(ids: "SymbolicIds", what: str) -> NoReturn:
    raise TraceError(f"found integers, {ids._show()}, as {what}: {_ONLY_ROWS}")


def _not_of_ids(what: str) -> Callable[..., Any]:
    # Any: stands in for dunder methods of many signatures, none of which ever returns
    @_located
    def method(self: "SymbolicIds", *args: object, **kwargs: object) -> NoReturn:
        _refuse_ids(self, what)

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
        return _located(_refuse_ids)(self, f"the owner of .{name}")

    @_located
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *rest: object, **_: object) -> NoReturn:
        if ufunc is np.matmul:
            _refuse_ids(self, "an operand of @")
        _refuse_ids(self, f"an operand of np.{ufunc.__name__}")

    @_located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        _refuse_ids(self, f"an argument of np.{function.__name__}")

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


class _OpaqueLength:
    """The length of a leading axis: one kernel serves every length, so it has no value."""

    __slots__ = ("_dim",)

    def __init__(self, dim: Lead) -> None:
        self._dim = dim

    def __repr__(self) -> str:
        return str(self._dim)

    __index__ = __int__ = __float__ = __bool__ = _forbidden(
        "the number of rows", "the kernel serves any number; only x.shape[-1] is a number"
    )
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __index__
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __index__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __index__
    __hash__ = object.__hash__


# --- NumPy's functions ----------------------------------------------------------------------


def _unsupported(what: str) -> NoReturn:
    raise TraceError(f"found {what}, which cannot be compiled: {_ACCEPTED}")


def _real(value: Any) -> float:  # Any: whatever has a __float__
    try:
        return float(value)
    except OverflowError:
        raise TraceError(
            f"found a whole number of {int(value).bit_length()} bits: accepted are numbers that "
            "float() takes; write np.inf for more"
        ) from None


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
        _refuse_ids(w, "an operand of @")
    found = f"f32 {show_shape(w._node.shape)}" if isinstance(w, SymbolicArray) else type(w).__name__
    raise TraceError(
        f"found a plain matrix ({found}) on the right of @: accepted is a "
        'QuantizedTensor; quantize(w, "F32") makes one without loss'
    )


def _getitem(value: SymbolicArray, index: object) -> SymbolicArray:
    builder, node = value._builder, value._node
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [p for p in parts if p is Ellipsis]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        missing = len(node.shape) - sum(p is not None and p is not Ellipsis for p in parts)
        parts[at : at + 1] = [slice(None)] * missing
    axes = [p for p in parts if p is not None]
    axes += [slice(None)] * (len(node.shape) - len(axes))
    if any(isinstance(p, SymbolicArray) for p in parts):
        raise TraceError("found an index that is a traced value: use np.where")
    if len(axes) > len(node.shape) or not all(isinstance(p, slice) for p in axes):
        raise TraceError(f"found the index {index!r}: accepted are slices of the last axis")
    for dim, part in zip(node.shape[:-1], axes[:-1], strict=True):
        if part != slice(None):
            raise TraceError(
                f"found the slice {part!r} of the leading axis {dim}: accepted are slices of the "
                "last axis, as in y[..., a:b]"
            )
    if None in parts:
        if parts[-1] is not None or parts.count(None) > 1:
            raise TraceError("found a new axis that is not the last: accepted is v[..., None]")
        return SymbolicArray(builder, builder.add_last(node))
    if not node.shape:
        return value
    last, part = node.shape[-1], axes[-1]
    assert isinstance(part, slice)
    if not isinstance(last, int):
        if part != slice(None):
            raise TraceError(f"found a slice of the leading axis {last}")
        return value
    try:
        start, stop, step = part.indices(last)
    except TypeError:
        raise TraceError(f"found the slice {part!r}: accepted are whole numbers") from None
    if step != 1 or stop <= start:
        raise TraceError(
            f"found the slice {part!r} of {last} columns: accepted are slices of at least one "
            "column with a step of 1"
        )
    return SymbolicArray(builder, builder.slice(node, start, stop))


def _check_axis(value: SymbolicArray, axis: object, rest: dict[str, object]) -> None:
    for name, given in rest.items():
        if given is np._NoValue or given is None:
            continue
        if name == "dtype" and np.dtype(given) == np.float32:  # type: ignore[call-overload]  # any object
            continue
        _unsupported(f"the argument {name}= of a reduction")
    rank = len(value._node.shape)
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    last = axis is None and rank == 1
    last = last or (isinstance(axis, int | np.integer) and int(axis) in {-1, rank - 1})
    if not last:
        raise TraceError(
            f"found a reduction of {show_shape(value._node.shape)} over axis={axis!r}: accepted is "
            "the last axis, axis=-1"
        )


def _sum(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    keepdims = rest.pop("keepdims", False)
    keep = keepdims is not np._NoValue and bool(keepdims)
    _check_axis(a, axis, {"dtype": dtype, "out": out, **rest})
    return SymbolicArray(a._builder, a._builder.sum(a._node, keep))


def _mean(
    a: SymbolicArray, axis: object = None, dtype: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    total = _sum(a, axis, dtype, out, **rest)
    return total._apply("div", total._node, a._builder.const(float(a._node.width)))


def _clip(
    a: object, a_min: object = None, a_max: object = None, out: object = None, **rest: object
) -> SymbolicArray:
    low, high = rest.pop("min", a_min), rest.pop("max", a_max)
    symbol = next(v for v in (a, low, high) if isinstance(v, SymbolicArray))
    if out is not None or any(v is not None for v in rest.values()):
        _unsupported("np.clip with out=, where= or dtype=")
    node = symbol._operand(a)
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None and bound is not np._NoValue:
            node = symbol._builder.apply(op, node, symbol._operand(bound))
    return SymbolicArray(symbol._builder, node)


def _where(condition: object, *values: object) -> SymbolicArray:
    if len(values) != 2:
        _unsupported("np.where without both values")
    symbol = next(v for v in (condition, *values) if isinstance(v, SymbolicArray))
    return symbol._apply("where", *(symbol._operand(v) for v in (condition, *values)))


_FUNCTIONS: Final[dict[Callable[..., object], Callable[..., object]]] = {
    np.sum: _sum,
    np.mean: _mean,
    np.clip: _clip,
    np.where: _where,
}


def array_spec(shape: tuple[int, ...], sized: bool = False) -> ArraySpec:
    """The spec of an f32 array of `shape`; where `sized`, leading axes keep their length."""
    return ArraySpec((*_leading(shape[:-1], sized), shape[-1]))


def ids_spec(shape: tuple[int, ...], sized: bool = False) -> IdsSpec:
    """The spec of an integer array of `shape`; where `sized`, its axes keep their length."""
    return IdsSpec(_leading(shape, sized))


def _leading(shape: tuple[int, ...], sized: bool) -> tuple[Dim, ...]:
    axes = range(len(shape), 0, -1)
    return tuple(
        1 if length == 1 else Lead(axis, length if sized else None)
        for axis, length in zip(axes, shape, strict=True)
    )
