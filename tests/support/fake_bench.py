"""Benches without a GPU: NumPy computes the results, and times follow a rule."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit import QuantizedTensor
from q4jit.errors import DeviceError
from q4jit.hip import search
from q4jit.hip.harness import Built
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.render import render
from q4jit.hip.tunings import Machine
from q4jit.runtime.driver import Device
from q4jit.targets import Target

DEVICE = Device(
    platform="amd",
    index=0,
    name="Fake",
    arch="gfx1100",
    id="0000:03:00.0/0",
    memory_bytes=1 << 20,
    compute_units=96,
    lds_bytes=64 << 10,
    max_block_size=1024,
    wave=32,
    l2_bytes=1 << 10,
    clock_khz=2_000_000,
    integrated=False,
)


def for_numpy(value: Any) -> Any:
    if isinstance(value, QuantizedTensor):
        return _Decoded(value.dequantize().astype(np.float64))
    return value


class _Decoded:
    """Decoded values with the operations of a weight."""

    __array_ufunc__ = None

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    def __rmatmul__(self, x: NDArray[Any]) -> NDArray[Any]:
        product: NDArray[Any] = x.astype(np.float64) @ self.values
        return product

    @property
    def T(self) -> "_Decoded":  # noqa: N802 - NumPy's name
        return _Decoded(self.values.T)

    def dequantize(self) -> NDArray[Any]:
        return self.values

    def rows(self, ids: NDArray[Any]) -> NDArray[Any]:
        columns: NDArray[Any] = self.values.T[ids]
        return columns


MACHINE = Machine(DEVICE.name, DEVICE.arch, "fake 1.0")
Fault = Callable[[HipKernel, NDArray[Any]], None]


def product_kernel(plan: HipPlan) -> HipKernel:
    (kernel,) = (kernel for kernel in plan.kernels if kernel.work.sections)
    return kernel


class SearchBench:
    """A bench that computes with NumPy. Its times follow a rule: more threads are slower.

    `fault` may raise an error or change the results.
    """

    fingerprint = MACHINE.compiler
    fault: Fault | None = None
    run_rows: list[tuple[HipKernel, int]]
    timed: list[HipKernel]
    lost = False

    def __init__(self, device: Device = DEVICE) -> None:
        self.device, self.target = device, Target("hip", device.arch)
        self.run_rows, self.timed = [], []

    def __enter__(self) -> "SearchBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compile(self, plan: HipPlan) -> Built:
        return Built(plan, tuple(render(plan, kernel) for kernel in plan.kernels))

    def run(self, built: Built, args: Sequence[Any]) -> list[NDArray[Any]]:
        kernel = product_kernel(built.plan)
        self.run_rows.append((kernel, len(args[0])))
        x, *weights = map(for_numpy, args)
        y = np.array(search.products(x, *weights), np.float32)
        if self.fault is not None:
            self.fault(kernel, y)
        return [y]

    def upload(self, args: Sequence[Any], stream: int = 0) -> Sequence[Any]:
        if self.lost:
            raise DeviceError("the device is lost")
        return args

    def outputs(self, built: Built, args: Sequence[Any]) -> tuple[None]:
        return (None,)

    def bind(self, built: Built, args: Sequence[Any]) -> "_FakeLaunch":
        return _FakeLaunch(product_kernel(built.plan))

    def replay_us(self, calls_on: Callable[[int], Sequence[Any]]) -> float:
        calls = calls_on(3)
        kernel: HipKernel = calls[0].func.kernel
        weights = [args for call in calls for args in call.args[0][1:]]
        assert len(set(map(id, weights))) == len(weights) > 1  # the weights take turns
        self.timed.append(kernel)
        return self.us(kernel)

    def us(self, kernel: HipKernel) -> float:
        return kernel.block_size + kernel.ahead + kernel.columns / 8


class _FakeLaunch:
    def __init__(self, kernel: HipKernel) -> None:
        self.kernel = kernel

    def prepare(self, args: Sequence[Any]) -> None:
        pass

    def __call__(self, args: Sequence[Any], out: Any) -> None:
        raise AssertionError("only replay_us times calls")
