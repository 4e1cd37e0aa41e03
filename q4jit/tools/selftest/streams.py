"""Streams and graphs of a device, by a library that is installed: PyTorch, else CuPy."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from q4jit.runtime.driver import Device


class NotRunError(Exception):
    """Why a check cannot be made here."""


class Streams(Protocol):
    """What a library knows of streams and graphs on one device."""

    def make(self) -> Any:
        """A new stream, independent of the default one."""

    def handle(self, stream: Any) -> int:
        """The driver's address of a stream."""

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        """Record what `action` enqueues on a stream; the result enqueues it there again."""


def find_streams(device: Device) -> Streams:
    """Those of PyTorch, else of CuPy. Raises NotRunError where neither can use the device."""
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")  # late: not ours, as CuPy

        platform_of_torch = "amd" if torch.version.hip else "nvidia"
        if torch.cuda.is_available() and platform_of_torch == device.platform:
            return _TorchStreams(torch, device)
    if importlib.util.find_spec("cupy") and device.platform == "nvidia":
        # on AMD its streams are not captured
        return _CupyStreams(importlib.import_module("cupy"), device)
    raise NotRunError(f"needs torch or cupy for {device.platform}")


@dataclass(frozen=True)
class _TorchStreams:
    torch: Any
    device: Device

    def make(self) -> Any:
        return self.torch.cuda.Stream(self.device.index)

    def handle(self, stream: Any) -> int:
        return int(stream.cuda_stream)

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        cuda = self.torch.cuda
        graph = cuda.CUDAGraph()
        with cuda.device(self.device.index), cuda.graph(graph, stream=stream):
            action()

        def replay() -> None:
            with cuda.stream(stream):
                graph.replay()

        return replay


@dataclass(frozen=True)
class _CupyStreams:
    cupy: Any
    device: Device

    def make(self) -> Any:
        with self.cupy.cuda.Device(self.device.index):
            return self.cupy.cuda.Stream(non_blocking=True)

    def handle(self, stream: Any) -> int:
        return int(stream.ptr)

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        with self.cupy.cuda.Device(self.device.index), stream:
            stream.begin_capture()
            action()
            graph = stream.end_capture()
        return functools.partial(graph.launch, stream)
