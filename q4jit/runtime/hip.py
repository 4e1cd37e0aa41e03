"""AMD's HIP runtime, through `rocm.bindings`."""

import contextlib
import ctypes
import os
import uuid
from collections.abc import Iterator
from typing import Any

from q4jit.compilers.codeobject import code_object_arch
from q4jit.errors import CompileError, DeviceError, expected
from q4jit.runtime.calls import Api, named
from q4jit.runtime.driver import (
    INVALID_VALUE,
    Device,
    Driver,
    LoadedKernel,
)

_NON_BLOCKING = 1  # hipStreamNonBlocking


class HipDriver(Driver):
    """AMD's devices."""

    platform = "amd"

    def __init__(self) -> None:
        """Start the runtime. Raises DeviceError if it is missing or sees no device."""
        super().__init__()
        from rocm.bindings import hip  # late: only an extra installs it

        self._hip: Any = hip
        self._call(None, hip.hipInit, 0)
        self.api = _api(hip)
        self.devices = tuple(map(self._device, range(self._call(None, hip.hipGetDeviceCount))))

    def _device(self, index: int) -> Device:
        facts = self._call(index, self._hip.hipGetDeviceProperties, index)
        bus = f"{facts.pciDomainID:04x}:{facts.pciBusID:02x}:{facts.pciDeviceID:02x}.0"
        return Device(
            platform=self.platform,
            index=index,
            name=_text(facts.name),
            arch=_text(facts.gcnArchName).partition(":")[0],  # gfx90a:sramecc+:xnack-
            id=f"{bus}/{uuid.UUID(bytes=bytes(facts.uuid.bytes))}",
            memory_bytes=int(facts.totalGlobalMem),
            compute_units=int(facts.multiProcessorCount),
            lds_bytes=int(facts.sharedMemPerBlock),
            max_block_size=int(facts.maxThreadsPerBlock),
            wave=int(facts.warpSize),
            l2_bytes=int(facts.l2CacheSize),
            clock_khz=int(facts.clockRate),
            integrated=bool(facts.integrated),
        )

    def device_of(self, pointer: int) -> int | None:
        """Return the index of the device whose memory contains `pointer`; None for host memory."""
        code, attributes = self._raw(self._hip.hipPointerGetAttributes, pointer)
        if code == INVALID_VALUE:  # not allocated by the runtime
            self._forget_error()
            return None
        if code:
            raise self.error("hipPointerGetAttributes", code, None)
        kinds = self._hip.hipMemoryType
        of_device = (kinds.hipMemoryTypeDevice, kinds.hipMemoryTypeManaged)
        return int(attributes.device) if int(attributes.type) in of_device else None

    def load(self, device: int, code: bytes, symbol: str) -> LoadedKernel:
        """Load the kernel `symbol` of a code object. Raises DeviceError for another arch."""
        owner = self.devices[device]
        try:
            arch = code_object_arch(code)
        except CompileError as error:
            raise DeviceError(
                f"cannot load {symbol} on {owner}: {error.log}; delete its cache entry, or build "
                "it again"
            ) from error
        if arch != owner.arch:
            raise DeviceError(
                expected(f"code for {owner.arch}", arch, where=f"{symbol} on {owner}")
            )
        return super().load(device, code, symbol)

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Make a device current in this thread for a `with` block."""
        before = self._call(device, self._hip.hipGetDevice)
        if before == device:
            yield
            return
        self._call(device, self._hip.hipSetDevice, device)
        try:
            yield
        finally:
            self._call(before, self._hip.hipSetDevice, before)

    def _current_handle(self, device: int) -> int:
        return device

    def _describe(self, code: int) -> tuple[str, str]:
        self._forget_error()
        result = self._hip.hipError_t(code)
        (_, name), (_, text) = (
            self._hip.hipGetErrorName(result),
            self._hip.hipGetErrorString(result),
        )
        return str(name), str(text)

    def _forget_error(self) -> None:
        """Clear the thread's last error, which PyTorch would take for an error of its own."""
        self._hip.hipGetLastError()

    def _permit_lds(self, kernel: LoadedKernel, size_bytes: int) -> None:
        """Do nothing: AMD's kernels may use all shared memory of a thread block."""


def _api(hip: Any) -> Api:
    from rocm.bindings.util.paths import get_library_path  # late: only an extra installs it

    path = os.fsdecode(get_library_path("amdhip64"))
    try:
        library = ctypes.CDLL(path)  # the binding has loaded the same library
    except OSError as error:
        raise DeviceError(
            f"cannot load AMD's HIP runtime, {path}: {error}; set ROCM_PATH to the folder whose "
            "lib/ contains libamdhip64.so"
        ) from error
    return Api(
        allocate=hip.hipMalloc,
        free=hip.hipFree,
        upload=_copier(hip, "hipMemcpyHostToDevice"),
        download=_copier(hip, "hipMemcpyDeviceToHost"),
        copy=_copier(hip, "hipMemcpyDeviceToDevice"),
        fill=hip.hipMemsetAsync,
        memory_info=hip.hipMemGetInfo,
        synchronize=hip.hipStreamSynchronize,
        stream_create=named(
            "hipStreamCreateWithFlags", lambda: hip.hipStreamCreateWithFlags(_NON_BLOCKING)
        ),
        stream_destroy=hip.hipStreamDestroy,
        capture_begin=named(
            "hipStreamBeginCapture",
            lambda stream: hip.hipStreamBeginCapture(
                stream, hip.hipStreamCaptureMode.hipStreamCaptureModeRelaxed
            ),
        ),
        capture_end=hip.hipStreamEndCapture,
        graph_instantiate=named(
            "hipGraphInstantiateWithFlags",
            lambda graph: hip.hipGraphInstantiateWithFlags(graph, 0),
        ),
        graph_launch=hip.hipGraphLaunch,
        graph_destroy=hip.hipGraphDestroy,
        graph_instance_destroy=hip.hipGraphExecDestroy,
        event_create=hip.hipEventCreate,
        event_record=hip.hipEventRecord,
        event_synchronize=hip.hipEventSynchronize,
        event_elapsed_ms=hip.hipEventElapsedTime,
        event_destroy=hip.hipEventDestroy,
        module_load=hip.hipModuleLoadData,
        module_function=hip.hipModuleGetFunction,
        module_unload=hip.hipModuleUnload,
        launch=library.hipModuleLaunchKernel,
        get_current=library.hipGetDevice,
        is_capturing=library.hipStreamIsCapturing,
        exchange_capture_mode=library.hipThreadExchangeStreamCaptureMode,
    )


def _copier(hip: Any, kind: str) -> Any:
    direction = getattr(hip.hipMemcpyKind, kind)

    def copy(destination: int, source: int, size_bytes: int, stream: int) -> Any:
        return hip.hipMemcpyAsync(destination, source, size_bytes, direction, stream)

    return named("hipMemcpyAsync", copy)


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.split(b"\0")[0].decode(errors="replace")
