"""Specialised functions that a traced function calls."""

import dataclasses
import gc
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from q4jit import ArgumentError, TraceError, specialize
from q4jit.dispatcher import Specialized
from tests.support.functions import F32, random, relative_rms, weight
from tests.support.tracing import CAPTURED, TABLE, refusal

M, K, N = 3, 32, 48
X, W, SQUARE = random(M, K), weight(K, N), weight(K, K)


@specialize
def silu(h: Any) -> Any:
    return h / (1 + np.exp(-h))


@specialize
def scaled(x: Any, w: Any, s: float = 0.5, *, shift: float = 0.0) -> Any:
    return x @ w * s + shift


@specialize
def parts(x: Any, layer: Any) -> Any:
    return {"y": x @ layer["w"], "x": [x * layer["s"], layer["n"]]}


@specialize
def power(x: Any, n: int) -> Any:
    return x * power(x, n - 1) if n > 1 else x


def check(function: Callable[..., Any], *args: Any) -> Specialized[..., Any]:
    """Compare with NumPy, where the nested functions run as kernels of their own."""
    compiled = function if isinstance(function, Specialized) else specialize(function)
    got, wanted = compiled(*args), compiled.py_func(*args)
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
    assert all(relative_rms(y, r) < 3e-6 for y, r in pairs)
    return compiled


NESTED: list[Callable[..., Any]] = [
    lambda x, w: silu(x @ w),
    lambda x, w: silu(silu(x) @ w) * 2,
    lambda x, w: scaled(x, w, 2.0, shift=1.0),
    lambda x, w: scaled(w=w, x=silu(x)),
    lambda x, w: parts(x, {"w": w, "s": 2.0, "n": 3})["y"] * 2,
    lambda x, w: parts(silu(x), {"w": w, "s": 2.0, "n": 3})["x"][0],
    lambda x, w: power(x, 5) @ w,
    lambda x, w: silu(x @ w)[..., :8] + np.sum(silu(x), -1, keepdims=True),
]


@pytest.mark.parametrize("function", NESTED)
def test_a_nested_function_becomes_part_of_the_graph(function: Callable[..., Any]) -> None:
    helpers = (silu, scaled, parts, power)
    before = [helper.stats for helper in helpers]
    compiled = specialize(function)
    compiled(X, W)
    assert [helper.stats for helper in helpers] == before
    check(compiled, X, W)
    assert len(compiled.signatures) == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32])
def test_results_of_a_nested_function_keep_their_type(dtype: Any) -> None:
    x = X.astype(dtype)
    compiled = specialize(lambda x, w: (scaled(x, w), parts(x, {"w": w, "s": 2.0, "n": 3})["y"]))
    assert {y.dtype for y in compiled(x, W)} == {np.dtype(dtype)}


def test_one_kernel_for_a_nested_function() -> None:
    compiled = check(lambda x, w: silu(x @ w) * scaled(x, w), X, W)
    assert compiled.explain().count("  kernel ") == 1


def test_containers_pass_through_a_nested_function() -> None:
    def outer(x: Any, layer: Any) -> Any:
        y = parts(x, layer)
        return silu(y["y"]), y["x"][0]

    check(outer, X, {"w": W, "s": 2.0, "n": 3})


def test_a_nested_function_may_not_change_the_callers_container() -> None:
    @specialize
    def inner(x: Any, d: dict[str, Any]) -> Any:
        d["x"] = x
        return x * 2

    shown = refusal(lambda x, d: inner(x * 2, d), X, {"s": 1.0})
    assert shown.line.strip() == 'd["x"] = x'
    specialize(lambda x: inner(x, {"s": 1.0}))(X)  # its own container


# --- results are new arrays -----------------------------------------------------------------------


@specialize
def same(y: Any) -> Any:
    return y


@specialize
def twice(y: Any) -> Any:
    return y, [y]


@specialize
def with_number(y: Any, s: Any) -> Any:
    return {"y": y * s, "s": s, "kept": [y]}


def in_place(x: Any, w: Any) -> Any:
    y = x @ w
    z = same(y)
    z += 1
    return y


def first_of_two(x: Any, w: Any) -> Any:
    a, (b,) = twice(x @ w)
    a += 1
    return b


def in_place_in_a_container(x: Any, w: Any) -> Any:
    y = x @ w
    layer = {"y": y}
    result = same(layer)
    result["y"] += 1
    result["z"] = y
    return y * len(layer)


