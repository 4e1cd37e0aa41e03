"""Launching a CPU's kernels on NumPy arrays: one object per set of exact shapes.

All that depends on shapes alone is worked out once; a call checks its arrays, allocates the
results, packs one row of 8-byte slots per kernel and calls it.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arguments import (
    F32,
    CallShapes,
    check_array,
    check_out,
    checked_ids,
    f32,
    usable,
    weight_layouts,
)
from q4jit.layouts import CACHE_LINE_BYTES, GGUF
from q4jit.plan import Slot
from q4jit.runtime import pool
from q4jit.runtime.cpu import data_pointer
from q4jit.schedule_cpu import CpuKernel, CpuPlan, digits_bytes, padded_k

KernelFunction = Callable[[bytes], None]
_Step = tuple[KernelFunction, Callable[..., bytes], Callable[[list[Any]], tuple[Any, ...]]]


class CpuLaunch:
    """Kernels bound to exact shapes; call it with the arguments."""

    def __init__(
        self,
        plan: CpuPlan,
        functions: Sequence[KernelFunction],
        args: Sequence[object],
        names: Sequence[str],
    ) -> None:
        """Bind `functions` (one per kernel of `plan`) to the shapes of `args`."""
        self._names = names
        shapes = CallShapes(plan.graph, args)
        self._rows = shapes.rows
        self._arrays, self._ids, self._scalars = shapes.arrays, shapes.ids, shapes.scalars
        self._results, self._picks = shapes.results, shapes.picks
        self._returns_tuple = shapes.returns_tuple
        self._weights = weight_layouts(plan)
        self._set_scratch(plan)
        self._steps = self._bind(plan, functions)

    # --- what depends on shapes alone -----------------------------------------------------------

    def _set_scratch(self, plan: CpuPlan) -> None:
        """Lay out temporaries and prologue results behind each other, each on a cache line."""
        sizes = {
            Slot("temp", i): 4 * width * max(1, self._rows) for i, width in enumerate(plan.temps)
        }
        for kernel in plan.kernels:
            rows = 1 if kernel.uniform else self._rows
            k = padded_k(plan, kernel)
            row_bytes = {
                Slot("x"): 4 * k,
                Slot("exponent"): 4,
                Slot("digits"): digits_bytes(k, kernel.limbs) if kernel.limbs else 0,
            }
            for slot, size in row_bytes.items():
                sizes[slot] = max(sizes.get(slot, 0), rows * size)
        self._scratch_offsets: dict[Slot, int] = {}
        total = 0
        for slot, size in sizes.items():
            self._scratch_offsets[slot] = total
            total += -(-size // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        self._scratch_bytes = total

    def _bind(self, plan: CpuPlan, functions: Sequence[KernelFunction]) -> list["_Step"]:
        """Per kernel: its function, the packing of its slots, and which values they take."""
        order = [Slot("pool"), Slot("m"), Slot("one")]
        order += [Slot("array", i) for i, _ in self._arrays]
        order += [Slot("ids", i) for i, _, _ in self._ids]
        order += [Slot("scalar", i) for i in self._scalars]
        order += [Slot("weight", i, layout) for i, layout in self._weights]
        order += [Slot("output", i) for i in range(len(self._results))]
        order += list(self._scratch_offsets)
        place = {slot: i for i, slot in enumerate(order)}
        steps: list[_Step] = []
        for kernel, function in zip(plan.kernels, functions, strict=True):
            if not kernel.uniform and self._rows == 0:
                continue
            slots = [_one_row(slot, kernel) for slot in kernel.slots()]
            form = "".join("f4x" if slot.kind == "scalar" else "Q" for slot in slots)
            pack = struct.Struct(f"<{form}").pack
            steps.append((function, pack, itemgetter(*(place[slot] for slot in slots))))
        return steps

    # --- a call -----------------------------------------------------------------------------------

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels; returns an array or a tuple of them, or `out` where it is given."""
        arrays = [self._array(i, args[i], shape) for i, shape in self._arrays]
        ids = [checked_ids(self._names[i], args[i], shape, count) for i, shape, count in self._ids]
        scalars = [f32(args[i]) for i in self._scalars]
        weights = [
            args[i].raw if layout == GGUF else args[i].repacked(layout)
            for i, layout in self._weights
        ]
        if out is None:
            buffers = [np.empty(r.buffer, F32) for r in self._results]
        else:
            buffers = self._out_buffers(out, args)
        scratch = _take_scratch(self._scratch_bytes)
        start = data_pointer(scratch)
        base = start + -start % CACHE_LINE_BYTES
        values = [
            pool.address(),
            self._rows,
            1,
            *map(data_pointer, arrays),
            *map(data_pointer, ids),
            *scalars,
            *map(data_pointer, weights),
            *map(data_pointer, buffers),
            *[base + offset for offset in self._scratch_offsets.values()],
        ]
        for function, pack, pick in self._steps:
            function(pack(*pick(values)))
        _give_back(scratch)
        if out is not None:
            return self._deliver(buffers, out)
        if self._picks:
            buffers = [r.of(b) for r, b in zip(self._results, buffers, strict=True)]
        return tuple(buffers) if self._returns_tuple else buffers[0]

    def prepare(self, args: Sequence[Any]) -> None:
        """Repack the weights, so that the first call finds them ready."""
        for i, layout in self._weights:
            if layout != GGUF:
                args[i].repacked(layout)

    def _array(
        self, i: int, array: NDArray[Any], shape: tuple[int, ...] | None
    ) -> NDArray[np.float32]:
        flags = array.flags
        if (
            array.dtype is not F32
            or shape is not None
            or not (flags.c_contiguous and flags.aligned)
        ):
            check_array(self._names[i], array)
            if shape is not None:
                array = np.broadcast_to(array, shape)
            array = np.require(array, F32, ["C", "A"])
        return array

    def _out_buffers(self, out: object, args: Sequence[object]) -> list[NDArray[np.float32]]:
        """What kernels fill for `out`: its own arrays where their memory has the right form."""
        shapes = [result.shape for result in self._results]
        given = check_out(out, shapes, self._returns_tuple, self._names, args)
        pairs = zip(given, self._results, strict=True)
        return [a if usable(a, r) else np.empty(r.buffer, F32) for a, r in pairs]

    def _deliver(self, buffers: Sequence[NDArray[np.float32]], out: Any) -> Any:
        given = out if isinstance(out, tuple) else (out,)
        for target, buffer, result in zip(given, buffers, self._results, strict=True):
            if target is not buffer:
                target[...] = result.of(buffer)
        return out


def _one_row(slot: Slot, kernel: CpuKernel) -> Slot:
    return Slot("one") if slot.kind == "m" and kernel.uniform else slot


_thread = threading.local()
# Kept between calls, because fresh pages from the operating system cost more than a small kernel;
# what a large call needs goes with it.
_KEPT_BYTES: Final = 16 << 20


def _take_scratch(size_bytes: int) -> NDArray[np.uint8]:
    """This thread's scratch memory, or more where that is too small.

    It is taken away: a signal handler or finaliser that calls a kernel meanwhile gets its own.
    """
    memory: NDArray[np.uint8] | None = vars(_thread).pop("memory", None)
    if memory is None or memory.size < size_bytes + CACHE_LINE_BYTES:
        memory = np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8)
    return memory


def _give_back(memory: NDArray[np.uint8]) -> None:
    if memory.size <= _KEPT_BYTES:
        _thread.memory = memory
