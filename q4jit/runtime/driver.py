"""What the drivers of both GPU platforms share: devices, memory, streams, graphs and kernels.

Addresses of memory and streams are plain integers (stream 0 is the default stream), devices are
named by their index in the driver.
"""

import abc
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import DeviceError
from q4jit.runtime.calls import Calls, name_of
from q4jit.runtime.prepared import Launch, arguments, early_arguments, launcher

OUT_OF_MEMORY: Final = 2
INVALID_VALUE: Final = 1


@dataclass(frozen=True)
class Device:
    """One GPU, as its driver describes it.

    `index` is the number that the driver knows it by; `id` (PCI address and UUID) stays the same
    between processes. `lds_bytes` is the most that one block may have, `compute_units` are NVIDIA's
    SMs, `wave` the lanes that run together, `clock_khz` its highest clock (0 where unknown), and
    `integrated` says whether it shares the CPU's memory.
    """

    platform: str  # amd | nvidia
    index: int
    name: str
    arch: str
    id: str
    memory_bytes: int
    compute_units: int
    lds_bytes: int
    max_block_size: int
    wave: int
    l2_bytes: int
    clock_khz: int
    integrated: bool

    def __str__(self) -> str:
        return f"{self.platform} device {self.index} ({self.name}, {self.arch})"


class LoadedKernel:
    """A kernel in a device's memory; `close` unloads it.

    It is not unloaded with its last reference: a captured graph may still launch it, and the driver
    does not tell.
    """

    def __init__(
        self, driver: "Driver", device: Device, module: int, function: int, symbol: str, code: bytes
    ) -> None:
        """Made by `Driver.load` alone."""
        self.device = device
        self.function = function
        self.symbol = symbol
        self.dynamic_lds_bytes = 0  # the most that the driver was told to permit
        self._driver = driver
        self._module = module
        self._code = code  # HIP may read the image again as long as the module is loaded

    def close(self) -> None:
        """Unload it, once all its launches have finished and no graph holds it."""
        if self._module:
            self._driver.unload(self.device.index, self._module)
            self._module = 0


