"""The graph of a traced function (the IR): nodes with symbolic shapes.

Every value is f32 inside a kernel; comparisons are bool. A graph has no slices: the builder pushes
each down to loads and products, which have a first column and a width.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from q4jit.floats import FloatType
from q4jit.frontend.shapes import LeadingAxis, Shape, inner_length, show_shape
from q4jit.frontend.specs import Signature
from q4jit.frontend.structures import Results

ELEMENTWISE: Final = frozenset(
    "neg exp log tanh sqrt abs add sub mul div maximum minimum "
    "lt le gt ge eq ne and or not where".split()
)
BOOLEAN: Final = frozenset("lt le gt ge eq ne and or not".split())
REDUCTIONS: Final = frozenset({"sum", "max"})
"""Reductions of the last axis. A rows phase computes them."""

DECODED: Final = frozenset({"dequantize", "rows"})
"""Values of a weight itself. A kernel of their own writes them, and no operation takes them."""


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a graph.

    The operation `op` is one of ELEMENTWISE, or:
        load: array argument `arg`, from column `start`.
        scalar: float argument `arg`.
        const: the number `value`.
        matmul: the operand @ weight argument `arg` or its transpose, columns from `start`. With ids
            as a second operand, each vector is multiplied by the matrix of its expert.
        sum: the sum of the operand over its last axis.
        max: the largest element of the operand along its last axis; NaN if there is one.
        inner_sum: the sum of the operand over its inner axis.
        expand: the operand with an inner axis of 1; never an operand, as `Builder` leaves it out.
        reshape: the operand with one axis of 1 more, or one fewer, at the end.
        dequantize: weight argument `arg` as floats [K, N].
        ids: the numbers of rows or experts of argument `arg`.
        rows: GGUF rows of weight argument `arg`, one for each of the operand's ids.

    Attributes:
        id: its number. Operands have smaller ones.
        shape: its symbolic shape.
        transposed: whether a product is one with `w.T`: a sum over w's columns.
    """

    id: int
    op: str
    operands: tuple["Node", ...]
    shape: Shape
    arg: int = -1
    start: int = 0
    value: float = 0.0
    transposed: bool = False

    @property
    def width(self) -> int:
        """Elements of a row: the last axis, or 1 for scalars and reduced values."""
        last = self.shape[-1] if self.shape else 1
        return last if isinstance(last, int) else 1

    @property
    def copies(self) -> int:
        """Vectors of a row: the length of the inner axis, 1 without one."""
        return inner_length(self.shape)

    @property
    def chosen(self) -> "Node | None":
        """The ids that choose the experts of a product; None for other values."""
        return self.operands[1] if self.op == "matmul" and len(self.operands) > 1 else None

    @property
    def varies(self) -> bool:
        """Whether the value differs from row to row: a leading axis is not 1."""
        return any(isinstance(d, LeadingAxis) for d in self.shape)

    @property
    def is_bool(self) -> bool:
        """Whether the value is a truth value, not a number."""
        return self.op in BOOLEAN

    def __str__(self) -> str:
        detail = {
            "load": f" arg{self.arg}" + (f" from {self.start}" if self.start else ""),
            "scalar": f" arg{self.arg}",
            "const": f" {self.value!r}",
            "matmul": f" @ arg{self.arg}{'.T' if self.transposed else ''}"
            + (f" from {self.start}" if self.start else ""),
            "dequantize": f" arg{self.arg}",
            "ids": f" arg{self.arg}",
            "rows": f" of arg{self.arg}",
        }.get(self.op, "")
        operands = "".join(f" v{n.id}" for n in self.operands)
        return f"v{self.id}: {show_shape(self.shape)} = {self.op}{operands}{detail}"


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced function: its name, its arguments' names and specs, and its results.

    Attributes:
        names: the arguments' names.
        signature: the arguments' specs.
        outputs: the nodes that the function returns.
        result_types: the float type of each, to which it is rounded when it is stored.
        returns_tuple: whether it returns a tuple, also one of a single array.
        results: the containers of its results; None if they are an array or a tuple of arrays. With
            them, `returns_tuple` is true.
    """

    name: str
    names: tuple[str, ...]
    signature: Signature
    outputs: tuple[Node, ...]
    result_types: tuple[FloatType, ...]
    returns_tuple: bool
    results: Results | None = None

    def nodes(self) -> list[Node]:
        """Return every node that an output needs, operands first."""
        return reachable(self.outputs)

    def __str__(self) -> str:
        pairs = zip(self.names, self.signature, strict=True)
        lines = [f"graph {self.name}({', '.join(f'{name}: {spec}' for name, spec in pairs)})"]
        return "\n".join([*lines, *self.statements])

    @property
    def statements(self) -> tuple[str, ...]:
        """The nodes and results as text, which is the same for graphs that compute the same."""
        pairs = zip(self.outputs, self.result_types, strict=True)
        names = [f"v{n.id}" if kind == "f32" else f"{kind} v{n.id}" for n, kind in pairs]
        results = ", ".join(names)
        if self.results is not None:  # classes of one name may differ, as in a notebook
            classes = [f" # {id(kind):#x}" for kind in self.results.classes]
            results = "".join([self.results.show(names), *classes])
        alone = self.returns_tuple and len(self.outputs) == 1 and self.results is None
        kind = "a tuple of " if alone else ""
        return *(f"  {node}" for node in self.nodes()), f"  return {kind}{results}"


def reachable(roots: tuple[Node, ...], stop: Container[int] = ()) -> list[Node]:
    """Return the roots and every node they need, operands first.

    stop: ids of nodes that are left out, with everything that only they need.
    """
    nodes: dict[int, Node] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.id not in nodes and node.id not in stop:
            nodes[node.id] = node
            stack.extend(node.operands)
    return [nodes[i] for i in sorted(nodes)]
