"""Half-precision arrays and products with `w.T` on a real GPU, through calls as users make them."""

from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import QuantizedTensor, specialize
from q4jit.arrays.device_array import DeviceArray
from q4jit.runtime.driver import Device
from q4jit.tools.selftest.halves import HALVES
from q4jit.tools.selftest.measures import special_error
from q4jit.tools.selftest.transposed import product_with_transpose
from q4jit.weights.reference import random_weight, random_x
from tests.support.halves import DTYPES

pytestmark = pytest.mark.gpu

BOUND: Final = 2e-6
K, N = 576, 200
ROUNDING: Final = {"f32": 2e-6, "f16": 2.0**-11, "bf16": 2.0**-8}
EVERY_CLASS: Final = (1, 5, 64, 600)  # M: one row, a few, a tile, several tiles
KINDS: Final = ("f32", *HALVES)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_class = pytest.mark.parametrize("m", EVERY_CLASS)


@pytest.fixture(scope="module")
def w() -> QuantizedTensor:
    return random_weight("Q4_0", K, N)


def both_ways(x: Any, w: Any) -> Any:
    """Return a product with a weight, and the product of that with its transpose."""
    y = x @ w
    return y, y @ w.T


def dtype_of(torch: Any, kind: str) -> Any:
    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]


def tensor_of(torch: Any, array: NDArray[Any], kind: str) -> Any:
    """Return a tensor on the GPU; its type is exact for the values of `array`."""
    return torch.from_numpy(array.astype(np.float32)).cuda().to(dtype_of(torch, kind))


def values_of(tensor: Any, kind: str) -> NDArray[Any]:
    wide: NDArray[np.float32] = tensor.float().cpu().numpy()  # NumPy cannot view PyTorch's bf16
    return wide.astype(DTYPES[kind])


def assert_product(x: NDArray[Any], w: Any, y: NDArray[Any], *, transposed: bool = False) -> None:
    """Check a product within the bound of f32, rounded once to the type of x."""
    assert y.shape == (len(x), K if transposed else N)
    assert special_error(BOUND, (x, w), [y], transposed=transposed) < BOUND


@every_kind
@every_class
def test_torch_tensors_times_the_transpose(
    torch: Any, w: QuantizedTensor, m: int, kind: str
) -> None:
    y = random_x(m, N).astype(DTYPES[kind])
    tensor = tensor_of(torch, y, kind)
    f = specialize(product_with_transpose)
    z = f(tensor, w)
    assert isinstance(z, torch.Tensor)
    assert (z.device, z.dtype) == (tensor.device, tensor.dtype)
    assert_product(y, w, values_of(z, kind), transposed=True)
    out = torch.full_like(z, torch.nan)
    assert f(tensor, w, out=out) is out
    assert torch.equal(out, z)


@every_kind
def test_device_arrays_times_the_transpose(device: Device, w: QuantizedTensor, kind: str) -> None:
    y = random_x(5, N).astype(DTYPES[kind])
    z = specialize(product_with_transpose)(DeviceArray.from_numpy(y, device), w)
    assert isinstance(z, DeviceArray)
    assert_product(y, w, z.to_numpy(), transposed=True)


@pytest.mark.parametrize("kind", HALVES)
@every_class
def test_half_precision_tensors_in_and_out(
    torch: Any, w: QuantizedTensor, m: int, kind: str
) -> None:
    x = random_x(m, K).astype(DTYPES[kind])
    tensor = tensor_of(torch, x, kind)
    f = specialize(lambda x, w: x @ w)
    y = f(tensor, w)
    assert (y.device, y.dtype) == (tensor.device, tensor.dtype)
    assert_product(x, w, values_of(y, kind))
    buffer = torch.full((m * N + 1,), torch.nan, device="cuda", dtype=y.dtype)
    out = buffer[1:].view(m, N)  # at an odd address of two bytes
    assert f(tensor, w, out=out) is out
    assert torch.equal(out, y)
    assert torch.isnan(buffer[0])


@every_kind
@every_class
def test_graphs_of_both_products_follow_their_inputs(
    torch: Any, w: QuantizedTensor, m: int, kind: str
) -> None:
    f = specialize(both_ways)
    x = tensor_of(torch, random_x(m, K), kind)
    outs = tuple(torch.empty((m, n), device="cuda", dtype=x.dtype) for n in (N, K))
    f(x, w, out=outs)  # compiles the kernels and uploads w
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f(x, w, out=outs)
    for scale in (-1, 3):
        changed = (scale * random_x(m, K) + np.float32(1)).astype(DTYPES[kind])
        x.copy_(tensor_of(torch, changed, kind))
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        y, z = (values_of(out, kind) for out in outs)
        assert_product(changed, w, y)
        values = w.dequantize().astype(np.float64)
        exact = changed.astype(np.float64) @ values @ values.T
        error = np.linalg.norm(z.astype(np.float64) - exact) / np.linalg.norm(exact)
        assert error < ROUNDING[kind]
        replayed = [out.clone() for out in outs]
        f(x, w, out=outs)
        assert all(map(torch.equal, replayed, outs))
