"""The rules by which operations become nodes, and shapes meet."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from q4jit.errors import TraceError
from q4jit.frontend.graph import DECODED, ELEMENTWISE, Node
from q4jit.frontend.shapes import Shape, broadcast, show_shape
from q4jit.frontend.specs import IdsSpec, Signature, WeightSpec

# what NumPy's arithmetic means where both operands are truth values
_ON_TRUTH: Final = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}

_ON_DECODED: Final = {
    "dequantize": "w.dequantize(): accepted is w.dequantize() as a result of the function; in a "
    "product write x @ w, which never makes a float copy of w",
    "rows": "w.rows(ids): accepted is w.rows(ids) as a result of the function; pass that result to "
    "another function",
}


@dataclass
class Builder:
    """Makes nodes; the same operation on the same operands is one node."""

    signature: Signature
    _known: dict[tuple[object, ...], Node] = field(default_factory=dict)

    def _node(
        self,
        op: str,
        operands: tuple[Node, ...],
        shape: Shape,
        *,
        arg: int = -1,
        start: int = 0,
        value: float = 0.0,
    ) -> Node:
        for n in operands:
            if n.op in DECODED:
                raise TraceError(f"found arithmetic on {_ON_DECODED[n.op]}")
        # the bits of `value`, so that 0.0 and −0.0 stay two constants and NaN is one
        key = (op, tuple(n.id for n in operands), shape, arg, start, np.float32(value).tobytes())
        if key not in self._known:
            self._known[key] = Node(len(self._known), op, operands, shape, arg, start, value)
        return self._known[key]

    def load(self, arg: int, shape: Shape, start: int = 0) -> Node:
        """Array argument number `arg`, `shape[-1]` columns from column `start`."""
        return self._node("load", (), shape, arg=arg, start=start)

    def scalar(self, arg: int) -> Node:
        """Float argument number `arg`."""
        return self._node("scalar", (), (), arg=arg)

    def const(self, value: float) -> Node:
        """A number, rounded to f32."""
        with np.errstate(over="ignore"):
            return self._node("const", (), (), value=float(np.float32(value)))

    def number(self, node: Node) -> Node:
        """A truth value as 1.0 or 0.0; numbers as they are."""
        if not node.is_bool:
            return node
        return self._node("where", (node, self.const(1.0), self.const(0.0)), node.shape)

    def apply(self, op: str, *operands: Node) -> Node:
        """An element-wise operation on broadcast operands; TraceError where they cannot be."""
        if all(n.is_bool for n in operands):
            op = _ON_TRUTH.get(op, op)
        values = operands if op in {"and", "or", "not"} else tuple(map(self.number, operands))
        if op == "where":
            values = (operands[0], *map(self.number, operands[1:]))
            if not values[0].is_bool:
                values = (self.apply("ne", values[0], self.const(0.0)), *values[1:])
        for node in values:
            if op in {"and", "or", "not"} and not node.is_bool:
                raise TraceError(f"{op!r} takes truth values (comparisons), found numbers")
        shape: Shape = ()
        for node in values:
            shape = broadcast(shape, node.shape)
        return self._node(op, tuple(values), shape)

    def power(self, base: Node, exponent: int) -> Node:
        """`base` to a small whole exponent, by repeated squaring."""
        if exponent < 0:
            return self.apply("div", self.const(1.0), self.power(base, -exponent))
        if exponent == 0:  # x⁰ is 1 in x's shape, for NaN too, as in NumPy
            return self.apply("where", self.apply("eq", base, base), *[self.const(1.0)] * 2)
        half = self.power(base, exponent // 2) if exponent > 1 else base
        if exponent == 1:
            return self.number(base)
        square = self.apply("mul", half, half)
        return self.apply("mul", square, base) if exponent % 2 else square

    def sum(self, node: Node, keepdims: bool) -> Node:
        """The sum over the last axis."""
        if not node.shape or not isinstance(node.shape[-1], int):
            raise TraceError(
                f"found a reduction of {show_shape(node.shape)}: only the last axis of a value can "
                "be reduced, and only once"
            )
        total = self._node("sum", (self.number(node),), (*node.shape[:-1], 1))
        return total if keepdims else self.drop_last(total)

    def drop_last(self, node: Node) -> Node:
        """The same value without its last axis, which is 1."""
        return self._node("reshape", (node,), node.shape[:-1])

    def add_last(self, node: Node) -> Node:
        """The same value with an axis of 1 behind the others.

        Only after a reduction, or of a float: kernels run along the last axis of all other values.
        """
        if node.shape and isinstance(node.shape[-1], int):
            raise TraceError(
                f"found a new axis behind {show_shape(node.shape)}: accepted is v[..., None] "
                "where a reduction took the last axis away"
            )
        if node.op == "reshape" and len(node.operands[0].shape) == len(node.shape) + 1:
            return node.operands[0]
        return self._node("reshape", (self.number(node),), (*node.shape, 1))

    def matmul(self, x: Node, arg: int) -> Node:
        """x [..., K] @ weight argument number `arg` [K, N]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        if not x.shape or x.shape[-1] != spec.k:
            raise TraceError(
                f"shapes {show_shape(x.shape)} @ [{spec.k}, {spec.n}] do not match: accepted is an "
                f"x whose last dimension is K = {spec.k}"
            )
        return self._node("matmul", (self.number(x),), (*x.shape[:-1], spec.n), arg=arg)

    def dequantize(self, arg: int) -> Node:
        """The whole of weight argument number `arg` as floats [K, N]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self._node("dequantize", (), (spec.k, spec.n), arg=arg)

    def ids(self, arg: int) -> Node:
        """Argument number `arg`, row numbers."""
        spec = self.signature[arg]
        assert isinstance(spec, IdsSpec)
        return self._node("ids", (), spec.shape, arg=arg)

    def rows(self, arg: int, ids: Node) -> Node:
        """The GGUF rows of weight argument number `arg` that ids [...] name: floats [..., K]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self._node("rows", (ids,), (*ids.shape, spec.k), arg=arg)

    def slice(self, node: Node, start: int, stop: int) -> Node:
        """Columns start..stop of the last axis, pushed down to loads and products."""
        done: dict[int, Node] = {}  # a value used many times is sliced once
        pending = [node]
        while pending:
            n = pending[-1]
            missing = [o for o in self._sliced_operands(n, start, stop) if o.id not in done]
            if missing:
                pending += missing
            else:
                done[n.id] = self._slice(n, start, stop, done)
                pending.pop()
        return done[node.id]

    def _sliced_operands(self, node: Node, start: int, stop: int) -> tuple[Node, ...]:
        if node.op not in ELEMENTWISE or (start, stop) == (0, node.shape[-1]):
            return ()
        return tuple(n for n in node.operands if n.shape and n.shape[-1] != 1)

    def _slice(self, node: Node, start: int, stop: int, done: dict[int, Node]) -> Node:
        if (start, stop) == (0, node.shape[-1]):
            return node
        shape = (*node.shape[:-1], stop - start)
        if node.op == "load":
            return self.load(node.arg, shape, node.start + start)
        if node.op == "matmul":
            return self._node(
                "matmul", node.operands, shape, arg=node.arg, start=node.start + start
            )
        if node.op in DECODED:
            raise TraceError(f"found a slice of {_ON_DECODED[node.op]}")
        if node.op in ELEMENTWISE:
            return self._node(node.op, tuple(done.get(n.id, n) for n in node.operands), shape)
        raise TraceError(f"a slice of a {node.op} of {show_shape(node.shape)} is not supported")
