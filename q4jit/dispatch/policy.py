"""The policy: whether a call runs on a GPU or on the CPU, and the rule that decided it.

A call with arrays on a device runs there. A target that the user names is used. Otherwise NumPy
arrays go to the GPU if there is one and the work outweighs the transfer. Both times are estimated
from rates that are measured once per process. The CPU's rates alone decide for work that is too
small for every GPU, so a small script makes no context on a GPU.

An error on the chosen device is raised. Nothing falls back to another device.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit import config
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.views import DeviceView, common_device, device_of
from q4jit.errors import ArgumentError, DeviceError, TargetError, expected
from q4jit.floats import FLOAT_BYTES
from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import ArraySpec, WeightSpec
from q4jit.runtime.devices import driver_of, find_device, find_devices, target_of, why_none
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS, Target, find_target

_REPEATS: Final = 5
_SMALL_BYTES: Final = 16 << 10  # a copy that takes the time of a call without its kernels
_LARGE_BYTES: Final = 8 << 20  # a copy that measures bandwidth
_SCARCE_BYTES: Final = 1 << 20  # the same, if a device's memory is nearly full
_SHORTEST_GPU_US: Final = 20.0  # two copies and a launch take at least this long on every GPU
_MATRIX: Final = 256  # rows of the matrices whose product measures the CPU's arithmetic
_LANES: Final = 128  # multiply-adds per cycle of a compute unit, about, on all GPUs in `targets`
_UNKNOWN_CLOCK_KHZ: Final = 1_000_000  # if a driver does not tell it: lower than every GPU's


@dataclass(frozen=True)
class Place:
    """Where a call runs, and why.

    Attributes:
        device: None on the CPU, and for a GPU that this machine does not have.
        rule: the place and the reason, for `explain`: "on the CPU: target='cpu'".
    """

    target: Target
    device: Device | None
    rule: str


@dataclass(frozen=True)
class CallCost:
    """The work of a call.

    Attributes:
        weight_bytes: bytes of weights that it reads.
        array_bytes: bytes of arguments and results, which a GPU call copies.
        multiply_adds: multiply-adds of its products.
    """

    weight_bytes: int
    array_bytes: int
    multiply_adds: int


def choose_place(
    name: str | None, args: Sequence[Any], names: Sequence[str], cost: Callable[[], CallCost]
) -> Place:
    """Return where a call runs.

    name: the target that the user asked for, or None. names: the arguments' names. cost: returns
    the cost of the call; it is called only if the cost decides. Raises ArgumentError for arrays on
    several devices, or not on the target; TargetError for an unknown target; DeviceError if the
    device of that name is missing.
    """
    arrays = [
        (value if isinstance(value, DeviceView) else None, names[i])
        for i, value in enumerate(args)
        if isinstance(value, DeviceView) or (isinstance(value, np.ndarray) and value.ndim)
    ]
    if any(view is not None for view, _ in arrays):
        return _where_arrays_are(name, [view for view, _ in arrays], [n for _, n in arrays])
    if name is not None and not names_device(name):
        target = find_target(name)
        of_arch = (d for d in find_devices() if target == Target("hip", d.arch))
        # without a device of that arch, kernels can be compiled and inspected, but not loaded
        device = next(of_arch, None)
        where = device or (target if target.backend == "hip" else "the CPU")
        return Place(target, device, f"on {where}: target={name!r}")
    if name is not None:
        device = find_device(name)
        return Place(target_of(device), device, f"on {device}: target={name!r}")
    return _cheaper(cost)


def runs_kernels() -> bool:
    """Whether kernels can run on this operating system: on Linux only."""
    return sys.platform == "linux"


def check_system() -> None:
    """Raise TargetError unless kernels can run on this operating system."""
    if not runs_kernels():
        raise TargetError(
            expected(
                "Linux to run kernels",
                sys.platform,
                cure="use f.warmup(...) and f.inspect_source(target) to read them",
            )
        )


def names_device(name: str) -> bool:
    """Whether a target names a device, which only a call looks up: hip, hip:1, cuda."""
    backend, _, which = name.partition(":")
    return backend == "cuda" or (backend == "hip" and (not which or which.isdigit()))


def _where_arrays_are(
    name: str | None, views: Sequence[DeviceView | None], names: Sequence[str]
) -> Place:
    common_device(views, names)
    device = device_of(next(view for view in views if view is not None))
    if name is not None and not _matches(name, device):
        raise ArgumentError(
            expected(
                f"arrays on target={name!r}",
                f"one on {device}",
                where=f"argument {names[0]!r}",
                cure="move it there, or leave out target",
            )
        )
    return Place(target_of(device), device, f"on {device}: the arrays are there")


def _matches(name: str, device: Device) -> bool:
    """Whether a target's name includes a device: `hip` any, `hip:gfx1100` each of that arch."""
    backend, _, which = name.partition(":")
    known = backend == "hip" or (backend == "cuda" and device.platform == "nvidia")
    devices = [d for d in find_devices() if backend == "hip" or d.platform == "nvidia"]
    if which.isdigit():
        return known and int(which) < len(devices) and devices[int(which)] == device
    return known and which in {"", device.arch}


