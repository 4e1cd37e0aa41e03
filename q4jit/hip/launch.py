"""Launch the kernels of a plan on a GPU: one `HipLaunch` per set of exact shapes and per device.

Arrays on the device are used in place: a call checks them, passes their addresses to prepared
launches on the current stream of their library, and returns without waiting. With `out=` it
allocates nothing. PyTorch tensors that only differ in their contents from those of an earlier call
are not checked again (`on_tensors`). NumPy arrays are copied to the device, and results back.
"""

import functools
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
from q4jit.arrays.call_shapes import CallShapes
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.libraries import current_stream, empty_like_kind
from q4jit.arrays.on_device import (
    check_views,
    output_views,
    overlap_error,
    pairs_apart,
    refuse_broadcasting,
)
from q4jit.arrays.outputs import check_out
from q4jit.arrays.torch_tensors import new_tensor
from q4jit.arrays.views import DeviceView
from q4jit.errors import DeviceError
from q4jit.hip.kernel import HipPlan, grid
from q4jit.hip.workspace import DeviceScratch
from q4jit.plan.kernels import Slot, Source
from q4jit.runtime.devices import driver_of, why_none
from q4jit.runtime.driver import Device, LoadedKernel
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.resident import DeviceMemory, device_key
from q4jit.weights.tensor import QuantizedTensor


def load(code: bytes, source: Source, device: Device | None) -> LoadedKernel:
    """Load a compiled kernel onto a device. Raises DeviceError if there is no device."""
    if device is None:
        reason = why_none() or "the GPUs of this machine have other archs"
        raise DeviceError(
            f"cannot run {source.symbol}, which is compiled for {source.target}: {reason}; use "
            "target='cpu', or only inspect_source and inspect_asm"
        )
    return driver_of(device).load(device.index, code, source.symbol)


# never freed, as the kernels in it are not (see `LoadedKernel`)
_loaded_once: Final[dict[tuple[Device | None, str, bytes], LoadedKernel]] = {}


def load_once(code: bytes, source: Source, device: Device | None) -> LoadedKernel:
    """Return a compiled kernel on a device; load it unless it is there. Raises as `load`.

    A loaded kernel stays in the device's memory (see `LoadedKernel`). So one that a function has
    forgotten is not loaded a second time. Callers hold the lock BUILD.
    """
    key = device, source.symbol, code
    if key not in _loaded_once:
        _loaded_once[key] = load(code, source, device)
    return _loaded_once[key]


