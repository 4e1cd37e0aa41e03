"""Tracing: what a function may do, how it is keyed, and what a refusal shows."""

# ruff: noqa: PLW0108 - each lambda is a user's function, and its line is what a message shows

import functools
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, QuantizedTensor, TargetError, TraceError, specialize
from q4jit.frontend.graph import ScalarSpec, StaticSpec
from tests.support.functions import F32, Floats, assert_close, check, random, reference, weight

M, K, N = 3, 32, 48
ARGUMENTS: dict[str, object] = {
    "x": random(M, K),
    "w": weight(K, N),
    "v": weight(K, N, seed=7),
    "narrow": weight(K, 1),
    "down": weight(N, K),
    "gain": random(K, seed=2),
    "bias": random(N, seed=3),
    "residual": random(M, N, seed=4),
    "s": 1.5,
}
"""Arguments by the name of the parameter that they are for."""

TABLE = np.ones(N, F32)
CAPTURED = weight(K, N)


def arguments(function: Callable[..., object]) -> list[object]:
    return [ARGUMENTS[name] for name in inspect.signature(function).parameters]


# --- what a function may do -----------------------------------------------------------------

OPERATIONS: list[Callable[..., object]] = [
    lambda x, w: x @ w,
    lambda x, w: np.matmul(x, w),
    lambda x, bias, w: x @ w + bias - 1.5,
    lambda x, w: 2 - (3.0 * x) @ w / 4,
    lambda x: 1 / (2 + x * x),
    lambda x: -x + +x - abs(x),
    lambda x: np.positive(x) + np.negative(x) * 3 + np.reciprocal(3 + x * x) + np.square(x),
    lambda x: x**0 + x**1 + x**2 + x**3 - x**7 / 100,
    lambda x: (2 + abs(x)) ** -3 + np.power(x, 2) + np.float_power(x, 3.0) + x ** np.int64(2),
    lambda x: np.exp(x) + np.log(1 + np.abs(x)) + np.tanh(x) + np.sqrt(1 + x * x),
    lambda x: np.maximum(x, 0.25) + np.minimum(x, gain_like(x)) + np.fabs(x),
    lambda x: np.clip(x, -0.5, 0.75) + np.clip(x, None, 0.1) + x.clip(-1, 1) + np.clip(x, 0, None),
    lambda x: np.clip(x, a_min=-0.5, a_max=0.5),
    lambda x: np.where(x > 0.5, x, 0.0) + np.where(x <= 0.5, 1, -x),
    lambda x: np.where((x >= -1) & (x < 1), x, 2.0) + np.where((x < -1) | ~(x < 1), 3.0, x),
    lambda x: np.where(np.logical_and(x > 0, np.logical_not(x > 1)), x, 0.0),
    lambda x: np.where(x == x, 1.0, 2.0) + np.where(x != x, 1.0, 2.0),
    lambda x: np.where(np.maximum(x, 0), 2.0, 3.0),  # a number as a condition
    lambda x: (x > 0) * x + (x > 0),  # truth values as numbers
    lambda x: np.where((x > 0) + (x > 1), 1.0, 2.0) + (x > 0) * (x > 1),  # and as truth values
    lambda x: 1 < x,  # noqa: SIM300 - the reflected operator
    lambda x: x / np.sum(x * x, axis=-1, keepdims=True),
    lambda x: x - np.mean(x, axis=-1, keepdims=True) + x.mean(-1, keepdims=True),
    lambda x: (x * x).sum(axis=1),
    lambda x: (x * x).mean(axis=(-1,), keepdims=True) + np.sum(x * x, -1)[..., None],
    lambda x: np.where((x.sum(-1) > 0)[:, None], x, -x),
    lambda x: x.astype(np.float32) * np.float64(0.1) + np.float32(2) + np.array(3.0) + True,
    lambda x, s: s * x + s * s,
    lambda x, w: (x @ w)[..., :16] * (x @ w)[:, 32:],
    lambda x, w: (x @ w)[..., 5:21] * (x @ w)[..., -16:],
    lambda x, w, bias, residual, s: (np.exp(-abs(x @ w + bias)) * s + residual)[..., 3:40],
    lambda x, w, residual: (x @ w)[..., 8:][..., 3:20] + residual[..., 5:][..., 2:19],
    lambda x, w: x[..., :32] @ w,
    lambda x, w, down: (x @ w)[..., 16:32],
    lambda x, w, down: np.tanh(x @ w) @ down,
    lambda x, w, v: x @ w + (2 * x) @ v,  # products of different x
    lambda x, w, v: np.where(x @ w > 0, abs(x * 2) @ v, 0.5),  # decided in one kernel, used in two
    lambda x, w: np.sum(np.square(x @ w), axis=-1, keepdims=True),
    lambda x, w: (x @ w) / np.sqrt(1 + np.mean((x @ w) ** 2, axis=-1, keepdims=True)),
    lambda x, w, narrow: (x @ w) * np.tanh(x @ narrow),  # a column beside wider products
    lambda x, w, narrow: np.where(x @ narrow > 0, x @ w, 0.5),
    lambda x, narrow: x @ narrow,
    lambda x, narrow: (x @ narrow).sum(-1),
    lambda x, w, v, narrow: (x @ w, x @ v, x @ narrow, x),
    lambda x, w: (x @ w, (x @ w) * 2),
    lambda x, w: (lambda y: (y, y, y + 1, y))(x @ w),  # the same value more than once
    lambda x, gain: (x * gain, gain + 1, gain.sum()),  # results of no rows beside results of M
    lambda x, residual: (x.sum(-1), residual.sum(-1, keepdims=True), x),
    lambda w: w.dequantize(),
    lambda x, w: (x @ w, w.dequantize()),
    lambda gain, w: gain @ w,
    lambda s: s * 2,
]


