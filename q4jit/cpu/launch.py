"""Launch a CPU's kernels on NumPy arrays: one `CpuLaunch` per set of exact shapes.

A launch computes once what depends only on shapes. A call checks its arrays, allocates the results,
packs one row of 8-byte slots per kernel and calls it.
"""

import functools
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.arguments import check_array, checked_ids, f32
from q4jit.arrays.call_shapes import CallShapes
from q4jit.arrays.outputs import check_out, usable
from q4jit.cpu.experts import ChosenExperts
from q4jit.cpu.schedule import CpuKernel, CpuPlan
from q4jit.cpu.scratch import Scratch, keep_scratch, lay_out_scratch, new_scratch, take_scratch
from q4jit.plan.kernels import Slot
from q4jit.runtime import pool
from q4jit.runtime.cpu import data_pointer
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

_FIRST_ARRAY: Final = 3  # index of the first array among the values of a call
# NumPy's flags of an array that kernels can read as it is
_C_CONTIGUOUS: Final = 0x001  # NPY_ARRAY_C_CONTIGUOUS
_ALIGNED: Final = 0x100  # NPY_ARRAY_ALIGNED
_READY: Final = _C_CONTIGUOUS | _ALIGNED

KernelFunction = Callable[[bytes], None]
_Step = tuple[KernelFunction, Callable[..., bytes], Callable[[list[Any]], tuple[Any, ...]]]


