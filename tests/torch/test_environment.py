"""PyTorch, as it is installed, compiles, exports and connects processes without CUDA."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support import builds
from tests.support.torch.gloo import run_processes


@torch.library.custom_op("q4jit_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(double(x) + 1) * x


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU")
def test_cuda_fails_with_an_error() -> None:
    """Libraries that do nothing take the place of CUDA's."""
    with pytest.raises(RuntimeError, match=r"NVIDIA driver|CUDA"):
        torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA"):  # transformers asks on a CPU as well
        torch.cuda.is_current_stream_capturing()


@pytest.mark.usefixtures("inductor")
def test_inductor_compiles_around_a_custom_operator() -> None:
    gate = Gate()
    compiled = torch.compile(gate, fullgraph=True, dynamic=True)
    for m in (3, 17):
        x = torch.randn(m, 64)
        torch.testing.assert_close(compiled(x), gate(x))
    libraries = list(builds.inductor().rglob("*.so"))
    assert libraries  # of this run or, with --reuse, of an earlier one


def test_an_exported_program_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    rows = torch.export.Dim("rows", min=1, max=512)
    program = torch.export.export(Gate(), (x,), dynamic_shapes={"x": {0: rows}})
    torch.export.save(program, tmp_path / "gate.pt2")
    loaded = torch.export.load(tmp_path / "gate.pt2").module()
    for m in (1, 17):
        x = torch.randn(m, 64)
        assert torch.equal(loaded(x), Gate()(x))


def check_parallel_layers(size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(3, 16)
    whole = layers(x)
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    sharded = parallelize_module(layers, mesh, styles)
    torch.testing.assert_close(sharded(x), whole)


@pytest.mark.serial
@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_layers(size: int) -> None:
    run_processes(size, check_parallel_layers, size)


def fail_in_one() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("a bad shard")
    distributed.barrier()


@pytest.mark.serial
def test_the_first_process_that_fails_is_reported() -> None:
    with pytest.raises(
        AssertionError, match=r"^rank 1 of 2 failed\n(?s:.*)ValueError: a bad shard"
    ):
        run_processes(2, fail_in_one)
