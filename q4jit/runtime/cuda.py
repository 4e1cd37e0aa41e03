"""NVIDIA's driver, through `cuda.bindings`."""

import contextlib
import ctypes
import uuid
from collections.abc import Iterator
from typing import Any

from q4jit.errors import DeviceError
from q4jit.runtime.calls import Api, named
from q4jit.runtime.driver import (
    INVALID_VALUE,
    Device,
    Driver,
    LoadedKernel,
)

_NAME_BYTES = 256
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class CudaDriver(Driver):
    """NVIDIA's devices, each in its primary context, which PyTorch and CuPy use too."""

    platform = "nvidia"

    def __init__(self) -> None:
        """Start the driver. Raises DeviceError if it is missing or sees no device."""
        super().__init__()
        from cuda.bindings import driver as cu  # late: only an extra installs it

        self._cu: Any = cu
        self._call(None, cu.cuInit, 0)
        self.api = _api(cu)
        self._contexts: dict[int, int] = {}
        self.devices = tuple(map(self._device, range(self._call(None, cu.cuDeviceGetCount))))

    def _device(self, index: int) -> Device:
        cu = self._cu

        def attribute(name: str) -> int:
            which = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._call(index, cu.cuDeviceGetAttribute, which, index))

        name = self._call(index, cu.cuDeviceGetName, _NAME_BYTES, index)
        bus = self._call(index, cu.cuDeviceGetPCIBusId, _NAME_BYTES, index)
        unique = uuid.UUID(bytes=bytes(self._call(index, cu.cuDeviceGetUuid, index).bytes))
        major, minor = (attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        return Device(
            platform=self.platform,
            index=index,
            name=_text(name),
            arch=f"sm_{major}{minor}",
            id=f"{_text(bus)}/{unique}",
            memory_bytes=int(self._call(index, cu.cuDeviceTotalMem, index)),
            compute_units=attribute("MULTIPROCESSOR_COUNT"),
            lds_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            max_block_size=attribute("MAX_THREADS_PER_BLOCK"),
            wave=attribute("WARP_SIZE"),
            l2_bytes=attribute("L2_CACHE_SIZE"),
            clock_khz=attribute("CLOCK_RATE"),
            integrated=bool(attribute("INTEGRATED")),
        )

    def device_of(self, pointer: int) -> int | None:
        """Return the index of the device whose memory contains `pointer`; None for host memory."""
        cu, which = self._cu, self._cu.CUpointer_attribute
        code, kind = self._raw(
            cu.cuPointerGetAttribute, which.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer
        )
        if code == INVALID_VALUE:  # not allocated by the driver
            return None
        if code:
            raise self.error("cuPointerGetAttribute", code, None)
        if int(kind) == int(cu.CUmemorytype.CU_MEMORYTYPE_HOST):
            return None
        ordinal = which.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(self._call(None, cu.cuPointerGetAttribute, ordinal, pointer))

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Make a device's primary context current in this thread for a `with` block."""
        context = self._current_handle(device)
        if int(self._call(device, self._cu.cuCtxGetCurrent)) == context:
            yield
            return
        self._call(device, self._cu.cuCtxPushCurrent, context)
        try:
            yield
        finally:
            self._call(device, self._cu.cuCtxPopCurrent)

    def _current_handle(self, device: int) -> int:
        """Return a device's primary context, retained until the process ends."""
        if device not in self._contexts:  # two threads may both retain it
            context = self._call(device, self._cu.cuDevicePrimaryCtxRetain, device)
            self._contexts[device] = int(context)
        return self._contexts[device]

    def _describe(self, code: int) -> tuple[str, str]:
        result = self._cu.CUresult(code)
        (_, name), (_, text) = self._cu.cuGetErrorName(result), self._cu.cuGetErrorString(result)
        return _text(name or b"unknown"), _text(text or b"no description")

    def _permit_lds(self, kernel: LoadedKernel, size_bytes: int) -> None:
        # above 48 KB the function needs this attribute; it is never lowered again, because other
        # launches of the same function may need it
        if size_bytes > kernel.dynamic_lds_bytes:
            which = self._cu.CUfunction_attribute
            attribute = which.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = kernel.device.index
            with self.current(device):
                self._call(
                    device, self._cu.cuFuncSetAttribute, kernel.function, attribute, size_bytes
                )
            kernel.dynamic_lds_bytes = size_bytes


def _api(cu: Any) -> Api:
    try:
        library = ctypes.CDLL("libcuda.so.1")  # the binding has loaded the same library
    except OSError as error:
        raise DeviceError(
            f"cannot load NVIDIA's driver, libcuda.so.1: {error}; install the driver"
        ) from error
    return Api(
        allocate=cu.cuMemAlloc,
        free=cu.cuMemFree,
        upload=cu.cuMemcpyHtoDAsync,
        download=cu.cuMemcpyDtoHAsync,
        copy=cu.cuMemcpyDtoDAsync,
        fill=cu.cuMemsetD8Async,
        memory_info=cu.cuMemGetInfo,
        synchronize=cu.cuStreamSynchronize,
        stream_create=named("cuStreamCreate", lambda: cu.cuStreamCreate(_NON_BLOCKING)),
        stream_destroy=cu.cuStreamDestroy,
        capture_begin=named(
            "cuStreamBeginCapture",
            lambda stream: cu.cuStreamBeginCapture(
                stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            ),
        ),
        capture_end=cu.cuStreamEndCapture,
        graph_instantiate=named(
            "cuGraphInstantiate", lambda graph: cu.cuGraphInstantiate(graph, 0)
        ),
        graph_launch=cu.cuGraphLaunch,
        graph_destroy=cu.cuGraphDestroy,
        graph_instance_destroy=cu.cuGraphExecDestroy,
        event_create=named("cuEventCreate", lambda: cu.cuEventCreate(0)),
        event_record=cu.cuEventRecord,
        event_synchronize=cu.cuEventSynchronize,
        event_elapsed_ms=cu.cuEventElapsedTime,
        event_destroy=cu.cuEventDestroy,
        module_load=cu.cuModuleLoadData,
        module_function=cu.cuModuleGetFunction,
        module_unload=cu.cuModuleUnload,
        launch=library.cuLaunchKernel,
        launch_early=library.cuLaunchKernelEx,
        get_current=library.cuCtxGetCurrent,
        is_capturing=library.cuStreamIsCapturing,
        exchange_capture_mode=library.cuThreadExchangeStreamCaptureMode,
    )


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode(errors="replace")