def _cheaper(cost_of_call: Callable[[], CallCost]) -> Place:
    """Return the place with the shorter estimated time."""
    cpu = find_target("cpu")
    devices = [d for d in find_devices() if d.arch in HIP_ARCHS]
    if not devices:
        unsupported = ", ".join(map(str, find_devices()))
        reason = f"q4jit has no code for {unsupported}" if unsupported else why_none()
        return Place(cpu, None, f"on the CPU: {reason}")
    cost = cost_of_call()
    on_cpu_us = cpu_us(cost)
    if on_cpu_us < _SHORTEST_GPU_US:  # decided without a context on a GPU
        rule = f"on the CPU: too little work for a GPU, about {on_cpu_us:.1f} µs on the CPU"
        return Place(cpu, None, rule)
    # a discrete GPU before an integrated one
    device = min(devices, key=lambda d: (d.integrated, -d.compute_units))
    on_gpu_us = gpu_us(device, cost)
    times = f"about {on_gpu_us:.0f} µs on {device} with copies, {on_cpu_us:.0f} µs on the CPU"
    if on_gpu_us < on_cpu_us:
        return Place(target_of(device), device, f"on {device}: it is faster, {times}")
    return Place(cpu, None, f"on the CPU: too little work for a GPU, {times}")


# --- estimates --------------------------------------------------------------------------------


def cost_of(graph: Graph, rows: int) -> CallCost:
    """Return the cost of a call of a graph for a number of rows."""
    weight_bytes = multiply_adds = 0
    results = zip(graph.outputs, graph.result_types, strict=True)
    row_bytes = sum(n.copies * n.width * FLOAT_BYTES[float_type] for n, float_type in results)
    for node in graph.nodes():
        if node.op == "load":
            array = graph.signature[node.arg]
            assert isinstance(array, ArraySpec)
            row_bytes += node.copies * node.width * FLOAT_BYTES[array.float_type]
        if node.op != "matmul":
            continue
        spec = graph.signature[node.arg]
        assert isinstance(spec, WeightSpec)
        fmt = spec.block_format
        elements = node.operands[0].width * node.width
        vectors = rows * node.copies
        matrices = 1 if node.chosen is None else min(spec.experts, vectors)
        weight_bytes += matrices * elements * fmt.block_bytes // fmt.block_elements
        multiply_adds += vectors * elements
    return CallCost(weight_bytes, rows * row_bytes, multiply_adds)


def gpu_us(device: Device, cost: CallCost) -> float:
    """Return the estimated microseconds of a call on a device, copies of its arrays included.

    Raises DeviceError if its copies cannot be measured, not even with 1 MiB of its memory.
    """
    rates = _gpu_rates(device)
    return rates.call_us + cost.array_bytes / rates.copy_bytes_per_us + _kernel_us(rates, cost)


def cpu_us(cost: CallCost) -> float:
    """Return the estimated microseconds of a call on the CPU."""
    return _kernel_us(_cpu_rates(), cost)


@dataclass(frozen=True)
class _Rates:
    read_bytes_per_us: float
    multiply_adds_per_us: float
    copy_bytes_per_us: float = 0.0
    call_us: float = 0.0


def _kernel_us(rates: _Rates, cost: CallCost) -> float:
    return max(
        cost.weight_bytes / rates.read_bytes_per_us, cost.multiply_adds / rates.multiply_adds_per_us
    )


@functools.cache
def _gpu_rates(device: Device) -> _Rates:
    """Return a device's rates: measured copies, and multiply-adds computed from its clock."""
    # usually out of memory; the second try raises any other error again
    with contextlib.suppress(DeviceError):
        return _measured_rates(device, _LARGE_BYTES)
    return _measured_rates(device, _SCARCE_BYTES)


def _measured_rates(device: Device, large_bytes: int) -> _Rates:
    """Return a device's rates, measured with copies on it and to it."""
    driver = driver_of(device)
    small = np.zeros(_SMALL_BYTES, np.uint8)
    large = np.zeros(large_bytes, np.uint8)
    memory = [DeviceArray((large_bytes,), device, large.dtype) for _ in range(2)]

    def on_device() -> None:
        driver.copy_on_device(device.index, memory[0].pointer, memory[1].pointer, large_bytes, 0)
        driver.synchronize(device.index, 0)

    call_us = _measured_us(lambda: DeviceArray.from_numpy(small, device).to_numpy())
    copy_us = _measured_us(lambda: DeviceArray.from_numpy(large, device)) - call_us / 2
    read_us = _measured_us(on_device)
    clock_mhz = (device.clock_khz or _UNKNOWN_CLOCK_KHZ) * 1e-3
    return _Rates(
        read_bytes_per_us=2 * large_bytes / max(read_us, 1e-3),
        multiply_adds_per_us=device.compute_units * clock_mhz * _LANES,
        copy_bytes_per_us=large_bytes / max(copy_us, 1.0),
        call_us=call_us,
    )


@functools.cache
def _cpu_rates() -> _Rates:
    """Return the CPU's rates, measured on one thread.

    About four threads saturate the memory; arithmetic scales with all threads.
    """
    threads = config.num_threads()
    data = np.ones(_LARGE_BYTES // 4, np.float32)
    square = np.ones((_MATRIX, _MATRIX), np.float32)
    read_us = _measured_us(data.sum)
    product_us = _measured_us(lambda: square @ square)
    return _Rates(
        read_bytes_per_us=_LARGE_BYTES / read_us * min(threads, 4),
        # BLAS may use several threads already, so its rate counts for the whole machine
        multiply_adds_per_us=_MATRIX**3 / product_us,
    )


def _measured_us(action: Callable[[], object]) -> float:
    """Return the microseconds of the shortest of a few runs, after one to warm up."""
    action()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6
