"""The operations of a program: the nodes of a graph without their shapes.

Shapes follow from those of a call's arguments, so an operation has only what they do not tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node, reachable
from q4jit.frontend.shapes import has_columns, show_shape
from q4jit.frontend.specs import Signature
from q4jit.frontend.vectors import expand, fixed_axes, inner_sum, vecmat, with_axis

_UNARY: Final = frozenset({"neg", "exp", "log", "tanh", "sqrt", "abs", "not"})
_NO_OPERAND: Final = frozenset({"load", "scalar", "const", "ids", "dequantize"})
_ONE_OPERAND: Final = _UNARY | {"sum", "max", "inner_sum", "reshape", "rows"}


@dataclass(frozen=True)
class Operation:
    """One operation of a program, as `Node` describes it.

    Attributes:
        of: the numbers of the operations whose values are its operands; all are smaller.
        width: the columns of a load or a product.
        adds_axis: whether a load or a reshape has an axis of 1 more at its end.
    """

    op: str
    of: tuple[int, ...] = ()
    arg: int = -1
    start: int = 0
    width: int = 0
    value: float = 0.0
    transposed: bool = False
    adds_axis: bool = False


Leaf = Node | int
"""An argument in a graph: the node of an array, ids or a number; the number of a weight."""


def operand_counts(op: str) -> tuple[int, ...]:
    """Return how many operands an operation may have."""
    if op == "matmul":
        return 1, 2
    if op == "where":
        return (3,)
    return (0,) if op in _NO_OPERAND else (1,) if op in _ONE_OPERAND else (2,)


def operations_of(
    outputs: tuple[Node, ...], signature: Signature, numbers: Mapping[int, int]
) -> tuple[list[Operation], list[int]]:
    """Return the operations that compute `outputs`, and the numbers of those that do.

    signature: of the graph's arguments. numbers: the new numbers of those that are kept.
    """
    known: dict[int, int] = {}
    made: list[Operation] = []
    for node in reachable(outputs):
        known[node.id] = len(made)
        made.append(_operation(node, known, signature, numbers))
    return made, [known[node.id] for node in outputs]


def _operation(
    node: Node, known: Mapping[int, int], signature: Signature, numbers: Mapping[int, int]
) -> Operation:
    before = node.shape
    if node.op == "load":
        before = signature[node.arg].shape  # type: ignore[union-attr]  # of an array
    elif node.op == "reshape":
        before = node.operands[0].shape
    adds_axis = len(node.shape) > len(before)
    width = 0
    if node.op in {"load", "matmul"}:
        last = node.shape[-2] if adds_axis else node.shape[-1]
        assert isinstance(last, int)
        width = int(last)
    return Operation(
        node.op,
        tuple(known[n.id] for n in node.operands),
        numbers[node.arg] if node.arg >= 0 else -1,
        node.start,
        width,
        node.value,
        node.transposed,
        adds_axis,
    )


def place_of_operation(number: int) -> str:
    """Return how errors call an operation."""
    return f"program.operations[{number}]"


# --- operations become nodes again --------------------------------------------------------------


def rebuilt(
    operations: Sequence[Operation],
    builder: Builder,
    leaves: Sequence[Leaf],
    place: Callable[[int], str] = place_of_operation,
) -> list[Node]:
    """Return the node of each operation, in a graph whose arguments may have other axes.

    leaves: the values of the program's arguments in that graph. place: how errors call an
    operation. Raises TraceError for an operation whose operands do not fit it.
    """
    nodes: list[Node] = []
    for number, operation in enumerate(operations):
        try:
            nodes.append(_node(operation, builder, leaves, [nodes[i] for i in operation.of]))
        except TraceError as error:
            raise TraceError(f"{place(number)}: {error}") from None
    return nodes


def _node(
    operation: Operation, builder: Builder, leaves: Sequence[Leaf], operands: list[Node]
) -> Node:
    op, leaf = operation.op, leaves[operation.arg] if operation.arg >= 0 else None
    _check_operands(op, operands)
    match op:
        case "load":
            assert isinstance(leaf, Node)
            columns = _columns(builder, builder.number(leaf), operation)
            return with_axis(builder, columns) if operation.adds_axis else columns
        case "scalar" | "ids":
            assert isinstance(leaf, Node)
            return leaf
        case "const":
            return builder.const(operation.value)
        case "matmul":
            assert isinstance(leaf, int)
            product = _product(operation, builder, leaf, operands)
            return _columns(builder, product, operation)
        case "dequantize":
            assert isinstance(leaf, int)
            return builder.dequantize(leaf)
        case "rows":
            assert isinstance(leaf, int)
            return builder.rows(leaf, operands[0])
        case "sum" | "max":
            return builder.reduce(op, operands[0], True)
        case "inner_sum":
            return inner_sum(builder, operands[0], False)
        case "reshape":
            change = builder.add_last if operation.adds_axis else partial(_without_axis, builder)
            return change(operands[0])
    return builder.apply(op, *beside_vectors(builder, operands))


def _product(operation: Operation, builder: Builder, weight: int, operands: list[Node]) -> Node:
    x = builder.number(operands[0])
    if len(operands) == 1:
        return builder.matmul(x, weight, operation.transposed)
    ids = operands[1]
    if needs_axis(x, fixed_axes(ids.shape) + 1):
        x = expand(builder, x)
    return vecmat(builder, x, weight, ids)


def beside_vectors(builder: Builder, operands: list[Node]) -> list[Node]:
    """Return operands of an operation, with an inner axis if one of them has one."""
    most = max((fixed_axes(n.shape) for n in operands), default=0)
    return [expand(builder, n) if needs_axis(n, most) else n for n in operands]


def needs_axis(node: Node, axes: int) -> bool:
    """Return whether a value has to get an inner axis beside one with `axes` fixed axes.

    Graphs leave out the node that adds it.
    """
    return axes == 2 and fixed_axes(node.shape) == 1 and not node.is_bool


def _check_operands(op: str, operands: list[Node]) -> None:
    """Raise TraceError for operands that no traced function gives to an operation."""
    ids = [n.op == "ids" for n in operands]
    wanted = [op == "rows" or (op == "matmul" and i == 1) for i in range(len(operands))]
    if ids != wanted:
        what = "ids for rows and for the experts of a product only"
        raise TraceError(
            expected(what, ", ".join(n.op for n in operands), where=f"operands of {op}")
        )
    shapes = [n.shape for n in operands]
    if op in {"sum", "max"} and not has_columns(shapes[0]):
        raise TraceError(expected("columns", show_shape(shapes[0]), where=f"operand of {op}"))


def _columns(builder: Builder, node: Node, operation: Operation) -> Node:
    start, stop = operation.start, operation.start + operation.width
    width = node.shape[-1]
    if not isinstance(width, int) or not start < stop <= width:
        what = f"columns among {width}"
        raise TraceError(expected(what, f"{start} to {stop}", where=operation.op))
    return builder.slice(node, start, stop)


def _without_axis(builder: Builder, node: Node) -> Node:
    if fixed_axes(node.shape) != 1 or node.shape[-1] != 1:
        raise TraceError(expected("one column", show_shape(node.shape), where="operand of reshape"))
    return builder.drop_last(node)
