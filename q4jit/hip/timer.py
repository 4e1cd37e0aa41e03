"""Times of calls on a GPU, by the device's own events."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

import numpy as np

from q4jit.arrays.device_array import DeviceArray
from q4jit.hip.workspace import release_graph_memory
from q4jit.runtime.devices import driver_of
from q4jit.runtime.driver import Device

Calls = Sequence[Callable[[], object]]

MEMORY_SHARE: Final = 8
"""Of a device's memory, at most this part is for arrays that are copied, or weights that rotate."""

_COPY_BYTES: Final = 256 << 20
_ROUND_US: Final = 20_000
_ROUNDS: Final = 3
_MOST_COPIES: Final = 200
_GRAPH_US: Final = 5_000  # a graph of about so long: its launch is lost in it
_LEAST_REPLAYED: Final = 4
_MOST_REPLAYED: Final = 2000


class Timer:
    """Times calls on one device."""

    def __init__(self, device: Device) -> None:
        """Start without streams and copies, which are made when they are needed."""
        self.device = device
        self._driver = driver_of(device)
        self._closing = contextlib.ExitStack()

    def close(self) -> None:
        """Give back the streams."""
        self._closing.close()

    def copy_bytes(self) -> int:
        """Bytes of the arrays that `copy` copies."""
        return min(_COPY_BYTES, self.device.memory_bytes // MEMORY_SHARE)

    @functools.cached_property
    def _copied(self) -> tuple[DeviceArray, DeviceArray]:
        """Two arrays, set to something: memory that nobody touched may cost nothing to read."""
        first, second = (
            DeviceArray((self.copy_bytes(),), self.device, np.dtype(np.uint8)) for _ in range(2)
        )
        for array in (first, second):
            self._driver.fill(self.device.index, array.pointer, 0, array.nbytes, 0)
        return first, second

    def copy(self) -> None:
        """Enqueue a copy of `copy_bytes` within the device's memory."""
        target, source = self._copied
        self._driver.copy_on_device(
            self.device.index, target.pointer, source.pointer, source.nbytes, 0
        )

    @functools.cached_property
    def copy_us(self) -> float:
        """Microseconds of one `copy`."""
        self._span_us([self.copy])
        return min(self._span_us([self.copy] * 4) for _ in range(_ROUNDS)) / 4

    def call_us(self, calls: Calls) -> float:
        """Microseconds per call; the device never waits for the host.

        Copies keep it busy until all calls are enqueued. Slow calls are not all made.
        """
        self._span_us(calls[:1])
        one_us = self._span_us(calls[:1])
        calls = calls[: max(2, int(_ROUND_US / max(one_us, 1.0)))]
        start = time.perf_counter()
        for call in calls:
            call()
        enqueue_us = (time.perf_counter() - start) * 1e6
        copies = min(_MOST_COPIES, math.ceil(2 * enqueue_us / self.copy_us))
        return min(self._span_us(calls, copies) for _ in range(_ROUNDS)) / len(calls)

    def replay_us(self, calls_on: Callable[[int], Calls]) -> float:
        """Microseconds per call, as a graph of many runs them: without the host between them.

        calls_on: the calls that take turns, for arguments on the stream that it is given.
        """
        with self.replays(calls_on) as again_us:
            again_us()
            return min(again_us() for _ in range(_ROUNDS))

    @contextlib.contextmanager
    def replays(
        self,
        calls_on: Callable[[int], Calls],
        graph: Callable[[int, Callable[[], None]], AbstractContextManager[Callable[[], None]]]
        | None = None,
    ) -> Iterator[Callable[[], float]]:
        """A graph of many calls: a function that replays it and gives the microseconds per call.

        Several may be open, and take turns. graph: makes one of what a function enqueues on a
        stream (None: the driver's own way), for libraries that want to know of it.
        """
        make = graph or functools.partial(self._driver.graph, self.device.index)
        with self._stream() as stream:
            calls = calls_on(stream)
            calls[0]()  # what is made by a first call cannot be part of a graph
            one_us = max(self._span_us(calls[:1], stream=stream), 1.0)
            number = min(max(_LEAST_REPLAYED, int(_GRAPH_US / one_us)), _MOST_REPLAYED)

            def work() -> None:
                for i in range(number):
                    calls[i % len(calls)]()

            with make(stream, work) as replay:
                yield lambda: self._span_us([replay], stream=stream) / number

    @functools.cached_property
    def _idle_streams(self) -> list[int]:
        return []

    @contextlib.contextmanager
    def _stream(self) -> Iterator[int]:
        """Where a graph is captured and replayed: the default stream cannot be captured.

        Streams are kept until the end: arrays that are freed later name theirs.
        """
        if not self._idle_streams:
            made = self._driver.new_stream(self.device.index)
            self._idle_streams.append(self._closing.enter_context(made))
        stream = self._idle_streams.pop()
        try:
            yield stream
        finally:
            release_graph_memory(self.device, stream)
            self._idle_streams.append(stream)

    def _span_us(self, calls: Calls, copies: int = 0, stream: int = 0) -> float:
        """Microseconds between the begin of the first call and the end of the last."""
        driver, device = self._driver, self.device.index
        events = [driver.create_event(device) for _ in range(2)]
        try:
            driver.synchronize(device, stream)
            for _ in range(copies):
                self.copy()
            driver.record_event(device, events[0], stream)
            for call in calls:
                call()
            driver.record_event(device, events[1], stream)
            return driver.elapsed_us(device, *events)
        finally:
            for event in events:
                driver.destroy_event(device, event)
