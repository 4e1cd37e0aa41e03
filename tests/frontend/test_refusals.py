"""What cannot be compiled, and what a refusal shows."""

# ruff: noqa: PLW0108 - each lambda is a user's function, and its line is what a message shows

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, QuantizedTensor, TraceError, specialize
from tests.support.functions import Floats, check, random, weight
from tests.support.tracing import ARGUMENTS, CAPTURED, TABLE, K, M, N, refusal

EXPONENT = r"accepted are whole numbers from -16 to 16"
ONLY_AT = r"accepted are @, arithmetic"
LAST_AXIS = r"accepted is the last axis, axis=-1"
SLICES = r"accepted are slices"

# what the function does · the columns under the carets · what was found · what is accepted
REFUSALS: list[tuple[Callable[..., object], str, str, str]] = [
    # symbols that would leak
    (lambda x: 1 if x > 0 else 2, "x > 0", "the truth value", "np.where"),
    (lambda x: x and 1, "x and 1", "the truth value", "np.where"),
    (lambda x: not x, "not x", "the truth value", "np.where"),
    (lambda x: max(x, 0.0), "max(x, 0.0)", "the truth value", "np.where"),
    (lambda x: int(x), "int(x)", r"an int\(\)", "keep it an array"),
    (lambda x: float(x), "float(x)", r"a float\(\)", "keep it an array"),
    (lambda x: complex(x), "complex(x)", r"a complex\(\)", "keep it an array"),
    (lambda s: float(s), "float(s)", r"a float\(\)", "keep it an array"),
    (lambda x: range(x), "range(x)", r"an int\(\)", "keep it an array"),
    (lambda x: len(x), "len(x)", r"the len\(\)", r"x\.shape\[-1\]"),
    (lambda x: list(x), "list(x)", "iteration", "slices of the last axis"),
    (lambda x: sum(x), "sum(x)", "iteration", "slices of the last axis"),
    (lambda x: 1.0 in x, "1.0 in x", "a membership test", "np.where"),
    (lambda x: round(x), "round(x)", r"round\(\)", ONLY_AT),
    (lambda x: np.asarray(x), "np.asarray(x)", "a conversion to a NumPy array", ONLY_AT),
    (lambda x: np.array([x, x]), "np.array([x, x])", "found", ""),
    (lambda x: np.float32(x), "np.float32(x)", "found", ""),
    (lambda x: np.exp(x, out=TABLE), "np.exp(x, out=TABLE)", "out=.* in np.exp", "new values"),
    (lambda bias: TABLE.__iadd__(bias), "TABLE.__iadd__(bias)", "in-place", "new values"),
    (
        lambda bias: TABLE.__setitem__(0, bias),
        "TABLE.__setitem__(0, bias)",
        r"a float\(\)",
        "array",
    ),
    (lambda bias: TABLE.__setitem__(..., bias), "TABLE.__setitem__(..., bias)", "conversion", "@"),
    (
        lambda x: x.__setitem__(0, 1),
        "x.__setitem__(0, 1)",
        "assignment into an element",
        "np.where",
    ),
    # rows are no number
    (lambda x: x * x.shape[0], "x * x.shape[0]", "_OpaqueLength|the number of rows", ""),
    (lambda x: range(x.shape[0]), "range(x.shape[0])", "the number of rows", r"x\.shape\[-1\]"),
    (lambda x: x.shape[0] + 1, "x.shape[0] + 1", "the number of rows", r"x\.shape\[-1\]"),
    (lambda x: np.zeros(x.shape), "np.zeros(x.shape)", "the number of rows", r"x\.shape\[-1\]"),
    # calls and operators
    (lambda x: np.sin(x), "np.sin(x)", r"np\.sin, which cannot be compiled", ONLY_AT),
    (lambda x: np.concatenate([x, x]), "np.concatenate([x, x])", r"np\.concatenate", ONLY_AT),
    (lambda x: np.max(x, axis=-1), "np.max(x, axis=-1)", r"np\.max", ONLY_AT),
    (lambda x: np.add.reduce(x), "np.add.reduce(x)", r"np\.add\.reduce", ONLY_AT),
    (lambda x: np.where(x > 0), "np.where(x > 0)", r"np\.where without both values", ONLY_AT),
    (lambda x: np.exp(x, where=True), "np.exp(x, where=True)", r"np\.exp with where=", ONLY_AT),
    (lambda x: np.dot(x, x), "np.dot(x, x)", r"np\.dot", ONLY_AT),
    (lambda x: x.T, "x.T", r"the attribute \.T", ONLY_AT),
    (lambda x: x.reshape(2, -1), "x.reshape", r"the attribute \.reshape", ONLY_AT),
    (lambda x: x // 2, "x // 2", "the // operator", ONLY_AT),
    (lambda x: x % 2, "x % 2", "the % operator", ONLY_AT),
    (lambda x: x << 1, "x << 1", "a shift", ONLY_AT),
    (lambda x: x ^ 1, "x ^ 1", r"the \^ operator", ONLY_AT),
    (lambda x: x & x, "x & x", "takes truth values", "found numbers"),
    (lambda x: ~x, "~x", "takes truth values", "found numbers"),
    (lambda x: x + "1", 'x + "1"', "an operand of type str", ONLY_AT),
    (lambda x: x + [1.0], "x + [1.0]", "an operand of type list", ONLY_AT),  # noqa: RUF005
    (lambda x: x == None, "x == None", "an operand of type NoneType", ONLY_AT),  # noqa: E711
    (lambda x: x + 1j, "x + 1j", "an operand of type complex", ONLY_AT),
    (lambda x: x * np.complex64(1), "x * np.complex64(1)", "the complex number", "real ones"),
    (lambda x: x.astype(np.float64), "x.astype(np.float64)", "astype", r"np\.float32"),
    # numbers
    (lambda x: x * 10**400, "x * 10**400", "a whole number of 1329 bits", r"that float\(\) takes"),
    (lambda x: -(10**5000) - x, "-(10**5000) - x", "a whole number of 16610 bits", r"np\.inf"),
    (lambda x: np.add(x, 10**400), "np.add(x, 10**400)", "a whole number of 1329 bits", "float"),
    # exponents
    (lambda x: x**10**5000, "x**10**5000", "the exponent something else", EXPONENT),
    (lambda x: x**0.5, "x**0.5", r"the exponent 0\.5", EXPONENT),
    (lambda x: x**17, "x**17", "the exponent 17", EXPONENT),
    (lambda x: x ** -(2**40), "x ** -(2**40)", "the exponent -1099511627776", EXPONENT),
    (lambda x: x**x, "x**x", "the exponent something else", EXPONENT),
    (lambda x, s: x**s, "x**s", "the exponent something else", EXPONENT),
    (lambda x: 2**x, "2**x", "an exponent", r"np\.exp and np\.log"),
    (lambda x: np.power(2.0, x), "np.power(2.0, x)", "a traced exponent", ONLY_AT),
    # products
    (lambda x: x @ x, "x @ x", r"plain matrix \(f32 \[M, 32\]\)", r'quantize\(w, "F32"\)'),
    (lambda x: x @ TABLE, "x @ TABLE", r"plain matrix \(ndarray\)", r'quantize\(w, "F32"\)'),
    (lambda x: TABLE @ x, "TABLE @ x", r"plain matrix \(f32 \[M, 32\]\)", "QuantizedTensor"),
    (lambda x: x @ 2, "x @ 2", r"plain matrix \(int\)", "QuantizedTensor"),
    (lambda x: x @ CAPTURED, "x @ CAPTURED", "captured weight .*F32", "an argument; pass it"),
    (lambda x, w: w @ x, "w @ x", "w @ something", "x @ w, the weight on the right"),
    (lambda w, v: w @ v, "w @ v", "w @ something|two weights", "x @ w"),
    (lambda w: TABLE @ w, "TABLE @ w", "ndarray @ w", "pass it as an argument"),
    (lambda s, w: s @ w, "s @ w", r"shapes \[\] @ \[32, 48\]", "K = 32"),
    (lambda x, down: x @ down, "x @ down", r"\[M, 32\] @ \[48, 32\] do not match", "K = 48"),
    # weights elsewhere than in products
    (lambda x, w: x * w, "x * w", "element-wise arithmetic", "x @ w"),
    (lambda x, w: w * x, "w * x", "element-wise arithmetic", "x @ w"),
    (lambda w: w * 2, "w * 2", "element-wise arithmetic", "x @ w"),
    (lambda w: 1 / w, "1 / w", "element-wise arithmetic", "x @ w"),
    (lambda w: -w, "-w", "element-wise arithmetic", "x @ w"),
    (lambda w: w**2, "w**2", "element-wise arithmetic", "x @ w"),
    (lambda w: w > 0, "w > 0", "element-wise arithmetic", "x @ w"),
    (lambda w: w == 0, "w == 0", "element-wise arithmetic", "x @ w"),
    (lambda w: TABLE + w, "TABLE + w", r"np\.add of a quantised weight", "x @ w"),
    (lambda w: np.exp(w), "np.exp(w)", r"np\.exp of a quantised weight", "x @ w"),
    (lambda w: np.sum(w), "np.sum(w)", r"np\.sum of a quantised weight", "x @ w"),
    (lambda x, w: np.where(x > 0, w, x), "np.where(x > 0, w, x)", "quantised weight", "x @ w"),
    (lambda w: w[0], "w[0]", "an index into a weight", r"\(x @ w\)\[\.\.\., a:b\]"),
    (lambda w: w.T, "w.T", r"the attribute \.T of a quantised weight", ONLY_AT),
    (lambda w: np.asarray(w), "np.asarray(w)", "a conversion to a NumPy array", "x @ w"),
    (lambda w: list(w), "list(w)", "iteration", "x @ w"),
    (lambda w: len(w), "len(w)", r"the len\(\)", r"w\.shape"),
    (lambda w: float(w), "float(w)", "a conversion to a number", "x @ w"),
    (lambda w: bool(w), "bool(w)", "the truth value", "x @ w"),
    (lambda w: w.dequantize() * 2, "w.dequantize() * 2", "arithmetic on w", "write x @ w"),
    (lambda w: np.exp(w.dequantize()), "np.exp(w.dequantize())", "arithmetic on w", "x @ w"),
    (lambda w: w.dequantize().sum(-1), "w.dequantize().sum(-1)", "arithmetic on w", "x @ w"),
    (lambda w: w.dequantize()[:, :3], "w.dequantize()[:, :3]", r"a slice of w\.deq", "as a result"),
    # shapes
    (lambda x, bias: x + bias, "x + bias", r"\[M, 32\] and \[48\] do not match", "equal shapes"),
    (lambda x, residual: x + residual, "x + residual", r"\[M, 32\] and \[M, 48\] do not", "equal"),
    (lambda x, w, gain: x @ w * gain, "x @ w * gain", r"\[M, 48\] and \[32\] do not", "equal"),
    (lambda x: x * x.sum(-1), "x * x.sum(-1)", r"\[M, 32\] and \[M\] do not", "keepdims=True"),
    (
        lambda x: x.sum(-1) * x.sum(-1, keepdims=True),
        "x.sum(-1) * x.sum(-1, keepdims=True)",
        r"\[M\] and \[M, 1\] meet as \[M, M\]",
        "keepdims=True",
    ),
    (lambda bias: bias + TABLE, "bias + TABLE", r"captured array of shape \(48,\)", "an argument"),
    (lambda bias: TABLE + bias, "TABLE + bias", r"captured array of shape \(48,\)", "an argument"),
    (lambda bias: np.maximum(bias, TABLE), "np.maximum(bias, TABLE)", "captured array", "pass it"),
    # axes, slices and new axes
    (lambda x: x.sum(), "x.sum()", r"\[M, 32\] over axis=None", LAST_AXIS),
    (lambda x: np.sum(x, axis=0), "np.sum(x, axis=0)", "axis=0", LAST_AXIS),
    (lambda x: np.mean(x, axis=(0, 1)), "np.mean(x, axis=(0, 1))", r"axis=\(0, 1\)", LAST_AXIS),
    (lambda x: x.sum(-1).sum(-1), "x.sum(-1).sum(-1)", r"a reduction of \[M\]", "only once"),
    (lambda x: x.sum(-1, dtype=np.float64), "x.sum(-1, dtype=np.float64)", "dtype=", ONLY_AT),
    (lambda x: np.sum(x, -1, initial=1), "np.sum(x, -1, initial=1)", "initial=", ONLY_AT),
    (lambda x: x[0], "x[0]", "the index 0", SLICES),
    (lambda x: x[:, 3], "x[:, 3]", "found the index", SLICES),
    (lambda x: x[[0, 1]], "x[[0, 1]]", "found the index", SLICES),
    (lambda x: x[x > 0], "x[x > 0]", "an index that is a traced value", r"np\.where"),
    (lambda x: x[:2], "x[:2]", r"slice\(None, 2, None\) of the leading axis M", "last axis"),
    (lambda x: x[1:2, :3], "x[1:2, :3]", "of the leading axis M", "last axis"),
    (lambda x: x[..., ::2], "x[..., ::2]", "of 32 columns", "step of 1"),
    (lambda x: x[..., 5:5], "x[..., 5:5]", "of 32 columns", "at least one column"),
    (lambda x: x[..., 40:], "x[..., 40:]", "of 32 columns", "at least one column"),
    (lambda x: x[..., 1.5:], "x[..., 1.5:]", "found the slice", "whole numbers"),
    (lambda x: x[:, :, :], "x[:, :, :]", "found the index", SLICES),
    (
        lambda x: x[:, None, :],
        "x[:, None, :]",
        "a new axis that is not the last",
        r"v\[\.\.\., None",
    ),
    (lambda x: x[..., None], "x[..., None]", r"a new axis behind \[M, 32\]", r"v\[\.\.\., None"),
    (lambda bias: bias[:, None], "bias[:, None]", r"a new axis behind \[48\]", r"v\[\.\.\., None"),
]


@pytest.mark.parametrize(
    ("function", "marked", "found", "accepted"), REFUSALS, ids=[r[1] for r in REFUSALS]
)
def test_refusal(function: Callable[..., object], marked: str, found: str, accepted: str) -> None:
    shown = refusal(function)
    assert re.search(found, shown.reason)
    assert re.search(accepted, shown.reason)
    line = function.__code__.co_firstlineno
    assert shown.origin == f"  File {__file__!r}, line {line}, in <lambda>"
    assert shown.marked == marked


def test_lengths_that_disagree_are_both_shown() -> None:
    shown = refusal(
        lambda x, r: np.tanh(x) + r,
        random(3, K),
        random(2, K),
    )
    assert "shapes [3, 32] and [2, 32] do not match" in shown.reason
    assert shown.marked == "np.tanh(x) + r"


def test_lengths_that_disagree_and_never_meet() -> None:
    with pytest.raises(
        ArgumentError,
        match=r"expected leading dimensions that are equal, .*, got \[3, 32\], \[2, 32\]$",
    ):
        specialize(lambda x, r: (x, r))(random(3, K), random(2, K))


def test_a_dimension_of_one_is_not_m() -> None:
    """A residual of one row broadcasts; a later one of two rows beside x of three does not."""
    compiled = specialize(lambda x, r: x + r)
    check(compiled, random(3, K), random(1, K))
    check(compiled, random(2, K), random(2, K))
    with pytest.raises(TraceError, match=re.escape("[3, 32] and [2, 32]")):
        compiled(random(3, K), random(2, K))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: None, "returned NoneType None"),
        (lambda x: 1.5, r"returned float 1\.5"),
        (lambda x: (), "returned an empty tuple"),
        (lambda x: (x, 2), "returned int 2"),
        (lambda x: [x, x], "returned a list of 2"),
        (lambda x: [], "returned a list of 0"),
        (lambda x: (x, (x, x)), "returned tuple"),
        (lambda x: {"y": x}, "returned dict"),
        (lambda w: w, "returned SymbolicWeight|weight"),
        (lambda x: TABLE, "returned ndarray"),
        (lambda x: (i for i in (1, 2)), "returned generator"),
    ],
)
def test_a_result_that_is_no_array(function: Callable[..., object], found: str) -> None:
    shown = refusal(function)
    assert re.search(found, shown.reason)
    assert "accepted is an array computed from the arguments, or a tuple" in shown.reason
    assert shown.origin == f"  File {__file__!r}, line {function.__code__.co_firstlineno}"


def test_a_symbol_that_outlived_its_trace() -> None:
    kept: list[Any] = []
    x, w = random(2, K), weight(K, 16)

    def keep(x: Any, w: Any) -> Any:
        kept[:] = [x, w]
        return x @ w

    specialize(keep)(x, w)
    for function in (lambda x: x + kept[0], lambda x: x @ kept[1], lambda w: kept[0] @ w):
        with pytest.raises(
            TraceError, match=r"(?s)of another call: accepted are this call's\n\n.*kept"
        ):
            specialize(function)(w if "w" in inspect.signature(function).parameters else x)
    with pytest.raises(TraceError, match="a symbol of another trace"):
        specialize(lambda x: kept[0])(x)


def test_arguments_are_what_they_are_said_to_be() -> None:
    """The tables above pass arguments by name: a wrong kind there would hide a refusal."""
    x, w = ARGUMENTS["x"], ARGUMENTS["w"]
    assert isinstance(x, np.ndarray)
    assert isinstance(w, QuantizedTensor)
    floats: Floats = x
    assert (floats.shape, w.shape) == ((M, K), (K, N))
