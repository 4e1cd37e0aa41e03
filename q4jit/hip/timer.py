"""Time calls on a GPU with the device's own events."""

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
"""Copied arrays and rotated weights each take at most 1 / MEMORY_SHARE of a device's memory."""

_COPY_BYTES: Final = 256 << 20
_ROUND_US: Final = 20_000
_ROUNDS: Final = 3
_MOST_COPIES: Final = 200
_GRAPH_US: Final = 5_000  # length of a graph, to which its launch adds little
_LEAST_REPLAYED: Final = 4
_MOST_REPLAYED: Final = 2000


class Timer:
    """Timing of calls on one device."""

    def __init__(self, device: Device) -> None:
        """Make no streams and no arrays yet; the first use makes them."""
        self.device = device
        self._driver = driver_of(device)
        self._closing = contextlib.ExitStack()

    def close(self) -> None:
        """Destroy the streams."""
        self._closing.close()

    def copy_bytes(self) -> int:
        """Return the bytes that `copy` copies."""
        return min(_COPY_BYTES, self.device.memory_bytes // MEMORY_SHARE)

    @functools.cached_property
    def _copied(self) -> tuple[DeviceArray, DeviceArray]:
        """Return two arrays that were written to: reading untouched memory may cost nothing."""
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
        """Return the microseconds of one `copy`."""
        self._span_us([self.copy])
        return min(self._span_us([self.copy] * 4) for _ in range(_ROUNDS)) / 4

    def call_us(self, calls: Calls) -> float:
        """Return the microseconds per call, without waits for the host.

        Copies keep the device busy until all calls are enqueued. Of slow calls only some are made.
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
        """Return the microseconds per call in a graph of many calls, which runs without the host.

        calls_on: returns the calls that take turns, with arguments on the given stream.
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
        """Capture a graph of many calls; yield a function that replays and times it.

        The function returns the microseconds per call. Several graphs may be open and take turns.

        Args:
            calls_on: returns the calls that take turns, with arguments on the given stream.
            graph: captures what a function enqueues on a stream; None for the driver's own
                capture. Libraries that must know about a capture have their own.
        """
        make = graph or functools.partial(self._driver.graph, self.device.index)
        with self._stream() as stream:
            calls = calls_on(stream)
            calls[0]()  # a first call may allocate memory, which a capture does not allow
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
        """Yield a stream to capture and replay graphs on; the default stream cannot be captured.

        Streams exist until `close`, because arrays on them are freed later.
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
        """Return the microseconds from the start of the first call to the end of the last one."""
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
