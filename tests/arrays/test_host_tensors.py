"""PyTorch's tensors in host memory as arguments and results. Run with `make torch`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, quantize, specialize

pytestmark = pytest.mark.torch

K, N = 64, 32
W = quantize(np.random.default_rng(0).standard_normal((K, N)).astype(np.float32), "Q8_0")
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


def affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def tensors(torch: Any, dtype: str) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, K, generator=generator).to(getattr(torch, dtype))
    return x, torch.randn(N, generator=generator).to(x.dtype)


@every_dtype
def test_results_are_tensors_of_the_same_type(torch: Any, dtype: str) -> None:
    x, b = tensors(torch, dtype)
    y = specialize(affine, target="cpu")(x, W, b)
    exact = x.double() @ torch.tensor(W.dequantize()).double() + b.double()
    assert type(y) is torch.Tensor
    assert y.dtype == x.dtype
    torch.testing.assert_close(
        y, exact.to(x.dtype), rtol=2e-2 if dtype != "float32" else 1e-4, atol=1e-4
    )


@every_dtype
def test_out_is_filled(torch: Any, dtype: str) -> None:
    x, b = tensors(torch, dtype)
    f = specialize(affine, target="cpu")
    out = torch.empty(3, N, dtype=x.dtype)
    assert f(x, W, b, out=out) is out
    assert torch.equal(out, f(x, W, b))


@every_dtype
def test_strided_tensors(torch: Any, dtype: str) -> None:
    x, b = tensors(torch, dtype)
    f = specialize(affine, target="cpu")
    assert torch.equal(f(x.T.contiguous().T, W, b), f(x, W, b))


def test_bound_calls_read_current_contents(torch: Any) -> None:
    x, b = tensors(torch, "float32")
    f = specialize(affine, target="cpu")
    step = f.bind(x, W, b)
    x.mul_(2)
    assert torch.equal(step(), f(x, W, b))


def test_containers_and_ids(torch: Any) -> None:
    def function(layer: Any, w: Any) -> Any:
        return {"y": layer["x"] * 2, "w": w}

    results = specialize(function, target="cpu")({"x": torch.ones(2, K)}, W)
    assert torch.equal(results["y"], torch.full((2, K), 2.0))
    assert results["w"] is W
    rows = specialize(lambda ids, w: w.rows(ids), target="cpu")(torch.tensor([1, 2]), W)
    np.testing.assert_array_equal(rows.numpy(), W.dequantize().T[[1, 2]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.randn(3, K, requires_grad=True), r"'x'.*use x\.detach\(\)"),
        (lambda t: t.randn(3, K).double(), r"got float64 \[3, 64\]; use x\.float\(\)"),
        (lambda t: t.randn(3, K).to(t.complex64), r"got complex64 .*use x\.float\(\)"),
        (lambda t: t.randn(3, K, device="meta"), r"got one on meta; use x\.cpu\(\)"),
        (lambda t: t.eye(K).to_sparse(), r"'x'.*to_dense"),
        (
            lambda t: np.ones((3, K), np.float32),
            r"'x': expected a tensor, as 'b' is one.*torch\.from_numpy\(x\)",
        ),
    ],
)
def test_tensors_that_cannot_be_used(torch: Any, make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        specialize(affine, target="cpu")(make(torch), W, torch.ones(N))