def gain_like(x: Any) -> Any:
    """A helper, called with the traced value."""
    return x * 0.5


@pytest.mark.parametrize("function", OPERATIONS)
def test_operation(function: Callable[..., Any]) -> None:
    args = arguments(function)
    wanted = reference(function, *args)
    assert_close(specialize(function)(*args), wanted)


def test_a_branch_and_a_loop_on_static_values() -> None:
    def function(x: Any, steps: int, mode: str, flag: bool, nothing: None) -> Any:
        assert nothing is None
        for i in range(steps):
            x = x + 1 / (i + 1)
        if flag:
            x = x * 2
        return np.tanh(x) if mode == "tanh" else x

    compiled = specialize(function)
    x = random(2, 5)
    for args in [(3, "tanh", True, None), (2, "id", False, None), (0, "id", True, None)]:
        assert_close(compiled(x, *args), reference(function, x, *args))
    assert len(compiled.signatures) == 3


def test_an_unrolled_loop_longer_than_pythons_stack() -> None:
    def function(x: Any) -> Any:
        total = x.sum(-1, keepdims=True)
        for i in range(2 * sys.getrecursionlimit()):
            x = x + 1 / (i + 1)
            total = total + 0.001
        return x + total

    check(function, random(1, 5))


def test_a_slice_of_a_value_used_twice_in_each_of_many_steps() -> None:
    def function(x: Any) -> Any:
        for _ in range(200):
            x = 0.5 * x + 0.5 * abs(x)
        return x[..., :3]

    check(function, random(1, 5))


# --- results and slices -----------------------------------------------------------------------


@pytest.mark.parametrize("half", [16, 24, 5])
@pytest.mark.parametrize("format_", ["Q4_0", "F32"])
def test_fused_gate_and_up(half: int, format_: str) -> None:
    def function(x: Any, gate_up: Any) -> Any:
        y = x @ gate_up
        gate, up = y[..., :half], y[..., half:]
        return gate / (1 + np.exp(-gate)) * up, gate

    check(function, random(5, 64), weight(64, 2 * half, format_))


def test_slices_of_a_tuple() -> None:
    def qkv(x: Any, w: Any) -> tuple[Any, Any, Any]:
        y = x @ w
        return y[..., :20], y[..., 20:30], y[..., 30:]

    check(lambda x, w: tuple(2 * part for part in qkv(x, w)), random(4, 32), weight(32, 37))


# --- ranks and leading dimensions ---------------------------------------------------------------

B, T = 2, 5
X_SHAPES: list[tuple[int, ...]] = [
    (K,),
    (1, K),
    (M, K),
    (B, T, K),
    (B, 1, K),
    (1, T, K),
    (B, T, 1, K),
]
RESIDUALS: list[tuple[int, ...]] = [
    (N,),
    (1,),
    (1, N),
    (1, 1),
    (T, N),
    (B, 1, N),
    (1, 1, N),
    (B, T, N),
]


