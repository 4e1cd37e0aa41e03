"""Launching compiled kernels on NumPy arrays: one object per set of exact shapes.

All that depends on shapes alone is worked out once; a call checks its arrays, allocates the
results, packs one row of 8-byte slots per kernel and calls it.
"""

import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import ArgumentError
from q4jit.ir import ArraySpec, IdsSpec, Lead, Node, ScalarSpec, Shape, show_shape
from q4jit.layouts import CACHE_LINE_BYTES, GGUF
from q4jit.plan import Slot
from q4jit.runtime import pool
from q4jit.runtime.cpu import data_pointer
from q4jit.schedule_cpu import CpuKernel, CpuPlan, padded_k
from q4jit.weights import QuantizedTensor

F32: Final = np.dtype(np.float32)
_IDS_DTYPES: Final = (np.dtype(np.int32), np.dtype(np.int64))
_OVERLAP_WORK: Final = 10_000  # candidates tried before strided arrays count as overlapping

KernelFunction = Callable[[bytes], None]
_Step = tuple[KernelFunction, Callable[..., bytes], Callable[[list[Any]], tuple[Any, ...]]]


@dataclass(frozen=True)
class _Result:
    """An output: the shape of the buffer that kernels fill, and of what the caller gets.

    They differ where the output has fewer rows than the call (`pick` chooses its rows).
    """

    buffer: tuple[int, ...]
    shape: tuple[int, ...]
    pick: tuple[slice, ...] | None = None

    def of(self, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
        """The result in a filled buffer."""
        if self.pick is None:
            return buffer
        return np.ascontiguousarray(buffer[self.pick]).reshape(self.shape)


class Launch:
    """Kernels bound to exact shapes; call it with the arguments."""

    def __init__(
        self,
        plan: CpuPlan,
        functions: Sequence[KernelFunction],
        args: Sequence[object],
        names: Sequence[str],
    ) -> None:
        """Bind `functions` (one per kernel of `plan`) to the shapes of `args`."""
        signature = plan.graph.signature
        self._names = names
        self._returns_tuple = plan.graph.returns_tuple
        self._lead = lead_shape(args)
        self._rows = math.prod(self._lead)
        self._arrays = [
            (i, self._broadcast_shape(spec.shape, array.shape[:-1], array.shape[-1:]))
            for i, (spec, array) in enumerate(zip(signature, args, strict=True))
            if isinstance(spec, ArraySpec) and isinstance(array, np.ndarray)
        ]
        self._ids = self._looked_up(plan, args)
        self._scalars = [i for i, spec in enumerate(signature) if isinstance(spec, ScalarSpec)]
        layouts = {
            (slot.index, slot.layout): None
            for kernel in plan.kernels
            for slot in kernel.slots()
            if slot.kind == "weight"
        }
        self._weights = list(layouts)
        self._results = [self._result(node) for node in plan.graph.outputs]
        self._picks = any(r.pick is not None for r in self._results)
        self._set_scratch(plan)
        self._steps = self._bind(plan, functions)

    # --- what depends on shapes alone -----------------------------------------------------------

    def _broadcast_shape(
        self, spec: Shape, lead: tuple[int, ...], rest: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """What an array [*lead, *rest] must be spread to, or None where it is used as it is."""
        padded = (1,) * (len(self._lead) - len(lead)) + lead
        varies = any(isinstance(d, Lead) for d in spec)
        return (*self._lead, *rest) if varies and padded != self._lead else None

    def _looked_up(
        self, plan: CpuPlan, args: Sequence[object]
    ) -> list[tuple[int, tuple[int, ...] | None, int]]:
        """Each argument of ids, the shape that it must be spread to, and the rows there are."""
        counts: dict[int, int] = {}
        for node in plan.graph.outputs:
            if node.op == "rows":
                (ids,), n = node.operands, plan.weight(node.arg).n
                counts[ids.arg] = min(n, counts.get(ids.arg, n))
        return [
            (i, self._broadcast_shape(spec.shape, array.shape), counts[i])
            for i, (spec, array) in enumerate(zip(plan.graph.signature, args, strict=True))
            if i in counts and isinstance(spec, IdsSpec) and isinstance(array, np.ndarray)
        ]

    def _result(self, node: Node) -> _Result:
        shape = tuple(self._lead[-d.axis] if isinstance(d, Lead) else d for d in node.shape)
        if not node.varies or math.prod(shape) == self._rows * node.width:
            return _Result(shape, shape)
        if self._rows == 0:
            raise ArgumentError(
                f"found leading dimensions {list(self._lead)} and a result {list(shape)} that does "
                "not have them all: accepted are at least one row, or results that are empty too"
            )
        # by number, not by place: a reduction without keepdims moves axes
        axes = {d.axis for d in node.shape if isinstance(d, Lead)}
        pick = tuple(
            slice(None) if axis in axes else slice(0, 1) for axis in range(len(self._lead), 0, -1)
        )
        return _Result((*self._lead, node.width), shape, pick)

    def _set_scratch(self, plan: CpuPlan) -> None:
        """Lay out temporaries and prologue results behind each other, each on a cache line."""
        sizes = {
            Slot("temp", i): 4 * width * max(1, self._rows) for i, width in enumerate(plan.temps)
        }
        for kernel in plan.kernels:
            rows = 1 if kernel.uniform else self._rows
            for slot, count in ((Slot("x"), padded_k(plan, kernel)), (Slot("exponent"), 1)):
                sizes[slot] = max(sizes.get(slot, 0), 4 * rows * count)
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
        ids = [self._row_ids(i, args[i], shape, count) for i, shape, count in self._ids]
        scalars = [_f32(args[i]) for i in self._scalars]
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

    def _row_ids(
        self, i: int, array: NDArray[Any], shape: tuple[int, ...] | None, count: int
    ) -> NDArray[np.int64]:
        # a copy: nobody can change it between the check and the kernel, which reads where it says
        ids = np.array(array, np.int64, order="C")
        if ids.size and ids.view(np.uint64).max() >= count:  # below 0 is above every count
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ArgumentError(
                f"rows: found id {wrong} in {self._names[i]!r}, accepted are 0 to {count - 1}"
            )
        return ids if shape is None else np.ascontiguousarray(np.broadcast_to(ids, shape))

    def _out_buffers(self, out: object, args: Sequence[object]) -> list[NDArray[np.float32]]:
        """What kernels fill for `out`: its own arrays where their memory has the right form."""
        shapes = [result.shape for result in self._results]
        given = check_out(out, shapes, self._returns_tuple, self._names, args)
        pairs = zip(given, self._results, strict=True)
        return [a if _usable(a, r) else np.empty(r.buffer, F32) for a, r in pairs]

    def _deliver(self, buffers: Sequence[NDArray[np.float32]], out: Any) -> Any:
        given = out if isinstance(out, tuple) else (out,)
        for target, buffer, result in zip(given, buffers, self._results, strict=True):
            if target is not buffer:
                target[...] = result.of(buffer)
        return out


def _one_row(slot: Slot, kernel: CpuKernel) -> Slot:
    return Slot("one") if slot.kind == "m" and kernel.uniform else slot


def check_out(
    out: object,
    shapes: Sequence[tuple[int, ...]],
    returns_tuple: bool,
    names: Sequence[str],
    args: Sequence[object],
) -> tuple[NDArray[np.float32], ...]:
    """The arrays of `out=` for results of these shapes; raises ArgumentError where they do not fit.

    names, args: the call's arguments, none of which may share memory with out.
    """
    given = out if isinstance(out, tuple) else (out,)
    if isinstance(out, tuple) != returns_tuple or len(given) != len(shapes):
        expected = f"a tuple of {len(shapes)} arrays" if returns_tuple else "one array"
        raise ArgumentError(f"out= is {type(out).__name__}: accepted is {expected}")
    for array, shape in zip(given, shapes, strict=True):
        if (
            not isinstance(array, np.ndarray)
            or array.dtype != F32
            or array.shape != shape
            or not array.flags.writeable
            or (
                array.size
                and any(n > 1 and not s for n, s in zip(shape, array.strides, strict=True))
            )
        ):
            found = (
                f"{'' if array.flags.writeable else 'read-only '}{array.dtype} {list(array.shape)}"
                if isinstance(array, np.ndarray)
                else type(array).__name__
            )
            raise ArgumentError(f"out= is {found}: accepted is a writable float32 {list(shape)}")
    _refuse_overlap(given, names, args)
    return given


def _usable(array: NDArray[np.float32], result: _Result) -> bool:
    flags = array.flags
    return bool(result.pick is None and flags.c_contiguous and flags.aligned)


def _refuse_overlap(
    given: Sequence[NDArray[np.float32]], names: Sequence[str], args: Sequence[object]
) -> None:
    for i, array in enumerate(given):
        for name, value in zip(names, args, strict=True):
            memory = value.raw if isinstance(value, QuantizedTensor) else value
            if isinstance(memory, np.ndarray) and _overlap(array, memory):
                raise ArgumentError(
                    f"out= overlaps the argument {name!r}, which is read while out is written: "
                    "accepted is an array of its own memory"
                )
        if any(_overlap(array, other) for other in given[:i]):
            raise ArgumentError("two arrays of out= overlap: accepted are arrays of their own")


_F32_MAX: Final = float(np.finfo(np.float32).max)


def _f32(value: Any) -> float:
    """A number as a kernel takes it: beyond f32's range it is infinite."""
    number = float(value)
    if -_F32_MAX <= number <= _F32_MAX:
        return number
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element; columns of one matrix beside each other do not."""
    if not np.may_share_memory(a, b):
        return False
    try:
        # NumPy's stubs know only 0 and -1, the two special values
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


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


def lead_shape(args: Sequence[object]) -> tuple[int, ...]:
    """The common leading dimensions of the arrays in `args`: all of those of ids.

    Raises ArgumentError where there are none.
    """
    arrays = [a for a in args if isinstance(a, np.ndarray) and a.ndim]
    try:
        return np.broadcast_shapes(*(a.shape if holds_ids(a) else a.shape[:-1] for a in arrays))
    except ValueError:
        shown = ", ".join(show_shape(a.shape) for a in arrays)
        raise ArgumentError(
            f"the leading dimensions of the array arguments do not fit together: found {shown}; "
            "accepted are equal leading dimensions, or 1 to broadcast"
        ) from None


def holds_ids(array: NDArray[Any]) -> bool:
    """Whether an array argument is one of row numbers, not of activations."""
    return array.dtype.kind in "iu"


def check_ids(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument is int32 or int64 in native byte order."""
    if array.dtype not in _IDS_DTYPES:
        raise ArgumentError(
            f"argument {name!r} is {_show(array)}: accepted are int32 and int64 for the ids of "
            f"w.rows(ids), {name}.astype(np.int64), and float32 for numbers, "
            f"{name}.astype(np.float32)"
        )
    _check_kind(name, array)


def check_array(name: str, array: NDArray[Any]) -> None:
    """Raise ArgumentError unless an array argument is f32 in native byte order, and not empty."""
    if array.dtype != F32:
        raise ArgumentError(
            f"argument {name!r} is {_show(array)}: accepted is float32; convert it with "
            f"{name}.astype(np.float32)"
        )
    _check_kind(name, array)
    if array.ndim and array.shape[-1] == 0:
        raise ArgumentError(
            f"argument {name!r} has the shape {list(array.shape)}: accepted is a last dimension of "
            "at least 1"
        )


def _show(array: NDArray[Any]) -> str:
    order = "" if array.dtype.isnative else " in foreign byte order"
    return f"{array.dtype.newbyteorder('=')}{order} {list(array.shape)}"


def _check_kind(name: str, array: NDArray[Any]) -> None:
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray | np.matrix):
        raise ArgumentError(
            f"argument {name!r} is a {type(array).__name__}: accepted is a plain array, "
            f"np.asarray({name})"
        )


__all__ = ["Launch", "check_array", "check_ids", "check_out", "holds_ids", "lead_shape"]
