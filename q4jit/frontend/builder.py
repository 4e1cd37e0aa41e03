"""The rules by which operations become nodes, with their shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.graph import DECODED, ELEMENTWISE, Node
from q4jit.frontend.refusals import refuse
from q4jit.frontend.shapes import Shape, broadcast, has_columns, show_shape
from q4jit.frontend.specs import IdsSpec, Signature, WeightSpec

# NumPy's arithmetic on two truth values
_ON_TRUTH: Final = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}

# and what NumPy refuses
_NOT_ON_TRUTH: Final = {"sub": "subtract", "neg": "negate"}

_SHOWN_LOGIC: Final = {
    "and": "& and np.logical_and",
    "or": "| and np.logical_or",
    "not": "~ and np.logical_not",
}

# values of a weight itself can only be returned: what they are, and what to write instead
_DECODED_ALONE: Final = {
    "dequantize": (
        "w.dequantize()",
        "return it as a result of the function; x @ w multiplies without a float copy of w",
    ),
    "rows": (
        "w.rows(ids)",
        "return it as a result of the function, and pass that to another function",
    ),
}


@dataclass
class Builder:
    """Makes nodes. The same operation on the same operands gives the same node.

    Attributes:
        signature: the specs of the function's arguments.
        names: their names, for errors.
        products: the products that the function asked for so far, in order.
        of_experts: by number of a value, whether it comes from a product with chosen experts.
    """

    signature: Signature
    names: Sequence[str] = ()
    products: list[Node] = field(default_factory=list)
    of_experts: dict[int, bool] = field(default_factory=dict)
    _known: dict[tuple[object, ...], Node] = field(default_factory=dict)

    def show_argument(self, arg: int) -> str:
        """Return argument number `arg` as errors show it."""
        named = len(self.names) == len(self.signature)
        return repr(self.names[arg]) if named else f"number {arg + 1}"

    def node(
        self,
        op: str,
        operands: tuple[Node, ...],
        shape: Shape,
        *,
        arg: int = -1,
        start: int = 0,
        value: float = 0.0,
        transposed: bool = False,
    ) -> Node:
        """Return the node of an operation; see `Node`. Raises TraceError for decoded operands."""
        for n in operands:
            if n.op in DECODED:
                what, cure = _DECODED_ALONE[n.op]
                refuse(f"compute with {what}", cure)
        # the bits of `value`, so that 0.0 and −0.0 stay two constants and NaN is one
        operands = tuple(n.operands[0] if n.op == "expand" else n for n in operands)
        bits = np.float32(value).tobytes()
        key = (op, tuple(n.id for n in operands), shape, arg, start, bits, transposed)
        if key not in self._known:
            number = len(self._known)
            self._known[key] = Node(number, op, operands, shape, arg, start, value, transposed)
        return self._known[key]

    def load(self, arg: int, shape: Shape, start: int = 0) -> Node:
        """Return array argument number `arg`, `shape[-1]` columns from column `start`."""
        return self.node("load", (), shape, arg=arg, start=start)

    def scalar(self, arg: int) -> Node:
        """Return float argument number `arg`."""
        return self.node("scalar", (), (), arg=arg)

    def const(self, value: float) -> Node:
        """Return a number, rounded to f32."""
        with np.errstate(over="ignore"):
            return self.node("const", (), (), value=float(np.float32(value)))

    def truth(self, value: bool) -> Node:
        """Return True or False as a truth value; `const` makes a number of it."""
        return self.apply("ne", self.const(float(value)), self.const(0.0))

    def number(self, node: Node) -> Node:
        """Return a truth value as 1.0 or 0.0, and a number unchanged."""
        if not node.is_bool:
            return node
        return self.node("where", (node, self.const(1.0), self.const(0.0)), node.shape)

    def apply(self, op: str, *operands: Node) -> Node:
        """Return an element-wise operation on operands, which broadcast.

        Raises TraceError if the shapes do not match, or if `and`, `or` and `not` get numbers.
        """
        if all(n.is_bool for n in operands):
            if op in _NOT_ON_TRUTH:
                refuse_arithmetic(_NOT_ON_TRUTH[op])
            if op == "abs":
                return operands[0]
            op = _ON_TRUTH.get(op, op)
        values = operands if op in {"and", "or", "not"} else tuple(map(self.number, operands))
        if op == "where":
            condition = operands[0]
            if not condition.is_bool:
                condition = self.apply("ne", condition, self.const(0.0))
            if all(n.is_bool for n in operands[1:]):
                return self._where_truth(condition, *operands[1:])
            values = (condition, *map(self.number, operands[1:]))
        for node in values:
            if op in {"and", "or", "not"} and not node.is_bool:
                raise TraceError(
                    expected(
                        "truth values (results of comparisons)",
                        "numbers",
                        where=f"operands of {_SHOWN_LOGIC[op]}",
                    )
                )
        shape: Shape = ()
        for node in values:
            shape = broadcast(shape, node.shape)
        return self.node(op, tuple(values), shape)

    def _where_truth(self, condition: Node, a: Node, b: Node) -> Node:
        """Return np.where of truth values, which is a truth value too."""
        otherwise = self.apply("and", self.apply("not", condition), b)
        return self.apply("or", self.apply("and", condition, a), otherwise)

    def power(self, base: Node, exponent: int) -> Node:
        """Return `base` to a small whole exponent, by repeated squaring."""
        if exponent < 0:
            return self.apply("div", self.const(1.0), self.power(base, -exponent))
        if exponent == 0:  # x⁰ is 1 in x's shape, for NaN too, as in NumPy
            return self.apply("where", self.apply("eq", base, base), *[self.const(1.0)] * 2)
        half = self.power(base, exponent // 2) if exponent > 1 else base
        if exponent == 1:
            return self.number(base)
        square = self.apply("mul", half, half)
        return self.apply("mul", square, base) if exponent % 2 else square

    def reduce(self, op: str, node: Node, keepdims: bool) -> Node:
        """Return the reduction `op` over the last axis, whose length is known while tracing."""
        assert node.shape
        assert isinstance(node.shape[-1], int)
        reduced = self.node(op, (self.number(node),), (*node.shape[:-1], 1))
        return reduced if keepdims else self.drop_last(reduced)

    def drop_last(self, node: Node) -> Node:
        """Return the same value without its last axis, which is 1."""
        return self.node("reshape", (node,), node.shape[:-1])

    def add_last(self, node: Node) -> Node:
        """Return a float or a reduction with an axis of 1 after the others.

        Raises TraceError for other values, because kernels run along their last axis.
        """
        if has_columns(node.shape):
            refuse(
                f"add an axis to {show_shape(node.shape)}",
                "use v[..., None] only after a reduction that removed the last axis",
            )
        if node.op == "reshape" and len(node.operands[0].shape) == len(node.shape) + 1:
            return node.operands[0]
        return self.node("reshape", (self.number(node),), (*node.shape, 1))

    @property
    def has_experts(self) -> bool:
        """Whether an argument is an `ExpertTensor`."""
        return any(isinstance(spec, WeightSpec) and spec.experts for spec in self.signature)

    def matmul(self, x: Node, arg: int, transposed: bool = False) -> Node:
        """Return x [..., K] @ weight argument number `arg` [K, N].

        transposed: multiply by its transpose [N, K] instead. Raises TraceError if the last
        dimension of x is not the first of the weight.
        """
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        name, inner, width = ("w.T", spec.n, spec.k) if transposed else ("w", spec.k, spec.n)
        if not x.shape or x.shape[-1] != inner:
            raise TraceError(
                expected(
                    f"x [..., {inner}] for {name} [{inner}, {width}]",
                    f"x {show_shape(x.shape)}",
                    where=f"x @ {name}",
                )
            )
        shape = (*x.shape[:-1], width)
        product = self.node("matmul", (self.number(x),), shape, arg=arg, transposed=transposed)
        self.products.append(product)
        return product

    def dequantize(self, arg: int) -> Node:
        """Return the whole of weight argument number `arg` as floats [K, N]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self.node("dequantize", (), (spec.k, spec.n), arg=arg)

    def ids(self, arg: int) -> Node:
        """Return argument number `arg`, which holds the numbers of rows or experts."""
        spec = self.signature[arg]
        assert isinstance(spec, IdsSpec)
        return self.node("ids", (), spec.shape, arg=arg)

    def rows(self, arg: int, ids: Node) -> Node:
        """Return the GGUF rows of weight argument `arg` that ids [...] name: floats [..., K]."""
        spec = self.signature[arg]
        assert isinstance(spec, WeightSpec)
        return self.node("rows", (ids,), (*ids.shape, spec.k), arg=arg)

    def slice(self, node: Node, start: int, stop: int) -> Node:
        """Return columns start..stop of the last axis, pushed down to loads and products.

        Raises TraceError for a slice of a weight's own values.
        """
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
            return self.node(
                "matmul",
                node.operands,
                shape,
                arg=node.arg,
                start=node.start + start,
                transposed=node.transposed,
            )
        if node.op in DECODED:
            what, cure = _DECODED_ALONE[node.op]
            refuse(f"slice {what}", cure)
        if node.op in ELEMENTWISE:
            return self.node(node.op, tuple(done.get(n.id, n) for n in node.operands), shape)
        raise TraceError(f"cannot slice a {node.op} of {show_shape(node.shape)}")


def refuse_arithmetic(action: str) -> NoReturn:
    """Raise TraceError for arithmetic that NumPy does not have for truth values."""
    refuse(f"{action} truth values (results of comparisons)", "use != or np.logical_not")
