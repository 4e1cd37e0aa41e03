"""The chain rule: the cotangent of an operand from that of the result, for each operation.

A cotangent is the derivative of a scalar by a value. It has the value's columns, or only one if the
derivatives by all columns of a row are equal.

A guarded value, as in `np.where(x > 0, np.log(x), 0.0)`, must not turn the cotangent 0 of a branch
that was not taken into NaN. So formulas choose by `where` instead of multiplying by zero, and the
slopes of log, sqrt and a division are taken as 0 where they are infinite. No formula tests whether
a cotangent is 0, because second derivatives depend on it.
"""

from typing import Final

import numpy as np

from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node
from q4jit.frontend.shapes import has_columns

_LARGEST: Final = float(np.finfo(np.float32).max)


class Formulas:
    """Makes the nodes of cotangents."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def cotangent(self, node: Node, i: int, g: Node) -> Node | None:
        """Return the cotangent of operand number `i` of `node`; None if there is no formula.

        g: the cotangent of `node`.
        """
        cotangent = self._of_structure(node, g)
        if cotangent is not None:
            return cotangent
        cotangent = self._of_one(node, g) if len(node.operands) == 1 else self._of_two(node, i, g)
        if cotangent is None and node.op == "where":
            branches = (g, 0.0) if i == 1 else (0.0, g)
            cotangent = self._apply("where", node.operands[0], *branches)
        return None if cotangent is None else self._narrowed(cotangent, node.operands[i], node)

    def full(self, g: Node, node: Node) -> Node:
        """Return a cotangent with all columns of its value `node`."""
        if g.width == node.width:
            return g
        return self._apply("where", self._apply("eq", node, node), g, g)

    def _of_structure(self, node: Node, g: Node) -> Node | None:
        """Return the cotangent of the operand of a reduction or of a change of axes."""
        match node.op:
            case "sum":
                return g
            case "max":  # equal elements share it
                x = node.operands[0]
                is_largest = self._apply("eq", x, node)
                count = self._builder.reduce(
                    "sum", self._apply("where", is_largest, 1.0, 0.0), True
                )
                return self._apply("where", is_largest, self._apply("div", g, count), 0.0)
            case "reshape":
                is_longer = len(node.shape) > len(node.operands[0].shape)
                return (self._builder.drop_last if is_longer else self._builder.add_last)(g)
        return None

    def _of_one(self, y: Node, g: Node) -> Node | None:
        """Return the cotangent of the operand of an element-wise function y(x)."""
        (x,) = y.operands
        match y.op:
            case "neg":
                return self._apply("neg", g)
            case "exp":  # where it is infinite, as in 1 / (1 + exp(-x)), g is often 0
                return self._apply("mul", g, self._apply("minimum", y, _LARGEST))
            case "log":
                return self._divided(g, x)
            case "tanh":
                return self._apply("mul", g, self._apply("sub", 1.0, self._apply("mul", y, y)))
            case "sqrt":  # of less than 0, too, the slope is 0
                slope = self._apply("div", g, self._apply("add", y, y))
                return self._apply("where", self._apply("gt", y, 0.0), slope, 0.0)
            case "abs":
                rising = self._apply("where", self._apply("eq", x, 0.0), 0.0, g)
                falls = self._apply("lt", x, 0.0)
                return self._apply("where", falls, self._apply("neg", g), rising)
        return None

    def _of_two(self, y: Node, i: int, g: Node) -> Node | None:
        """Return the cotangent of operand number `i` of an element-wise operation on two."""
        own, other = y.operands[i], y.operands[i - 1]
        match y.op:
            case "add":
                return g
            case "sub":
                return self._apply("neg", g) if i else g
            case "mul":
                return self._apply("mul", g, other)
            case "div" if i == 0:
                return self._divided(g, other)
            case "div":
                slope = self._apply("mul", self._apply("div", g, own), y)
                return self._apply("neg", self._unless_zero(own, slope))
            case "maximum" | "minimum":  # equal operands share it
                loses = self._apply("lt" if y.op == "maximum" else "gt", own, other)
                half = self._apply("mul", g, 0.5)
                wins = self._apply("where", self._apply("eq", own, other), half, g)
                return self._apply("where", loses, 0.0, wins)
        return None

    def _divided(self, g: Node, divisor: Node) -> Node:
        return self._unless_zero(divisor, self._apply("div", g, divisor))

    def _unless_zero(self, divisor: Node, slope: Node) -> Node:
        """Return a slope, but 0 where the divisor is 0."""
        if divisor.op == "const" and divisor.value != 0:
            return slope
        return self._apply("where", self._apply("eq", divisor, 0.0), 0.0, slope)

    def _narrowed(self, g: Node, operand: Node, node: Node) -> Node:
        """Return the cotangent of an operand that may be broadcast along the columns of `node`."""
        if not has_columns(node.shape):
            return g
        if node.width > 1 and operand.width == 1:
            if g.width == 1:
                g = self._apply("mul", g, float(node.width))
            else:
                g = self._builder.reduce("sum", g, True)
        return g if has_columns(operand.shape) else self._builder.drop_last(g)

    def _apply(self, op: str, *operands: Node | float) -> Node:
        nodes = (self._builder.const(v) if isinstance(v, float) else v for v in operands)
        return self._builder.apply(op, *nodes)
