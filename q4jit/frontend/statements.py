"""Graphs printed as the statements that a person would have written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from q4jit.frontend.graph import Node, reachable

_OPERATORS: Final = {
    "add": ("+", 1),
    "sub": ("-", 1),
    "mul": ("*", 2),
    "div": ("/", 2),
    "lt": ("<", 0),
    "le": ("<=", 0),
    "gt": (">", 0),
    "ge": (">=", 0),
    "eq": ("==", 0),
    "ne": ("!=", 0),
    "and": ("&", -1),
    "or": ("|", -2),
}
_ATOM: Final = 4  # binds tighter than every operator
_LONGEST_EXPRESSION: Final = 72


def numbered(node: Node) -> str:
    """Return the name of a value that no argument and no buffer names."""
    return f"v{node.id}"


def statements(
    results: Sequence[tuple[str, Node]],
    names: Sequence[str],
    known: Mapping[int, str],
    label: Callable[[Node], str] = numbered,
) -> list[str]:
    """Return assignments that compute `results` (label, value), as a person would write them.

    A value that is used twice, and a long expression, get a line of their own.
    names: the arguments' names. known: the names of values, by id, that exist already. label: the
    name of a value with a line of its own.
    """
    uses: dict[int, int] = {}
    nodes = reachable(tuple(node for _, node in results), known)
    for node in (*(n for user in nodes for n in user.operands), *(n for _, n in results)):
        uses[node.id] = uses.get(node.id, 0) + 1
    texts = {i: (name, _ATOM) for i, name in known.items()}
    lines = []
    for node in nodes:
        text, binding = _expression(node, [texts[n.id] for n in node.operands], names)
        if binding < _ATOM and (uses[node.id] > 1 or len(text) > _LONGEST_EXPRESSION):
            lines.append(f"{label(node)} = {text}")
            text, binding = label(node), _ATOM
        texts[node.id] = (text, binding)
    return lines + [f"{label} = {texts[node.id][0]}" for label, node in results]


def product_text(
    product: Node, names: Sequence[str], label: Callable[[Node], str] = numbered
) -> str:
    """Return a product of a value that has a name, on one line: `v3 @ w[:, 8:16]`."""
    operands = [(label(product.operands[0]), _ATOM)]
    if product.chosen is not None:
        operands.append((names[product.chosen.arg], _ATOM))
    return _expression(product, operands, names)[0]


def _expression(
    node: Node, operands: Sequence[tuple[str, int]], names: Sequence[str]
) -> tuple[str, int]:
    """Return the text of a node and how tightly its outermost operator binds."""
    if node.op in _OPERATORS:
        sign, binding = _OPERATORS[node.op]
        left, right = (
            text if inner >= binding + (i if sign in "-/" else 0) else f"({text})"
            for i, (text, inner) in enumerate(operands)
        )
        return f"{left} {sign} {right}", binding
    match node.op:
        case "const":
            return f"{node.value:.7g}", _ATOM
        case "scalar" | "ids":
            return names[node.arg], _ATOM
        case "load":
            stop = node.start + node.width
            columns = f"[..., {node.start}:{stop}]" if node.start else ""
            if node.width == 1 and node.copies > 1:
                stop = node.start + node.copies
                columns = f"[..., {node.start}:{stop}, None]" if node.start else "[..., None]"
            return f"{names[node.arg]}{columns}", _ATOM
        case "reshape" | "expand":
            return operands[0]
        case "inner_sum":
            return f"sum({operands[0][0]}, axis=-2)", 3
        case "neg":
            text, inner = operands[0]
            return f"-{text}" if inner == _ATOM else f"-({text})", 3
        case "matmul":
            stop = node.start + node.width
            columns = f"[:, {node.start}:{stop}]" if node.start else ""
            if node.chosen is not None:
                chosen = f"{names[node.arg]}[{operands[1][0]}]{columns.replace(':,', '..., :,')}"
                return f"vecmat({operands[0][0]}, {chosen})", _ATOM
            weight = f"{names[node.arg]}{'.T' if node.transposed else ''}"
            return f"{operands[0][0]} @ {weight}{columns}", 2
        case "dequantize":
            return f"{names[node.arg]}.dequantize()", 3
        case "rows":
            return f"{names[node.arg]}.rows({operands[0][0]})", 3
    return f"{node.op}({', '.join(text for text, _ in operands)})", 3
