"""What a call's exact shapes decide, the same on every device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.arguments import holds_ids
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.shapes import LeadingAxis, Shape, show_shape
from q4jit.frontend.specs import ArraySpec, IdsSpec, ScalarSpec, WeightSpec


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
        varies = any(isinstance(d, LeadingAxis) for d in spec)
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
        shape = tuple(self.lead[-d.axis] if isinstance(d, LeadingAxis) else d for d in node.shape)
        if not node.varies or math.prod(shape) == self.rows * node.width:
            return Result(shape, shape)
        if self.rows == 0:
            raise ArgumentError(
                f"found leading dimensions {list(self.lead)} and a result {list(shape)} that does "
                "not have them all: accepted are at least one row, or results that are empty too"
            )
        # by number, not by place: a reduction without keepdims moves axes
        axes = {d.axis for d in node.shape if isinstance(d, LeadingAxis)}
        pick = tuple(
            slice(None) if axis in axes else slice(0, 1) for axis in range(len(self.lead), 0, -1)
        )
        return Result((*self.lead, node.width), shape, pick)


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
