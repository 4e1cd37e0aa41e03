"""Calls on a real GPU: the contract, other libraries' arrays, streams, graphs, and errors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import QuantizedTensor, quantize, specialize
from q4jit.arrays.device_array import DeviceArray
from q4jit.backends import find_backend
from q4jit.errors import ArgumentError, DeviceError
from q4jit.hip.harness import Bench
from q4jit.hip.kernel import ELEMENT, MAX_GRID_Y
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.runtime import devices
from q4jit.runtime.driver import Device
from q4jit.tools.cli.main import main
from q4jit.tools.selftest.cases import cases, product
from q4jit.tools.selftest.measures import contract_error
from q4jit.tools.selftest.run import outcomes
from q4jit.weights.reference import random_weight, random_x
from tests.support import child

pytestmark = pytest.mark.gpu

BOUND: Final = 2e-6
K, N = 576, 200
EVERY_CLASS: Final = (1, 5, 64)  # M: one row, rows that share decoded weights, a tile with scratch
SLEEP_CYCLES: Final = 400_000_000  # about 0.2 s

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def cupy(device: Device) -> Any:
    return pytest.importorskip("cupy", reason="cupy is not installed")


@pytest.fixture(scope="module")
def w() -> QuantizedTensor:
    return random_weight("Q4_0", K, N)


def layer(x: Any, gain: Any, w: Any, bias: Any, residual: Any) -> Any:
    """Compute an RMSNorm, a product, a bias and a residual."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    return h @ w + bias + residual


def layer_args(m: int) -> list[Floats]:
    """Return x, gain, bias and residual."""
    return [random_x(m, K), random_x(1, K)[0], random_x(1, N)[0], random_x(m, N)]


def expected_layer(arrays: list[Floats], w: QuantizedTensor) -> Any:
    """Compute `layer` of `layer_args` in float64."""
    x, gain, bias, residual = (a.astype(np.float64) for a in arrays)
    return layer(x, gain, w.dequantize().astype(np.float64), bias, residual)


def close(y: Any, wanted: Any) -> None:
    assert y.dtype == np.float32
    assert y.shape == wanted.shape
    error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    assert error < 3e-6, f"relative rms {error:.1e}"


# --- the contract ---------------------------------------------------------------------------------


def test_every_schedule_format_shape_and_precision(bench: Bench) -> None:
    of_cases = list(outcomes(bench, cases(bench.target)))
    assert len(of_cases) > 200
    assert [f"{o.case}: {o.message}" for o in of_cases if not o.passed] == []


def test_the_command(device: Device, tmp_path: Path) -> None:
    name = f"hip:{devices.find_devices().index(device)}"
    assert main(["selftest", "--quick", "--device", name, "--out", str(tmp_path)]) == 0
    assert "0 failed" in (tmp_path / "report.txt").read_text("utf-8")


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_numpy_arrays_are_copied(device: Device, w: QuantizedTensor, m: int) -> None:
    f = specialize(layer, target="hip")
    arrays = layer_args(m)
    x, gain, bias, residual = arrays
    wanted = expected_layer(arrays, w)
    close(f(x, gain, w, bias, residual), wanted)
    out = np.full((m, 2 * N), np.nan, np.float32)
    assert f(x, gain, w, bias, residual, out=out[:, ::2]).base is out
    close(out[:, ::2], wanted)
    assert np.isnan(out[:, 1::2]).all()
    leading = f(x[None], gain, w, bias, residual[None])
    np.testing.assert_array_equal(leading[0], f(x, gain, w, bias, residual))


def test_no_rows_give_no_rows(device: Device, w: QuantizedTensor) -> None:
    assert specialize(product, target="hip")(np.empty((0, K), np.float32), w).shape == (0, N)


def test_more_rows_than_a_grid_axis_has_blocks(bench: Bench) -> None:
    m = MAX_GRID_Y + 1000
    args = (random_x(m, 32), random_weight("Q4_0", 32, 3))
    built = bench.build(product, args, PlanOptions(schedule=ELEMENT))
    assert contract_error(args, bench.run(built, args)) < 10 * BOUND  # of the worst row