@pytest.mark.parametrize("shape", X_SHAPES, ids=str)
def test_rank_of_x(shape: tuple[int, ...]) -> None:
    def function(x: Any, w: Any, bias: Any) -> Any:
        scale = np.sqrt(0.1 + np.mean(x * x, axis=-1, keepdims=True))
        return (x / scale) @ w + bias, scale, x.sum(-1)

    check(function, random(*shape), ARGUMENTS["w"], ARGUMENTS["bias"])


def test_residuals_of_every_rank_in_one_function() -> None:
    compiled = specialize(lambda x, w, r: np.tanh(x @ w) + 0.5 * r)
    for shape in RESIDUALS:
        check(compiled, random(B, T, K), ARGUMENTS["w"], random(*shape))
    assert len(compiled.signatures) == len(RESIDUALS)


def test_a_residual_of_one_row_and_then_of_all() -> None:
    compiled = specialize(lambda x, w, r: x @ w + r)
    for rows in (1, M, 1, M):
        check(compiled, ARGUMENTS["x"], ARGUMENTS["w"], random(rows, N))
    assert len(compiled.signatures) == 2


@pytest.mark.parametrize("shape", [(T, N), (1, T, N), (B, T, N)], ids=str)
def test_an_x_of_fewer_rows_than_a_residual(shape: tuple[int, ...]) -> None:
    def function(x: Any, w: Any, r: Any) -> Any:
        y = x @ w
        return y + r, y, x.sum(-1), r.sum(-1), (x * x).mean(-1, keepdims=True)

    check(function, random(B, 1, K), ARGUMENTS["w"], random(*shape))


@pytest.mark.parametrize("m", [1, 16, 64])
def test_rows_are_never_guessed_from_equal_numbers(m: int) -> None:
    """First calls with M = 1, M = N and M = K, then others: arrays are as wide as x is long."""
    compiled = specialize(lambda x, w, gain, bias: (x * gain) @ w + bias)
    w, gain, bias = weight(64, 16), random(64, seed=1), random(16, seed=2)
    for rows in (m, 1, 2, 16, 64, 5):
        check(compiled, random(rows, 64), w, gain, bias)
    assert len(compiled.signatures) == 2  # one row, and M rows


def test_a_square_bias_is_a_residual() -> None:
    """[N, N] beside x [N, K] has rows; the same array beside x [1, K] gives N rows."""
    compiled = specialize(lambda x, w, r: x @ w + r)
    check(compiled, random(16, K), weight(K, 16), random(16, 16))
    check(compiled, random(1, K), weight(K, 16), random(16, 16))
    check(compiled, random(16, K), weight(K, 16), random(16))
    with pytest.raises(TraceError, match=re.escape("[16, 16] and [9, 16] do not match")):
        compiled(random(16, K), weight(K, 16), random(9, 16))


@pytest.mark.parametrize("shape", [(0, K), (0, 1, K), (B, 0, K)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    def function(x: Any, w: Any, down: Any, r: Any) -> Any:
        y = x @ w + r
        return y[..., :7], y.sum(-1), np.tanh(y) @ down, x

    check(function, np.zeros(shape, F32), ARGUMENTS["w"], ARGUMENTS["down"], random(N))


# --- scalars, static values, frozen values ------------------------------------------------------


def test_a_thousand_scalars_compile_once() -> None:
    compiled = specialize(lambda x, w, s: x @ w * s, cache=False)
    x, w = ARGUMENTS["x"], ARGUMENTS["w"]
    compiled(x, w, 0.5)
    before = compiled.stats
    once: Any = compiled(x, w, 1.0)
    for i in range(1000):
        assert np.array_equal(compiled(x, w, i * 0.37), once * F32(i * 0.37))
    after = compiled.stats
    assert (after.misses, after.compiles) == (before.misses, before.compiles) == (1, 1)
    assert after.hits == before.hits + 1001
    assert [type(s) for s in compiled.signatures[0]][2] is ScalarSpec


@pytest.mark.parametrize(
    "scalar",
    [F32(0.3), np.float64(0.3), np.float16(0.3), np.array(0.3), np.array(0.3, F32), np.array(3)],
    ids=lambda s: f"{type(s).__name__} {s.dtype}",
)
def test_kinds_of_scalars(scalar: Any) -> None:
    compiled = specialize(lambda x, s: x * s, cache=False)
    compiled(random(2, 5), 0.1)
    result = compiled(random(2, 5), scalar)
    assert np.array_equal(result, random(2, 5) * F32(scalar))
    assert compiled.stats.compiles == 1
    assert len(compiled.signatures) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1e300])
