"""PyTorch's tensors in host memory as arguments and results. Run with `make torch`."""

from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, quantize, specialize

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed: run make torch")

K, N = 64, 32
W = quantize(np.random.default_rng(0).standard_normal((K, N)).astype(np.float32), "Q8_0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def tensors(dtype: Any) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, K, generator=generator).to(dtype)
    return x, torch.randn(N, generator=generator).to(dtype)


@every_dtype
def test_results_are_tensors_of_the_same_type(dtype: Any) -> None:
    x, b = tensors(dtype)
    y = specialize(affine, target="cpu")(x, W, b)
    exact = x.double() @ torch.tensor(W.dequantize()).double() + b.double()
    assert type(y) is torch.Tensor
    assert y.dtype == dtype
    torch.testing.assert_close(
        y, exact.to(dtype), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4
    )


@every_dtype
def test_out_is_filled(dtype: Any) -> None:
    x, b = tensors(dtype)
    f = specialize(affine, target="cpu")
    out = torch.empty(3, N, dtype=dtype)
    assert f(x, W, b, out=out) is out
    assert torch.equal(out, f(x, W, b))


@every_dtype
def test_strided_tensors(dtype: Any) -> None:
    x, b = tensors(dtype)
    f = specialize(affine, target="cpu")
    assert torch.equal(f(x.T.contiguous().T, W, b), f(x, W, b))


def test_bound_calls_read_current_contents() -> None:
    x, b = tensors(torch.float32)
    f = specialize(affine, target="cpu")
    step = f.bind(x, W, b)
    x.mul_(2)
    assert torch.equal(step(), f(x, W, b))


def test_containers_and_ids() -> None:
    def function(layer: Any, w: Any) -> Any:
        return {"y": layer["x"] * 2, "w": w}

    results = specialize(function, target="cpu")({"x": torch.ones(2, K)}, W)
    assert torch.equal(results["y"], torch.full((2, K), 2.0))
    assert results["w"] is W
    rows = specialize(lambda ids, w: w.rows(ids), target="cpu")(torch.tensor([1, 2]), W)
    np.testing.assert_array_equal(rows.numpy(), W.dequantize().T[[1, 2]])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, K, requires_grad=True), r"'x'.*use x\.detach\(\)"),
        (torch.randn(3, K).double(), r"got float64 \[3, 64\]; use x\.float\(\)"),
        (torch.randn(3, K).to(torch.complex64), r"got complex64 .*use x\.float\(\)"),
        (torch.randn(3, K, device="meta"), r"got one on meta; use x\.cpu\(\)"),
        (torch.eye(K).to_sparse(), r"'x'.*to_dense"),
        (
            np.ones((3, K), np.float32),
            r"'x': expected a tensor, as 'b' is one.*torch\.from_numpy\(x\)",
        ),
    ],
)
def test_tensors_that_cannot_be_used(x: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        specialize(affine, target="cpu")(x, W, torch.ones(N))