def test_a_result_of_more_than_2_31_elements(bench: Bench, torch: Any) -> None:
    m, k, n = 65600, 32, 32768
    assert m * n > 1 << 31
    free, _ = devices.driver_of(bench.device).memory_info(bench.device.index)
    if free < 5 * m * n:
        pytest.skip(f"{free:,} bytes are free, {5 * m * n:,} are needed")
    w, x = random_weight("Q4_0", k, n), random_x(m, k)
    y = torch.full((m, n), torch.nan, device="cuda")
    specialize(product)(torch.from_numpy(x).cuda(), w, out=y)
    for rows in (slice(0, 3), slice(32766, 32770), slice(65533, 65538), slice(m - 3, m)):
        assert contract_error((x[rows], w), [y[rows].cpu().numpy()]) < BOUND
    for part in y.split(4096):
        assert bool(torch.isfinite(part).all())
    del y, part
    torch.cuda.empty_cache()


# --- arrays of other libraries --------------------------------------------------------------------


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_torch_tensors_are_used_in_place(torch: Any, w: QuantizedTensor, m: int) -> None:
    arrays = layer_args(m)
    x, gain, bias, residual = (torch.from_numpy(a).cuda() for a in arrays)
    f = specialize(layer)
    y = f(x, gain, w, bias, residual)
    assert isinstance(y, torch.Tensor)
    assert y.device == x.device
    close(y.cpu().numpy(), expected_layer(arrays, w))
    out = torch.full_like(y, torch.nan)
    assert f(x, gain, w, bias, residual, out=out) is out
    assert torch.equal(out, y)
    assert "the arrays are there" in f.explain()


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_cupy_arrays_are_used_in_place(cupy: Any, w: QuantizedTensor, m: int) -> None:
    arrays = layer_args(m)
    x, gain, bias, residual = map(cupy.asarray, arrays)
    f = specialize(layer)
    y = f(x, gain, w, bias, residual)
    assert isinstance(y, cupy.ndarray)
    close(y.get(), expected_layer(arrays, w))
    out = cupy.full_like(y, np.nan)
    assert f(x, gain, w, bias, residual, out=out) is out
    np.testing.assert_array_equal(out.get(), y.get())


def test_device_arrays_are_used_in_place(device: Device, w: QuantizedTensor) -> None:
    x = random_x(5, K)
    y = specialize(product)(DeviceArray.from_numpy(x, device), w)
    assert isinstance(y, DeviceArray)
    assert contract_error((x, w), [y.to_numpy()]) < BOUND


def test_arrays_that_only_have_dlpack(torch: Any, w: QuantizedTensor) -> None:
    class Foreign:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__(**options)

    x = random_x(5, K)
    tensor, out = torch.from_numpy(x).cuda(), torch.full((5, N), torch.nan, device="cuda")
    torch.cuda.synchronize()
    f = specialize(product)
    y = f(Foreign(tensor), w)
    assert isinstance(y, DeviceArray)
    assert contract_error((x, w), [y.to_numpy()]) < BOUND
    assert torch.equal(torch.from_dlpack(y), f(tensor, w))
    target = Foreign(out)
    assert f(Foreign(tensor), w, out=target) is target
    torch.cuda.synchronize()
    np.testing.assert_array_equal(out.cpu().numpy(), y.to_numpy())


