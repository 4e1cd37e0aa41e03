"""Scratch memory on a device: temporaries, and values that a kernel passes to a later one."""

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

_PER_THREAD_STREAM: Final = 2  # every thread has a default stream of its own with this handle
_ALIGNMENT_BYTES: Final = 256  # of each slot: the start of a memory burst


class DeviceScratch:
    """The scratch memory of a plan for `rows` rows.

    Attributes:
        offsets: the offset of each slot in bytes.
        size_bytes: the size of all slots.
    """

    def __init__(self, plan: HipPlan, rows: int, device: Device) -> None:
        """Compute the offsets; memory is allocated when kernels are launched."""
        self._device, self._driver = device, driver_of(device)
        self.offsets, self.size_bytes = _divided(plan, rows)

    def launch(
        self, launches: Sequence[Callable[..., None]], stream: int, values: list[Any]
    ) -> None:
        """Launch kernels on a stream with `values` and, after them, the addresses of the slots."""
        workspace = _workspace(self._device, stream)
        with workspace.lock:  # the kernels of two calls must not alternate: each overwrites slots
            base = self._memory(workspace, stream)
            values += [base + offset for offset in self.offsets.values()]
            for launch in launches:
                launch(stream, *values)

    def _memory(self, workspace: "_Workspace", stream: int) -> int:
        """Return the address of the slots.

        A captured graph gets memory of its own, because two graphs can be replayed at a time.
        """
        if not self._driver.is_capturing(self._device.index, stream):
            return workspace.of(self.size_bytes)
        memory = DeviceArray((self.size_bytes,), self._device, np.dtype(np.uint8), stream)
        held_by_graphs.append(memory)
        return memory.pointer


def _divided(plan: HipPlan, rows: int) -> tuple[dict[Slot, int], int]:
    """Return the offset of each slot in scratch memory, and the size of all slots."""
    sizes = {Slot("temp", i): 4 * floats * max(1, rows) for i, floats in enumerate(plan.temps)}
    for kernel in plan.kernels:
        for slot, size in scratch(kernel, rows).items():
            sizes[slot] = max(sizes.get(slot, 0), size)
    offsets: dict[Slot, int] = {}
    total = 0
    for slot, size in sizes.items():
        offsets[slot] = total
        total += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, total


class _Workspace:
    """Memory for the calls on one stream of a device, which use it one after the other."""

    def __init__(self, device: Device, stream: int) -> None:
        self.lock = threading.Lock()
        self._device, self._stream = device, stream
        self._memory: DeviceArray | None = None

    def of(self, size_bytes: int) -> int:
        """Return the address of `size_bytes` bytes.

        To grow, the workspace waits for the kernels that use the old memory.
        """
        if self._memory is None or self._memory.nbytes < size_bytes:
            self._memory = None
            self._memory = DeviceArray(
                (size_bytes,), self._device, np.dtype(np.uint8), self._stream
            )
        return self._memory.pointer


# The driver does not say when a graph is destroyed, so its memory is kept until the process ends.
held_by_graphs: list[DeviceArray] = []


def release_graph_memory(device: Device, stream: int) -> None:
    """Free the memory of the graphs captured on a stream; all of them must be destroyed."""
    held_by_graphs[:] = [
        memory for memory in held_by_graphs if (memory.device, memory.stream) != (device, stream)
    ]


def _workspace(device: Device, stream: int) -> _Workspace:
    """Return the workspace of a stream. A thread's own stream ends with the thread, and so does it.

    Another thread may get the same number later, while kernels of the first still run.
    """
    if stream != _PER_THREAD_STREAM:
        return _shared_workspace(device.platform, device.index, stream)
    known = _of_thread.workspaces
    place = device.platform, device.index
    if place not in known:
        known[place] = _Workspace(drivers()[device.platform].devices[device.index], stream)
    return known[place]


@functools.lru_cache(maxsize=64)  # a program may create many streams
def _shared_workspace(platform: str, device: int, stream: int) -> _Workspace:
    return _Workspace(drivers()[platform].devices[device], stream)


class _OfThread(threading.local):
    """The workspaces of a thread's own stream, by platform and device."""

    def __init__(self) -> None:
        self.workspaces: dict[tuple[str, int], _Workspace] = {}


_of_thread: Final = _OfThread()
