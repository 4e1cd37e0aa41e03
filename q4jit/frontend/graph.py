"""The graph of a traced function (the IR): nodes with symbolic shapes.

Everything is f32 (comparisons are bool). Slices are pushed down to the loads and products they end
at, so a graph holds none.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from q4jit.frontend.shapes import Lead, Shape, show_shape
from q4jit.frontend.specs import Signature

ELEMENTWISE: Final = frozenset(
    "neg exp log tanh sqrt abs add sub mul div maximum minimum "
    "lt le gt ge eq ne and or not where".split()
)
BOOLEAN: Final = frozenset("lt le gt ge eq ne and or not".split())
DECODED: Final = frozenset({"dequantize", "rows"})
"""Values of a weight itself: a kernel of their own writes them, and nothing computes with them."""


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a graph. `id` counts up in an order in which operands come first.

    op is one of `load` (array argument `arg`, from column `start`), `scalar` (argument `arg`),
    `const` (`value`), `matmul` (operand @ weight argument `arg`, columns from `start`), `sum`
    (over the last axis), `reshape` (the same numbers with one axis of 1 at the end more or fewer),
    `dequantize` (weight argument `arg`, as rows of K), `ids` (argument `arg`), `rows` (GGUF rows of
    weight argument `arg`, one for each of the operand's ids), or one of ELEMENTWISE.
    """

    id: int
    op: str
    operands: tuple["Node", ...]
    shape: Shape
    arg: int = -1
    start: int = 0
    value: float = 0.0

    @property
    def width(self) -> int:
        """Elements of a row: the last axis, or 1 for scalars and values whose axis was reduced."""
        last = self.shape[-1] if self.shape else 1
        return last if isinstance(last, int) else 1

    @property
    def varies(self) -> bool:
        """Whether the value differs from row to row (has a leading axis that is not 1)."""
        return any(isinstance(d, Lead) for d in self.shape)

    @property
    def is_bool(self) -> bool:
        """Whether the value is a truth value, not a number."""
        return self.op in BOOLEAN

    def __str__(self) -> str:
        detail = {
            "load": f" arg{self.arg}" + (f" from {self.start}" if self.start else ""),
            "scalar": f" arg{self.arg}",
            "const": f" {self.value!r}",
            "matmul": f" @ arg{self.arg}" + (f" from {self.start}" if self.start else ""),
            "dequantize": f" arg{self.arg}",
            "ids": f" arg{self.arg}",
            "rows": f" of arg{self.arg}",
        }.get(self.op, "")
        operands = "".join(f" v{n.id}" for n in self.operands)
        return f"v{self.id}: {show_shape(self.shape)} = {self.op}{operands}{detail}"


@dataclass(frozen=True)
class Graph:
    """A traced function: its name, its arguments' names and specs, and what it returns."""

    name: str
    names: tuple[str, ...]
    signature: Signature
    outputs: tuple[Node, ...]
    returns_tuple: bool

    def nodes(self) -> list[Node]:
        """Every node that an output needs, operands first."""
        return reachable(self.outputs)

    def __str__(self) -> str:
        pairs = zip(self.names, self.signature, strict=True)
        lines = [f"graph {self.name}({', '.join(f'{name}: {spec}' for name, spec in pairs)})"]
        lines += [f"  {node}" for node in self.nodes()]
        lines.append(f"  return {', '.join(f'v{n.id}' for n in self.outputs)}")
        return "\n".join(lines)


def reachable(roots: tuple[Node, ...], stop: Container[int] = ()) -> list[Node]:
    """The roots and all that they need, operands first; values in `stop` are not entered."""
    found: dict[int, Node] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.id not in found and node.id not in stop:
            found[node.id] = node
            stack.extend(node.operands)
    return [found[i] for i in sorted(found)]
