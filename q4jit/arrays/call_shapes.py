"""Everything that the exact shapes of a call determine, on every device."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.dtypes import MOST_LEADING
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_BYTES, FloatType, numpy_dtype
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.shapes import LeadingAxis, Shape, leading_axes, show_shape
from q4jit.frontend.specs import ArraySpec, IdsSpec, ScalarSpec, Signature, WeightSpec


@dataclass(frozen=True)
class Result:
    """A result of a call.

    Attributes:
        buffer: the shape of the array that kernels write.
        shape: the shape of the result. It differs from `buffer` if the result has fewer rows than
            the call.
        float_type: the type of its elements.
        pick: the part of the buffer that is the result then.
    """

    buffer: tuple[int, ...]
    shape: tuple[int, ...]
    float_type: FloatType = "f32"
    pick: tuple[slice, ...] | None = None

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer in bytes."""
        return math.prod(self.buffer) * FLOAT_BYTES[self.float_type]

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of the result. Raises ImportError for bfloat16 without ml_dtypes."""
        return numpy_dtype(self.float_type)

    def of(self, buffer: NDArray[Any]) -> NDArray[Any]:
        """Return the result from a buffer that kernels have written."""
        if self.pick is None:
            return buffer
        return np.ascontiguousarray(buffer[self.pick]).reshape(self.shape)


class CallShapes:
    """Everything that the exact shapes of a call determine, on every device.

    Attributes:
        lead: the leading dimensions of the call.
        rows: their product, M.
        arrays: of each array argument, its index and the shape that it is broadcast to (None: it
            is used as it is).
        ids: the same for each argument of ids, with the number of rows or experts to choose from.
        narrow_ids: the indices of those whose kernels get 32 bits for each id.
        scalars: the indices of the float arguments.
        results: the results, in order.
        returns_tuple: whether the function returns a tuple.
        picks: whether a result has fewer rows than the call.
    """

    def __init__(
        self, graph: Graph, args: Sequence[Any], lead: tuple[int, ...] | None = None
    ) -> None:
        """Compute the shapes of a call. lead: `lead_shape` of it, if the caller has that.

        Raises ArgumentError if the leading dimensions do not broadcast.
        """
        self.lead = lead_shape(args, graph.signature) if lead is None else lead
        self.rows = math.prod(self.lead)
        self.arrays = [
            (i, self._broadcast(spec.shape, args[i].shape))
            for i, spec in enumerate(graph.signature)
            if isinstance(spec, ArraySpec)
        ]
        self.ids = self._looked_up(graph, args)
        narrow = (
            i for i, s in enumerate(graph.signature) if isinstance(s, IdsSpec) and s.is_narrow
        )
        self.narrow_ids = frozenset(narrow)
        self.scalars = [i for i, s in enumerate(graph.signature) if isinstance(s, ScalarSpec)]
        pairs = zip(graph.outputs, graph.result_types, strict=True)
        self.results = [self._result(node, float_type) for node, float_type in pairs]
        self.returns_tuple = graph.returns_tuple
        self.picks = any(r.pick is not None for r in self.results)

    def _broadcast(self, spec: Shape, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that an array of `shape` is broadcast to; None: used as it is."""
        lead, rest = shape[: leading_axes(spec)], shape[leading_axes(spec) :]
        padded = (1,) * (len(self.lead) - len(lead)) + lead
        varies = any(isinstance(d, LeadingAxis) for d in spec)
        return (*self.lead, *rest) if varies and padded != self.lead else None

    def _looked_up(
        self, graph: Graph, args: Sequence[Any]
    ) -> list[tuple[int, tuple[int, ...] | None, int]]:
        """Return each argument of ids: its index, its shape as in `arrays`, and what it counts.

        That is the number of rows or experts of w.
        """
        counts: dict[int, int] = {}
        for node in graph.nodes():
            ids = node.operands[0] if node.op == "rows" else node.chosen
            if ids is not None:
                weight = graph.signature[node.arg]
                assert isinstance(weight, WeightSpec)
                count = weight.experts or weight.n
                counts[ids.arg] = min(count, counts.get(ids.arg, count))
        return [
            (i, self._broadcast(spec.shape, args[i].shape), counts[i])
            for i, spec in enumerate(graph.signature)
            if i in counts and isinstance(spec, IdsSpec)
        ]

    def _result(self, node: Node, float_type: FloatType) -> Result:
        shape = tuple(self.lead[-d.axis] if isinstance(d, LeadingAxis) else d for d in node.shape)
        if not node.varies or math.prod(shape) == self.rows * node.copies * node.width:
            return Result(shape, shape, float_type)
        if self.rows == 0:
            what = f"at least one row, or results with all leading dimensions {list(self.lead)}"
            raise ArgumentError(expected(what, f"a result {list(shape)}"))
        # by axis number, not by position: a reduction without keepdims moves axes
        axes = {d.axis for d in node.shape if isinstance(d, LeadingAxis)}
        pick = tuple(
            slice(None) if axis in axes else slice(0, 1) for axis in range(len(self.lead), 0, -1)
        )
        inner = (node.copies,) if node.copies > 1 else ()
        return Result((*self.lead, *inner, node.width), shape, float_type, pick)


def lead_shape(args: Sequence[Any], signature: Signature) -> tuple[int, ...]:
    """Return the common leading dimensions of the arrays in `args`, which have these specs.

    Raises ArgumentError if they do not broadcast.
    """
    pairs = zip(args, signature, strict=False)  # containers have no spec in a graph
    used = [(a, s.shape) for a, s in pairs if isinstance(s, ArraySpec | IdsSpec)]
    arrays = [array for array, _ in used]
    leads = [array.shape[: leading_axes(spec)] for array, spec in used]
    most = max(map(len, leads), default=0)
    if most > MOST_LEADING:
        what = f"at most {MOST_LEADING} leading dimensions"
        raise ArgumentError(expected(what, f"{most}", where="array arguments"))
    try:
        return np.broadcast_shapes(*leads)
    except ValueError:
        shapes = ", ".join(show_shape(a.shape) for a in arrays)
        what = "leading dimensions that are equal, or 1 to broadcast"
        raise ArgumentError(expected(what, shapes, where="array arguments")) from None