def in_place_on_an_argument(x: Any, w: Any) -> Any:
    y = same(x)
    y += 1
    return y @ w


@pytest.mark.parametrize(
    "function", [in_place, first_of_two, in_place_in_a_container, in_place_on_an_argument]
)
def test_results_of_a_nested_function_are_new(function: Callable[..., Any]) -> None:
    check(function, X, W)


@pytest.mark.parametrize("number", [2.0, np.float32(2), np.float64(2), np.array(2, F32)])
def test_numbers_of_a_nested_function_have_the_types_of_its_results(number: Any) -> None:
    def outer(x: Any, s: Any) -> Any:
        passed_on, computed, alone = with_number(x, s)["s"], same(s * 2), same(s)
        assert isinstance(passed_on, type(number))
        assert isinstance(computed, np.ndarray)
        assert isinstance(alone, np.ndarray)
        return x * passed_on * alone

    check(outer, X, number)


# --- options of the outer and the inner function --------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ({}, {}),
        ({}, {"target": "cpu"}),
        ({"target": "cpu"}, {"target": "cpu"}),
        ({"precision": "i8"}, {"precision": "f16", "target": "cpu"}),
        ({"precision": "f16"}, {}),
        ({"K": K, "N": N, "block_size": 128, "cache": False}, {}),
    ],
)
def test_options_that_the_outer_function_satisfies(
    inner: dict[str, Any], outer: dict[str, Any]
) -> None:
    product = specialize(lambda x, w: x @ w, **inner)
    compiled = specialize(lambda x, w: product(x, w) * 2, **outer)
    np.testing.assert_allclose(compiled(X, W), X @ W * 2, rtol=1e-2, atol=1e-2)


def test_a_less_exact_product_is_refused() -> None:
    product = specialize(lambda x, w: x @ w, precision="f16")

    def outer(x: Any, w: Any) -> Any:
        return product(x, w) * 2

    for precision in ("f32", "f16"):
        specialize(outer, precision=precision)(X, W)
    with pytest.raises(TraceError) as caught:
        specialize(outer, precision="i8")(X, W)
    message = str(caught.value)
    assert message.startswith("cannot trace through <lambda>, whose precision is 'f16', in a ")
    assert "precision='i8'; use <lambda>.py_func(...)" in message
    assert "return product(x, w) * 2" in message
    specialize(lambda x, w: product.py_func(x, w) * 2, precision="i8")(X, W)  # the way out
    specialize(lambda x, w: silu(x @ w), precision="i8")(X, W)  # no product inside
    half = specialize(lambda h: h[..., :16] * h[..., 16:32])
    specialize(lambda x, w: half(x @ w), precision="i8")(X, W)  # slices of the outer's product


def test_another_target_is_refused() -> None:
    product = specialize(lambda x, w: x @ w, target="hip:gfx1100")
    with pytest.raises(TraceError, match=r"whose target is 'hip:gfx1100', in a .*target=None; use"):
        specialize(lambda x, w: product(x, w) * 2)(X, W)
    with pytest.raises(TraceError, match=r"target='cpu'; use <lambda>\.py_func"):
        specialize(lambda x, w: product(x, w) * 2, target="cpu")(X, W)


def test_k_and_n_of_the_inner_function_are_checked() -> None:
    def outer(product: Any) -> Callable[..., Any]:
        return specialize(lambda x, w: product(x, w)[..., :8])

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"K": 64}, "<lambda>: specialize(K=64): expected products with K = 64, got K = 32"),
        ({"N": 64}, "<lambda>: specialize(N=64): expected results with N = 64, got N = 48"),
    ]
    for options, message in wrong:
        with pytest.raises(ArgumentError, match=f"^{re.escape(message)}") as caught:
            outer(specialize(lambda x, w: x @ w, **options))(X, W)
        shown, carets = str(caught.value).split("\n")[-2:]
        assert shown[carets.index("^") : len(carets)] == "product(x, w)"
    # only the inner function's products count, and those of its own x
    second = specialize(lambda x, w: x @ w, K=K, N=N)
    check(lambda x, v, w: second(x @ v, w), X, SQUARE, W)
    check(lambda x, w, v: specialize(lambda h, v: h[..., :K] @ v, K=K)(x @ w, v), X, W, SQUARE)
    third = specialize(lambda x, w: x @ w, K=K)
    check(lambda x, w, down: third(x, w) @ down, X, W, weight(N, 64))


