"""Tensor parallelism: a feed-forward block whose weights are divided among processes.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Each process has a GPU if there are enough, and a share of the CPU's cores if there are not. The
program compares the divided block with the whole one, and prints its error and the time of a step.
"""

import argparse
import os
import time

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import q4jit
from q4jit.torch import Linear
from q4jit.torch.parallel import ColwiseLinear, RowwiseLinear

__all__ = ["FeedForward", "main"]


class FeedForward(nn.Module):
    """A gated feed-forward block with quantised weights."""

    def __init__(self, width: int, hidden: int, name: str) -> None:
        """Make a block with random weights in a format."""
        super().__init__()
        self.gate = _random_linear(width, hidden, name)
        self.up = _random_linear(width, hidden, name)
        self.down = _random_linear(hidden, width, name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [..., width]."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def _random_linear(k: int, n: int, name: str) -> Linear:
    w = torch.randn(k, n) * k**-0.5
    return Linear(q4jit.quantize(w.numpy(), name))


def _device() -> torch.device:
    """Return this process's GPU, if every process of this machine has one, or the CPU."""
    rank, processes = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if torch.cuda.device_count() >= processes:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    q4jit.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    return torch.device("cpu")


def _compare(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> list[str]:
    """Return a line for each number of tokens."""
    torch.manual_seed(0)  # the same weights and inputs in every process
    block = FeedForward(options.width, options.hidden, options.format).to(device)
    inputs = [torch.randn(m, options.width).to(device) for m in options.tokens]
    whole = [(block(x), _seconds(block, x, options.steps)) for x in inputs]
    parallelize_module(
        block, mesh, {"gate": ColwiseLinear(), "up": ColwiseLinear(), "down": RowwiseLinear()}
    )
    lines = []
    for x, (y, whole_s) in zip(inputs, whole, strict=True):
        error = float((block(x) - y).norm() / y.norm())
        step_s = _seconds(block, x, options.steps)
        lines.append(
            f"{len(x):5} tokens: error {error:.1e}, {step_s * 1e3:.3f} ms per step, "
            f"{whole_s * 1e3:.3f} ms in one process"
        )
    return lines


def _seconds(block: FeedForward, x: Tensor, steps: int) -> float:
    """Return the time of a step in the slowest process."""
    for _ in range(3):
        block(x)
    _wait(x.device)
    distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        block(x)
    _wait(x.device)
    taken = torch.tensor((time.perf_counter() - start) / steps, device=x.device)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Compare a block that is divided with one that is not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error(
            "no process group; use torchrun --nproc-per-node 2 examples/tensor_parallel.py"
        )
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        with torch.no_grad():
            lines = _compare(options, mesh, device)
        if distributed.get_rank() == 0:
            size = f"{options.width} x {options.hidden} in {options.format}"
            print(f"{size}, {mesh.size()} processes, {device.type} with {backend}")
            print("\n".join(lines))
        distributed.barrier()  # no process ends while another one communicates
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
