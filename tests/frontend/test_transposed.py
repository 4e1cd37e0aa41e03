"""Products with `w.T`: what is traced, and how plans keep them apart from products with `w`."""

import pickle
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, TraceError, quantize, specialize
from q4jit.frontend.trace import trace
from q4jit.plan.split import split
from q4jit.weights.tensor import QuantizedTensor, TransposedTensor
from tests.support.kernels import specs_of

K, N = 64, 48
RNG = np.random.default_rng(0)
W = quantize(RNG.standard_normal((K, N)).astype(np.float32), "Q8_0")
X = RNG.standard_normal((3, K)).astype(np.float32)
Y = RNG.standard_normal((3, N)).astype(np.float32)


def traced(function: Any, *args: Any) -> Any:
    return trace(function, specs_of(list(args)))


def test_the_graph_says_which_operand_is_transposed() -> None:
    graph = traced(lambda y, w: y @ w.T, Y, W)
    assert "v0 @ arg1.T" in str(graph)
    (product,) = graph.outputs
    assert (product.transposed, product.width) == (True, K)


def test_a_transpose_has_a_shape_and_a_transpose() -> None:
    def function(y: Any, w: Any) -> Any:
        assert w.T.shape == (N, K)
        assert w.mT.T.shape == (K, N)
        assert (w.T.ndim, w.T.format) == (2, "Q8_0")
        assert isinstance(w.T, TransposedTensor)
        assert isinstance(w.T.T, QuantizedTensor)
        return y @ w.T

    assert traced(function, Y, W).outputs[0].width == K


def test_both_operands_give_two_kernels_even_with_one_x() -> None:
    square = quantize(RNG.standard_normal((K, K)).astype(np.float32), "Q4_0")
    kernels, _ = split(traced(lambda x, w: x @ w + x @ w.T, X, square))
    assert [kernel.is_transposed for kernel in kernels] == [False, True]


def test_a_slice_of_the_product() -> None:
    graph = traced(lambda y, w: (y @ w.T)[..., 5:21], Y, W)
    assert "arg1.T from 5" in str(graph)
    assert graph.outputs[0].width == 16


def test_a_transpose_is_no_argument_of_a_nested_function() -> None:
    inner = specialize(lambda y, v: y @ v, target="cpu")
    with pytest.raises(TraceError, match=r"cannot pass a transpose .*; pass w, and write w\.T"):
        specialize(lambda y, w: inner(y, w.T), target="cpu")(Y, W)
    with pytest.raises(ArgumentError, match="pass w, and write"):
        inner(Y, W.T)


def test_a_transpose_is_no_argument() -> None:
    f = specialize(lambda y, v: y @ v, target="cpu")
    with pytest.raises(ArgumentError, match=r"'v'.*got TransposedTensor.*pass w, and write w\.T"):
        f(Y, W.T)


def test_a_captured_transpose_is_refused() -> None:
    with pytest.raises(TraceError, match=r"captured weight .*; pass w as an argument, and write"):
        traced(lambda y: y @ W.T, Y)


def test_a_transpose_is_no_result() -> None:
    with pytest.raises(TraceError, match="got SymbolicTranspose"):
        specialize(lambda w: w.T, target="cpu")(W)


# --- outside of decorated functions ---------------------------------------------------------------


def test_numpy_arrays_are_multiplied_exactly() -> None:
    exact = Y.astype(np.float64) @ W.dequantize().astype(np.float64).T
    np.testing.assert_array_equal(Y @ W.T, exact.astype(np.float32))
    np.testing.assert_array_equal(np.matmul(Y, W.T), exact.astype(np.float32))
    assert (Y.astype(np.float16) @ W.T).dtype == np.float16
    assert (Y[np.newaxis] @ W.T).shape == (1, 3, K)
    np.testing.assert_array_equal(W.T.dequantize(), W.dequantize().T)


def test_a_transpose_shares_the_tensor() -> None:
    assert W.T.T is W
    assert W.mT.mT is W
    assert W.T.shape == (N, K)
    assert W.T.format == "Q8_0"
    assert (W.ndim, W.T.ndim) == (2, 2)
    assert repr(W.T) == f"<transpose of {W!r}>"
    copy = pickle.loads(pickle.dumps(W.T))
    np.testing.assert_array_equal(copy.T.raw, W.raw)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: X @ W.T,
            r"x @ w\.T with w\.T \(N, K\) = \(48, 64\): .*\[\.\.\., 48\], got \[3, 64\]",
        ),
        (lambda: W.T @ X, r"a TransposedTensor must be the right operand of @, as in x @ w\.T"),
        (lambda: np.exp(W.T), r"np\.exp cannot take a TransposedTensor; use x @ w\.T"),
        (lambda: np.asarray(W.T), r"does not become an array by itself; use x @ w\.T"),
        (lambda: Y.astype(int) @ W.T, r"x in x @ w\.T: expected float32"),
    ],
    ids=["shape", "left", "exp", "array", "dtype"],
)
def test_what_cannot_be_multiplied(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
