"""The operator and the modules on a real GPU: eager, compiled, captured, differentiated."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import q4jit.torch as qt
from q4jit import quantize, specialize
from q4jit.precision import BOUNDS
from q4jit.tools.selftest.measures import special_error
from q4jit.weights.reference import random_weight

pytestmark = pytest.mark.gpu

K, N = 512, 1024
ROWS: Final = (1, 3, 17, 200)
FORMATS: Final = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")


@specialize
def swiglu(x: Any, gate: Any, up: Any) -> Any:
    """Return the gated product of x [M, K] with two weights [K, N]."""
    g = x @ gate
    return g / (1 + np.exp(-g)) * (x @ up)


@specialize
def normed(x: Any, scale: Any, w: Any) -> Any:
    """Return the product of the RMS-normed x [M, K] with a weight, scale [K]."""
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale) @ w


class FeedForward(torch.nn.Module):
    """A gated feed-forward block with a residual."""

    def __init__(self, fmt: str) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        sizes = ((K, N), (K, N), (N, K))
        weights = [quantize(0.04 * rng.standard_normal(size), fmt) for size in sizes]
        self.gate, self.up = map(qt.Weight, weights[:2])
        self.down = qt.Linear(weights[2])

    def forward(self, x: Any) -> Any:
        return x + self.down(swiglu(x, self.gate, self.up))


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")


def inputs(m: int, dtype: Any = torch.float32, **options: Any) -> Any:
    """Return x [m, K] on the GPU."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, K, generator=generator).to("cuda", dtype)
    return x.requires_grad_() if options.get("grad") else x


@pytest.fixture(scope="module", params=FORMATS)
def block(request: pytest.FixtureRequest) -> Any:
    return FeedForward(request.param).cuda()


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_are_within_the_bound(fmt: str) -> None:
    w = random_weight(fmt, K, N)
    linear = qt.Linear(w).cuda()
    for m in ROWS:
        x = inputs(m)
        y = linear(x)
        assert y.device == x.device
        assert special_error(BOUNDS["f32"], (x.cpu().numpy(), w), [y.cpu().numpy()]) < BOUNDS["f32"]


def test_a_weight_is_on_the_gpu_once_and_nowhere_else() -> None:
    linear = qt.Linear(random_weight("Q4_K", 4096, 4096))
    before = torch.cuda.memory_allocated()
    linear.cuda()
    for m in ROWS:
        linear(torch.randn(m, 4096, device="cuda"))
    torch.cuda.synchronize()
    blocks = linear.weight.blocks
    assert blocks.is_cuda
    assert torch.cuda.memory_allocated() - before < 1.05 * blocks.numel()
    resident = linear.weight.tensor()._resident
    assert len(resident.uploads) == 1
    assert not resident.addresses


@pytest.mark.parametrize("lookup", [False, True], ids=["with a head", "alone"])
@pytest.mark.parametrize("fmt", [*FORMATS, "F16"])
def test_a_table_is_on_the_gpu_once(fmt: str, lookup: bool) -> None:
    w = random_weight(fmt, K, N)
    table = qt.Embedding(qt.Weight(w, lookup=lookup)).cuda()
    ids = torch.tensor([3, N - 1, 0], device="cuda")
    vectors = table(ids)
    np.testing.assert_array_equal(vectors.cpu().numpy(), w.rows(ids.cpu().numpy()))
    if not lookup:
        head = qt.Linear(table.weight)
        torch.testing.assert_close(head(vectors), qt.Linear(w).cuda()(vectors), rtol=0, atol=0)
    resident = table.weight.tensor()._resident
    assert len(resident.uploads) == 1
    assert not resident.addresses


def test_the_state_is_the_same_from_every_device(block: Any) -> None:
    on_gpu = block.state_dict()
    on_cpu = FeedForward(block.gate.format).state_dict()
    assert on_gpu.keys() == on_cpu.keys()
    assert all(torch.equal(on_gpu[key].cpu(), on_cpu[key]) for key in on_cpu)


