"""Where a call runs: on a GPU or on the CPU, and the rule that says so.

Arrays on a device stay there. A target that the user names is used. Otherwise NumPy arrays go to a
GPU where one is here and the work is worth the way: both times are estimated from rates that are
measured once per process. An error on the way chosen is raised; nothing falls back. Work that no
GPU could be worth is told by the CPU's rates alone: a small script makes no context on a GPU.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit import config
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.views import DeviceView, common_device, device_of
from q4jit.errors import ArgumentError, DeviceError
from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import WeightSpec
from q4jit.runtime.devices import driver_of, find_device, find_devices, target_of, why_none
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS, Target, find_target

_REPEATS: Final = 5
_SMALL_BYTES: Final = 16 << 10
_LARGE_BYTES: Final = 8 << 20
_SCARCE_BYTES: Final = 1 << 20  # instead, where a device's memory is nearly full
_TRIVIAL_US: Final = 20.0  # two copies and a launch alone take this long on every GPU
_MATRIX: Final = 256  # rows of the matrices whose product measures the CPU's arithmetic
_LANES: Final = 128  # multiply-adds per cycle of a compute unit, about, on every GPU of the table
_UNKNOWN_CLOCK_KHZ: Final = 1_000_000  # where a driver does not say: below what GPUs reach


@dataclass(frozen=True)
class Place:
    """Where a call runs and why. `device` is None on the CPU."""

    target: Target
    device: Device | None
    rule: str


@dataclass(frozen=True)
class CallCost:
    """What a call costs: bytes of weights read, of arrays copied if they must be, multiply-adds."""

    weight_bytes: int
    array_bytes: int
    multiply_adds: int


def choose_place(
    name: str | None, args: Sequence[Any], names: Sequence[str], work: Callable[[], CallCost]
) -> Place:
    """Where a call runs.

    name: the target asked for, None for any. `work` is asked only where it decides. Raises
    ArgumentError for arrays in several places, TargetError and DeviceError where there is no such
    device.
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
        found = (d for d in find_devices() if target == Target("hip", d.arch))
        # an arch without its device: what is compiled can be inspected, and does not load
        return Place(target, next(found, None), f"target={name!r} was asked for")
    if name is not None:
        device = find_device(name)
        return Place(target_of(device), device, f"target={name!r} was asked for: {device}")
    return _cheaper(work)


def names_device(name: str) -> bool:
    """Whether a target is a device, which only a call looks for: hip, hip:1, cuda."""
    backend, _, which = name.partition(":")
    return backend == "cuda" or (backend == "hip" and (not which or which.isdigit()))


def _where_arrays_are(
    name: str | None, views: Sequence[DeviceView | None], names: Sequence[str]
) -> Place:
    common_device(views, names)
    device = device_of(next(view for view in views if view is not None))
    if name is not None and not _means(name, device):
        raise ArgumentError(
            f"target={name!r} was asked for, and {names[0]!r} lies on {device}: accepted are "
            f"arrays of that target, or no target"
        )
    return Place(target_of(device), device, f"arrays on {device} stay there")


def _means(name: str, device: Device) -> bool:
    """Whether a name stands for a device: `hip` for any, an arch for each of that arch."""
    backend, _, which = name.partition(":")
    known = backend == "hip" or (backend == "cuda" and device.platform == "nvidia")
    devices = [d for d in find_devices() if backend == "hip" or d.platform == "nvidia"]
    if which.isdigit():
        return known and int(which) < len(devices) and devices[int(which)] == device
    return known and which in {"", device.arch}


def _cheaper(work: Callable[[], CallCost]) -> Place:
    cpu = find_target("cpu")
    devices = [d for d in find_devices() if d.arch in HIP_ARCHS]
    if not devices:
        found = ", ".join(map(str, find_devices()))
        reason = f"no code for {found}" if found else why_none()
        return Place(cpu, None, f"the CPU runs every call: {reason}")
    asked = work()
    here = cpu_us(asked)
    if here < _TRIVIAL_US:  # no device gets a context for it
        reason = f"about {here:.1f} µs on the CPU, less than a call of any GPU"
        return Place(cpu, None, f"too small to be worth a launch: {reason}")
    # a discrete GPU before an integrated one
    device = min(devices, key=lambda d: (d.integrated, -d.compute_units))
    there = gpu_us(device, asked)
    times = f"about {there:.0f} µs on {device}, copies included, and {here:.0f} µs on the CPU"
    if there < here:
        return Place(target_of(device), device, f"worth a launch: {times}")
    return Place(cpu, None, f"too small to be worth a launch: {times}")


# --- estimates --------------------------------------------------------------------------------


def work_of(graph: Graph, rows: int) -> CallCost:
    """What a call of a graph with so many rows costs."""
    weight_bytes = multiply_adds = 0
    widths = sum(node.width for node in graph.outputs)
    for node in graph.nodes():
        if node.op == "load":
            widths += node.width
        if node.op != "matmul":
            continue
        spec = graph.signature[node.arg]
        assert isinstance(spec, WeightSpec)
        fmt = spec.block_format
        elements = spec.k * node.width
        weight_bytes += elements * fmt.block_bytes // fmt.block_elements
        multiply_adds += rows * elements
    return CallCost(weight_bytes, 4 * rows * widths, multiply_adds)


def gpu_us(device: Device, work: CallCost) -> float:
    """Microseconds on a device, with its arrays copied there and back.

    Raises DeviceError where its copies cannot be measured, not even with 1 MiB of its memory.
    """
    rates = _gpu_rates(device)
    return rates.call_us + work.array_bytes / rates.copy_bytes_per_us + _kernel_us(rates, work)


def cpu_us(work: CallCost) -> float:
    """Microseconds on the CPU."""
    return _kernel_us(_cpu_rates(), work)


@dataclass(frozen=True)
class _Rates:
    read_bytes_per_us: float
    multiply_adds_per_us: float
    copy_bytes_per_us: float = 0.0
    call_us: float = 0.0


def _kernel_us(rates: _Rates, work: CallCost) -> float:
    return max(
        work.weight_bytes / rates.read_bytes_per_us, work.multiply_adds / rates.multiply_adds_per_us
    )


@functools.cache
def _gpu_rates(device: Device) -> _Rates:
    """Copies as they are measured, and the nominal rate of multiply-adds of the arch and clock."""
    # out of memory, as a rule; whatever else it is, the second try raises it again
    with contextlib.suppress(DeviceError):
        return _measured_rates(device, _LARGE_BYTES)
    return _measured_rates(device, _SCARCE_BYTES)


def _measured_rates(device: Device, large_bytes: int) -> _Rates:
    """Measured with copies: a small one costs what a call does beside its kernels."""
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
    """Measured on one thread; the memory serves about four of them, arithmetic all."""
    threads = config.num_threads()
    data = np.ones(_LARGE_BYTES // 4, np.float32)
    square = np.ones((_MATRIX, _MATRIX), np.float32)
    read_us = _measured_us(data.sum)
    product_us = _measured_us(lambda: square @ square)
    return _Rates(
        read_bytes_per_us=_LARGE_BYTES / read_us * min(threads, 4),
        # BLAS may use threads of its own: what it reaches is taken for the whole machine
        multiply_adds_per_us=_MATRIX**3 / product_us,
    )


def _measured_us(action: Callable[[], object]) -> float:
    """The shortest of a few runs, after one that warms up."""
    action()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6
