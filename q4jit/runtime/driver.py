"""The part that both GPU platforms share: devices, memory, streams, graphs and kernels.

Memory addresses and streams are plain integers (stream 0 is the default stream). A device is given
by its index in the driver.
"""

import abc
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import DeviceError, expected
from q4jit.runtime.calls import Calls, name_of
from q4jit.runtime.prepared import PreparedLaunch, arguments, early_arguments, launcher

OUT_OF_MEMORY: Final = 2
INVALID_VALUE: Final = 1


@dataclass(frozen=True)
class Device:
    """One GPU, as its driver describes it.

    Attributes:
        platform: `amd` or `nvidia`.
        index: the number of the device in its driver.
        name: the product's name.
        arch: `gfx1100`, `sm_90`, …
        id: PCI address and UUID, which are the same in every process.
        memory_bytes: the size of its memory.
        compute_units: compute units (NVIDIA: SMs).
        lds_bytes: the most shared memory that a thread block can have.
        max_block_size: the most threads of a thread block.
        wave: the threads that run in lockstep.
        l2_bytes: the size of the L2 cache.
        clock_khz: the highest clock rate; 0 if unknown.
        integrated: whether the GPU uses the CPU's memory.
    """

    platform: str
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

    The kernel stays loaded when its last reference is gone, because a captured graph may still
    launch it, and the driver cannot say whether one does.
    """

    def __init__(
        self, driver: "Driver", device: Device, module: int, function: int, symbol: str, code: bytes
    ) -> None:
        """Store the parts; only `Driver.load` makes instances."""
        self.device = device
        self.function = function
        self.symbol = symbol
        self.dynamic_lds_bytes = 0  # the most that the driver permits so far
        self._driver = driver
        self._module = module
        self._code = code  # HIP may read the image again while the module is loaded

    def close(self) -> None:
        """Unload the kernel. All its launches must have finished, and no graph may contain it."""
        if self._module:
            self._driver.unload(self.device.index, self._module)
            self._module = 0


class Driver(Calls):
    """A platform's driver. Every method raises DeviceError if a call fails; sizes are in bytes.

    Copies, `fill` and launches are asynchronous: their memory must exist until the stream has
    finished them. The subclasses add the parts that differ between the platforms.
    """

    devices: tuple[Device, ...]

    @abc.abstractmethod
    def device_of(self, pointer: int) -> int | None:
        """Return the index of the device whose memory contains `pointer`; None for host memory."""

    @abc.abstractmethod
    def _permit_lds(self, kernel: LoadedKernel, size_bytes: int) -> None:
        """Permit launches of `kernel` with `size_bytes` of dynamic shared memory."""

    # --- memory ---------------------------------------------------------------------------------

    def allocate(self, device: int, size_bytes: int) -> int:
        """Allocate memory on `device` and return its address; 0 for a size of 0."""
        if size_bytes == 0:
            return 0
        with self.current(device), self._relaxed():
            code, pointer = self._raw(self.api.allocate, size_bytes)
        if code == OUT_OF_MEMORY:
            free, total = self.memory_info(device)
            raise DeviceError(
                f"out of memory on {self._name(device)}: cannot allocate {size_bytes:,} bytes, "
                f"{free:,} of {total:,} are free; free arrays or weights, pass fewer rows at a "
                "time, or use target='cpu'"
            )
        if code:
            raise self.error(name_of(self.api.allocate), code, device)
        return int(pointer)

    def free(self, device: int, pointer: int) -> None:
        """Free memory of `allocate`. In a forked child do nothing: the parent owns the memory."""
        if pointer and not self.forked:
            with self.current(device), self._relaxed():
                self._call(device, self.api.free, pointer)

    def copy_to_device(
        self, device: int, destination: int, host: int, size_bytes: int, stream: int
    ) -> None:
        """Copy from host memory to the device, asynchronously."""
        self._move(device, self.api.upload, destination, host, size_bytes, stream)

    def copy_to_host(
        self, device: int, host: int, source: int, size_bytes: int, stream: int
    ) -> None:
        """Copy from the device to host memory, asynchronously."""
        self._move(device, self.api.download, host, source, size_bytes, stream)

    def copy_on_device(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        """Copy within a device's memory, asynchronously."""
        self._move(device, self.api.copy, destination, source, size_bytes, stream)

    def fill(self, device: int, pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Set every byte to `byte`, asynchronously."""
        self._move(device, self.api.fill, pointer, byte, size_bytes, stream)

    def memory_info(self, device: int) -> tuple[int, int]:
        """Return the free and the total bytes of a device's memory."""
        with self.current(device):
            free, total = self._call(device, self.api.memory_info)
        return int(free), int(total)

    def _move(self, device: int, function: Callable[..., Any], *arguments: int) -> None:
        if arguments[2]:
            with self.current(device):
                self._call(device, function, *arguments)

    # --- streams and events ---------------------------------------------------------------------

    def synchronize(self, device: int, stream: int) -> None:
        """Wait until all work on `stream` is done. Errors of earlier kernels are raised here."""
        with self.current(device):
            self._call(device, self.api.synchronize, stream)

    def is_capturing(self, device: int, stream: int) -> bool:
        """Return whether work on `stream` is recorded into a graph instead of run."""
        if self.forked:
            raise self.fork_error()
        # No driver captures the default stream, and the query takes 2 µs. If another stream that
        # waits for the default one is being captured, the query would fail; the launch will too.
        if stream == 0:
            return False
        current, status = ctypes.c_uint64(), ctypes.c_int()
        query = ctypes.c_void_p(stream), ctypes.byref(status)
        code = self.api.get_current(ctypes.byref(current))
        if not code and current.value == self._current_handle(device):
            code = self.api.is_capturing(*query)
        else:
            with self.current(device):
                code = self.api.is_capturing(*query)
        if code:
            raise self.error(self.api.is_capturing.__name__, code, device)
        return bool(status.value)

    @contextlib.contextmanager
    def new_stream(self, device: int) -> Iterator[int]:
        """Yield a stream that does not wait for the default stream."""
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
        """Capture what `work` enqueues on `stream`; yield a function that enqueues it again."""
        api = self.api
        with self.current(device):
            self._call(device, api.capture_begin, stream)
            try:
                work()
            except BaseException:
                with contextlib.suppress(DeviceError):  # `work` may have broken the capture
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
        """Return a new event; pass it to `destroy_event` in the end."""
        with self.current(device):
            return int(self._call(device, self.api.event_create))

    def record_event(self, device: int, event: int, stream: int) -> None:
        """Record `event` once all work that `stream` has so far is done."""
        with self.current(device):
            self._call(device, self.api.event_record, event, stream)

    def elapsed_us(self, device: int, start: int, stop: int) -> float:
        """Wait for the second of two recorded events; return the microseconds between them."""
        with self.current(device):
            self._call(device, self.api.event_synchronize, stop)
            return 1e3 * float(self._call(device, self.api.event_elapsed_ms, start, stop))

    def destroy_event(self, device: int, event: int) -> None:
        """Destroy an event."""
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
                raise DeviceError(f"no kernel {symbol!r} in the code object: {error}") from error
        return LoadedKernel(self, self.devices[device], module, function, symbol, code)

    def unload(self, device: int, module: int) -> None:
        """Unload a module. In a forked child do nothing: the parent owns the module."""
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
        fixed: Sequence[int] = (),
        order: Sequence[int] | None = None,
        overlaps: bool = False,
    ) -> PreparedLaunch:
        """Prepare a launch of `kernel`: a function of the stream and the values, about 1 µs a call.

        Any thread may call the function. It raises DeviceError if the launch fails.

        Args:
            kernel: the kernel.
            grid: the number of thread blocks on each axis.
            block: the threads of a thread block on each axis.
            dynamic_lds_bytes: shared memory that the kernel's text does not declare.
            values: one letter per value: P (address), i (32 bits), q (64 bits), f (float).
            fixed: 64-bit values that every launch appends to the values.
            order: for each parameter of the kernel, its index among values and fixed values; None
                if they are already in order.
            overlaps: whether the kernel starts before the previous kernel of the stream has ended;
                its text then waits for that kernel (NVIDIA, from sm_90).

        Raises:
            DeviceError: the block or the shared memory exceeds the device's limits.
        """
        _check_limits(kernel, block, dynamic_lds_bytes)
        self._permit_lds(kernel, dynamic_lds_bytes)
        order = range(len(values) + len(fixed)) if order is None else order
        shape = (*grid, *block, dynamic_lds_bytes)
        first = (*[0] * len(values), *fixed)
        device, make = kernel.device.index, early_arguments if overlaps else arguments
        return launcher(
            self,
            device,
            self._current_handle(device),
            self.api.launch_early if overlaps else self.api.launch,
            lambda: make(kernel.function, shape, first, order),
            values,
            f"{kernel.symbol}, grid {grid}, block {block}, {dynamic_lds_bytes} bytes of dynamic "
            "shared memory",
        )


def _check_limits(
    kernel: LoadedKernel, block: tuple[int, int, int], dynamic_lds_bytes: int
) -> None:
    device = kernel.device
    x, y, z = block
    if not 1 <= x * y * z <= device.max_block_size:
        where = f"thread block of {kernel.symbol} on {device}"
        most = device.max_block_size
        raise DeviceError(expected(f"1 to {most} threads", f"{x}×{y}×{z}", where=where))
    if not 0 <= dynamic_lds_bytes <= device.lds_bytes:
        where = f"dynamic shared memory of {kernel.symbol} on {device}"
        most = device.lds_bytes
        raise DeviceError(expected(f"0 to {most:,} bytes", f"{dynamic_lds_bytes:,}", where=where))
