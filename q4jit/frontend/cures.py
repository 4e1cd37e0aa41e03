"""What to write instead of the functions, methods and attributes that cannot be compiled."""

import math
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from q4jit.frontend.carets import located, marked_code
from q4jit.frontend.refusals import USE_OTHER_PRODUCT, USE_SLICE, USE_SUPPORTED, refuse

_JOIN: Final = "return the arrays as a tuple, and join them outside"
_SHAPE: Final = "give arguments the shape that they need, or reshape the result outside"
_FILL: Final = "use a number, which broadcasts"
_ARGUMENT: Final = "compute it outside, and pass the result as an argument"
_OUTSIDE: Final = "return the value, and do this outside"
_FLOATS: Final = "leave it out: every value is computed in float32"

_CURES: Final = {
    name: cure
    for names, cure in {
        "dot vdot inner outer tensordot einsum matvec vecmat vecdot": USE_OTHER_PRODUCT,
        "concatenate concat stack hstack vstack column_stack append block": _JOIN,
        "split array_split hsplit": USE_SLICE,
        "T mT transpose reshape ravel flatten squeeze expand_dims swapaxes moveaxis": _SHAPE,
        "tile repeat resize broadcast_to atleast_1d atleast_2d": _SHAPE,
        "zeros_like ones_like full_like empty_like": _FILL,
        "size": "use x.shape[-1]; the number of rows is not known while tracing",
        "argmax argmin argsort sort argpartition partition cumsum cumprod prod median": _OUTSIDE,
        "quantile percentile nonzero unique roll flip pad round floor ceil rint trunc": _OUTSIDE,
        "tolist item numpy cpu nbytes strides": _OUTSIDE,
        "isnan": "use x != x",
        "isfinite": "use abs(x) < np.inf",
        "isinf": "use abs(x) == np.inf",
        "nan_to_num": "use np.where(x == x, x, 0.0)",
        "sign": "use np.where(x > 0, 1.0, np.where(x < 0, -1.0, 0.0))",
        "heaviside": "use np.where",
        "any": "use np.max(condition, -1)",
        "all": "use np.min(condition, -1)",
        "average": "use np.mean",
        "ptp": "use np.max(x, -1) - np.min(x, -1)",
        "shape": "use x.shape",
        "ndim": "use x.ndim",
        "hypot": "use np.sqrt(a * a + b * b)",
        "log2": "use np.log(x) / np.log(2)",
        "log10": "use np.log(x) / np.log(10)",
        "exp2": "use np.exp(x * np.log(2))",
        "log1p": "use np.log(1 + x), which is less exact near 0",
        "expm1": "use np.exp(x) - 1, which is less exact near 0",
        "logaddexp": "use m + np.log(np.exp(a - m) + np.exp(b - m)) with m = np.maximum(a, b)",
        "expit": "use 1 / (1 + np.exp(-x))",
        "softmax": "use e / np.sum(e, -1, keepdims=True) with e = np.exp(x - np.max(x, -1, "
        "keepdims=True))",
        "erf erfc": "use GELU's approximation 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * "
        "x**3)))",
        "sin cos tan": _ARGUMENT,
        "asarray array asanyarray ascontiguousarray float64 double": _FLOATS,
        "float32 float": "use x.astype(np.float32)",
        "float16 half": "use x.astype(np.float16)",
        "bfloat16": "use x.astype(ml_dtypes.bfloat16)",
        "to type": "use x.astype with np.float32, np.float16 or ml_dtypes.bfloat16",
        "take": "use slices of the last axis, and w.rows(ids) for rows of a weight",
    }.items()
    for name in names.split()
}

_OF_MATH: Final = {"fabs": "np.abs", "pow": "**"} | {
    name: f"np.{name}" for name in ("sqrt", "exp", "log", "tanh")
}
"""Functions of `math` that can be compiled under another name."""


def cure_of(name: str) -> str:
    """Return what to write instead of a function, method or attribute of NumPy's arrays."""
    return _CURES.get(name, USE_SUPPORTED)


def numpy_name(function: Callable[..., Any]) -> str:
    """Return the name of a function of NumPy as users write it, for example `np.linalg.inv`."""
    module = getattr(function, "__module__", None) or "numpy"
    return f"{module.replace('numpy', 'np', 1)}.{function.__name__}"


@located
def refuse_conversion(kind: str, cure: str) -> NoReturn:
    """Raise TraceError for a conversion to `kind`, which functions of `math` ask for as well."""
    call = re.match(r"(?:math\.)?(\w+)\(", marked_code())
    if call and not call[1].startswith("_") and hasattr(math, call[1]):
        name = call[1]
        instead = f"use {_OF_MATH[name]}" if name in _OF_MATH else cure_of(name)
        refuse(f"compute math.{name} of a value that the kernel computes", instead)
    refuse(f"convert a value that the kernel computes to {kind}", cure)


def not_converted(kind: str, cure: str = "keep it an array") -> Callable[..., Any]:
    """Return a method that raises the error of `refuse_conversion`."""

    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        refuse_conversion(kind, cure)

    return method


def refuse_array(self: object, *args: object, **kwargs: object) -> NoReturn:
    """Raise TraceError for a conversion to a NumPy array."""
    call = re.match(r"(?:np|numpy)\.(\w+)\(([\[(]?)", marked_code())
    cure = USE_SUPPORTED
    if call:
        cure = _JOIN if call[2] else cure_of(call[1])
    located(refuse)("convert a value that the kernel computes to a NumPy array", cure)


def shown_as(self: object, spec: str) -> str:
    """Return the text of a traced array. Raises TraceError if a format asks for its value."""
    if spec:
        located(refuse)(
            f"print a value that the kernel computes as {spec!r}", "print the result outside"
        )
    return str(self)


@located
def refuse_torch(function: Callable[..., Any]) -> NoReturn:
    """Raise TraceError for a function of PyTorch."""
    name = getattr(function, "__name__", "a function")
    refuse(f"compile {name} of PyTorch", f"use NumPy's functions: {USE_SUPPORTED}")
