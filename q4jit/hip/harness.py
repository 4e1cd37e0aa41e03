"""The bench runs and times chosen kernels on a GPU.

Unlike a call of a specialised function, `PlanOptions` choose the schedule and the layout of the
weights, and results are filled with NaN before the kernels run.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from q4jit import config
from q4jit.arrays.call_shapes import CallShapes, lead_shape
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.specs import spec_of
from q4jit.arrays.views import DeviceView
from q4jit.compilers import cache
from q4jit.compilers.find import find_compiler
from q4jit.floats import float_type_of
from q4jit.frontend.specs import (
    ScalarSpec,
    Signature,
    Spec,
    array_spec,
    ids_spec,
    with_inner_axes,
)
from q4jit.frontend.trace import trace
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.launch import HipLaunch, load
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.hip.timer import MEMORY_SHARE, Timer
from q4jit.hip.tunings import Measured
from q4jit.pipeline import fetch, ready_kernels
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.runtime.devices import target_of
from q4jit.runtime.driver import Device, LoadedKernel
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]

_MOST_THREADS: Final = 16
_ROTATED_BYTES: Final = 256 << 20  # more than any cache; AMD has a larger cache behind its L2
_POISON: Final = 0xFF  # four such bytes are a NaN


@dataclass(frozen=True)
class Built:
    """A plan with the texts of its kernels. Their compilation has begun."""

    plan: HipPlan
    sources: tuple[Source, ...]


class Bench(Timer):
    """A device on which functions run with chosen kernels."""

    def __init__(self, device: Device) -> None:
        """Find the compiler. Raises TargetError if it is missing or if the arch is unknown."""
        super().__init__(device)
        self.target = target_of(device)
        self._compiler = find_compiler(self.target)
        self.fingerprint = self._compiler.fingerprint(self.target)
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, config.num_threads()))
        self._entries: dict[str, Future[cache.Entry]] = {}  # by text
        self._labels: dict[str, tuple[str, str]] = {}  # text → what it computes, symbol
        self._loaded: dict[str, LoadedKernel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that compile, and destroy the streams."""
        self._threads.shutdown(cancel_futures=True)
        super().close()

    def build(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        plan_options: PlanOptions,
        measured: Measured | None = None,
    ) -> Built:
        """Plan `function` and begin to compile its kernels; `bind` raises their errors.

        measured: as for `make_plan`.
        """
        graph = trace(function, signature_of(args))
        rows = math.prod(lead_shape(args, graph.signature))
        return self.compile(make_plan(graph, self.target, rows, plan_options, measured))

    def compile(self, plan: HipPlan) -> Built:
        """Begin to compile the kernels of a plan; `bind` raises their errors."""
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
        """Return a launch for arguments on the device (see `upload`)."""
        ready = ready_kernels(built.sources, self._entry, self._load, self.device)
        kernels, graph = [kernel.loaded for kernel in ready], built.plan.graph
        return HipLaunch(
            built.plan, kernels, CallShapes(graph, args), args, graph.names, self.device
        )

    def load(self, source: Source) -> LoadedKernel:
        """Wait for the compilation of a kernel, load it and return it. Raises CompileError."""
        (ready,) = ready_kernels((source,), self._entry, self._load, self.device)
        kernel: LoadedKernel = ready.loaded
        return kernel

    def _entry(self, source: Source) -> cache.Entry:
        """Wait for a compilation and return its result."""
        return self._entries[source.text].result()

    def _load(self, code: bytes, source: Source, device: Device | None) -> LoadedKernel:
        if source.text not in self._loaded:
            self._loaded[source.text] = load(code, source, device)
        return self._loaded[source.text]

    def upload(self, args: Sequence[Any], stream: int = 0) -> tuple[Any, ...]:
        """Return the arguments with each array copied to the device, for use on `stream`.

        A launch runs on the stream of its first array.
        """
        return tuple(
            DeviceArray.from_numpy(a, self.device, stream).view()
            if isinstance(a, np.ndarray)
            else a
            for a in args
        )

    def overwrite(self, view: DeviceView, array: Floats) -> None:
        """Overwrite an uploaded array with an array of the same shape."""
        source, stream = np.ascontiguousarray(array), view.stream or 0
        self._driver.copy_to_device(
            self.device.index, view.pointer, source.ctypes.data, source.nbytes, stream
        )
        self._driver.synchronize(self.device.index, stream)

    def outputs(self, built: Built, args: Sequence[Any]) -> tuple[DeviceArray, ...]:
        """Return an array of NaN for each result, on the stream of the first array of `args`."""
        stream = next(a.stream for a in args if isinstance(a, DeviceView)) or 0
        shapes = CallShapes(built.plan.graph, args)
        arrays = tuple(
            DeviceArray(result.shape, self.device, result.dtype, stream)
            for result in shapes.results
        )
        self.poison(arrays)
        return arrays

    def poison(self, arrays: Sequence[DeviceArray]) -> None:
        """Fill arrays with NaN, each on its stream."""
        for array in arrays:
            self._driver.fill(self.device.index, array.pointer, _POISON, array.nbytes, array.stream)

    def run(self, built: Built, args: Sequence[Any]) -> list[Floats]:
        """Return the results for NumPy arguments. Elements that no kernel wrote are NaN."""
        uploaded = self.upload(args)
        outputs = self.outputs(built, uploaded)
        launch = self.bind(built, uploaded)
        launch(uploaded, outputs if built.plan.graph.returns_tuple else outputs[0])
        return [array.to_numpy() for array in outputs]

    def run_rows(self, built: Built, args: Sequence[Any], ranges: Sequence[slice]) -> list[Floats]:
        """Return ranges of rows of the result [M, N], which may be larger than host memory."""
        uploaded = self.upload(args)
        (output,) = self.outputs(built, uploaded)
        self.bind(built, uploaded)(uploaded, output)
        return [self._rows(output, each) for each in ranges]

    def _rows(self, array: DeviceArray, rows: slice) -> Floats:
        first, stop, _ = rows.indices(array.shape[0])
        copied = np.empty((stop - first, array.shape[1]), np.float32)
        source = array.pointer + first * array.shape[1] * copied.itemsize
        self._driver.copy_to_host(
            self.device.index, copied.ctypes.data, source, copied.nbytes, array.stream
        )
        self._driver.synchronize(self.device.index, array.stream)
        return copied

    def free_bytes(self) -> int:
        """Return the free bytes of the device's memory."""
        return self._driver.memory_info(self.device.index)[0]

    # --- compiled kernels -----------------------------------------------------------------------

    def compiled(self) -> list[tuple[str, str, Future[cache.Entry]]]:
        """Return the label of each kernel, its symbol, and its code or error."""
        return [(*self._labels[text], future) for text, future in self._entries.items()]


