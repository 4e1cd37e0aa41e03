"""TraceErrors: what each says, and which code of the user it marks."""

# ruff: noqa: PLW0108 - each lambda is a user's function, whose line the message shows

import inspect
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, QuantizedTensor, TraceError, specialize
from q4jit.frontend.cures import cure_of
from tests.support.functions import Floats, check, random, weight
from tests.support.tracing import ARGUMENTS, CAPTURED, TABLE, K, M, N, refusal


def erf(x: Any) -> Any:
    return x


ERF = np.frompyfunc(erf, 1, 1)  # a ufunc of another library, as scipy.special.erf


# PyTorch asks the argument's type to compute
relu = operator.methodcaller("__torch_function__", abs, (), ())


EXPONENT = r"exponent of \S+: expected a whole number from -16 to 16"
ONLY_AT = r"; use @, arithmetic"
LAST_AXIS = r"expected the last axis, axis=-1"
SLICES = r"expected slices of the last axis"

# the function · the code above the carets · two parts of the message: the problem, the cure
REFUSALS: list[tuple[Callable[..., object], str, str, str]] = [
    # symbols that would leak
    (
        lambda x: 1 if x > 0 else 2,
        "x > 0",
        "branch on a value that the kernel computes",
        "use np.where",
    ),
    (lambda x: x and 1, "x and 1", "branch on a value that the kernel computes", "use np.where"),
    (lambda x: not x, "not x", "branch on a value that the kernel computes", "use np.where"),
    (
        lambda x: max(x, 0.0),
        "max(x, 0.0)",
        "branch on a value that the kernel computes",
        "use np.where",
    ),
    (lambda x: int(x), "int(x)", "to int", "keep it an array"),
    (lambda x: float(x), "float(x)", "to float", "keep it an array"),
    (lambda x: complex(x), "complex(x)", "to complex", "keep it an array"),
    (lambda s: float(s), "float(s)", "to float", "keep it an array"),
    (lambda x: range(x), "range(x)", "to int", "keep it an array"),
    (lambda x: len(x), "len(x)", r"take len\(\) of a value", r"x\.shape\[-1\]"),
    (lambda x: list(x), "list(x)", "iterate over a value", "slices of the last axis"),
    (lambda x: sum(x), "sum(x)", "iterate over a value", "slices of the last axis"),
    (lambda x: 1.0 in x, "1.0 in x", "search in a value", "np.where"),
    (lambda x: round(x), "round(x)", r"compile round\(\)", ONLY_AT),
    (
        lambda x: np.asarray(x),
        "np.asarray(x)",
        "convert a value .* to a NumPy array",
        "leave it out",
    ),
    (
        lambda x: np.array([x, x]),
        "np.array([x, x])",
        "to a NumPy array",
        "return the arrays as a tuple",
    ),
    (lambda x: np.float32(x), "np.float32(x)", "to a NumPy array", r"use x\.astype\(np\.float32\)"),
    (
        lambda x: np.exp(x, out=TABLE),
        "np.exp(x, out=TABLE)",
        r"result of np\.exp .* out=",
        "new value",
    ),
    (lambda bias: TABLE.__iadd__(bias), "TABLE.__iadd__(bias)", "in place", "new value"),
    (
        lambda bias: TABLE.__setitem__(0, bias),
        "TABLE.__setitem__(0, bias)",
        "to float",
        "keep it an array",
    ),
    (
        lambda bias: TABLE.__setitem__(..., bias),
        "TABLE.__setitem__(..., bias)",
        "to a NumPy array",
        ONLY_AT,
    ),
    (
        lambda x: x.__setitem__(0, 1),
        "x.__setitem__(0, 1)",
        "assign to elements of a value",
        "np.where",
    ),
    # the number of rows is not known while tracing
    (lambda x: x * x.shape[0], "x * x.shape[0]", "the number of rows", r"x\.shape\[-1\]"),
    (lambda x: range(x.shape[0]), "range(x.shape[0])", "the number of rows", r"x\.shape\[-1\]"),
    (lambda x: x.shape[0] + 1, "x.shape[0] + 1", "the number of rows", r"x\.shape\[-1\]"),
    (lambda x: np.zeros(x.shape), "np.zeros(x.shape)", "the number of rows", r"x\.shape\[-1\]"),
    # calls and operators
    (
        lambda x: np.sin(x),
        "np.sin(x)",
        r"cannot compile np\.sin",
        "compute it outside, .* an argument",
    ),
    (lambda x: np.concatenate([x, x]), "np.concatenate([x, x])", r"np\.concatenate", "as a tuple"),
    (lambda x: np.argmax(x, -1), "np.argmax(x, -1)", r"np\.argmax", "return the value"),
    (lambda x: np.sinh(x), "np.sinh(x)", r"np\.sinh", ONLY_AT),
    (lambda x: np.linalg.inv(x), "np.linalg.inv(x)", r"compile np\.linalg\.inv", ONLY_AT),
    (lambda x: ERF(x), "ERF(x)", r"compile erf \(vectorized\) of another library", ONLY_AT),
    (lambda x: np.any(x > 0, -1), "np.any(x > 0, -1)", r"np\.any", r"np\.max\(condition, -1\)"),
    (
        lambda x: np.linalg.norm(x, 1, -1),
        "np.linalg.norm(x, 1, -1)",
        "with ord=1",
        r"np\.sum\(np\.abs\(x\), -1\)",
    ),
    (lambda x: format(x, ".2f"), 'format(x, ".2f")', r"print a value .* as '\.2f'", "outside"),
    (lambda x: np.add.reduce(x), "np.add.reduce(x)", r"np\.add\.reduce", ONLY_AT),
    (
        lambda x: np.where(x > 0),
        "np.where(x > 0)",
        r"np\.where without both",
        r"np\.where\(condition, a, b\)",
    ),
    (
        lambda x: np.exp(x, where=True),
        "np.exp(x, where=True)",
        r"np\.exp with where=",
        r"use np\.where",
    ),
    (lambda x: np.dot(x, x), "np.dot(x, x)", r"np\.dot", r"x @ w .* np\.sum\(a \* b, -1\)"),
    (lambda x, w: np.einsum("mk,kn", x, w), 'np.einsum("mk,kn", x, w)', r"np\.einsum", "use x @ w"),
    (lambda x: x.T, "x.T", r"the attribute \.T", "reshape the result outside"),
    (lambda x: x.reshape(2, -1), "x.reshape", r"the attribute \.reshape", "the result outside"),
    (lambda x: x.flat, "x.flat", r"the attribute \.flat", ONLY_AT),
    # functions of math and PyTorch
    (lambda x: math.erf(x), "math.erf(x)", r"compute math\.erf of a value", r"np\.tanh\(0\.797"),
    (lambda s: math.sqrt(s), "math.sqrt(s)", r"compute math\.sqrt", r"use np\.sqrt$"),
    (lambda x: math.fabs(x), "math.fabs(x)", r"compute math\.fabs", r"use np\.abs$"),
    (lambda x: math.pow(x, 2), "math.pow(x, 2)", r"compute math\.pow", r"use \*\*$"),
    (lambda x: math.floor(x), "math.floor(x)", r"compute math\.floor", "outside"),
    (lambda x: math.gamma(x), "math.gamma(x)", r"compute math\.gamma", ONLY_AT),
    (lambda x: relu(x), "relu(x)", "compile abs of PyTorch", r"use NumPy's functions: use @"),
    (lambda w: relu(w), "relu(w)", "compile abs of PyTorch", "use NumPy's functions"),
    (lambda x: x // 2, "x // 2", "compile the // operator", ONLY_AT),
    (lambda x: x % 2, "x % 2", "compile the % operator", ONLY_AT),
    (lambda x: x << 1, "x << 1", "compile the << operator", ONLY_AT),
    (lambda x: x ^ 1, "x ^ 1", r"the \^ operator", ONLY_AT),
    (lambda x: x & x, "x & x", "expected truth values", "got numbers"),
    (lambda x: ~x, "~x", "expected truth values", "got numbers"),
    (lambda x: x + "1", 'x + "1"', "expected an array", "got str"),
    (lambda x: x + [1.0], "x + [1.0]", "expected an array", "got list"),  # noqa: RUF005
    (lambda x: x == None, "x == None", "expected an array", "got NoneType"),  # noqa: E711
    (lambda x: x + 1j, "x + 1j", "expected an array", "got complex"),
    (
        lambda x: x * np.complex64(1),
        "x * np.complex64(1)",
        r"operand of \*: expected a real number",
        "complex64",
    ),
    (
        lambda x: x.astype(np.float64),
        "x.astype(np.float64)",
        "expected np.float32, np.float16 or ml_dtypes.bfloat16, got float64",
        "astype",
    ),
    # numbers
    (
        lambda x: x * 10**400,
        "x * 10**400",
        "a whole number of 1329 bits",
        r"operand of \*: .* that float\(\) takes",
    ),
    (lambda x: -(10**5000) - x, "-(10**5000) - x", "a whole number of 16610 bits", r"np\.inf"),
    (
        lambda x: np.add(x, 10**400),
        "np.add(x, 10**400)",
        "a whole number of 1329 bits",
        r"operand of np\.add",
    ),
    # exponents
    (lambda x: x**10**5000, "x**10**5000", EXPONENT, "got a whole number of 16610 bits; multiply"),
    (lambda x: x**0.5, "x**0.5", EXPONENT, r"got 0\.5; use np\.sqrt"),
    (lambda x: x**17, "x**17", EXPONENT, "got 17; multiply smaller powers"),
    (lambda x: x ** -(2**40), "x ** -(2**40)", EXPONENT, "got -1099511627776; multiply"),
    (lambda x: x**1.5, "x**1.5", EXPONENT, r"got 1\.5; use np\.exp and np\.log"),
    (lambda x: np.power(x, 0.5), "np.power(x, 0.5)", r"exponent of np\.power", "use np.sqrt"),
    (lambda x: x**x, "x**x", "as an exponent", r"np\.exp and np\.log"),
    (lambda x, s: x**s, "x**s", "as an exponent", r"np\.exp and np\.log"),
    (lambda x: 2**x, "2**x", "as an exponent", r"np\.exp and np\.log"),
    (lambda x: np.power(2.0, x), "np.power(2.0, x)", "as an exponent", r"np\.exp and np\.log"),
    # products
    (lambda x: x @ x, "x @ x", "two arrays that are no weights", r"np\.sum\(a \* b, -1\)"),
    (lambda x, w: (x @ w) @ (x @ w), "(x @ w) @ (x @ w)", "two arrays", "multiply them outside"),
    (lambda x: np.matmul(x, x), "np.matmul(x, x)", "two arrays", "use x @ w"),
    (lambda x, residual: x @ residual, "x @ residual", "array 'residual'", 'quantize.*"F32"'),
    (lambda x, w: x @ w.dequantize(), "x @ w.dequantize()", r"with w\.deq", "use x @ w, which"),
    (lambda x: x @ TABLE, "x @ TABLE", "QuantizedTensor, got ndarray", r'quantize\(w, "F32"\)'),
    (lambda x: TABLE @ x, "TABLE @ x", "QuantizedTensor, got the array 'x'", "quantize"),
    (lambda x: x @ 2, "x @ 2", "QuantizedTensor, got int", r"use \* for a number"),
    (lambda x: x @ "w", 'x @ "w"', "right operand of @: .*, got str$", ""),
    (lambda x: x @ CAPTURED, "x @ CAPTURED", "captured weight .*F32", "pass it as an argument"),
    (
        lambda x, w: w @ x,
        "w @ x",
        r"on the left of @, here argument 'w' \(F32 \[32, 48\]\)",
        "swap",
    ),
    (lambda w: w @ 2, "w @ 2", "on the left of @, here argument 'w'", "use x @ w$"),
    (lambda w, v: w @ v, "w @ v", "two weights", "use x @ w"),
    (
        lambda w: TABLE @ w,
        "TABLE @ w",
        "left operand of @: .* got ndarray",
        "pass it as an argument",
    ),
    (lambda s, w: s @ w, "s @ w", r"expected x \[\.\.\., 32\] for w \[32, 48\]", r"got x \[\]"),
    (
        lambda x, down: x @ down,
        "x @ down",
        r"expected x \[\.\.\., 48\] for w \[48, 32\]",
        r"got x \[M, 32\]",
    ),
    # weights elsewhere than in products
    (lambda x, w: x * w, "x * w", "element by element", "use x @ w"),
    (lambda x, w: w * x, "w * x", "element by element", "use x @ w"),
    (lambda w: w * 2, "w * 2", "element by element", "use x @ w"),
    (lambda w: 1 / w, "1 / w", "element by element", "use x @ w"),
    (lambda w: -w, "-w", "element by element", "use x @ w"),
    (lambda w: w**2, "w**2", "element by element", "use x @ w"),
    (lambda w: w > 0, "w > 0", "element by element", "use x @ w"),
    (lambda w: w == 0, "w == 0", "element by element", "use x @ w"),
    (lambda w: TABLE + w, "TABLE + w", r"np\.add of a quantised weight", "x @ w"),
    (lambda w: np.exp(w), "np.exp(w)", r"np\.exp of a quantised weight", "x @ w"),
    (lambda w: np.sum(w), "np.sum(w)", r"np\.sum of a quantised weight", "x @ w"),
    (lambda x, w: np.where(x > 0, w, x), "np.where(x > 0, w, x)", "a quantised weight", "x @ w"),
    (lambda w: w[0], "w[0]", "index a quantised weight", r"\(x @ w\)\[\.\.\., a:b\]"),
    (
        lambda w: w.raw,
        "w.raw",
        r"the attribute \.raw of a quantised",
        r"use x @ w, y @ w\.T, w\.rows",
    ),
    (
        lambda w: w.T.rows,
        "w.T.rows",
        r"the attribute \.rows of a quantised",
        r"use y @ w\.T, w\.T\.sh",
    ),
    (lambda w: w.transpose(), "w.transpose", r"the attribute \.transpose of", r"use w\.T"),
    (lambda w: np.transpose(w), "np.transpose(w)", r"np\.transpose of a quantised", r"use w\.T"),
    (
        lambda x, w: x @ w.T,
        "x @ w.T",
        r"expected x \[\.\.\., 48\] for w\.T \[48, 32\]",
        r"got x \[M, 32\]",
    ),
    (lambda x, w: w.T @ x, "w.T @ x", "with a weight on the left of @", "use x @ w"),
    (lambda x, w: np.exp(w.T), "np.exp(w.T)", r"np\.exp of a quantised weight", "x @ w"),
    (lambda w: np.take(w, 1, 0), "np.take(w, 1, 0)", "np.take of a quantised", r"w\.rows\(ids\)"),
    (
        lambda w: w.rows([1]),
        "w.rows([1])",
        "int64 array .*, got list",
        r"np\.array\(ids, np\.int64",
    ),
    (lambda w: np.asarray(w), "np.asarray(w)", "weight to a NumPy array", "x @ w"),
    (lambda w: list(w), "list(w)", "iterate over a quantised weight", "x @ w"),
    (lambda w: len(w), "len(w)", r"take len\(\) of a quantised weight", r"w\.shape"),
    (lambda w: float(w), "float(w)", "weight to a number", "x @ w"),
    (lambda w: bool(w), "bool(w)", "branch on a quantised weight", "x @ w"),
    (
        lambda w: w.dequantize() * 2,
        "w.dequantize() * 2",
        r"compute with w\.deq",
        "x @ w multiplies",
    ),
    (lambda w: np.exp(w.dequantize()), "np.exp(w.dequantize())", r"compute with w\.deq", "x @ w"),
    (lambda w: w.dequantize().sum(-1), "w.dequantize().sum(-1)", r"compute with w\.deq", "x @ w"),
    (
        lambda w: w.dequantize()[:, :3],
        "w.dequantize()[:, :3]",
        r"slice w\.dequantize",
        "as a result",
    ),
    # shapes
    (lambda x, bias: x + bias, "x + bias", r"broadcast \[M, 32\] with \[48\]", "equal dimensions"),
    (
        lambda x, residual: x + residual,
        "x + residual",
        r"\[M, 32\] with \[M, 48\]",
        "equal dimensions",
    ),
    (lambda x, w, gain: x @ w * gain, "x @ w * gain", r"\[M, 48\] with \[32\]", "equal dimensions"),
    (lambda x: x * x.sum(-1), "x * x.sum(-1)", r"\[M, 32\] with \[M\]", "keepdims=True"),
    (
        lambda x: x.sum(-1) * x.sum(-1, keepdims=True),
        "x.sum(-1) * x.sum(-1, keepdims=True)",
        r"\[M\] with \[M, 1\] to \[M, M\]",
        "keepdims=True",
    ),
    (
        lambda bias: bias + TABLE,
        "bias + TABLE",
        r"captured array \(float32 \[48\]\)",
        "an argument",
    ),
    (
        lambda bias: TABLE + bias,
        "TABLE + bias",
        r"captured array \(float32 \[48\]\)",
        "an argument",
    ),
    (lambda bias: np.maximum(bias, TABLE), "np.maximum(bias, TABLE)", "captured array", "pass it"),
    # axes, slices and new axes
    (lambda x: x.sum(), "x.sum()", r"got axis=None for \[M, 32\]", LAST_AXIS),
    (lambda x: np.sum(x, axis=0), "np.sum(x, axis=0)", "axis=0", LAST_AXIS),
    (lambda x: np.mean(x, axis=(0, 1)), "np.mean(x, axis=(0, 1))", r"axis=\(0, 1\)", LAST_AXIS),
    (lambda x: x.sum(-1).sum(-1), "x.sum(-1).sum(-1)", r"np\.sum of \[M\]", "only once"),
    (
        lambda x: x.sum(-1, dtype=np.float64),
        "x.sum(-1, dtype=np.float64)",
        r"np\.sum with dtype=",
        "leave it out",
    ),
    (
        lambda x: np.sum(x, -1, initial=1),
        "np.sum(x, -1, initial=1)",
        r"np\.sum with initial=",
        "leave it out",
    ),
    (lambda x: x[0], "x[0]", r"got \[0\]", SLICES),
    (lambda x: x[:, 3], "x[:, 3]", r"got \[:, 3\]", SLICES),
    (lambda x: x[[0, 1]], "x[[0, 1]]", r"got \[\[0, 1\]\]", SLICES),
    (lambda x: x[x > 0], "x[x > 0]", "index with a value that the kernel computes", r"np\.where"),
    (lambda x: x[:2], "x[:2]", r"leading axis M with \[:2\]", "slices of the last axis"),
    (lambda x: x.sum(-1)[:2, None], "x.sum(-1)[:2, None]", "slice the leading axis M", "last axis"),
    (
        lambda x: x[1:2, :3],
        "x[1:2, :3]",
        r"leading axis M with \[1:2, :3\]",
        "slices of the last axis",
    ),
    (lambda x: x[..., ::2], "x[..., ::2]", "got ::2 of 32 columns", "step of 1"),
    (lambda x: x[..., 5:5], "x[..., 5:5]", "got 5:5 of 32 columns", "at least one column"),
    (lambda x: x[..., 40:], "x[..., 40:]", "got 40: of 32 columns", "at least one column"),
    (lambda x: x[..., 1.5:], "x[..., 1.5:]", r"got 1\.5:", "expected whole numbers"),
    (lambda x: x[:, :, :], "x[:, :, :]", r"got \[:, :, :\]", SLICES),
    (
        lambda x: x[:, None, :],
        "x[:, None, :]",
        r"add axes with \[:, None, :\]",
        r"v\[\.\.\., None",
    ),
    (lambda x: x[..., None], "x[..., None]", r"add an axis to \[M, 32\]", r"v\[\.\.\., None"),
    (lambda bias: bias[:, None], "bias[:, None]", r"add an axis to \[48\]", r"v\[\.\.\., None"),
]


@pytest.mark.parametrize(
    ("function", "marked", "problem", "cure"), REFUSALS, ids=[r[1] for r in REFUSALS]
)
def test_refusal(function: Callable[..., object], marked: str, problem: str, cure: str) -> None:
    shown = refusal(function)
    assert re.search(problem, shown.reason)
    assert re.search(cure, shown.reason)
    line = function.__code__.co_firstlineno
    assert shown.origin == f"  File {__file__!r}, line {line}, in <lambda>"
    assert shown.marked == marked


def test_an_error_shows_both_lengths_that_disagree() -> None:
    shown = refusal(
        lambda x, r: np.tanh(x) + r,
        random(3, K),
        random(2, K),
    )
    assert "cannot broadcast [3, 32] with [2, 32]" in shown.reason
    assert shown.marked == "np.tanh(x) + r"


def test_lengths_that_disagree_and_never_meet() -> None:
    with pytest.raises(
        ArgumentError,
        match=r"expected leading dimensions that are equal, .*, got \[3, 32\], \[2, 32\]$",
    ):
        specialize(lambda x, r: (x, r))(random(3, K), random(2, K))


def test_a_dimension_of_one_is_not_m() -> None:
    """A residual of one row broadcasts. A later one of two rows does not fit an x of three."""
    compiled = specialize(lambda x, r: x + r)
    check(compiled, random(3, K), random(1, K))
    check(compiled, random(2, K), random(2, K))
    with pytest.raises(TraceError, match=re.escape("[3, 32] with [2, 32]")):
        compiled(random(3, K), random(2, K))


@pytest.mark.parametrize(
    ("function", "result"),
    [
        (lambda x: None, "got NoneType None"),
        (lambda x: 1.5, r"got float 1\.5"),
        (lambda x: (), r"got only values that are known already: \(\)"),
        (lambda x: (2, None), r"got only values that are known already: \(2, None\)"),
        (lambda x: [], r"got only values that are known already: \[\]"),
        (lambda x: {"n": 2}, r"got only values that are known already: \{'n': 2\}"),
        (lambda x: x.shape[0], "got RowCount M"),
        (lambda w: w, "got SymbolicWeight <traced weight"),
        (lambda x: TABLE, "got ndarray"),
        (lambda x: (i for i in (1, 2)), "got generator"),
    ],
)
def test_a_result_must_be_an_array(function: Callable[..., object], result: str) -> None:
    shown = refusal(function)
    assert re.search(rf"{result}(?!\w)", shown.reason)
    assert "result of <lambda>: expected an array computed from the arguments" in shown.reason
    line = function.__code__.co_firstlineno
    assert shown.origin == f"  File {__file__!r}, line {line}, in <lambda>"
    assert shown.marked in shown.line.partition(": ")[2]
    # Python 3.12 does not know the column of a constant that a lambda returns
    assert shown.marked or sys.version_info[:2] == (3, 12)


def test_the_error_of_a_result_shows_its_line() -> None:
    def one(x: Any) -> Any:
        y = x * 2
        return (y, {1.5})

    def several(x: Any, way: int) -> Any:
        if way:
            return 1
        return 2

    def forgotten(x: Any) -> Any:
        y = x * 2  # noqa: F841 - as a user's

    shown = refusal(one)
    assert shown.marked == "(y, {1.5})"
    assert shown.origin.endswith(f"line {one.__code__.co_firstlineno + 2}, in one")
    assert refusal(lambda x, way: 1 if way else 2, random(2, K), 1).marked == ""
    shown = refusal(several, random(2, K), 1)
    assert shown.line.strip() == "def several(x: Any, way: int) -> Any:"
    assert shown.marked == ""
    assert "got NoneType None; end the function with a return" in refusal(forgotten).reason


def test_a_symbol_that_outlived_its_trace() -> None:
    kept: list[Any] = []
    x, w = random(2, K), weight(K, 16)

    def keep(x: Any, w: Any) -> Any:
        kept[:] = [x, w]
        return x @ w

    specialize(keep)(x, w)
    for function in (lambda x: x + kept[0], lambda x: x @ kept[1], lambda w: kept[0] @ w):
        with pytest.raises(TraceError, match=r"(?s)traced in another call; .*\n\n.*kept"):
            specialize(function)(w if "w" in inspect.signature(function).parameters else x)
    with pytest.raises(TraceError, match="got a value that was traced in another call"):
        specialize(lambda x: kept[0])(x)


def test_arguments_have_the_kinds_that_their_names_promise() -> None:
    """The table above passes arguments by name: a wrong kind there would hide an error."""
    x, w = ARGUMENTS["x"], ARGUMENTS["w"]
    assert isinstance(x, np.ndarray)
    assert isinstance(w, QuantizedTensor)
    floats: Floats = x
    assert (floats.shape, w.shape) == ((M, K), (K, N))


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize(
    ("name", "code", "wanted"),
    [
        ("sign", "np.where(x > 0, 1.0, np.where(x < 0, -1.0, 0.0))", np.sign),
        ("nan_to_num", "np.where(x == x, x, 0.0)", np.nan_to_num),
        ("log2", "np.log(x) / np.log(2)", np.log2),
        ("log10", "np.log(x) / np.log(10)", np.log10),
        ("exp2", "np.exp(x * np.log(2))", np.exp2),
        ("log1p", "np.log(1 + x)", np.log1p),
        ("expm1", "np.exp(x) - 1", np.expm1),
        ("ptp", "np.max(x, -1) - np.min(x, -1)", lambda x: np.ptp(x, -1)),
        ("expit", "1 / (1 + np.exp(-x))", lambda x: 1 / (1 + np.exp(-x))),
        ("erf", "0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x**3)))", gelu),
    ],
)
def test_a_cure_computes_what_it_replaces(name: str, code: str, wanted: Any) -> None:
    assert code in cure_of(name)
    function = eval(f"lambda x: {code}", {"np": np})
    x = np.abs(random(3, K)) + np.float32(0.01)
    tolerance = 5e-4 if name == "erf" else 1e-5
    np.testing.assert_allclose(specialize(function)(x), wanted(x), tolerance, tolerance)
