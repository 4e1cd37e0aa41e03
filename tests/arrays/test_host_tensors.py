"""PyTorch's tensors in host memory as arguments and results. Run with `make test-torch`."""

from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, DeviceError, dispatcher, quantize, specialize
from q4jit.arrays import host_tensors, libraries, torch_tensors
from q4jit.arrays.views import DeviceView
from q4jit.dispatch import pytorch
from tests.support.cures import check_cure
from tests.support.halves import BF16

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed: run make test-torch")
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call like a program that does not import q4jit.torch, which takes more tensors."""
    monkeypatch.setattr(pytorch, "bridge", None)


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


def converted(dtype: str) -> Any:
    return torch.randn(3, K).to(getattr(torch, dtype))


REFUSED = [
    (torch.randn(3, K, requires_grad=True), "x.detach()"),
    (torch.nn.Parameter(torch.randn(3, K).double()), "x.detach().float()"),
    (torch.nn.Parameter(torch.randn(3, K).bfloat16()), "x.detach()"),
    *((converted(dtype), "x.float()") for dtype in ("float64", "int8", "uint8", "bool")),
    *((converted(dtype), "x.float()") for dtype in ("int32", "int64")),  # row numbers
    *((converted(dtype), "x.float()") for dtype in ("float8_e4m3fn", "float8_e5m2")),
    *((converted(dtype), "x.real.float()") for dtype in ("complex64", "complex128")),
    (converted("complex64").conj(), "x.real.float()"),
    (converted("complex64").conj().imag, "x.resolve_neg()"),
    (torch.randn(3, K).to_sparse(), "x.to_dense()"),
    (torch.randn(3, K, device="meta"), "torch.zeros_like(x, device='cpu')"),
]


@pytest.mark.parametrize(("x", "cure"), REFUSED, ids=lambda v: str(getattr(v, "dtype", "")))
def test_cures_of_tensors(x: Any, cure: str) -> None:
    f = specialize(lambda x, w: x @ w, target="cpu")
    check_cure(lambda x: f(x, W), x, "x", cure, torch=torch)


@pytest.mark.parametrize(
    ("x", "cure"),
    [
        (np.ones((3, K), np.float32), "torch.from_numpy(x)"),
        (np.ones((3, K), np.float16), "torch.from_numpy(x)"),
        (np.ones((3, K), BF16), "torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)"),
        (np.ones((3, K), ">f4"), "torch.from_numpy(x.astype(np.float32))"),
        (np.ones((3, K), np.float64), "torch.from_numpy(x.astype(np.float32))"),
        (np.ones((3, K), np.float32)[::-1], "torch.from_numpy(np.ascontiguousarray(x))"),
    ],
    ids=lambda v: str(getattr(v, "dtype", "")),
)
def test_cures_of_mixed_containers(x: Any, cure: str) -> None:
    f = specialize(affine, target="cpu")
    check_cure(lambda x: f(x, W, torch.ones(N)), x, "x", cure, torch=torch)


@pytest.mark.parametrize(
    ("w", "cure"),
    [
        (torch.nn.Parameter(torch.randn(K, N)), "w.detach().numpy()"),
        (torch.nn.Parameter(torch.randn(K, N).bfloat16()), "w.detach().float().numpy()"),
        (torch.randn(K, N).bfloat16(), "w.float().numpy()"),
        (torch.randn(K, N).to(torch.float8_e4m3fn), "w.float().numpy()"),
        (torch.randn(K, N).to(torch.complex64), "w.real.float().numpy()"),
        (torch.randn(K, N).to(torch.int8), "w.float().numpy()"),
        (torch.randn(K, N).to_sparse(), "w.to_dense().numpy()"),
        (torch.randn(K, N, device="meta"), "torch.zeros_like(w, device='cpu').numpy()"),
    ],
    ids=lambda v: str(getattr(v, "dtype", "")),
)
def test_cures_of_matrices(w: Any, cure: str) -> None:
    check_cure(lambda w: quantize(w, "Q8_0"), w, "w", cure, torch=torch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_cures_of_the_reference(dtype: str) -> None:
    cure = "x.float().numpy()" if dtype == "bfloat16" else "x.numpy()"
    check_cure(lambda x: affine(x, W, 1.0), converted(dtype), "x", cure)


@pytest.mark.parametrize(
    ("out", "got"),
    [
        (torch.empty(3, N, dtype=torch.float16), r"float16 \[3, 32\]"),
        (torch.empty(3, N, dtype=torch.float8_e4m3fn), r"a tensor float8_e4m3fn \[3, 32\] on cpu"),
        (torch.empty(3, N, dtype=torch.int64), r"a tensor int64 \[3, 32\] on cpu"),
        (torch.empty(1, N).expand(3, N), r"float32 \[3, 32\] whose elements share memory"),
    ],
    ids=lambda v: str(getattr(v, "dtype", "")),
)
def test_out_that_does_not_fit(out: Any, got: str) -> None:
    x, b = tensors(torch.float32)
    wanted = rf"out=: expected a writable float32 \[3, 32\], got {got}"
    with pytest.raises(ArgumentError, match=wanted):
        specialize(affine, target="cpu")(x, W, b, out=out)


def test_out_of_another_library_than_the_arguments() -> None:
    x, b = tensors(torch.float32)
    with pytest.raises(ArgumentError, match=r"got a tensor float32 \[3, 32\] on cpu"):
        specialize(affine, target="cpu")(x.numpy(), W, b.numpy(), out=torch.empty(3, N))


@every_dtype
def test_tensors_at_odd_addresses(dtype: Any) -> None:
    x, b = tensors(dtype)
    f = specialize(affine, target="cpu")
    memory = torch.zeros(3 * K + 1, dtype=dtype)[1:].view(3, K)
    memory.copy_(x)
    assert torch.equal(f(memory, W, b), f(x, W, b))
    out = torch.empty(3 * N + 1, dtype=dtype)[1:].view(3, N)
    assert f(x, W, b, out=out) is out
    assert torch.equal(out, f(x, W, b))


def test_numbers_without_axes_promote_as_arrays() -> None:
    f = specialize(lambda x, s: x * s, target="cpu")
    for s, wanted in [
        (torch.tensor(2.0), torch.float32),
        (torch.tensor(2.0).half(), torch.float16),
        (torch.tensor(2.0).bfloat16(), torch.float32),
        (2.0, torch.float16),
    ]:
        assert f(torch.ones(2, K).half(), s).dtype == wanted


def test_tensors_without_memory_are_refused() -> None:
    f = specialize(lambda x: x * 2, target="cpu")
    with pytest.raises(ArgumentError, match=r"argument 'x': .*tensor with values in memory"):
        torch.func.vmap(f)(torch.ones(3, K))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a tensor that q4jit takes for one on a GPU."""
    tensor = torch.ones(N)
    view = DeviceView(4096, (N,), None, "float32", "nvidia", 0, False, "torch", None, tensor)
    torch_view, is_host_tensor = torch_tensors.torch_view, host_tensors.is_host_tensor
    monkeypatch.setattr(
        libraries, "torch_view", lambda t, v, n: view if v is tensor else torch_view(t, v, n)
    )
    for module in (libraries, host_tensors, dispatcher):
        monkeypatch.setattr(
            module, "is_host_tensor", lambda v: v is not tensor and is_host_tensor(v)
        )
    return tensor


@pytest.mark.parametrize("target", [None, "cpu"])
def test_tensors_on_two_devices(on_gpu: Any, target: str | None) -> None:
    f = specialize(lambda d, w: d["x"] @ w + d["b"], target=target)
    got = r"got d\['x'\] on the host and d\['b'\] on nvidia device 0"
    cure = r"use torch\.as_tensor\(d\['x'\], device=d\['b'\]\.device\)"
    with pytest.raises(ArgumentError, match=f"{got}; {cure}$"):
        f({"x": torch.ones(3, K), "b": on_gpu}, W)
    with pytest.raises(ArgumentError, match="got x on the host and b on nvidia device 0"):
        specialize(affine, target=target)(torch.ones(3, K), W, on_gpu)


def test_a_number_in_host_memory_beside_a_tensor_on_a_gpu(on_gpu: Any) -> None:
    with pytest.raises(DeviceError, match="no driver for the array on nvidia device 0"):
        specialize(lambda x, s: x * s)(on_gpu, torch.tensor(2.0))