def test_unusual_scalars(value: float) -> None:
    with np.errstate(over="ignore"):
        wanted = F32(value) * np.ones(5, F32)
    found = specialize(lambda x, s: x * s)(np.ones(5, F32), value)
    assert np.asarray(found).tobytes() == wanted.tobytes() or np.isnan(value)
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize("value", [3, True, np.int64(3), np.bool_(True), "text", None])
def test_static_values_are_part_of_the_signature(value: Any) -> None:
    compiled = specialize(lambda x, v: x * (2 if v == "text" or v is None else v))
    check(compiled, random(2, 5), value)
    spec = compiled.signatures[0][1]
    assert isinstance(spec, StaticSpec)
    plain = value.item() if isinstance(value, np.generic) else value
    assert (spec.kind, spec.value) == (type(plain), plain)


def test_one_and_true_and_one_point_zero_are_three_signatures() -> None:
    compiled = specialize(lambda x, v: x * v)
    for value in (1, True, 1.0):
        check(compiled, random(2, 5), value)
    assert len(compiled.signatures) == 3


FROZEN = 2.0


def test_globals_and_closures_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = 3.0
    compiled = specialize(lambda x: x * FROZEN * factor)
    x = random(2, 5)
    assert np.allclose(np.asarray(compiled(x)), 6 * x)
    monkeypatch.setattr(sys.modules[__name__], "FROZEN", 5.0)
    factor = 7.0
    assert np.allclose(np.asarray(compiled(x)), 6 * x)


# --- how functions are called --------------------------------------------------------------------


def test_keywords_and_defaults() -> None:
    def function(x: Any, w: Any, scale: float = 0.5, *, shift: float = 0.25, times: int = 1) -> Any:
        return x @ w * scale * times + shift

    compiled = specialize(function)
    x, w = ARGUMENTS["x"], ARGUMENTS["w"]
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = [
        ((x, w), {}),
        ((x,), {"w": w}),
        ((), {"w": w, "x": x, "scale": 0.75}),
        ((x, w, 1.5), {"shift": 2.0}),
        ((x, w), {"times": 3, "shift": 1.0}),
    ]
    for args, keywords in calls:
        check(compiled, *args, **keywords)
    assert len(compiled.signatures) == 2  # times = 1 and times = 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(), "missing a required argument: 'x'"),
        (lambda f: f(1.0, 2.0, 3.0), "too many positional arguments"),
        (lambda f: f(1.0, z=2.0), "unexpected keyword argument 'z'"),
    ],
)
def test_a_call_that_does_not_fit(call: Callable[..., object], message: str) -> None:
    def scaled(x: Any, s: float = 1.0) -> Any:
        return x * s

    with pytest.raises(ArgumentError, match=r"^scaled\(\): .*" + message):
        call(specialize(scaled))


def test_positional_only_parameters_and_partial() -> None:
    def function(x: Any, /, w: Any, *, s: float) -> Any:
        return x @ w * s

    check(specialize(function), ARGUMENTS["x"], ARGUMENTS["w"], s=0.5)
    check(functools.partial(function, s=2.0), ARGUMENTS["x"], ARGUMENTS["w"])


@pytest.mark.parametrize("function", [lambda *xs: xs[0], lambda **xs: xs["x"], lambda out: out])
def test_parameters_that_are_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ArgumentError, match=r"accepted are parameters|is taken by out="):
        specialize(function)


class Layer:
    factor = 1.5

    def scaled(self, x: Any, w: Any) -> Any:
        return x @ w * self.factor

    @specialize
    def decorated(self, x: Any) -> Any:
        return x

    @staticmethod
    @specialize
    def alone(x: Any, w: Any) -> Any:
        return x @ w