@pytest.mark.parametrize("m", EVERY_CLASS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_that_start_at_any_element_of_a_buffer(
    torch: Any, w: QuantizedTensor, m: int, offset: int
) -> None:
    def moved(tensor: Any) -> Any:
        buffer = torch.empty(tensor.numel() + offset, device="cuda")
        return buffer[offset:].view(tensor.shape).copy_(tensor)

    aligned = [torch.from_numpy(a).cuda() for a in layer_args(m)]
    x, gain, bias, residual = map(moved, aligned)
    assert x.data_ptr() % 16 == 4 * offset
    f = specialize(layer)
    wanted = f(aligned[0], aligned[1], w, *aligned[2:])
    assert torch.equal(f(x, gain, w, bias, residual), wanted)
    out = moved(torch.full_like(wanted, torch.nan))
    f(x, gain, w, bias, residual, out=out)
    assert torch.equal(out, wanted)


def test_ids_on_the_device(torch: Any, w: QuantizedTensor) -> None:
    ids = torch.tensor([[0, N - 1], [7, 7]], device="cuda")
    y = specialize(lambda ids, w: w.rows(ids))(ids, w)
    np.testing.assert_array_equal(y.cpu().numpy(), w.rows(ids.cpu().numpy()))


def test_unsuitable_arrays_are_refused(torch: Any, w: QuantizedTensor) -> None:
    f = specialize(product)
    x = torch.from_numpy(random_x(8, K)).cuda()
    f(x, w)
    with pytest.raises(ArgumentError, match=r"strides of .*x\.contiguous\(\)"):
        f(x.T.contiguous().T, w)
    with pytest.raises(ArgumentError, match=r"got float64 .*; use x\.float\(\)"):
        f(x.double(), w)
    with pytest.raises(ArgumentError, match="requires a gradient"):
        f(x.clone().requires_grad_(), w)
    with torch.no_grad():
        f(x.clone().requires_grad_(), w)
    for out in (
        np.empty((8, N), np.float32),
        torch.empty((8, N)),
        torch.empty((8, N + 1), device="cuda"),
        torch.empty((8, 2 * N), device="cuda")[:, ::2],
        torch.empty((8, N), device="cuda", dtype=torch.float64),
        (torch.empty((8, N), device="cuda"),),
    ):
        with pytest.raises(ArgumentError, match="out=: expected "):
            f(x, w, out=out)
    shared = torch.empty(8 * (K + N), device="cuda")
    inside = shared[: 8 * K].view(8, K)
    with pytest.raises(ArgumentError, match="out= overlaps"):
        f(inside, w, out=shared[8 * K - 1 : 8 * (K + N) - 1].view(8, N))


def test_later_calls_refuse_the_same_arrays_as_the_first(torch: Any, w: QuantizedTensor) -> None:
    f = specialize(product)
    x, out = torch.from_numpy(random_x(8, K)).cuda(), torch.empty((8, N), device="cuda")
    for _ in range(2):
        f(x, w, out=out)
    wanted = out.clone()
    negated, grown = torch._neg_view(x), x.clone().requires_grad_()
    for wrong, message in (
        (x.half(), "float16"),
        (x.T.contiguous().T, "strides"),
        (x.to_sparse(), "sparse"),
        (negated, "negated"),
        (grown, "requires a gradient"),
    ):
        with pytest.raises(ArgumentError, match=message):
            f(wrong, w, out=out)
    for wrong in (out.half(), out.T.contiguous().T, out.cpu(), out[:4], (out,), x[:, :N]):
        with pytest.raises(ArgumentError, match="out=: expected "):
            f(x, w, out=wrong)
    for wrong in (torch._neg_view(out), out.clone().requires_grad_()):
        with pytest.raises(ArgumentError, match="argument 'out': expected "):
            f(x, w, out=wrong)
    shared = torch.empty(8 * (K + N), device="cuda")
    inside = shared[: 8 * K].view(8, K).copy_(x)
    with pytest.raises(ArgumentError, match="out= overlaps"):
        f(inside, w, out=shared[8 * K - 1 : 8 * (K + N) - 1].view(8, N))
    beside = shared[8 * K :].view(8, N)
    assert torch.equal(f(inside, w, out=beside), wanted)
    with torch.no_grad():
        assert torch.equal(f(grown, w, out=out.zero_()), wanted)
    assert torch.equal(f(torch.nn.Parameter(x, requires_grad=False), w), wanted)


def test_arrays_on_two_devices_are_refused(torch: Any, w: QuantizedTensor) -> None:
    f = specialize(lambda x, w, bias: x @ w + bias)
    x, bias = random_x(8, K), random_x(1, N)[0]
    with pytest.raises(ArgumentError, match="all on one device"):
        f(torch.from_numpy(x).cuda(), w, bias)
    with pytest.raises(ArgumentError, match="all on one device"):
        f(x, w, torch.from_numpy(bias).cuda())
    with pytest.raises(ArgumentError, match="expected arrays on target='cpu'"):
        specialize(product, target="cpu")(torch.from_numpy(x).cuda(), w)


# --- streams, graphs, the hot path ----------------------------------------------------------------


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_torch_streams_are_respected(torch: Any, w: QuantizedTensor, m: int) -> None:
    f = specialize(product)
    new = torch.from_numpy(random_x(m, K)).cuda()
    x = torch.full_like(new, torch.nan)
    f(x, w)  # compiles the kernels and uploads w
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        f(x, w)
        side.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(new)  # a kernel on another stream would still read NaN
        y = f(x, w)
        x.fill_(torch.nan)
    side.synchronize()
    assert contract_error((new.cpu().numpy(), w), [y.cpu().numpy()]) < BOUND


def test_cupy_streams_are_respected(cupy: Any, w: QuantizedTensor) -> None:
    f = specialize(product)
    new = cupy.asarray(random_x(64, K))
    x = cupy.full_like(new, np.nan)
    f(x, w)
    large = cupy.ones((8192, 8192), np.float32)
    cupy.cuda.Device().synchronize()
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        for _ in range(50):
            cupy.multiply(large, 1.0, out=large)
        x[...] = new
        y = f(x, w)
        x.fill(np.nan)
    side.synchronize()
    assert contract_error((new.get(), w), [y.get()]) < BOUND


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_calls_on_two_streams_are_independent(torch: Any, w: QuantizedTensor, m: int) -> None:
    f = specialize(layer)
    inputs = []
    for sign in (1, -1):
        x, *rest = (torch.from_numpy(a).cuda() for a in layer_args(m))
        inputs.append((sign * x, rest[0], w, *rest[1:]))
    wanted = [f(*args) for args in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    by_stream: list[list[Any]] = [[], []]
    for _ in range(50):
        for stream, args, results in zip(streams, inputs, by_stream, strict=True):
            with torch.cuda.stream(stream):
                results.append(f(*args))
    torch.cuda.synchronize()
    for exact, results in zip(wanted, by_stream, strict=True):
        assert all(torch.equal(y, exact) for y in results)


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_graphs_are_captured_and_replayed(torch: Any, w: QuantizedTensor, m: int) -> None:
    f = specialize(layer)
    x, gain, bias, residual = (torch.from_numpy(a).cuda() for a in layer_args(m))
    out = torch.empty((m, N), device="cuda")
    args = (x, gain, w, bias, residual)
    first = f(*args, out=out).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f(*args, out=out)
    for scale in (-1.0, 3.0):
        x.copy_(scale * torch.from_numpy(random_x(m, K)).cuda() + 1)
        residual.mul_(scale)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        f(*args, out=out)
        assert torch.equal(replayed, out)
        assert not torch.equal(replayed, first)


def test_two_graphs_do_not_share_scratch(torch: Any, w: QuantizedTensor) -> None:
    f = specialize(product)
    xs = [torch.from_numpy(sign * random_x(64, K)).cuda() for sign in (1, -1)]
    wanted = [f(x, w) for x in xs]
    outs = [torch.empty_like(y) for y in wanted]
    graphs = [torch.cuda.CUDAGraph() for _ in xs]
    for graph, x, out in zip(graphs, xs, outs, strict=True):
        with torch.cuda.graph(graph):
            f(x, w, out=out)
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for out, exact in zip(outs, wanted, strict=True):
            assert torch.equal(out, exact)
            out.fill_(torch.nan)


@pytest.mark.parametrize("m", EVERY_CLASS)
def test_a_call_neither_allocates_nor_waits(
    torch: Any, device: Device, w: QuantizedTensor, m: int
) -> None:
    f = specialize(layer)
    x, gain, bias, residual = (torch.from_numpy(a).cuda() for a in layer_args(m))
    out = torch.empty((m, N), device="cuda")
    driver = devices.driver_of(device)

    def call() -> None:
        f(x, gain, w, bias, residual, out=out)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), driver.memory_info(device.index)
    for _ in range(100):
        call()
    assert (torch.cuda.memory_allocated(), driver.memory_info(device.index)) == before
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start = time.perf_counter()
    call()
    returned_s = time.perf_counter() - start
    assert not torch.cuda.current_stream().query()  # the device is still busy
    torch.cuda.synchronize()
    assert returned_s < (time.perf_counter() - start) / 2


# --- the choice of the device ---------------------------------------------------------------------


def test_small_calls_stay_on_the_cpu_and_large_ones_go_to_the_gpu(device: Device) -> None:
    small, large = random_weight("Q4_0", 32, 16), random_weight("Q4_0", 4096, 4096)
    f = specialize(product)
    f(random_x(1, 32), small)
    assert "too little work for a GPU" in f.explain()
    assert "plan product for hip:" not in f.explain()
    g = specialize(product)
    x = random_x(512, 4096)
    y = g(x, large)
    assert "it is faster, " in g.explain()
    assert str(device.arch) in g.explain()
    assert contract_error((x[:4], large), [y[:4]]) < BOUND


# --- errors ---------------------------------------------------------------------------------------


def test_a_damaged_cache_entry_is_compiled_again(
    device: Device, w: QuantizedTensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    x = random_x(3, K)
    wanted = specialize(product, target="hip")(x, w)
    (code,) = (tmp_path / "cache").glob("*.cubin" if device.platform == "nvidia" else "*.hsaco")
    data = bytearray(code.read_bytes())
    data[len(data) // 2] ^= 0xFF
    code.write_bytes(data)
    f = specialize(product, target="hip")
    np.testing.assert_array_equal(f(x, w), wanted)
    assert f.stats.compiles == 1
    again = specialize(product, target="hip")
    again(x, w)
    assert again.stats.compiles == 0


def test_damaged_code_is_refused(bench: Bench, device: Device) -> None:
    source = Source("q4jit_product", bench.target, "", ".hip")
    load: Callable[..., Any] = find_backend(bench.target).load
    with pytest.raises(DeviceError, match=r"q4jit_product|delete its cache entry"):
        load(b"\x7fELF" + bytes(4096), source, device)


def test_running_out_of_memory_is_an_error(device: Device, w: QuantizedTensor) -> None:
    driver = devices.driver_of(device)
    f = specialize(product, target="hip")
    f(random_x(64, K), w)
    with pytest.raises(DeviceError, match=r"out of memory on .*cannot allocate .*target='cpu'"):
        DeviceArray((device.memory_bytes,), device)
    free, _ = driver.memory_info(device.index)
    kept = 256 << 20
    ballast = DeviceArray((free - kept,), device, np.dtype(np.uint8))
    try:
        with pytest.raises(DeviceError, match="out of memory"):
            f(np.zeros((2 * kept // (4 * K), K), np.float32), w)
    finally:
        del ballast
    x = random_x(64, K)
    assert contract_error((x, w), [f(x, w)]) < BOUND


def test_a_forked_child_gets_an_error(device: Device) -> None:
    child.run("""
        from q4jit.errors import DeviceError

        on_gpu = specialize(lambda x, w: x @ w, target="hip")
        check(on_gpu)

        def work():
            try:
                on_gpu(x_small, small)
            except DeviceError as error:
                assert "forked child" in str(error)
            else:
                raise AssertionError("the parent's device was used")
            check(specialize(lambda x, w: x @ w, target="cpu"))

        reap(in_child(work))
        check(on_gpu)
    """)


@pytest.mark.parametrize("name", ["F16", "Q4_0"])
def test_nan_and_inf_agree_with_float64(device: Device, name: str) -> None:
    values = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    if name == "F16":
        values[3, 1], values[5, 2] = np.inf, np.nan
    w = quantize(values, name)
    for m in EVERY_CLASS:
        x = random_x(m, 64).copy()
        x[0, 7], x[-1, 9] = np.inf, np.nan if m > 1 else -np.inf
        with np.errstate(invalid="ignore"):
            exact = (x.astype(np.float64) @ w.dequantize().astype(np.float64)).astype(np.float32)
        y = specialize(product, target="hip")(x, w)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
        np.testing.assert_array_equal(y[np.isinf(exact)], exact[np.isinf(exact)])
