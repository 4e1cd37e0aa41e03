"""A bench: kernels of one's own choice run, checked and timed on a GPU, one call after the other.

A call of a specialised function chooses its kernels; here a `Tuning` forces the schedule and the
weights' layout, results begin as NaN, and times are taken by the device's own events.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from q4jit import config
from q4jit.arrays.call_shapes import CallShapes, lead_shape
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.views import DeviceView
from q4jit.compilers import cache
from q4jit.compilers.find import find_compiler
from q4jit.frontend.specs import ScalarSpec, Spec, WeightSpec, array_spec, ids_spec
from q4jit.frontend.trace import trace
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.launch import HipLaunch, load, release_graph_memory
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.hip.tunings import Tuned
from q4jit.pipeline import fetch
from q4jit.plan.kernels import Source
from q4jit.plan.options import Tuning
from q4jit.runtime.devices import driver_of, target_of
from q4jit.runtime.driver import Device, LoadedKernel
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Calls = Sequence[Callable[[], object]]

_MOST_THREADS: Final = 16
_COPY_BYTES: Final = 256 << 20
_ROTATED_BYTES: Final = 256 << 20  # weights that no cache keeps; AMD's last level is not its L2
_MEMORY_SHARE: Final = 8  # of the device's memory, at most this part for what is copied or rotated
_ROUND_US: Final = 20_000
_ROUNDS: Final = 3
_MOST_COPIES: Final = 200
_GRAPH_US: Final = 5_000  # a graph of about so long: its launch is lost in it
_LEAST_REPLAYED: Final = 4
_MOST_REPLAYED: Final = 2000
_POISON: Final = 0xFF  # four of them are a NaN


@dataclass(frozen=True)
class Built:
    """A plan with the texts of its kernels, which are being compiled or are."""

    plan: HipPlan
    sources: tuple[Source, ...]


class Bench:
    """Runs functions on one device with kernels of one's own choice."""

    def __init__(self, device: Device) -> None:
        """Raises TargetError where the device's arch or a compiler for it is not known."""
        self.device = device
        self.target = target_of(device)
        self._driver = driver_of(device)
        self._compiler = find_compiler(self.target)
        self.fingerprint = self._compiler.fingerprint(self.target)
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, config.num_threads()))
        self._entries: dict[str, Future[cache.Entry]] = {}  # by text
        self._labels: dict[str, tuple[str, str]] = {}  # text → what it computes, symbol
        self._loaded: dict[str, LoadedKernel] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._closing.close()

    def build(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        tuning: Tuning,
        tuned: Tuned | None = None,
    ) -> Built:
        """Plan `function` and begin to compile its kernels; their errors are raised by `bind`.

        tuned: as for `make_plan`.
        """
        graph = trace(function, tuple(map(_spec, args)))
        rows = math.prod(lead_shape(args))
        return self.compile(make_plan(graph, self.target, rows, tuning, tuned))

    def compile(self, plan: HipPlan) -> Built:
        """Begin to compile the kernels of a plan; their errors are raised by `bind`."""
        sources = tuple(render(plan, kernel) for kernel in plan.kernels)
        for kernel, source in zip(plan.kernels, sources, strict=True):
            self.compile_text(source, _label(plan, kernel))
        return Built(plan, sources)

    def compile_text(self, source: Source, label: str) -> None:
        """Begin to compile a kernel's text; label: what it computes."""
        if source.text not in self._entries:
            self._labels[source.text] = label, source.symbol
            self._entries[source.text] = self._threads.submit(fetch, self._compiler, source)

    def bind(self, built: Built, args: Sequence[Any]) -> HipLaunch:
        """A launch for arguments on the device (see `upload`)."""
        kernels = [self.load(source) for source in built.sources]
        graph = built.plan.graph
        return HipLaunch(
            built.plan, kernels, CallShapes(graph, args), args, graph.names, self.device
        )

    def load(self, source: Source) -> LoadedKernel:
        """A kernel whose text is being compiled, ready to run. Raises CompileError."""
        if source.text not in self._loaded:
            code = self._entries[source.text].result().object_bytes
            self._loaded[source.text] = load(code, source, self.device)
        return self._loaded[source.text]

    def upload(self, args: Sequence[Any], stream: int = 0) -> tuple[Any, ...]:
        """The arguments, with the arrays among them copied to the device, to be used on `stream`.

        A launch runs on the stream of its first array.
        """
        return tuple(
            DeviceArray.from_numpy(a, self.device, stream).view()
            if isinstance(a, np.ndarray)
            else a
            for a in args
        )

    def overwrite(self, view: DeviceView, array: Floats) -> None:
        """Copy other values, of the same shape, to where an uploaded array lies."""
        source, stream = np.ascontiguousarray(array), view.stream or 0
        self._driver.copy_to_device(
            self.device.index, view.pointer, source.ctypes.data, source.nbytes, stream
        )
        self._driver.synchronize(self.device.index, stream)

    def outputs(self, built: Built, args: Sequence[Any]) -> tuple[DeviceArray, ...]:
        """An array of NaN for each result, on the stream of the first array of `args`."""
        stream = next(a.stream for a in args if isinstance(a, DeviceView)) or 0
        shapes = CallShapes(built.plan.graph, args)
        arrays = tuple(
            DeviceArray(result.shape, self.device, stream=stream) for result in shapes.results
        )
        self.poison(arrays)
        return arrays

    def poison(self, arrays: Sequence[DeviceArray]) -> None:
        """Fill arrays with NaN, each on its stream."""
        for array in arrays:
            self._driver.fill(self.device.index, array.pointer, _POISON, array.nbytes, array.stream)

    def run(self, built: Built, args: Sequence[Any]) -> list[Floats]:
        """The results for NumPy arguments; what no kernel wrote is NaN."""
        there = self.upload(args)
        outputs = self.outputs(built, there)
        launch = self.bind(built, there)
        launch(there, outputs if built.plan.graph.returns_tuple else outputs[0])
        return [array.to_numpy() for array in outputs]

    def run_rows(self, built: Built, args: Sequence[Any], bands: Sequence[slice]) -> list[Floats]:
        """Some rows of the result [M, N] for NumPy arguments: all may be more than the host has."""
        there = self.upload(args)
        (output,) = self.outputs(built, there)
        self.bind(built, there)(there, output)
        return [self._rows(output, band) for band in bands]

    def _rows(self, array: DeviceArray, band: slice) -> Floats:
        first, stop, _ = band.indices(array.shape[0])
        found = np.empty((stop - first, array.shape[1]), np.float32)
        source = array.pointer + first * array.shape[1] * found.itemsize
        self._driver.copy_to_host(
            self.device.index, found.ctypes.data, source, found.nbytes, array.stream
        )
        self._driver.synchronize(self.device.index, array.stream)
        return found

    def free_bytes(self) -> int:
        """Bytes of the device's memory that nobody uses now."""
        return self._driver.memory_info(self.device.index)[0]

    # --- times --------------------------------------------------------------------------------

    def copy_bytes(self) -> int:
        """Bytes of the arrays that `copy` copies."""
        return min(_COPY_BYTES, self.device.memory_bytes // _MEMORY_SHARE)

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

    def call_us(self, calls: Sequence[Callable[[], object]]) -> float:
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

    def _span_us(
        self, calls: Sequence[Callable[[], object]], copies: int = 0, stream: int = 0
    ) -> float:
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

    # --- what was compiled --------------------------------------------------------------------

    def compiled(self) -> list[tuple[str, str, Future[cache.Entry]]]:
        """What each kernel computes, its symbol, and its code or its error."""
        return [(*self._labels[text], future) for text, future in self._entries.items()]


def rotated_bytes(device: Device) -> int:
    """Return how many bytes of weights defeat a device's caches when they take turns."""
    wanted = max(4 * device.l2_bytes, _ROTATED_BYTES)
    return min(wanted, device.memory_bytes // _MEMORY_SHARE)


def rotated_copies(device: Device, one_bytes: int) -> int:
    """Return how many equal weights of `one_bytes` take turns so that no cache keeps them."""
    return max(2, rotated_bytes(device) // one_bytes + 1)


def _label(plan: HipPlan, kernel: HipKernel) -> str:
    """What a kernel is: its schedule, and the weights that it reads."""
    slots = [slot for slot in kernel.slots() if slot.kind == "weight"]
    weights = [f"{plan.weight(slot.index)} {slot.layout}" for slot in slots]
    return ", ".join([kernel.schedule, kernel.rows_class, *weights])


def _spec(value: Any) -> Spec:
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if _is_ids(value):
        return ids_spec(value.shape)
    return array_spec(value.shape) if isinstance(value, np.ndarray) else ScalarSpec()


def _is_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "i"