class HipLaunch:
    """Kernels bound to exact shapes and a device; calling it with arguments runs them.

    Arguments on the device are passed as `DeviceView`.
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
        """Bind the loaded kernels of `plan` to the shapes of `args`.

        Raises ArgumentError for arrays on the device that kernels would have to broadcast.
        """
        self._names, self._device = names, device
        self._driver = driver_of(device)
        self._shapes = shapes
        self._on_device = any(isinstance(value, DeviceView) for value in args)
        if self._on_device:
            refuse_broadcasting(shapes, names)
        self._weights = [
            (i, layout, device_key(device.platform, device.index, layout))
            for i, layout in plan.weight_layouts()
        ]
        self._scratch = DeviceScratch(plan, shapes.rows, device)
        self._arrays = self._array_slots(args)
        # the library of the first array allocates the results
        first = min(((slot.kind, slot.index) for slot in self._arrays), default=("", -1))
        self._like = first[1]
        self._apart = pairs_apart(shapes, self._arrays, args)
        self._launches = self._bind(plan, kernels)

    def _array_slots(self, args: Sequence[Any]) -> list[Slot]:
        """Return the slots of the arrays that a call passes, in the order of its arguments."""
        if self._on_device:  # including ids that the kernels only need the number of
            views = [(i, v) for i, v in enumerate(args) if isinstance(v, DeviceView)]
            return [Slot("ids" if holds_ids(view) else "array", i) for i, view in views]
        arrays = [Slot("array", i) for i, _ in self._shapes.arrays]
        return arrays + [Slot("ids", i) for i, _, _ in self._shapes.ids]

    def _bind(self, plan: HipPlan, kernels: Sequence[LoadedKernel]) -> list[Callable[..., None]]:
        """Return the prepared launch of each kernel, which takes the values of `_enqueue`."""
        shapes = self._shapes
        values = [*self._arrays, *[Slot("output", i) for i in range(len(shapes.results))]]
        values += [Slot("scalar", i) for i in shapes.scalars]
        values += [Slot("weight", i, layout) for i, layout, _ in self._weights]
        values += self._scratch.offsets
        letters = "".join("f" if slot.kind == "scalar" else "P" for slot in values)
        counts = list(dict.fromkeys(k.work.rows_of(shapes.rows) for k in plan.kernels))
        rows_slots = [Slot("m", count) for count in counts]
        positions = {slot: i for i, slot in enumerate([*values, *rows_slots])}
        launches = []
        for kernel, loaded in zip(plan.kernels, kernels, strict=True):
            rows = kernel.work.rows_of(shapes.rows)
            if rows == 0:
                continue
            launch = self._driver.prepare(
                loaded,
                grid(plan, kernel).blocks(rows),
                (kernel.block_size, 1, 1),
                0,
                letters,
                tuple(counts),
                [positions[Slot("m", rows) if s.kind == "m" else s] for s in kernel.slots()],
                plan.target.hip.overlaps,
            )
            launches.append(launch)
        return launches

    # --- a call ---------------------------------------------------------------------------------

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels; return `out` if it is given, else an array or a tuple of arrays."""
        if self._on_device:
            return self._run_in_place(args, out)
        return self._run_with_copies(args, out)

    def bind(self, args: Sequence[Any], out: object = None) -> Callable[[], Any]:
        """Return a call with these arrays."""
        return functools.partial(self, args, out)

    def prepare(self, args: Sequence[Any]) -> None:
        """Upload the weights before the first call."""
        for i, layout, key in self._weights:
            self._uploaded(args[i], layout, key)

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """Run the kernels on PyTorch tensors with the `tensor_facts` of an earlier call.

        pointers: the addresses of the tensors in the order of the arguments, then those of `out`.
        """
        if out is not None:
            self._enqueue(stream, args, pointers)
            return out
        like = args[self._like]
        results = self._shapes.results
        made = tuple([new_tensor(like, r.buffer, r.float_type) for r in results])
        self._enqueue(stream, args, pointers + [tensor.data_ptr() for tensor in made])
        return made if self._shapes.returns_tuple else made[0]

    def _run_in_place(self, args: Sequence[Any], out: Any) -> Any:
        check_views(self._shapes, self._names, args)
        arrays = [args[slot.index] for slot in self._arrays]
        stream = current_stream(args[self._like])
        if out is None:
            like, results = args[self._like], self._shapes.results
            owners = tuple(empty_like_kind(like, r.buffer, r.float_type) for r in results)
        else:
            owners = out if isinstance(out, tuple) else (out,)
        views = arrays + output_views(self._shapes, self._device, owners, out)
        pointers = [view.pointer for view in views]
        self._wait_for_others(stream, args[self._like].library, views)
        self._enqueue(stream, args, pointers)
        if out is not None:
            return out
        return owners if self._shapes.returns_tuple else owners[0]

    def _wait_for_others(self, stream: int, library: str, views: Sequence[DeviceView]) -> None:
        """Wait for the streams of other libraries than `library`, if a call mixes libraries."""
        for view in views:
            if view.library != library or not view.library:
                other = current_stream(view)
                if other != stream:
                    self._driver.synchronize(self._device.index, other)

    def _run_with_copies(self, args: Sequence[Any], out: Any) -> Any:
        """Copy the arguments in, run, and copy the results out, on the default stream."""
        shapes = self._shapes
        arrays = [self._copied(self._host_array(i, args[i], s)) for i, s in shapes.arrays]
        ids = [self._copied(checked_ids(self._names[i], args[i], s, n)) for i, s, n in shapes.ids]
        results = [DeviceArray(r.buffer, self._device, r.dtype) for r in shapes.results]
        targets = None
        if out is not None:
            wanted = [(result.shape, result.dtype) for result in shapes.results]
            targets = check_out(out, wanted, shapes.returns_tuple, self._names, args)
        pointers = [array.pointer for array in (*arrays, *ids, *results)]
        self._enqueue(0, args, pointers)
        made = tuple(r.of(a.to_numpy()) for r, a in zip(shapes.results, results, strict=True))
        if targets is not None:
            for target, value in zip(targets, made, strict=True):
                target[...] = value
            return out
        return made if shapes.returns_tuple else made[0]

    def _enqueue(self, stream: int, args: Sequence[Any], pointers: list[int]) -> None:
        """Launch the kernels.

        pointers: the addresses of `_arrays` and then of the results; the other values are appended.
        """
        for output, size_bytes, other, others_bytes in self._apart:
            if -size_bytes < pointers[output] - pointers[other] < others_bytes:
                raise overlap_error()
        values: list[Any] = pointers
        if self._shapes.scalars:
            values += [f32(args[i]) for i in self._shapes.scalars]
        for i, layout, key in self._weights:
            memory = args[i]._resident.uploads.get(key)
            if memory is None:
                memory = self._uploaded(args[i], layout, key)
            values.append(memory.pointer)
        if self._scratch.size_bytes:
            self._scratch.launch(self._launches, stream, values)
            return
        for launch in self._launches:
            launch(stream, *values)

    def _host_array(
        self, i: int, array: NDArray[Any], shape: tuple[int, ...] | None
    ) -> NDArray[Any]:
        check_array(self._names[i], array)
        return array if shape is None else np.broadcast_to(array, shape)

    def _copied(self, array: NDArray[Any]) -> DeviceArray:
        return DeviceArray.from_numpy(array, self._device)

    def _uploaded(
        self, weight: QuantizedTensor | ExpertTensor, layout: str, key: str
    ) -> DeviceMemory:
        """Return a weight's copy on the device in a layout; upload it if it is missing.

        The tensor owns the copy.
        """
        return weight._resident.upload(key, layout, self._copied)
