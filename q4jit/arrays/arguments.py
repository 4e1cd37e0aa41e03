"""Arguments of calls: what is accepted, and what of a call depends on shapes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.device import DeviceView
from q4jit.errors import ArgumentError
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.shapes import Lead, Shape, show_shape
from q4jit.frontend.specs import (
    ArraySpec,
    IdsSpec,
    ScalarSpec,
    WeightSpec,
)
from q4jit.plan.kernels import Plan
from q4jit.weights.tensor import QuantizedTensor

F32: Final = np.dtype(np.float32)
_IDS_DTYPES: Final = (np.dtype(np.int32), np.dtype(np.int64))
_OVERLAP_WORK: Final = 10_000  # candidates tried before strided arrays count as overlapping


@dataclass(frozen=True)
class Result:
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


class CallShapes:
    """What a call's exact shapes decide, the same on every device.

    lead: the leading dimensions of the call; rows: their product. arrays: the number of each array
    argument and the shape that it must be spread to (None: used as it is); ids: the same with the
    rows that there are; scalars: the numbers of the float arguments; results: the outputs.
    """

    def __init__(
        self, graph: Graph, args: Sequence[Any], lead: tuple[int, ...] | None = None
    ) -> None:
        """Work out the shapes of a call. lead: what `lead_shape(args)` gave, where it is known.

        Raises ArgumentError where the leading dimensions do not fit together.
        """
        self.lead = lead_shape(args) if lead is None else lead
        self.rows = math.prod(self.lead)
        self.arrays = [
            (i, self._spread(spec.shape, args[i].shape[:-1], args[i].shape[-1:]))
            for i, spec in enumerate(graph.signature)
            if isinstance(spec, ArraySpec)
        ]
        self.ids = self._looked_up(graph, args)
        self.scalars = [i for i, s in enumerate(graph.signature) if isinstance(s, ScalarSpec)]
        self.results = [self._result(node) for node in graph.outputs]
        self.returns_tuple = graph.returns_tuple
        self.picks = any(r.pick is not None for r in self.results)

    def _spread(
        self, spec: Shape, lead: tuple[int, ...], rest: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """What an array [*lead, *rest] must be spread to, or None where it is used as it is."""
        padded = (1,) * (len(self.lead) - len(lead)) + lead
        varies = any(isinstance(d, Lead) for d in spec)
        return (*self.lead, *rest) if varies and padded != self.lead else None

    def _looked_up(
        self, graph: Graph, args: Sequence[Any]
    ) -> list[tuple[int, tuple[int, ...] | None, int]]:
        """Each argument of ids, the shape that it must be spread to, and the rows there are."""
        counts: dict[int, int] = {}
        for node in graph.outputs:
            if node.op == "rows":
                (ids,), weight = node.operands, graph.signature[node.arg]
                assert isinstance(weight, WeightSpec)
                n = weight.n
                counts[ids.arg] = min(n, counts.get(ids.arg, n))
        return [
            (i, self._spread(spec.shape, args[i].shape), counts[i])
            for i, spec in enumerate(graph.signature)
            if i in counts and isinstance(spec, IdsSpec)
        ]

    def _result(self, node: Node) -> Result:
        shape = tuple(self.lead[-d.axis] if isinstance(d, Lead) else d for d in node.shape)
        if not node.varies or math.prod(shape) == self.rows * node.width:
            return Result(shape, shape)
        if self.rows == 0:
            raise ArgumentError(
                f"found leading dimensions {list(self.lead)} and a result {list(shape)} that does "
                "not have them all: accepted are at least one row, or results that are empty too"
            )
        # by number, not by place: a reduction without keepdims moves axes
        axes = {d.axis for d in node.shape if isinstance(d, Lead)}
        pick = tuple(
            slice(None) if axis in axes else slice(0, 1) for axis in range(len(self.lead), 0, -1)
        )
        return Result((*self.lead, node.width), shape, pick)


def weight_layouts(plan: Plan[Any]) -> list[tuple[int, str]]:
    """The weight arguments that kernels read, each with the layout that they want."""
    slots = (slot for kernel in plan.kernels for slot in kernel.slots())
    return list(dict.fromkeys((s.index, s.layout) for s in slots if s.kind == "weight"))


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


def usable(array: NDArray[np.float32], result: Result) -> bool:
    """Whether kernels may fill an array of out= in place."""
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


def f32(value: Any) -> float:
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


def lead_shape(args: Sequence[object]) -> tuple[int, ...]:
    """The common leading dimensions of the arrays in `args`: all of those of ids.

    Raises ArgumentError where there are none.
    """
    arrays: list[Any] = [a for a in args if isinstance(a, np.ndarray | DeviceView) and a.shape]
    try:
        return np.broadcast_shapes(*(a.shape if holds_ids(a) else a.shape[:-1] for a in arrays))
    except ValueError:
        shown = ", ".join(show_shape(a.shape) for a in arrays)
        raise ArgumentError(
            f"the leading dimensions of the array arguments do not fit together: found {shown}; "
            "accepted are equal leading dimensions, or 1 to broadcast"
        ) from None


def holds_ids(array: NDArray[Any] | DeviceView) -> bool:
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


def checked_ids(
    name: str, array: NDArray[Any], shape: tuple[int, ...] | None, count: int
) -> NDArray[np.int64]:
    """A copy of row numbers, spread to `shape`; ArgumentError unless all are below `count`."""
    # a copy: nobody can change it between the check and the kernel, which reads where it says
    ids = np.array(array, np.int64, order="C")
    if ids.size and ids.view(np.uint64).max() >= count:  # below 0 is above every count
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ArgumentError(f"rows: found id {wrong} in {name!r}, accepted are 0 to {count - 1}")
    return ids if shape is None else np.ascontiguousarray(np.broadcast_to(ids, shape))


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


__all__ = [
    "F32",
    "CallShapes",
    "Result",
    "check_array",
    "check_ids",
    "check_out",
    "checked_ids",
    "f32",
    "holds_ids",
    "lead_shape",
    "usable",
    "weight_layouts",
]
