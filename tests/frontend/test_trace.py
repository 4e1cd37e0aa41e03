"""Tracing: which operations a function may use, how it is called, which signatures it gets."""

# ruff: noqa: PLW0108 - each lambda is a user's function, whose line the message shows

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, TargetError, TraceError, specialize
from q4jit.frontend.specs import ScalarSpec, StaticSpec
from tests.support.functions import F32, assert_close, check, random, reference, weight
from tests.support.tracing import ARGUMENTS, K, M, N, arguments

# --- operations that compile -----------------------------------------------------------------

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
    lambda x: np.where(1 < x, 1.0, 0.0),  # noqa: SIM300 - the reflected operator
    lambda x: x / np.sum(x * x, axis=-1, keepdims=True),
    lambda x: x - np.mean(x, axis=-1, keepdims=True) + x.mean(-1, keepdims=True),
    lambda x: (x * x).sum(axis=1),
    lambda x: (x * x).mean(axis=(-1,), keepdims=True) + np.sum(x * x, -1)[..., None],
    lambda x: np.where((x.sum(-1) > 0)[:, None], x, -x),
    lambda x: (x.max(-1), np.max(x, axis=1, keepdims=True), np.amax(x, -1), x[:, :1].max(-1)),
    lambda x: (x.min(-1), np.min(x, axis=1, keepdims=True), np.amin(x, -1), x[:, 4:9].min(-1)),
    lambda x: (x.var(-1), np.var(x, axis=-1, keepdims=True, ddof=1), np.var(x, -1)[..., None]),
    lambda x: (x.std(-1), np.std(x, axis=-1, ddof=1)),
    lambda x: (np.linalg.norm(x, axis=-1), np.linalg.norm(x, 2, -1, keepdims=True)),
    lambda gain: (np.linalg.norm(gain), gain.max(), np.min(gain), gain.var(), np.std(gain)),
    lambda x: np.where((x > 2).max(-1, keepdims=True) | np.min(x > -2, -1, keepdims=True), x, 9),
    lambda x, w: np.exp((x @ w) - (x @ w).max(-1, keepdims=True)),
    lambda x, w: np.exp(x - x.max(-1, keepdims=True)) @ w,
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
    lambda x, w: (lambda y: (y, y, y + 1, y))(x @ w),  # one value, returned three times
    lambda x, gain: (x * gain, gain + 1, gain.sum()),  # results without rows beside one of M rows
    lambda x, residual: (x.sum(-1), residual.sum(-1, keepdims=True), x),
    lambda w: w.dequantize(),
    lambda x, w: (x @ w, w.dequantize()),
    lambda gain, w: gain @ w,
    lambda s: s * 2,
]


def gain_like(x: Any) -> Any:
    """Halve the traced value, as a helper."""
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
def test_rows_are_not_inferred_from_equal_dimensions(m: int) -> None:
    """The first call has M = 1, N or K, so that x has as many rows as other arrays columns."""
    compiled = specialize(lambda x, w, gain, bias: (x * gain) @ w + bias)
    w, gain, bias = weight(64, 16), random(64, seed=1), random(16, seed=2)
    for rows in (m, 1, 2, 16, 64, 5):
        check(compiled, random(rows, 64), w, gain, bias)
    assert len(compiled.signatures) == 2  # one row, and M rows


def test_a_square_bias_is_a_residual() -> None:
    """An array [N, N] has rows next to x [N, K], and gives N rows next to x [1, K]."""
    compiled = specialize(lambda x, w, r: x @ w + r)
    check(compiled, random(16, K), weight(K, 16), random(16, 16))
    check(compiled, random(1, K), weight(K, 16), random(16, 16))
    check(compiled, random(16, K), weight(K, 16), random(16))
    with pytest.raises(TraceError, match=re.escape("cannot broadcast [16, 16] with [9, 16]")):
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
    result = specialize(lambda x, s: x * s)(np.ones(5, F32), value)
    assert np.asarray(result).tobytes() == wanted.tobytes() or np.isnan(value)
    assert np.array_equal(result, wanted, equal_nan=True)


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
        (lambda f: f(1.0, z=2.0), "unknown argument 'z'"),
    ],
)
def test_wrong_arguments_of_a_call(call: Callable[..., object], message: str) -> None:
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
    with pytest.raises(ArgumentError, match=r"expected parameters|cannot be named 'out'"):
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
    with pytest.raises(
        ArgumentError, match=r"argument 'self': expected a float array, .*, got Layer$"
    ):
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
def test_function_names_that_are_not_identifiers(name: str) -> None:
    def function(x: Any) -> Any:
        return x * 2

    function.__name__ = name
    check(function, random(2, 5))


def test_decorating_twice_or_a_number() -> None:
    with pytest.raises(ArgumentError, match="cannot specialise a function twice"):
        specialize(specialize(lambda x: x))
    with pytest.raises(ArgumentError, match="expected a function, got int"):
        specialize(3)  # type: ignore[call-overload]  # the wrong type is the test


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "K: expected a positive int or None, got 0"),
        ({"K": True}, "K: .* got True"),
        ({"N": -1}, "N: expected a positive int or None, got -1"),
        ({"N": 2.0}, r"N: .* got 2\.0"),
        ({"block_size": "64"}, "block_size: expected a positive int or None, got '64'"),
        ({"precision": "f64"}, "precision: expected one of 'f32', 'f16', 'i8', got 'f64'"),
        ({"M": 1}, "specialize: expected options K, N, .*, got M"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        specialize(**options)


@pytest.mark.parametrize("target", ["cpu:z80", "gpu", "", "cpu:"])
def test_an_unknown_target(target: str) -> None:
    with pytest.raises(TargetError, match=r"unknown target .*known targets: cpu, "):
        specialize(target=target)


def test_options_k_and_n() -> None:
    def function(x: Any, w: Any, down: Any) -> Any:
        return np.tanh(x @ w) @ down

    args = arguments(function)
    check(specialize(function, K=K, N=K), *args)
    check(specialize(K=K, N=K, block_size=64, precision="i8")(function), *args)
    with pytest.raises(ArgumentError, match=r"K=64\): expected products with K = 64, got K = 32"):
        specialize(function, K=64)(*args)
    with pytest.raises(ArgumentError, match=r"N=48\): expected results with N = 48, got N = 32"):
        specialize(function, N=48)(*args)


# --- symbols ------------------------------------------------------------------------------------


def test_attributes_and_repr_of_symbols() -> None:
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
