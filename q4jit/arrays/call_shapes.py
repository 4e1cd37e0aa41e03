"""Everything that the exact shapes of a call determine, on every device."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.arguments import holds_ids
from q4jit.arrays.dtypes import MOST_LEADING
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_BYTES, FloatType, numpy_dtype
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.shapes import LeadingAxis, Shape, show_shape
from q4jit.frontend.specs import ArraySpec, IdsSpec, ScalarSpec, WeightSpec


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
        ids: the same for each argument of row ids, with the number of rows to choose from.
        scalars: the indices of the float arguments.
        results: the results, in order.
        returns_tuple: whether the function returns a tuple.
        picks: whether a result has fewer rows than the call.
    """

    def __init__(
        self, graph: Graph, args: Sequence[Any], lead: tuple[int, ...] | None = None
    ) -> None:
        """Compute the shapes of a call. lead: `lead_shape(args)`, if the caller has it.

        Raises ArgumentError if the leading dimensions do not broadcast.
        """
        self.lead = lead_shape(args) if lead is None else lead
        self.rows = math.prod(self.lead)
        self.arrays = [
            (i, self._broadcast(spec.shape, args[i].shape[:-1], args[i].shape[-1:]))
            for i, spec in enumerate(graph.signature)
            if isinstance(spec, ArraySpec)
        ]
        self.ids = self._looked_up(graph, args)
        self.scalars = [i for i, s in enumerate(graph.signature) if isinstance(s, ScalarSpec)]
        pairs = zip(graph.outputs, graph.result_types, strict=True)
        self.results = [self._result(node, float_type) for node, float_type in pairs]
        self.returns_tuple = graph.returns_tuple
        self.picks = any(r.pick is not None for r in self.results)

    def _broadcast(
        self, spec: Shape, lead: tuple[int, ...], rest: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """Return the shape that an array [*lead, *rest] is broadcast to; None: used as it is."""
        padded = (1,) * (len(self.lead) - len(lead)) + lead
        varies = any(isinstance(d, LeadingAxis) for d in spec)
        return (*self.lead, *rest) if varies and padded != self.lead else None

    def _looked_up(
        self, graph: Graph, args: Sequence[Any]
    ) -> list[tuple[int, tuple[int, ...] | None, int]]:
        """Return each argument of ids: its index, its shape as in `arrays`, and the rows of w."""
        counts: dict[int, int] = {}
        for node in graph.outputs:
            if node.op == "rows":
                (ids,), weight = node.operands, graph.signature[node.arg]
                assert isinstance(weight, WeightSpec)
                n = weight.n
                counts[ids.arg] = min(n, counts.get(ids.arg, n))
        return [
            (i, self._broadcast(spec.shape, args[i].shape), counts[i])
            for i, spec in enumerate(graph.signature)
            if i in counts and isinstance(spec, IdsSpec)
        ]

    def _result(self, node: Node, float_type: FloatType) -> Result:
        shape = tuple(self.lead[-d.axis] if isinstance(d, LeadingAxis) else d for d in node.shape)
        if not node.varies or math.prod(shape) == self.rows * node.width:
            return Result(shape, shape, float_type)
        if self.rows == 0:
            what = f"at least one row, or results with all leading dimensions {list(self.lead)}"
            raise ArgumentError(expected(what, f"a result {list(shape)}"))
        # by axis number, not by position: a reduction without keepdims moves axes
        axes = {d.axis for d in node.shape if isinstance(d, LeadingAxis)}
        pick = tuple(
            slice(None) if axis in axes else slice(0, 1) for axis in range(len(self.lead), 0, -1)
        )
        return Result((*self.lead, node.width), shape, float_type, pick)


def lead_shape(args: Sequence[object]) -> tuple[int, ...]:
    """Return the common leading dimensions of the arrays in `args`; ids have no others.

    Raises ArgumentError if they do not broadcast.
    """
    arrays: list[Any] = [a for a in args if isinstance(a, np.ndarray | DeviceView) and a.shape]
    leads = [a.shape if holds_ids(a) else a.shape[:-1] for a in arrays]
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
