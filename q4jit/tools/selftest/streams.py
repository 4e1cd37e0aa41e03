"""Streams and graphs of a device, through PyTorch or CuPy."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from q4jit.runtime.driver import Device


class NotRunError(Exception):
    """A check cannot run on this machine; the message says why."""


class Streams(Protocol):
    """The streams and graphs of a library on one device."""

    def make(self) -> Any:
        """Return a new stream that does not wait for the default stream."""

    def handle(self, stream: Any) -> int:
        """Return the driver's handle of a stream."""

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        """Capture what `action` enqueues on a stream, and return a function that replays it."""


def find_streams(device: Device) -> Streams:
    """Return the streams of PyTorch, else of CuPy. Raises NotRunError without either."""
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")  # late: optional and slow, like CuPy

        platform_of_torch = "amd" if torch.version.hip else "nvidia"
        if torch.cuda.is_available() and platform_of_torch == device.platform:
            return _TorchStreams(torch, device)
    if importlib.util.find_spec("cupy") and device.platform == "nvidia":
        # on AMD, CuPy cannot capture its streams
        return _CupyStreams(importlib.import_module("cupy"), device)
    raise NotRunError(f"needs PyTorch or CuPy for {device.platform}")


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
