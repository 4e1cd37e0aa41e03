"""Scratch memory on a device: temporaries, and what kernels of a call hand on to each other."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from q4jit.arrays.device_array import DeviceArray
from q4jit.hip.kernel import HipPlan
from q4jit.hip.memory import scratch
from q4jit.plan.kernels import Slot
from q4jit.runtime.devices import driver_of, drivers
from q4jit.runtime.driver import Device

_PER_THREAD_STREAM: Final = 2  # the handle of each thread's own default stream
_REGION_BYTES: Final = 256  # each temporary begins where a burst of memory does


class DeviceScratch:
    """The scratch memory of a plan for `rows` rows; offsets: where each of its slots begins."""

    def __init__(self, plan: HipPlan, rows: int, device: Device) -> None:
        """Divide it; memory is taken when kernels are launched."""
        self._device, self._driver = device, driver_of(device)
        self.offsets, self.size_bytes = _divided(plan, rows)

    def launch(self, steps: Sequence[Callable[..., None]], stream: int, values: list[Any]) -> None:
        """Launch kernels on a stream with `values` and, after them, the addresses of the slots."""
        # this handle means another stream in every thread
        thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
        workspace = _workspace(self._device.platform, self._device.index, stream, thread)
        with workspace.lock:  # kernels of a call hand values on in it: calls do not mix
            base = self._memory(workspace, stream)
            values += [base + offset for offset in self.offsets.values()]
            for step in steps:
                step(stream, *values)

    def _memory(self, workspace: "_Workspace", stream: int) -> int:
        """Where temporaries go. A graph gets memory of its own: two may be replayed at a time."""
        if not self._driver.is_capturing(self._device.index, stream):
            return workspace.of(self.size_bytes)
        memory = DeviceArray((self.size_bytes,), self._device, np.dtype(np.uint8), stream)
        held_by_graphs.append(memory)
        return memory.pointer


def _divided(plan: HipPlan, rows: int) -> tuple[dict[Slot, int], int]:
    """Where temporaries and what kernels hand on begin in the scratch memory, and its size."""
    sizes = {Slot("temp", i): 4 * width * max(1, rows) for i, width in enumerate(plan.temps)}
    for kernel in plan.kernels:
        for slot, size in scratch(kernel, rows).items():
            sizes[slot] = max(sizes.get(slot, 0), size)
    offsets: dict[Slot, int] = {}
    total = 0
    for slot, size in sizes.items():
        offsets[slot] = total
        total += -(-size // _REGION_BYTES) * _REGION_BYTES
    return offsets, total


class _Workspace:
    """Memory that the calls on one stream of a device use one after the other."""

    def __init__(self, device: Device, stream: int) -> None:
        self.lock = threading.Lock()
        self._device, self._stream = device, stream
        self._memory: DeviceArray | None = None

    def of(self, size_bytes: int) -> int:
        """Return the address of `size_bytes` bytes. Growing waits for kernels that use the old."""
        if self._memory is None or self._memory.nbytes < size_bytes:
            self._memory = None
            self._memory = DeviceArray(
                (size_bytes,), self._device, np.dtype(np.uint8), self._stream
            )
        return self._memory.pointer


# A graph does not tell when it is gone: what it writes to lives as long as the process.
held_by_graphs: list[DeviceArray] = []


def release_graph_memory(device: Device, stream: int) -> None:
    """Free what was given to graphs that were captured on a stream, and that are all gone."""
    held_by_graphs[:] = [
        memory for memory in held_by_graphs if (memory.device, memory.stream) != (device, stream)
    ]


@functools.lru_cache(maxsize=64)  # streams come and go; freeing memory waits for what uses it
def _workspace(platform: str, device: int, stream: int, thread: int) -> _Workspace:
    return _Workspace(drivers()[platform].devices[device], stream)