class Driver(Calls):
    """A platform's driver. Everything raises DeviceError where a call fails; sizes are in bytes.

    Copies, `fill` and launches are asynchronous: their memory must live until the stream is through
    with it. The subclasses supply what the two platforms do not share.
    """

    devices: tuple[Device, ...]

    @abc.abstractmethod
    def device_of(self, pointer: int) -> int | None:
        """The index of the device whose memory holds `pointer`; None for the host's memory."""

    @abc.abstractmethod
    def _permit_lds(self, kernel: LoadedKernel, size_bytes: int) -> None:
        """Permit launches of `kernel` with `size_bytes` of dynamic LDS."""

    # --- memory ---------------------------------------------------------------------------------

    def allocate(self, device: int, size_bytes: int) -> int:
        """The address of new memory on `device`; 0 for a size of 0."""
        if size_bytes == 0:
            return 0
        with self.current(device), self._relaxed():
            code, pointer = self._raw(self.api.allocate, size_bytes)
        if code == OUT_OF_MEMORY:
            free, total = self.memory_info(device)
            raise DeviceError(
                f"out of memory on {self._name(device)}: asked for {size_bytes:,} bytes, free are "
                f"{free:,} of {total:,}; free arrays or weights, ask for fewer rows at a time, or "
                "use target='cpu'"
            )
        if code:
            raise self.error(name_of(self.api.allocate), code, device)
        return int(pointer)

    def free(self, device: int, pointer: int) -> None:
        """Free what `allocate` gave; not in a forked child, where it is the parent's."""
        if pointer and not self.forked:
            with self.current(device), self._relaxed():
                self._call(device, self.api.free, pointer)

    def copy_to_device(
        self, device: int, destination: int, host: int, size_bytes: int, stream: int
    ) -> None:
        """Copy from the host's memory, asynchronously."""
        self._move(device, self.api.upload, destination, host, size_bytes, stream)

    def copy_to_host(
        self, device: int, host: int, source: int, size_bytes: int, stream: int
    ) -> None:
        """Copy to the host's memory, asynchronously."""
        self._move(device, self.api.download, host, source, size_bytes, stream)

    def copy_on_device(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        """Copy from one place of a device's memory to another, asynchronously."""
        self._move(device, self.api.copy, destination, source, size_bytes, stream)

    def fill(self, device: int, pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Set every byte, asynchronously."""
        self._move(device, self.api.fill, pointer, byte, size_bytes, stream)

    def memory_info(self, device: int) -> tuple[int, int]:
        """Free and total bytes of a device's memory."""
        with self.current(device):
            free, total = self._call(device, self.api.memory_info)
        return int(free), int(total)

    def _move(self, device: int, function: Callable[..., Any], *arguments: int) -> None:
        if arguments[2]:
            with self.current(device):
                self._call(device, function, *arguments)

    # --- streams and events ---------------------------------------------------------------------

    def synchronize(self, device: int, stream: int) -> None:
        """Wait until all work on `stream` is done; errors of kernels come to light here."""
        with self.current(device):
            self._call(device, self.api.synchronize, stream)

    def is_capturing(self, device: int, stream: int) -> bool:
        """Whether work on `stream` is recorded into a graph instead of done."""
        if self.forked:
            raise self.fork_error()
        # No driver captures the default stream, and a question takes 2 µs. While another stream is
        # captured that waits for it, the question would fail as the launch will.
        if stream == 0:
            return False
        found, status = ctypes.c_uint64(), ctypes.c_int()
        query = ctypes.c_void_p(stream), ctypes.byref(status)
        code = self.api.get_current(ctypes.byref(found))
        if not code and found.value == self._current_handle(device):
            code = self.api.is_capturing(*query)
        else:
            with self.current(device):
                code = self.api.is_capturing(*query)
        if code:
            raise self.error(self.api.is_capturing.__name__, code, device)
        return bool(status.value)

    @contextlib.contextmanager
    def new_stream(self, device: int) -> Iterator[int]:
        """A stream that does not wait for the default one, for a `with` block."""
        with self.current(device):
            stream = int(self._call(device, self.api.stream_create))
        try:
            yield stream
        finally:
            with self.current(device):
                self._call(device, self.api.stream_destroy, stream)

    @contextlib.contextmanager
    def graph(
        self, device: int, stream: int, work: Callable[[], object]
    ) -> Iterator[Callable[[], None]]:
        """What `work` enqueues on `stream`, as a graph: a function that enqueues it there again."""
        api = self.api
        with self.current(device):
            self._call(device, api.capture_begin, stream)
            try:
                work()
            except BaseException:
                with contextlib.suppress(DeviceError):  # of a capture that `work` has broken
                    self._call(
                        device, api.graph_destroy, self._call(device, api.capture_end, stream)
                    )
                raise
            graph = self._call(device, api.capture_end, stream)
            try:
                instance = self._call(device, api.graph_instantiate, graph)
            finally:
                self._call(device, api.graph_destroy, graph)

        def replay() -> None:
            with self.current(device):
                self._call(device, api.graph_launch, instance, stream)

        try:
            yield replay
        finally:
            with self.current(device):
                self._call(device, api.synchronize, stream)
                self._call(device, api.graph_instance_destroy, instance)

    def create_event(self, device: int) -> int:
        """A new event, to be given back to `destroy_event`."""
        with self.current(device):
            return int(self._call(device, self.api.event_create))

    def record_event(self, device: int, event: int, stream: int) -> None:
        """Let `event` happen when all that `stream` holds so far is done."""
        with self.current(device):
            self._call(device, self.api.event_record, event, stream)

    def elapsed_us(self, device: int, start: int, stop: int) -> float:
        """Microseconds between two recorded events; waits for the second."""
        with self.current(device):
            self._call(device, self.api.event_synchronize, stop)
            return 1e3 * float(self._call(device, self.api.event_elapsed_ms, start, stop))

    def destroy_event(self, device: int, event: int) -> None:
        """Give an event back."""
        with self.current(device):
            self._call(device, self.api.event_destroy, event)

    # --- kernels --------------------------------------------------------------------------------

    def load(self, device: int, code: bytes, symbol: str) -> LoadedKernel:
        """Load the kernel `symbol` of a code object."""
        with self.current(device):
            module = int(self._call(device, self.api.module_load, code))
            try:
                function = int(
                    self._call(device, self.api.module_function, module, symbol.encode())
                )
            except DeviceError as error:
                self._call(device, self.api.module_unload, module)
                raise DeviceError(f"the code object has no kernel {symbol!r}: {error}") from error
        return LoadedKernel(self, self.devices[device], module, function, symbol, code)

    def unload(self, device: int, module: int) -> None:
        """What `LoadedKernel.close` does; in a forked child the module is the parent's."""
        if not self.forked:
            with self.current(device):
                self._call(device, self.api.module_unload, module)

    def prepare(
        self,
        kernel: LoadedKernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_lds_bytes: int,
        values: str,
        constants: Sequence[int] = (),
        order: Sequence[int] | None = None,
        overlaps: bool = False,
    ) -> Launch:
        """A launch of `kernel`: called with the stream and its values, in about 1 µs.

        `values` has a letter for each: P (address), i (32 bits), q (64 bits), f (float).
        `constants`, of 64 bits, stand behind them in every launch; `order` has the place of each of
        the kernel's parameters among both (None: they are its parameters). `grid` counts blocks,
        `block` threads. `overlaps`: it starts before the kernel before it in the stream has ended,
        for which its text waits (NVIDIA's from sm_90). Any thread may call it. Raises DeviceError
        for a block or an LDS size beyond the device's limits, and each call may raise it for a
        failed launch.
        """
        _check_limits(kernel, block, dynamic_lds_bytes)
        self._permit_lds(kernel, dynamic_lds_bytes)
        order = range(len(values) + len(constants)) if order is None else order
        shape = (*grid, *block, dynamic_lds_bytes)
        first = (*[0] * len(values), *constants)
        device, make = kernel.device.index, early_arguments if overlaps else arguments
        return launcher(
            self,
            device,
            self._current_handle(device),
            self.api.launch_early if overlaps else self.api.launch,
            lambda: make(kernel.function, shape, first, order),
            values,
            f"{kernel.symbol}, grid {grid}, block {block}, {dynamic_lds_bytes} bytes of LDS",
        )


def _check_limits(
    kernel: LoadedKernel, block: tuple[int, int, int], dynamic_lds_bytes: int
) -> None:
    device = kernel.device
    x, y, z = block
    if not 1 <= x * y * z <= device.max_block_size:
        raise DeviceError(
            f"found a block of {x}×{y}×{z} threads for {kernel.symbol}: accepted are 1 to "
            f"{device.max_block_size} threads on {device}"
        )
    if not 0 <= dynamic_lds_bytes <= device.lds_bytes:
        raise DeviceError(
            f"found {dynamic_lds_bytes:,} bytes of dynamic LDS for {kernel.symbol}: accepted are "
            f"0 to {device.lds_bytes:,} on {device}"
        )