def test_out_is_refused_inside() -> None:
    out = np.empty((M, K), F32)
    shown = refusal(lambda x: silu(x, out=out), X)
    assert shown.reason.startswith("cannot pass out= to silu while a function is traced; use the")
    assert shown.marked == "silu(x, out=out)"


@pytest.mark.parametrize("way", ["bind", "warmup"])
def test_preparing_a_call_is_refused_inside(way: str) -> None:
    shown = refusal(lambda x: getattr(silu, way)(x * 2), X)
    assert (
        shown.reason == "cannot prepare calls of silu while a function is traced; call silu itself"
    )
    shown = refusal(lambda d: getattr(silu, way)(d["x"]), {"x": X})
    assert shown.reason.startswith("cannot prepare calls of silu")


# --- without traced arguments ---------------------------------------------------------------------


def test_a_call_without_traced_arguments_runs() -> None:
    """It computes a constant, as every function of NumPy does."""
    half = specialize(lambda s: s * 0.5)
    compiled = check(lambda x: x * half(3.0), X)
    assert half.stats.misses == 1
    check(compiled, X)
    assert half.stats.misses == 1


def test_a_captured_weight_is_refused_as_in_any_helper() -> None:
    shown = refusal(lambda x: scaled(x, CAPTURED))
    assert shown.reason.startswith("cannot use a captured weight")
    shown = refusal(lambda x: silu(x) + silu(TABLE))
    assert shown.reason.startswith("cannot use a captured array")


def test_a_symbol_that_outlived_its_trace() -> None:
    kept: list[Any] = []

    def keep(x: Any) -> Any:
        kept.append(x)
        return x * 2

    specialize(keep)(X)
    with pytest.raises(TraceError, match="traced in another call"):
        silu(kept[0])
    with pytest.raises(TraceError, match="traced in another call"):
        specialize(lambda x: x + silu(kept[0]))(X)


# --- methods, globals -----------------------------------------------------------------------------

FACTOR = 2.0


@dataclasses.dataclass
class Block:
    w: Any
    s: float = 2.0

    @specialize
    def forward(self, x: Any) -> Any:
        return silu(self.inner(x)) + self.inner(x)

    @specialize
    def inner(self, h: Any) -> Any:
        return h @ self.w * self.s * FACTOR


class Plain:
    @specialize
    def inner(self, h: Any) -> Any:
        return h * FACTOR

    def outer(self, h: Any) -> Any:
        return self.inner(h) + 1


def changed_later(
    function: Any, wanted: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor in (2.0, 3.0):
        monkeypatch.setattr("tests.dispatch.test_nested.FACTOR", factor)
        np.testing.assert_allclose(function(X), wanted(), rtol=1e-4, atol=1e-4)


def test_a_method_that_calls_another(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(W)

    def wanted() -> Any:
        y = X @ W * 2 * FACTOR
        return y / (1 + np.exp(-y)) + y

    changed_later(block.forward, wanted, monkeypatch)


def test_globals_of_a_nested_method_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_later(specialize(Plain().outer), lambda: X * FACTOR + 1, monkeypatch)
    inner = Plain().inner
    changed_later(specialize(lambda x: inner(x) + 1), lambda: X * FACTOR + 1, monkeypatch)


def test_an_error_in_a_nested_function_shows_its_own_line() -> None:
    @specialize
    def branches(x: Any) -> Any:
        return x if x > 0 else -x

    assert refusal(lambda x: branches(x) * 2, X).line.strip() == "return x if x > 0 else -x"


def test_endless_recursion_is_pythons_error() -> None:
    @specialize
    def endless(x: Any) -> Any:
        return endless(x)

    gc.collect()  # finalisers of earlier tests' garbage would fail at the limit of recursion
    with pytest.raises(RecursionError):
        endless(X)


def test_without_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = specialize(lambda x: x * 2)
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    interpreted = specialize(lambda x: x * 2)
    both = specialize(lambda x: inner(x) + interpreted(x))
    assert np.array_equal(both(X), X * 4)
    monkeypatch.delenv("Q4JIT_DISABLE_JIT")
    assert np.array_equal(specialize(lambda x: inner(x) + interpreted(x))(X), X * 4)
