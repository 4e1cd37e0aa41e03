"""What the drivers of both GPU platforms share: devices, checked calls, and prepared launches.

Addresses of memory and streams are plain integers (stream 0 is the default stream), devices are
named by their index in the driver. A call makes its device current for itself, and leaves what was
current as it was: PyTorch and CuPy share the thread, and on NVIDIA the primary context.
"""

import abc
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import DeviceError

OUT_OF_MEMORY: Final = 2
INVALID_VALUE: Final = 1
_RELAXED: Final = 2  # of the three modes of stream capture
# a parameter's kind → how struct writes its slot of 8 bytes
_SLOTS: Final = {"P": "Q", "i": "i4x", "q": "q", "f": "f4x"}

# HIP's codes are CUDA's numbers
_LOST: Final = (
    "a kernel failed, this one or an earlier one, and this process can no longer use the device: "
    "start a new process; AMD_SERIALIZE_KERNEL=3 or CUDA_LAUNCH_BLOCKING=1 in its environment "
    "shows which kernel it was"
)
_WRONG_CODE: Final = "the code object is damaged or made for another arch: delete its cache entry"
_CAPTURE: Final = (
    "a stream is being captured, and this cannot be part of a graph: call the function once with "
    "the same shapes before the capture begins"
)
_ADVICE: Final = {
    3: "the driver is not initialised; a forked child cannot use its parent's: start it by spawn",
    4: "the process is ending",
    35: "the GPU's driver is older than this runtime needs: update it",
    46: "another process holds the device alone, or it is being reset: see rocm-smi or nvidia-smi",
    100: "no device is visible: see HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and "
    "CUDA_VISIBLE_DEVICES, and whether this user may open /dev/kfd or /dev/nvidia0 (on AMD: the "
    "groups render and video)",
    **dict.fromkeys((200, 209, 218, 300), _WRONG_CODE),
    214: "the device's memory is faulty (an uncorrectable ECC error): reset the device",
    **dict.fromkeys((700, 702, 709, 710, *range(714, 720)), _LOST),
    803: "the GPU's driver does not fit this runtime: update it, and reboot if it was updated",
    **dict.fromkeys(range(900, 909), _CAPTURE),
}


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


Launch = Callable[..., None]
"""A prepared launch: call it with the stream and its values."""