def test_methods() -> None:
    check(Layer().scaled, ARGUMENTS["x"], ARGUMENTS["w"])  # bound: self is frozen
    check(Layer.alone, ARGUMENTS["x"], ARGUMENTS["w"])
    assert isinstance(Layer().alone, type(Layer.alone))
    with pytest.raises(ArgumentError, match="argument 'self' is Layer: accepted are float32"):
        Layer().decorated(ARGUMENTS["x"])


def test_functions_of_one_name() -> None:
    def make(factor: float) -> Callable[..., Any]:
        def same(x: Any) -> Any:
            return x * factor

        return specialize(same)

    first, second = make(2.0), make(3.0)
    x = random(2, 5)
    for _ in range(2):
        assert np.array_equal(first(x), 2 * x)
        assert np.array_equal(second(x), 3 * x)


@pytest.mark.parametrize("name", ["λ", "1st", "with blank", "_", "émile"])
def test_names_that_are_no_symbols(name: str) -> None:
    def function(x: Any) -> Any:
        return x * 2

    function.__name__ = name
    check(function, random(2, 5))


def test_decorating_twice_or_nothing() -> None:
    with pytest.raises(ArgumentError, match="specialised already"):
        specialize(specialize(lambda x: x))
    with pytest.raises(ArgumentError, match="takes a function: found int"):
        specialize(3)  # type: ignore[call-overload]  # the wrong type is the test


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "K=0: accepted is a positive int"),
        ({"K": True}, "K=True"),
        ({"N": -1}, "N=-1: accepted is a positive int"),
        ({"N": 2.0}, "N=2.0"),
        ({"block_size": "64"}, "block_size='64': accepted is a positive int"),
        ({"precision": "f64"}, "precision='f64': accepted are 'f32', 'f16', 'i8'"),
        ({"M": 1}, "specialize takes no M: accepted are K, N, block_size, target, precision"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        specialize(**options)


@pytest.mark.parametrize("target", ["cpu:z80", "gpu", "", "cpu:"])
def test_an_unknown_target(target: str) -> None:
    with pytest.raises(TargetError, match=r"unknown target .*known are cpu, cpu:x86-64"):
        specialize(target=target)


def test_options_k_and_n() -> None:
    def function(x: Any, w: Any, down: Any) -> Any:
        return np.tanh(x @ w) @ down

    args = arguments(function)
    check(specialize(function, K=K, N=K), *args)
    check(specialize(K=K, N=K, block_size=64, precision="i8")(function), *args)
    with pytest.raises(ArgumentError, match=r"K=64\): found a product of K = 32"):
        specialize(function, K=64)(*args)
    with pytest.raises(ArgumentError, match=r"N=48\): found a result of N = 32"):
        specialize(function, N=48)(*args)


# --- refusals ------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """The parts of a TraceError's message."""

    reason: str
    place: str
    line: str
    marked: str

    def __init__(self, message: str) -> None:
        self.reason, place = message.split("\n\n")
        self.place, *shown = place.split("\n")
        self.line = self.marked = ""
        if shown:
            self.line = shown[0]
        if len(shown) > 1:
            carets = shown[1]
            assert set(carets.strip()) == {"^"}
            self.marked = self.line[carets.index("^") : len(carets)]


def refusal(function: Callable[..., object], *args: object) -> Refusal:
    with pytest.raises(TraceError) as caught:
        specialize(function)(*(args or arguments(function)))
    return Refusal(str(caught.value))


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
    assert shown.place == f"  File {__file__!r}, line {line}, in <lambda>"
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
    with pytest.raises(ArgumentError, match=r"found \[3, 32\], \[2, 32\]; accepted are equal"):
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
    assert shown.place == f"  File {__file__!r}, line {function.__code__.co_firstlineno}"


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


# --- where the user's code is shown -----------------------------------------------------------


def test_a_statement_over_several_lines() -> None:
    def function(x: Any, w: Any) -> Any:
        # fmt: off
        return (x @ w
                + float(
                    x,
                ))
        # fmt: on

    shown = refusal(function)
    assert shown.line.strip() == "+ float("
    assert shown.marked == "float("
    assert shown.place.endswith(f"line {function.__code__.co_firstlineno + 3}, in function")


def test_a_line_that_is_not_ascii() -> None:
    shown = refusal(lambda x, größe=1, 数="…": ("äöü €", np.sin(x)), random(2, K))
    assert shown.marked == "np.sin(x)"


def test_a_local_function_and_a_loop() -> None:
    def function(x: Any) -> Any:
        def inner(y: Any) -> Any:
            for part in y:
                x.append(part)
            return x

        return inner(x)

    shown = refusal(function)
    assert shown.line.strip() == "for part in y:"
    assert re.fullmatch("(for part in )?y:?", shown.marked)
    assert shown.place.endswith("in inner")


def module_at(path: Path, text: str) -> types.ModuleType:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_helper_of_another_module(tmp_path: Path) -> None:
    helper = module_at(tmp_path / "helper.py", "def root(v):\n\treturn 1 + v ** 0.5 # tab\n")
    shown = refusal(lambda x: helper.root(x))
    assert shown.place == f"  File {str(tmp_path / 'helper.py')!r}, line 2, in root"
    assert shown.marked == "v ** 0.5"


def test_a_folder_whose_name_begins_like_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of q4jit and NumPy are skipped, those of q4jit_plots beside it are the user's."""
    import q4jit.frontend.trace

    monkeypatch.setattr(q4jit.frontend.trace, "_NUMPY", f"{tmp_path / 'q4jit'}{os.sep}")
    helper = module_at(
        tmp_path / "q4jit_plots" / "helper.py", "def root(v):\n    return v ** 0.5\n"
    )
    assert refusal(lambda x: helper.root(x)).marked == "v ** 0.5"
    assert Path(q4jit.frontend.trace._PACKAGE).name == "q4jit"
    assert q4jit.frontend.trace._PACKAGE.endswith(os.sep)


def test_a_function_without_source() -> None:
    code = compile("\n\ndef made(x):\n    return float(x)\n", "<made>", "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    shown = refusal(space["made"], random(2, K))
    assert shown.place == "  File '<made>', line 4, in made"
    assert shown.line == shown.marked == ""


def test_a_function_without_positions() -> None:
    """Compiled with -X no_debug_ranges, code has lines and no columns."""

    def function(x: Any) -> Any:
        return float(x)

    code = function.__code__
    lines_only = code.replace(co_linetable=_without_columns(code))
    shown = refusal(types.FunctionType(lines_only, globals()), random(2, K))
    assert shown.line.strip() == "return float(x)"
    assert shown.marked == ""


def _without_columns(code: types.CodeType) -> bytes:
    """A location table of the code's lines, in entries that have no columns."""
    table, line = bytearray(), code.co_firstlineno
    for start, end, at in code.co_lines():
        units = (end - start) // 2
        delta = 0 if at is None else at - line
        line = line if at is None else at
        while units:
            size = min(units, 8)
            value = delta << 1 if delta >= 0 else (-delta << 1) | 1
            assert value < 64  # one byte of a variable-length number
            table += bytes([0x80 | 13 << 3 | size - 1, value])
            units, delta = units - size, 0
    return bytes(table)


def test_a_users_own_error_passes() -> None:
    def function(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        specialize(function)(random(2, K))


def test_what_a_symbol_tells_of_itself() -> None:
    seen: list[object] = []

    def function(x: Any, w: Any, s: float) -> Any:
        seen[:] = [x.shape[-1], x.ndim, x.dtype, (x > 0).dtype, w.shape, w.format, w.ndim]
        seen.append(f"{x!r} {w!r} {s!r} {x.shape}")
        return x @ w * s

    specialize(function)(ARGUMENTS["x"], ARGUMENTS["w"], 2.0)
    assert seen == [
        K, 2, np.dtype(F32), np.dtype(np.bool_), (K, N), "F32", 2,
        "<traced f32 [M, 32]> <traced weight F32 [32, 48]> <traced f32 []> (M, 32)",
    ]  # fmt: skip


def test_arguments_are_what_they_are_said_to_be() -> None:
    """The tables above pass arguments by name: a wrong kind there would hide a refusal."""
    x, w = ARGUMENTS["x"], ARGUMENTS["w"]
    assert isinstance(x, np.ndarray)
    assert isinstance(w, QuantizedTensor)
    floats: Floats = x
    assert (floats.shape, w.shape) == ((M, K), (K, N))
