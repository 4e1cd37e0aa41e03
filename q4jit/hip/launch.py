"""Launching a GPU's kernels: one object per set of exact shapes and per device.

Arrays that lie on the device are used in place: a call then checks them, puts their addresses into
prepared launches on the stream that their library works on, and returns; it allocates nothing where
`out=` is given, and never waits. PyTorch's tensors whose like was accepted before are not looked at
again (`on_tensors`). NumPy arrays are copied in, and their results out.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.arguments import (
    check_array,
    checked_ids,
    f32,
    holds_ids,
)
from q4jit.arrays.call_shapes import CallShapes, Result
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.dtypes import F32
from q4jit.arrays.libraries import as_device_array, current_stream, empty_like_kind
from q4jit.arrays.outputs import check_out
from q4jit.arrays.torch_tensors import new_tensor
from q4jit.arrays.views import DeviceView, require_contiguous, require_f32
from q4jit.errors import ArgumentError, DeviceError
from q4jit.hip.kernel import HipKernel, HipPlan, grid
from q4jit.hip.memory import scratch
from q4jit.plan.kernels import Slot, Source
from q4jit.runtime.devices import driver_of, drivers, why_none
from q4jit.runtime.driver import Device, LoadedKernel
from q4jit.weights.resident import device_key
from q4jit.weights.tensor import QuantizedTensor

_PER_THREAD_STREAM: Final = 2  # the handle of each thread's own default stream
_REGION_BYTES: Final = 256  # each temporary begins where a burst of memory does


def load(code: bytes, source: Source, device: Device | None) -> LoadedKernel:
    """Return a compiled kernel, ready to run. Raises DeviceError where there is no device."""
    if device is None:
        raise DeviceError(
            f"{source.symbol} is compiled for {source.target}, and no such device is here: "
            f"accepted are inspect_source and inspect_asm; {why_none() or 'another GPU is'}"
        )
    return driver_of(device).load(device.index, code, source.symbol)


class HipLaunch:
    """Kernels bound to exact shapes and a device; call it with the arguments.

    Arguments on the device are given as `DeviceView`.
    """

    def __init__(
        self,
        plan: HipPlan,
        kernels: Sequence[LoadedKernel],
        shapes: CallShapes,
        args: Sequence[Any],
        names: Sequence[str],
        device: Device,
    ) -> None:
        """Bind `kernels` (one per kernel of `plan`, on `device`) to `shapes`, those of `args`.

        Raises ArgumentError for shapes that arrays on the device cannot have.
        """
        self._names, self._device = names, device
        self._driver = driver_of(device)
        self._shapes = shapes
        self._on_device = any(isinstance(value, DeviceView) for value in args)
        if self._on_device:
            self._refuse_spreading()
        self._weights = [(i, layout, _place(device, layout)) for i, layout in plan.weight_layouts()]
        self._offsets, self._scratch_bytes = _scratch(plan, self._shapes.rows)
        self._given = self._given_arrays(args)
        self._like = min((slot.kind, slot.index) for slot in self._given)[1] if self._given else -1
        self._apart = self._must_be_apart(args)
        self._steps = self._bind(plan, kernels)

    def _refuse_spreading(self) -> None:
        spread = [i for i, shape in self._shapes.arrays if shape is not None]
        spread += [i for i, shape, _ in self._shapes.ids if shape is not None]
        lead = list(self._shapes.lead)
        if spread:
            raise ArgumentError(
                f"argument {self._names[spread[0]]!r} on a device has fewer leading dimensions "
                f"than {lead}: accepted are arrays that have them all, contiguous"
            )
        if self._shapes.picks:
            raise ArgumentError(
                f"found a result that lacks some of the leading dimensions {lead}: accepted, for "
                "arrays on a device, are results that have all of them or none"
            )

    def _given_arrays(self, args: Sequence[Any]) -> list[Slot]:
        """The arrays that a call gives, in the order of its arguments."""
        if self._on_device:  # among them ids of which no kernel reads more than the number
            views = [(i, v) for i, v in enumerate(args) if isinstance(v, DeviceView)]
            return [Slot("ids" if holds_ids(view) else "array", i) for i, view in views]
        arrays = [Slot("array", i) for i, _ in self._shapes.arrays]
        return arrays + [Slot("ids", i) for i, _, _ in self._shapes.ids]

    def _must_be_apart(self, args: Sequence[Any]) -> list[tuple[int, int, int, int]]:
        """Per pair of an output and another array: place among the pointers, and bytes, of each."""
        used = {i for i, _ in self._shapes.arrays} | {i for i, _, _ in self._shapes.ids}
        given = enumerate(self._given if self._on_device else ())
        sizes = {place: _bytes(args[slot.index]) for place, slot in given if slot.index in used}
        pairs = []
        for place, result in enumerate(self._shapes.results, len(self._given)):
            size = math.prod(result.buffer) * F32.itemsize
            pairs += [(place, size, other, others) for other, others in sizes.items()]
            sizes[place] = size
        return pairs

    def _bind(self, plan: HipPlan, kernels: Sequence[LoadedKernel]) -> list[Callable[..., None]]:
        """The prepared launch of each kernel, which takes the values of `_enqueue`."""
        shapes = self._shapes
        values = [*self._given, *[Slot("output", i) for i in range(len(shapes.results))]]
        values += [Slot("scalar", i) for i in shapes.scalars]
        values += [Slot("weight", i, layout) for i, layout, _ in self._weights]
        values += self._offsets
        letters = "".join("f" if slot.kind == "scalar" else "P" for slot in values)
        places = {slot: i for i, slot in enumerate([*values, Slot("m"), Slot("one")])}
        steps = []
        for kernel, loaded in zip(plan.kernels, kernels, strict=True):
            rows = 1 if kernel.work.uniform else shapes.rows
            if rows == 0:
                continue
            launch = self._driver.prepare(
                loaded,
                grid(plan, kernel).blocks(rows),
                (kernel.block_size, 1, 1),
                0,
                letters,
                (shapes.rows, 1),
                [places[_one_row(slot, kernel)] for slot in kernel.slots()],
                plan.target.hip.overlaps,
            )
            steps.append(launch)
        return steps

    # --- a call ---------------------------------------------------------------------------------

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels; returns an array or a tuple of them, or `out` where it is given."""
        if self._on_device:
            return self._run_in_place(args, out)
        return self._run_with_copies(args, out)

    def bind(self, args: Sequence[Any], out: object = None) -> Callable[[], Any]:
        """A call with these very arrays."""
        return functools.partial(self, args, out)

    def prepare(self, args: Sequence[Any]) -> None:
        """Upload the weights, so that the first call finds them there."""
        for i, layout, _ in self._weights:
            device_weight(args[i], layout, self._device)

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """A call on PyTorch's tensors that `tensor_facts` cannot tell from those of an earlier one.

        pointers: where they lie, in the order of the arguments, then those of `out`.
        """
        if out is not None:
            self._enqueue(stream, args, pointers)
            return out
        like = args[self._like]
        made = tuple([new_tensor(like, result.buffer) for result in self._shapes.results])
        self._enqueue(stream, args, pointers + [tensor.data_ptr() for tensor in made])
        return made if self._shapes.returns_tuple else made[0]

    def _run_in_place(self, args: Sequence[Any], out: Any) -> Any:
        for i, _ in self._shapes.arrays:
            self._check_array(i, args[i])
        for i, _, _ in self._shapes.ids:
            self._check_ids(i, args[i])
        given = [args[slot.index] for slot in self._given]
        stream = current_stream(args[self._like])
        if out is None:
            results = self._shapes.results
            owners = tuple(empty_like_kind(args[self._like], result.buffer) for result in results)
        else:
            owners = out if isinstance(out, tuple) else (out,)
        views = given + self._output_views(owners, out)
        pointers = [view.pointer for view in views]
        self._wait_for_others(stream, args[self._like].library, views)
        self._enqueue(stream, args, pointers)
        if out is not None:
            return out
        return owners if self._shapes.returns_tuple else owners[0]

    def _wait_for_others(self, stream: int, library: str, views: Sequence[DeviceView]) -> None:
        """Wait for work on other streams than `library`'s, where libraries are mixed."""
        for view in views:
            if view.library != library or not view.library:
                other = current_stream(view)
                if other != stream:
                    self._driver.synchronize(self._device.index, other)

    def _run_with_copies(self, args: Sequence[Any], out: Any) -> Any:
        """Copy in, run, copy out, on the default stream; complete when this returns."""
        shapes = self._shapes
        arrays = [self._upload(self._host_array(i, args[i], s)) for i, s in shapes.arrays]
        ids = [self._upload(checked_ids(self._names[i], args[i], s, n)) for i, s, n in shapes.ids]
        results = [DeviceArray(result.buffer, self._device) for result in shapes.results]
        given = None
        if out is not None:
            wanted = [result.shape for result in shapes.results]
            given = check_out(out, wanted, shapes.returns_tuple, self._names, args)
        pointers = [array.pointer for array in (*arrays, *ids, *results)]
        self._enqueue(0, args, pointers)
        made = tuple(r.of(a.to_numpy()) for r, a in zip(shapes.results, results, strict=True))
        if given is not None:
            for target, value in zip(given, made, strict=True):
                target[...] = value
            return out
        return made if shapes.returns_tuple else made[0]

    def _enqueue(self, stream: int, args: Sequence[Any], pointers: list[int]) -> None:
        """Launch the kernels; pointers: of what `_given` names, then of the outputs; extended."""
        for output, size_bytes, other, others_bytes in self._apart:
            if -size_bytes < pointers[output] - pointers[other] < others_bytes:
                raise ArgumentError(
                    "out= overlaps an argument, which is read while out is written, or another "
                    "array of out=: accepted are arrays of their own memory"
                )
        values: list[Any] = pointers
        if self._shapes.scalars:
            values += [f32(args[i]) for i in self._shapes.scalars]
        for i, layout, place in self._weights:
            memory = args[i]._resident.uploads.get(place)
            values.append(
                device_weight(args[i], layout, self._device) if memory is None else memory.pointer
            )
        if self._scratch_bytes:
            self._launch_with_scratch(stream, values)
            return
        for launch in self._steps:
            launch(stream, *values)

    def _launch_with_scratch(self, stream: int, values: list[Any]) -> None:
        # this handle means another stream in every thread
        thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
        workspace = _workspace(self._device.platform, self._device.index, stream, thread)
        with workspace.lock:  # kernels of a call hand values on in it: calls do not mix
            base = self._scratch_memory(workspace, stream)
            values += [base + offset for offset in self._offsets.values()]
            for launch in self._steps:
                launch(stream, *values)

    def _scratch_memory(self, workspace: "_Workspace", stream: int) -> int:
        """Where temporaries go. A graph gets memory of its own: two may be replayed at a time."""
        if not self._driver.is_capturing(self._device.index, stream):
            return workspace.of(self._scratch_bytes)
        memory = DeviceArray((self._scratch_bytes,), self._device, np.dtype(np.uint8), stream)
        _held_by_graphs.append(memory)
        return memory.pointer

    # --- arguments on the device ------------------------------------------------------------------

    def _check_array(self, i: int, view: DeviceView) -> None:
        require_f32(view, self._names[i])
        require_contiguous(view, self._names[i])

    def _check_ids(self, i: int, view: DeviceView) -> None:
        if view.dtype != np.int64:
            raise ArgumentError(
                f"argument {self._names[i]!r} is {view}: accepted are int64 for ids on a device"
            )
        require_contiguous(view, self._names[i])

    def _output_views(self, owners: tuple[Any, ...], out: object) -> list[DeviceView]:
        results = self._shapes.results
        if out is not None and (
            isinstance(out, tuple) != self._shapes.returns_tuple or len(owners) != len(results)
        ):
            wanted = (
                f"a tuple of {len(results)} arrays" if self._shapes.returns_tuple else "an array"
            )
            raise ArgumentError(f"out= is {type(out).__name__}: accepted is {wanted}")
        return [self._output_view(o, r) for o, r in zip(owners, results, strict=True)]

    def _output_view(self, owner: object, result: Result) -> DeviceView:
        view = as_device_array(owner, "out")
        place = (self._device.platform, self._device.index)
        if (
            view is None
            or (view.platform, view.device) != place
            or view.dtype != F32
            or view.shape != result.shape
            or view.strides is not None
            or view.readonly
        ):
            found = type(owner).__name__ if view is None else _show(view)
            raise ArgumentError(
                f"out= is {found}: accepted is a writable, contiguous float32 "
                f"{list(result.shape)} on {self._device}"
            )
        return view

    # --- arguments of NumPy -----------------------------------------------------------------------

    def _host_array(
        self, i: int, array: NDArray[Any], shape: tuple[int, ...] | None
    ) -> NDArray[Any]:
        check_array(self._names[i], array)
        return array if shape is None else np.broadcast_to(array, shape)

    def _upload(self, array: NDArray[Any]) -> DeviceArray:
        return DeviceArray.from_numpy(array, self._device)