class CpuLaunch:
    """Kernels bound to exact shapes; calling it runs them on arguments."""

    def __init__(
        self,
        plan: CpuPlan,
        functions: Sequence[KernelFunction],
        shapes: CallShapes,
        args: Sequence[object],
        names: Sequence[str],
    ) -> None:
        """Bind `functions`, one per kernel of `plan`, to the shapes of `args`."""
        self._names = names
        self._rows = shapes.rows
        self._arrays, self._ids, self._scalars = shapes.arrays, shapes.ids, shapes.scalars
        self._results, self._picks = shapes.results, shapes.picks
        self._returns_tuple = shapes.returns_tuple
        self._weights = plan.weight_layouts()
        self._blocks = [
            i for i, a in enumerate(args) if isinstance(a, QuantizedTensor | ExpertTensor)
        ]
        read: list[Any] = [args[i] for i, _ in self._arrays]
        self._sizes = [array.nbytes for array in read] + [r.buffer_bytes for r in self._results]
        numbers = any(isinstance(args[i], np.ndarray) for i in self._scalars)
        self._outs_may_be_quick = not (numbers or self._picks)
        offsets, self.scratch_bytes = lay_out_scratch(plan, self._rows)
        self._offsets = [*offsets.values()]
        # the rows of kernels that compute several vectors for each row of the call
        counts = [k.work.rows_of(self._rows) for k in plan.kernels if k.work.copies > 1]
        self._vector_counts = list(dict.fromkeys(counts))
        self._experts = ChosenExperts(plan, self._rows)
        self._steps = self._steps_of(plan, functions, offsets)

    # --- what depends only on shapes ------------------------------------------------------------

    def _steps_of(
        self, plan: CpuPlan, functions: Sequence[KernelFunction], scratch: Iterable[Slot]
    ) -> list[_Step]:
        """Return a step for each kernel: its function, and how to pick and pack its slots' values.

        scratch: the slots of scratch memory, in the order of a call's values.
        """
        order = [Slot("pool"), Slot("m"), Slot("one")]
        order += [Slot("array", i) for i, _ in self._arrays]
        order += [Slot("ids", i) for i, _, _ in self._ids]
        order += [Slot("rows", rows) for rows in self._vector_counts]
        order += self._experts.slots
        order += [Slot("scalar", i) for i in self._scalars]
        order += [Slot("weight", i, layout) for i, layout in self._weights]
        order += [Slot("output", i) for i in range(len(self._results))]
        order += scratch
        position = {slot: i for i, slot in enumerate(order)}
        steps: list[_Step] = []
        for kernel, function in zip(plan.kernels, functions, strict=True):
            if not kernel.work.uniform and self._rows == 0:
                continue
            slots = [_own_rows(slot, kernel, self._rows) for slot in kernel.slots()]
            slot_formats = "".join("f4x" if slot.kind == "scalar" else "Q" for slot in slots)
            pack = struct.Struct(f"<{slot_formats}").pack
            steps.append((function, pack, itemgetter(*(position[slot] for slot in slots))))
        return steps

    # --- a call -----------------------------------------------------------------------------------

    def __call__(self, args: Sequence[Any], out: Any = None) -> Any:
        """Run the kernels; return an array or a tuple of arrays, or `out` if it is given."""
        values, _copies, buffers = self._values(args, out)  # copies live until kernels are done
        scratch = take_scratch(self.scratch_bytes)
        base = scratch[0]
        for offset in self._offsets:
            values.append(base + offset)
        for function, pack, pick in self._steps:
            function(pack(*pick(values)))
        keep_scratch(scratch)
        if out is not None:
            return out if buffers is None else self._deliver(buffers, out)
        if self._picks:
            buffers = [r.of(b) for r, b in zip(self._results, buffers, strict=True)]
        return tuple(buffers) if self._returns_tuple else buffers[0]

    def _values(self, args: Sequence[Any], out: Any) -> tuple[list[Any], list[Any], Any]:
        """Return the values of the slots, the copies that were made, and the arrays to fill.

        The last is None if the kernels fill `out` itself. The loops are written out because a
        comprehension over one element takes longer than the element.
        """
        values: list[Any] = [pool.address(), self._rows, 1]
        copies: list[NDArray[Any]] = []
        for i, shape in self._arrays:
            array = args[i]
            if shape is not None or array.flags.num & _READY != _READY:
                array = self._prepared(i, array, shape)
                copies.append(array)
            values.append(data_pointer(array))
        ids = {}
        for i, shape, count in self._ids:
            array = ids[i] = checked_ids(self._names[i], args[i], shape, count)
            copies.append(array)
            values.append(data_pointer(array))
        if self._vector_counts:
            values += self._vector_counts
        if self._experts.slots:
            of_experts, arrays = self._experts.values(ids)
            values += of_experts
            copies += arrays
        if self._scalars:
            values += [f32(args[i]) for i in self._scalars]
        for i, layout in self._weights:
            resident = args[i]._resident
            values.append(resident.addresses.get(layout) or resident.address(layout))
        if out is None:
            buffers = []
            for result in self._results:
                buffer = np.empty(result.buffer, result.dtype)
                buffers.append(buffer)
                values.append(data_pointer(buffer))
        elif not copies and (starts := self._starts(out, args, values)):
            buffers = None
            values += starts
        else:
            buffers = self._out_buffers(out, args)
            values += map(data_pointer, buffers)
        return values, copies, buffers

    def bind(self, args: Sequence[Any], out: Any = None) -> Callable[[], Any]:
        """Check these arrays now and return a call on them; without `out` it owns its results."""
        if out is None:
            made = tuple(np.empty(result.shape, result.dtype) for result in self._results)
            out = made if self._returns_tuple else made[0]
        values, copies, buffers = self._values(args, out)
        if copies or buffers is not None:  # every call must make them anew
            return functools.partial(self, args, out)
        return _Bound(self, args, out, values)

    def packed(self, values: list[Any], scratch: Scratch) -> list[tuple[KernelFunction, bytes]]:
        """Return the kernels in order, each with its packed slots."""
        values = values + [scratch.start + offset for offset in self._offsets]
        return [(function, pack(*pick(values))) for function, pack, pick in self._steps]

    def prepare(self, args: Sequence[Any]) -> None:
        """Repack the weights, so that the first call finds them ready."""
        for i, layout in self._weights:
            resident = args[i]._resident
            if layout not in resident.addresses:  # kernels read the others where they are
                resident.address(layout)

    def _prepared(self, i: int, array: NDArray[Any], shape: tuple[int, ...] | None) -> NDArray[Any]:
        """Return an array as kernels read it: broadcast to `shape`, and contiguous."""
        check_array(self._names[i], array)
        if shape is not None:
            array = np.broadcast_to(array, shape)
        return np.require(array, None, ["C", "A"])

    def _starts(self, out: Any, args: Sequence[Any], values: list[int]) -> list[int] | None:
        """Return the addresses of `out` if a quick check shows that `check_out` would accept it.

        values: the addresses of the argument arrays, from index `_FIRST_ARRAY` on.
        """
        outs = out if self._returns_tuple else (out,)
        if (
            not self._outs_may_be_quick
            or type(outs) is not tuple
            or len(outs) != len(self._results)
        ):
            return None
        sizes = self._sizes
        starts = values[_FIRST_ARRAY : _FIRST_ARRAY + len(self._arrays)]
        for i, result in enumerate(self._results):
            array = outs[i]
            if (
                type(array) is not np.ndarray
                or array.dtype != result.dtype
                or array.shape != result.shape
                or not array.flags.carray
            ):
                return None
            start = data_pointer(array)
            end = start + array.nbytes
            for weight in self._blocks:
                first, last = args[weight]._resident.span
                if start < last and first < end:
                    return None
            for j, other in enumerate(starts):
                if start < other + sizes[j] and other < end:
                    return None
            starts.append(start)
        return starts[-len(outs) :]

    def _out_buffers(self, out: object, args: Sequence[object]) -> list[NDArray[Any]]:
        """Return the arrays that kernels fill: those of `out` if their memory is suitable."""
        wanted = [(result.shape, result.dtype) for result in self._results]
        given = check_out(out, wanted, self._returns_tuple, self._names, args)
        pairs = zip(given, self._results, strict=True)
        return [a if usable(a, r) else np.empty(r.buffer, r.dtype) for a, r in pairs]

    def _deliver(self, buffers: Sequence[NDArray[Any]], out: Any) -> Any:
        given = out if isinstance(out, tuple) else (out,)
        for target, buffer, result in zip(given, buffers, self._results, strict=True):
            if target is not buffer:
                target[...] = result.of(buffer)
        return out


class _Bound:
    """A call with packed slots; it owns all memory that they point to."""

    def __init__(self, launch: CpuLaunch, args: Sequence[Any], out: Any, values: list[Any]) -> None:
        self._launch, self._args, self._out = launch, args, out
        self._workers = pool.address()
        self._scratch = new_scratch(launch.scratch_bytes)
        self._steps = launch.packed(values, self._scratch)
        self._free = threading.Lock()

    def __call__(self) -> Any:
        # a forked child has another pool, and another thread may be using the scratch memory
        if pool.address() != self._workers or not self._free.acquire(blocking=False):
            return self._launch(self._args, self._out)
        try:
            for function, slots in self._steps:
                function(slots)
        finally:
            self._free.release()
        return self._out


def _own_rows(slot: Slot, kernel: CpuKernel, m: int) -> Slot:
    """Return the slot of the rows that a kernel computes in place of M, other slots unchanged."""
    if slot.kind != "m" or (kernel.work.copies == 1 and not kernel.work.uniform):
        return slot
    return Slot("rows", kernel.work.rows_of(m)) if kernel.work.copies > 1 else Slot("one")
