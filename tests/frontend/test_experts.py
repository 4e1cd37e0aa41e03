"""Traced expert tensors: what compiles, and what is refused with the user's line."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import q4jit
from q4jit import ArgumentError, ExpertTensor, TraceError, specialize, vecmat
from q4jit.arrays.specs import signature_of
from q4jit.frontend.trace import trace
from tests.support.experts import chosen, experts, moe, moe_arguments, numbers, product

W = experts("Q4_0", 64, 20)
X, IDS, ONE_EACH, S = numbers(3, 64), chosen(3, 2), chosen(3), numbers(3, 2)


def traced(function: Callable[..., Any], *args: Any) -> str:
    names = tuple(f"a{i}" for i in range(len(args)))
    return str(trace(function, signature_of(names, args)))


@pytest.mark.parametrize(
    ("x_shape", "ids_shape", "x", "ids"),
    [
        ((3, 64), (3,), "f32 [M, 64]", "ids [M]"),
        ((3, 1, 64), (3, 2), "f32 [M, 1, 64]", "ids [M, 2]"),
        ((3, 2, 64), (3, 2), "f32 [M2, M, 64]", "ids [M2, M]"),
        ((3, 64), (3, 2), "f32 [M, 64]", "ids [M, 2]"),
        ((1, 64), (1, 2), "f32 [1, 64]", "ids [1, 2]"),
        ((1, 64), (2,), "f32 [1, 64]", "ids [2]"),
        ((1, 64), (1,), "f32 [1, 64]", "ids [1]"),
        ((64,), (2,), "f32 [64]", "ids [M]"),
        ((5, 3, 1, 64), (5, 3, 2), "f32 [M2, M, 1, 64]", "ids [M2, M, 2]"),
    ],
    ids=str,
)
def test_the_experts_of_a_row_are_a_fixed_length(
    x_shape: tuple[int, ...], ids_shape: tuple[int, ...], x: str, ids: str
) -> None:
    specs = signature_of(("x", "w", "ids"), (numbers(*x_shape), W, chosen(*ids_shape)))
    assert tuple(map(str, specs)) == (x, "Q4_0 [5, 64, 20]", ids)


def test_ids_of_rows_are_all_leading_axes() -> None:
    specs = signature_of(("x", "w", "ids"), (X, W[0], IDS))
    assert tuple(map(str, specs)) == ("f32 [M, 64]", "Q4_0 [64, 20]", "ids [M2, M]")


def test_statements_of_a_feed_forward() -> None:
    text = traced(moe, *moe_arguments(3, 2))
    assert "v12: [M, 2, 64] = matmul v11 v1 @ arg3" in text
    assert "v13: [M, 2, 1] = load arg5" in text
    assert "v15: [M, 64] = inner_sum v14" in text


REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (
        lambda x, w, i: vecmat(x, w[i]),
        (X, W, IDS),
        "because ids has several experts for each row, got x [M, 64] with ids [M, 2]; use np.",
    ),
    (lambda x, w, i: vecmat(x[..., :32], w[i]), (X, W, ONE_EACH), "expected x [..., 64] for w"),
    (lambda x, w, i: x @ w, (X, W, ONE_EACH), "use @ with an expert tensor; use np.vecmat(x,"),
    (lambda x, w, i: x @ w[i], (X, W, ONE_EACH), "use @ with an expert tensor; use np.vecmat(x,"),
    (
        lambda x, w, i: w[0],
        (X, W, ONE_EACH),
        "ids of w[ids]: expected an int32 or int64 array, got",
    ),
    (lambda x, w, i: w[x], (X, W, ONE_EACH), "got <traced f32 [M, 64]>"),
    (lambda x, w, i: vecmat(x, w), (X, W, ONE_EACH), "expected w[ids] of an ExpertTensor"),
    (lambda x, w, i: vecmat(x, x), (X, W, ONE_EACH), "expected w[ids] of an ExpertTensor"),
    (lambda x, w, i: vecmat(x, W[[0, 1, 2]]), (X, W, ONE_EACH), "that is an argument"),
    (lambda x, w, i: vecmat(x, W[i]), (X, W, ONE_EACH), "pass a captured weight as an argument"),
    (lambda x, w, i: w.T, (X, W, ONE_EACH), "cannot use the attribute .T of an expert tensor"),
    (lambda x, w, i: w + x, (X, W, ONE_EACH), "cannot compute element by element"),
    (lambda x, w, i: np.exp(w[i]), (X, W, ONE_EACH), "cannot compute np.exp of an expert tensor"),
    (
        lambda x, w, i: vecmat(x[:, None], w[i]).sum(-1),
        (X, W, IDS),
        "cannot remove the last axis of [M, 2, 20]; use keepdims=True",
    ),
    (
        lambda x, w, i: (x[:, None] * 2).sum(-2),
        (X, W, IDS),
        "cannot add up the axis before the last of [M, 1, 64]",
    ),
    (lambda x, w, i: x[:, None, None], (X, W, IDS), "cannot add axes with [:, None, None"),
    (lambda x, w, i: vecmat(x[:, None], w[i])[..., None], (X, W, IDS), "cannot add an axis to"),
    (lambda x, w, i: x[:, None], (X, W, IDS), "cannot return an array with an added axis"),
]


@pytest.mark.parametrize(("function", "args", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(function: Callable[..., Any], args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        traced(function, *args)
    assert "test_experts.py" in str(caught.value)


def test_sums_that_depend_on_a_reduction_are_refused() -> None:
    def function(x: Any, w: Any, i: Any) -> Any:
        y = vecmat(x[:, None], w[i])
        return (y - y.max(-1, keepdims=True)).sum(-2)

    with pytest.raises(TraceError, match="add up vectors of experts that depend on a reduction"):
        specialize(function, target="cpu")(X, W, IDS)


def test_a_number_of_rows_and_a_fixed_length_that_are_equal() -> None:
    """The scales have as many axes as ids, so the last axis of ids counts the experts of a row."""
    x, ids, scales = numbers(2, 3, 64), chosen(2, 3), numbers(3, 20)
    with pytest.raises(TraceError, match=re.escape("(one 3 is a number of rows, the other")):
        specialize(lambda x, w, i, s: vecmat(x, w[i]) * s, target="cpu")(x, W, ids, scales)


def test_types_and_shapes_are_those_of_numpy() -> None:
    def function(x: Any, w: Any, i: Any) -> Any:
        assert isinstance(w, ExpertTensor)
        assert (w.shape, w.ndim, len(w), w.format) == ((5, 64, 20), 3, 5, "Q4_0")
        y = q4jit.vecmat(x[:, None], w[i])
        assert y.shape[1:] == (2, 20)
        return y, w

    y, w = specialize(function, target="cpu")(X, W, IDS)
    assert w is W
    assert np.allclose(y, vecmat(X[:, None], W[IDS]), atol=1e-6)


def test_experts_in_containers_and_helpers() -> None:
    @dataclass
    class Layer:
        w: ExpertTensor
        ids: Any

    inner = specialize(product, target="cpu")

    compiled = specialize(lambda x, layer: inner(x, layer.w, layer.ids), target="cpu")
    args = X, Layer(W, ONE_EACH)
    compiled.warmup(*args)
    assert np.allclose(compiled(*args), vecmat(X, W[ONE_EACH]), atol=1e-6)
    out = np.empty((3, 20), np.float32)
    assert compiled(*args, out=out) is out


def test_without_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    args = moe_arguments(3, 2)
    for kind in (np.float32, np.float16):
        x = args[0].astype(kind)
        assert np.allclose(specialize(moe)(x, *args[1:]), moe(*args), atol=1e-2)


@pytest.mark.skipif(not hasattr(np, "vecmat"), reason="NumPy has vecmat from 2.2 on")
def test_numpys_vecmat_is_the_same() -> None:
    def function(x: Any, w: Any, i: Any) -> Any:
        return np.vecmat(x, w[i]), vecmat(x, w[i])

    assert traced(function, X, W, ONE_EACH).count("matmul") == 1
    for first, second in (function(X, W, ONE_EACH), specialize(function)(X, W, ONE_EACH)):
        assert np.array_equal(first, second)
    with pytest.raises(TraceError, match="that is an argument"):
        traced(lambda x, w, i: np.vecmat(x, W[[0, 1, 2]]), X, W, ONE_EACH)
    with pytest.raises(TraceError, match="of an expert tensor and no traced array"):
        traced(lambda x, w, i: np.vecmat(X, w[i]), X, W, ONE_EACH)


def test_vecmat_of_other_operands() -> None:
    with pytest.raises(ArgumentError, match="right operand of vecmat: expected w"):
        q4jit.vecmat(X, W[0])
    with pytest.raises(ArgumentError, match="expected a NumPy array, got list"):
        q4jit.vecmat([1.0], W[IDS])
    with pytest.raises(ArgumentError, match=r"expected leading axes of x that broadcast"):
        q4jit.vecmat(numbers(4, 64), W[ONE_EACH])
    with pytest.raises(ArgumentError, match=r"cannot compute np.matmul of <experts w\[ids\]"):
        X @ W[IDS]
    with pytest.raises(ArgumentError, match="expected shape"):
        q4jit.vecmat(numbers(3, 32), W[ONE_EACH])