def _one_row(slot: Slot, kernel: HipKernel) -> Slot:
    return Slot("one") if slot.kind == "m" and kernel.work.uniform else slot


def _scratch(plan: HipPlan, rows: int) -> tuple[dict[Slot, int], int]:
    """Where temporaries and what kernels hand on begin in the scratch memory, and its size."""
    sizes = {Slot("temp", i): 4 * width * max(1, rows) for i, width in enumerate(plan.temps)}
    for kernel in plan.kernels:
        for slot, size in scratch(kernel, rows).items():
            sizes[slot] = max(sizes.get(slot, 0), size)
    offsets: dict[Slot, int] = {}
    total = 0
    for slot, size in sizes.items():
        offsets[slot] = total
        total += -(-size // _REGION_BYTES) * _REGION_BYTES
    return offsets, total


class _Workspace:
    """Memory that the calls on one stream of a device use one after the other."""

    def __init__(self, device: Device, stream: int) -> None:
        self.lock = threading.Lock()
        self._device, self._stream = device, stream
        self._memory: DeviceArray | None = None

    def of(self, size_bytes: int) -> int:
        """The address of so many bytes. It grows; freeing the old waits for what reads it."""
        if self._memory is None or self._memory.nbytes < size_bytes:
            self._memory = None
            self._memory = DeviceArray(
                (size_bytes,), self._device, np.dtype(np.uint8), self._stream
            )
        return self._memory.pointer


# A graph does not tell when it is gone: what it writes to lives as long as the process.
_held_by_graphs: list[DeviceArray] = []


def release_graph_memory(device: Device, stream: int) -> None:
    """Free what was given to graphs that were captured on a stream, and that are all gone."""
    _held_by_graphs[:] = [
        memory for memory in _held_by_graphs if (memory.device, memory.stream) != (device, stream)
    ]


@functools.lru_cache(maxsize=64)  # streams come and go; freeing memory waits for what uses it
def _workspace(platform: str, device: int, stream: int, thread: int) -> _Workspace:
    return _Workspace(drivers()[platform].devices[device], stream)


def _show(view: DeviceView) -> str:
    how = f", strides {list(view.strides)}" if view.strides is not None else ""
    return f"{'read-only ' if view.readonly else ''}{view}{how}"


def _bytes(view: DeviceView) -> int:
    return math.prod(view.shape) * view.dtype.itemsize


# --- weights ------------------------------------------------------------------------------------


def _place(device: Device, layout: str) -> str:
    return device_key(device.platform, device.index, layout)


def device_weight(tensor: QuantizedTensor, layout: str, device: Device) -> int:
    """The address of a weight on a device, in a layout; uploaded once, freed with the tensor."""

    def copy(blocks: NDArray[Any]) -> DeviceArray:
        return DeviceArray.from_numpy(blocks, device)

    return tensor._resident.upload(_place(device, layout), layout, copy).pointer