def rotated_bytes(device: Device) -> int:
    """Return how many bytes of weights must take turns so that no cache keeps them."""
    wanted = max(4 * device.l2_bytes, _ROTATED_BYTES)
    return min(wanted, device.memory_bytes // MEMORY_SHARE)


def _label(plan: HipPlan, kernel: HipKernel) -> str:
    """Return a kernel's schedule, its class of rows, and the weights that it reads."""
    slots = [slot for slot in kernel.slots() if slot.kind == "weight"]
    weights = [f"{plan.weight(slot.index)} {slot.layout}" for slot in slots]
    return ", ".join([kernel.schedule, kernel.rows_class, *weights])


def signature_of(args: Sequence[Any]) -> Signature:
    """Return the specs of NumPy arguments as kernels for a GPU read them once they are uploaded."""
    shapes = [getattr(value, "shape", ()) for value in args]
    return with_inner_axes(tuple(map(_spec, args)), shapes)


def _spec(value: Any) -> Spec:
    if isinstance(value, QuantizedTensor | ExpertTensor):
        return spec_of("w", value)
    if _is_ids(value):
        return replace(ids_spec(value.shape), is_narrow=value.dtype == np.int32)
    if isinstance(value, np.ndarray):
        return array_spec(value.shape, float_type=float_type_of(value.dtype) or "f32")
    return ScalarSpec()


def _is_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "i"