class Driver(abc.ABC):
    """A platform's driver. Everything raises DeviceError where a call fails; sizes are in bytes.

    Copies, `fill` and launches are asynchronous: their memory must live until the stream is through
    with it. The subclasses supply what the two platforms do not share.
    """

    platform: str
    api: "Api"
    devices: tuple[Device, ...]

    def __init__(self) -> None:
        self.forked = False
        # neither platform's driver survives a fork: a call in the child would crash or hang
        os.register_at_fork(after_in_child=self._mark_forked)

    def _mark_forked(self) -> None:
        self.forked = True

    @abc.abstractmethod
    def device_of(self, pointer: int) -> int | None:
        """The index of the device whose memory holds `pointer`; None for the host's memory."""

    @abc.abstractmethod
    def current(self, device: int) -> AbstractContextManager[None]:
        """Make a device this thread's current one for a `with` block."""

    @abc.abstractmethod
    def _current_handle(self, device: int) -> int:
        """What `api.get_current` finds while `device` is current."""

    @abc.abstractmethod
    def _describe(self, code: int) -> tuple[str, str]:
        """Name and text of an error code."""

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
            raise self.error(_name(self.api.allocate), code, device)
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
            raise self._fork_error()
        # No driver captures the default stream, and a question takes 2 µs. While another stream is
        # captured that waits for it, the question would fail as the launch will.
        if stream == 0:
            return False
        found, status = ctypes.c_uint64(), ctypes.c_int()
        arguments = ctypes.c_void_p(stream), ctypes.byref(status)
        code = self.api.get_current(ctypes.byref(found))
        if not code and found.value == self._current_handle(device):
            code = self.api.is_capturing(*arguments)
        else:
            with self.current(device):
                code = self.api.is_capturing(*arguments)
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
        api, device = self.api, kernel.device.index
        arguments_of = _arguments
        launch_kernel, get_current = api.launch, api.get_current
        if overlaps:
            arguments_of, launch_kernel = _early_arguments, api.launch_early
        handle = self._current_handle(device)
        pack = struct.Struct("<" + "".join(_SLOTS[kind] for kind in values)).pack_into
        order = range(len(values) + len(constants)) if order is None else order

        def arguments() -> _Arguments:
            shape = (*grid, *block, dynamic_lds_bytes)
            return arguments_of(kernel.function, shape, (*[0] * len(values), *constants), order)

        # Each belongs to one call at a time: the launch copies slots and stream, but lets other
        # threads run before. A list's pop and append are a third of a lock's price.
        idle = [arguments()]

        def launch(stream: int, *numbers: float) -> None:
            if self.forked:
                raise self._fork_error()
            try:
                own = idle.pop()
            except IndexError:  # other threads are in this launch
                own = arguments()
            slots, where, found, found_at, handed_over = own
            pack(slots, 0, *numbers)
            where.value = stream
            code = get_current(found_at)
            if not code and found.value == handle:
                code = launch_kernel(*handed_over)
            else:
                with self.current(device):
                    code = launch_kernel(*handed_over)
            idle.append(own)
            if code:
                launched = f"{kernel.symbol}, grid {grid}, block {block}, {dynamic_lds_bytes} bytes"
                raise self.error(f"{launch_kernel.__name__} of {launched} of LDS", code, device)

        return launch

    # --- errors ---------------------------------------------------------------------------------

    def error(self, call: str, code: int, device: int | None) -> DeviceError:
        """The error of a call that gave `code`: what failed, where, and what to do about it."""
        name, text = self._describe(code)
        advice = _ADVICE.get(code)
        return DeviceError(
            f"{call} failed on {self._name(device)}: {name} ({code}): {text}"
            + (f"; {advice}" if advice else "")
        )

    def _call(self, device: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call into the platform's runtime (a tuple, where it has several)."""
        code, *results = self._raw(function, *arguments)
        if code:
            raise self.error(_name(function), code, device)
        return results[0] if len(results) == 1 else tuple(results)

    def _raw(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        """Error code and results of a call into the platform's runtime."""
        if self.forked:
            raise self._fork_error()
        try:
            code, *results = function(*arguments)
        except RuntimeError as error:  # both bindings: a library or one of its functions is missing
            raise DeviceError(
                f"{_name(function)} cannot be called: {error}; install or update the GPU's driver "
                "and runtime (on AMD, ROCM_PATH names the folder whose lib/ holds the runtime)"
            ) from error
        return int(code), *results

    def _fork_error(self) -> DeviceError:
        return DeviceError(
            f"a forked child (process {os.getpid()}) cannot use its parent's {self.platform} "
            "devices: use target='cpu' in it, or start it by spawn "
            "(multiprocessing.get_context('spawn'))"
        )

    def _name(self, device: int | None) -> str:
        return f"{self.platform} device {device}" if device is not None else self.platform

    @contextlib.contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Let this thread allocate and free while any thread captures a graph.

        Garbage is freed at any time; in the other modes that would end the capture.
        """
        mode = ctypes.c_int(_RELAXED)
        self._exchange_mode(mode)
        try:
            yield
        finally:
            self._exchange_mode(mode)

    def _exchange_mode(self, mode: ctypes.c_int) -> None:
        code = self.api.exchange_capture_mode(ctypes.byref(mode))
        if code:
            raise self.error(self.api.exchange_capture_mode.__name__, code, None)


@dataclass(frozen=True)
class Api:
    """A platform's runtime: functions of its binding, which return an error code and results.

    The last four are ctypes functions of the same library, which return the error code alone: the
    hot path spares the bindings' conversions.
    """

    allocate: Callable[..., Any]
    free: Callable[..., Any]
    upload: Callable[..., Any]
    download: Callable[..., Any]
    copy: Callable[..., Any]
    fill: Callable[..., Any]
    memory_info: Callable[..., Any]
    synchronize: Callable[..., Any]
    stream_create: Callable[..., Any]
    stream_destroy: Callable[..., Any]
    capture_begin: Callable[..., Any]
    capture_end: Callable[..., Any]
    graph_instantiate: Callable[..., Any]
    graph_launch: Callable[..., Any]
    graph_destroy: Callable[..., Any]
    graph_instance_destroy: Callable[..., Any]
    event_create: Callable[..., Any]
    event_record: Callable[..., Any]
    event_synchronize: Callable[..., Any]
    event_elapsed_ms: Callable[..., Any]
    event_destroy: Callable[..., Any]
    module_load: Callable[..., Any]
    module_function: Callable[..., Any]
    module_unload: Callable[..., Any]
    launch: Any
    get_current: Any
    is_capturing: Any
    exchange_capture_mode: Any
    launch_early: Any = None  # where kernels can overlap


_Arguments = tuple[Any, ctypes.c_void_p, ctypes.c_uint64, Any, tuple[Any, ...]]


def _arguments(
    function: int, shape: tuple[int, ...], values: tuple[int, ...], order: Sequence[int]
) -> _Arguments:
    """What one launch at a time hands over: slots, stream, room for what is current, arguments.

    `shape` has grid, block and LDS bytes. What `from_param` and `byref` give was converted once:
    ctypes takes it as it is, in two thirds of the time of its own values.
    """
    slots = (ctypes.c_uint64 * len(values))(*values)
    first = ctypes.addressof(slots)
    pointers = (ctypes.c_void_p * len(order))(*[first + 8 * place for place in order])
    stream, current = ctypes.c_void_p(), ctypes.c_uint64()
    arguments = (
        ctypes.c_void_p.from_param(function),
        *map(ctypes.c_uint.from_param, shape),
        stream,
        ctypes.byref(pointers),
        None,
    )
    return slots, stream, current, ctypes.byref(current), arguments


class _Attribute(ctypes.Structure):
    """CUDA's CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _Launch(ctypes.Structure):
    """CUDA's CUlaunchConfig; shape: grid, block and LDS bytes."""

    _fields_ = (
        ("shape", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6


def _early_arguments(
    function: int, shape: tuple[int, ...], values: tuple[int, ...], order: Sequence[int]
) -> _Arguments:
    """The same for a launch that does not wait for the kernel before."""
    slots, _, current, current_at, (handle, *_, pointers, _) = _arguments(
        function, shape, values, order
    )
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,))
    launch = _Launch((ctypes.c_uint * 7)(*shape), None, ctypes.pointer(attribute), 1)
    stream = ctypes.c_void_p.from_buffer(launch, _Launch.stream.offset)
    return slots, stream, current, current_at, (ctypes.byref(launch), handle, pointers, None)


def _name(function: Callable[..., Any]) -> str:
    name: str = function.__name__
    return name


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which errors call `name`."""
    function.__name__ = name
    return function


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