# PyTorch itself captures an empty graph when it starts
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_two_graphs_serve_every_number_of_rows(block: Any, mode: str) -> None:
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for m in (*ROWS, *ROWS):
            x = inputs(m)
            assert torch.equal(compiled(x).clone(), block(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_captured_graph_follows_its_inputs(block: Any) -> None:
    x = inputs(5)
    with torch.no_grad():
        block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        for seed in range(3):
            x.copy_(torch.randn(5, K, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(y, block(x))


def test_streams_give_equal_bits(block: Any) -> None:
    x = inputs(17)
    with torch.no_grad():
        expected = block(x)
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                results += [block(x) for _ in range(8)]
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


PROGRAM: Final = """
import sys, torch, q4jit.torch
program = torch.export.load(sys.argv[1]).module()
for x, y in torch.load(sys.argv[2]):
    assert torch.equal(program(x.cuda()).cpu(), y), len(x)
print("equal")
"""


def test_an_exported_program_loads_in_a_fresh_process(block: Any, tmp_path: Path) -> None:
    rows = torch.export.Dim("M")
    program = torch.export.export(block, (inputs(3),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "block.pt2")
    with torch.no_grad():
        pairs = [(inputs(m).cpu(), block(inputs(m)).cpu()) for m in ROWS]
    torch.save(pairs, tmp_path / "pairs.pt")
    files = [str(tmp_path / name) for name in ("block.pt2", "pairs.pt")]
    command = [sys.executable, "-c", PROGRAM, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_agree_with_pytorch(block: Any, compiled: bool) -> None:
    run = torch.compile(block, fullgraph=True) if compiled else block
    dense = {
        name: torch.from_numpy(np.array(w.numpy().dequantize())).to("cuda", torch.float64)
        for name, w in {"gate": block.gate, "up": block.up, "down": block.down.weight}.items()
    }
    for m in ROWS:
        x = inputs(m, grad=True)
        cotangent = inputs(m).sign() + 0.5
        (got,) = torch.autograd.grad(run(x), x, cotangent)
        y = x.detach().double().requires_grad_()
        gated = torch.nn.functional.silu(y @ dense["gate"]) * (y @ dense["up"])
        (expected,) = torch.autograd.grad(y + gated @ dense["down"], y, cotangent.double())
        error = (got - expected).norm() / expected.norm()
        assert float(error) < 1e-5


def test_gradients_of_a_norm_reach_its_scale() -> None:
    w = qt.Weight(random_weight("Q4_0", K, N)).cuda()
    dense = torch.from_numpy(np.array(w.numpy().dequantize())).to("cuda", torch.float64)
    x, scale = inputs(17, grad=True), torch.rand(K, device="cuda", requires_grad=True)
    got = torch.autograd.grad(normed(x, scale, w).sum(), (x, scale))
    wide = [v.detach().double().requires_grad_() for v in (x, scale)]
    product = torch.nn.functional.rms_norm(wide[0], (K,), wide[1], 1e-6) @ dense
    expected = torch.autograd.grad(product.sum(), wide)
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocasting_gives_its_dtype(block: Any, dtype: Any) -> None:
    x = inputs(17)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        y = block.down(swiglu(x, block.gate, block.up))
        compiled = torch.compile(lambda v: swiglu(v, block.gate, block.up), fullgraph=True)(x)
        assert torch.equal(compiled, swiglu(x, block.gate, block.up))
    assert y.dtype is dtype


def test_opcheck_passes(block: Any) -> None:
    from q4jit.torch.operator import call  # late, as it needs PyTorch

    program = torch.export.export(block, (inputs(3),))
    (first, *_) = [n for n in program.graph.nodes if n.target is call]
    weights = [block.gate.blocks, block.up.blocks]
    for m in (1, 17):
        torch.library.opcheck(call, ([inputs(m, grad=True)], weights, [], first.args[3]))


def test_strided_tensors_are_accepted(block: Any) -> None:
    x = torch.randn(K, 17, device="cuda").T
    assert not x.is_contiguous()
    with torch.no_grad():
        assert torch.equal(block(x), block(x.contiguous()))
        assert torch.equal(
            swiglu(x, block.gate, block.up), swiglu(x.contiguous(), block.gate, block.up)
        )


def test_two_devices_are_refused(block: Any) -> None:
    with pytest.raises(Exception, match=r"x.*cpu"):
        block.down(torch.randn(1, N))
