"""Gradients of programs, in reverse mode: each is a list of programs.

A cotangent is the derivative of a scalar, the loss, by a value. A gradient takes the cotangents of
results and gives the derivatives by arguments. Its programs compute the values that they need
again. Weights are constants.

Where a function uses parts of a product, such as `h[..., :n]` and `h[..., n:]` of h = x @ w, each
part has a cotangent of its own, and x needs that of the whole product. No program joins arrays, so
the caller does: the first backward step returns the parts, and the next one takes the whole.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from q4jit.floats import FloatType
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node, reachable
from q4jit.frontend.programs.arguments import AnyArgument, ArrayArgument, smallest_signature
from q4jit.frontend.programs.formulas import Formulas
from q4jit.frontend.programs.operations import operations_of
from q4jit.frontend.programs.program import Program, first_leaf
from q4jit.frontend.programs.text import LONGEST_NAME, Content
from q4jit.frontend.refusals import refuse
from q4jit.frontend.shapes import Shape, has_columns, leading_axes
from q4jit.frontend.specs import WeightSpec
from q4jit.frontend.vectors import fixed_axes

_SHOWN: Final = {
    "matmul": "np.vecmat(x, w[ids])",
    "inner_sum": "np.sum(y, axis=-2)",
}


@dataclass(frozen=True)
class BackwardInput:
    """An argument of a backward step.

    Attributes:
        kind: argument `number` of the program, the cotangent of result `number`, or the cotangent
            of product `number`, which earlier steps have contributed to.
        adds_axis: it is the cotangent of a result without columns, such as `np.sum(x, -1)`, and
            needs an axis of 1 at its end.
    """

    kind: Literal["argument", "cotangent", "product"]
    number: int
    adds_axis: bool = False


@dataclass(frozen=True)
class Contribution:
    """A result of a backward step: columns of the derivative by an argument or by a product.

    The derivative is the sum of all contributions to it, each with zeros in the other columns. A
    contribution to an argument has the leading axes of the results that it comes from. The caller
    first adds up the rows that share a row of the argument, as `Tensor.sum_to_size` does, because
    contributions may come from results with different leading axes.

    Attributes:
        kind: whether it belongs to argument or product `number`.
        start: its first column.
        width: how many columns it has.
        whole: how many columns the derivative has.
    """

    kind: Literal["argument", "product"]
    number: int
    start: int
    width: int
    whole: int


@dataclass(frozen=True)
class BackwardStep:
    """A program of a gradient, what its arguments are and what its results contribute to."""

    program: Program
    inputs: tuple[BackwardInput, ...]
    contributions: tuple[Contribution, ...]


def gradient(
    program: Program, wanted: Collection[int], given: Collection[int]
) -> tuple[BackwardStep, ...]:
    """Return the steps that compute the derivatives by some arguments, in order.

    wanted: numbers of array arguments. given: numbers of the results whose cotangents there are;
    those of the other results are 0. An argument without contributions has the derivative 0.

    A result has the float type of its argument; contributions to products are f32. At equal
    operands, `maximum`, `minimum` and `max` share the cotangent evenly. The derivative of `abs` at
    0 is 0, and so are those of `sqrt`, `log` and divisions where they are infinite. Numbers have no
    derivatives. Raises TraceError if an operation without a formula, such as a product with chosen
    experts, is between a wanted argument and a given result.
    """
    return _Backward(program, frozenset(wanted)).steps(frozenset(given))


class _Backward:
    """One gradient while it is made: all its steps are one graph, which is split at the end.

    Attributes:
        arguments: of the graph: those of the program, then cotangents of results and of products.
        inputs: what each of them is.
    """

    def __init__(self, program: Program, wanted: Collection[int]) -> None:
        self._program, self._wanted = program, wanted
        self.arguments: list[AnyArgument] = list(program.arguments)
        self.inputs = [BackwardInput("argument", i) for i in range(len(self.arguments))]
        names = [a.name for a in self.arguments]
        self._builder = Builder(smallest_signature(program.arguments), names)
        self._formulas = Formulas(self._builder)
        self._cotangents: dict[int, Node] = {}
        self._parts: dict[int, list[tuple[Node, Node]]] = {}
        self._contributions: list[tuple[Contribution, Node]] = []

    def steps(self, given: Collection[int]) -> tuple[BackwardStep, ...]:
        """Return the steps."""
        leaves = [first_leaf(self._builder, i, a) for i, a in enumerate(self.arguments)]
        outputs = self._program.rebuilt(self._builder, leaves)
        by_rows: dict[frozenset[int], dict[int, Node]] = {}
        for j in sorted(given):
            by_rows.setdefault(self._rows_of(outputs[j]), {})[j] = outputs[j]
        for results in by_rows.values():
            self._differentiate(results)
        levels = self._levels()
        pairs = list(zip(levels, self._contributions, strict=True))
        count = max(levels, default=-1) + 1
        return tuple(
            self._step([c for own, c in pairs if own == level], f"_{level + 1}" * (count > 1))
            for level in range(count)
        )

    def _rows_of(self, result: Node) -> frozenset[int]:
        """Return the arguments with leading axes that a result depends on.

        They determine its own leading axes. Results with others must not share cotangents: the sum
        of one for each row and of one for all rows, which broadcasts, counts the latter repeatedly.
        """
        named = {n.arg for n in reachable((result,)) if n.op in {"load", "ids"}}
        return frozenset(i for i in named if getattr(self.arguments[i], "leading", 0))

    def _differentiate(self, results: dict[int, Node]) -> None:
        """Add the contributions of the cotangents of results with the same leading axes."""
        self._cotangents, self._parts = {}, {}
        nodes = reachable(tuple(results.values()))
        moving = self._moving(nodes)
        for j, result in results.items():
            if result.id in moving:
                self._add(result, self._cotangent_of_result(j, result))
        for node in reversed(nodes):  # users come before their operands
            self._add_products(node)
            if node.id in self._cotangents:
                self._pass_on(node, self._cotangents[node.id], moving)

    def _moving(self, nodes: list[Node]) -> set[int]:
        """Return the ids of the values that have a derivative by a wanted argument."""
        moving: set[int] = set()
        for node in nodes:
            is_wanted = node.op == "load" and node.arg in self._wanted
            if is_wanted or (not node.is_bool and any(n.id in moving for n in node.operands)):
                moving.add(node.id)
        return moving

    def _argument(
        self, name: str, shape: Shape, float_type: FloatType, what: BackwardInput
    ) -> Node:
        """Return a new array argument."""
        while name in {a.name for a in self.arguments}:
            name += "_"
        leading = leading_axes(shape)
        columns = shape[-1]
        assert isinstance(columns, int)
        self.arguments.append(ArrayArgument(name, leading, (columns,), float_type))
        self.inputs.append(what)
        return self._builder.load(len(self.arguments) - 1, shape)

    def _cotangent_of_result(self, j: int, result: Node) -> Node:
        if fixed_axes(result.shape) > 1:
            self._refuse("vectors of experts")
        adds_axis = not has_columns(result.shape)
        shape = (*result.shape, 1) if adds_axis else result.shape
        what = BackwardInput("cotangent", j, adds_axis)
        load = self._argument(f"cotangent_{j}", shape, self._program.result_types[j], what)
        return self._builder.drop_last(load) if adds_axis else load

    def _add(self, node: Node, cotangent: Node) -> None:
        known = self._cotangents.get(node.id)
        total = cotangent if known is None else self._builder.apply("add", known, cotangent)
        self._cotangents[node.id] = total

    def _pass_on(self, node: Node, g: Node, moving: Collection[int]) -> None:
        """Turn the cotangent of a value into those of its operands."""
        if fixed_axes(node.shape) > 1 or node.op == "inner_sum":
            self._refuse(_SHOWN.get(node.op, "vectors of experts"))
        if node.op == "load":
            whole = self._columns(node.arg)
            part = Contribution("argument", node.arg, node.start, node.width, whole)
            self._contributions.append((part, self._formulas.full(g, node)))
        elif node.op == "matmul":
            if node.chosen is not None:
                self._refuse(_SHOWN["matmul"])
            part_of = self._parts.setdefault(node.operands[0].id, [])
            part_of.append((node, self._formulas.full(g, node)))
        else:
            for i, operand in enumerate(node.operands):
                if operand.id in moving:
                    cotangent = self._formulas.cotangent(node, i, g)
                    if cotangent is None:
                        self._refuse(node.op)
                    self._add(operand, cotangent)

    def _add_products(self, x: Node) -> None:
        """Add the cotangents of x from those of products with it."""
        wholes: dict[tuple[int, bool], list[tuple[Node, Node]]] = {}
        for part, g in self._parts.get(x.id, ()):
            wholes.setdefault((part.arg, part.transposed), []).append((part, g))
        for (arg, transposed), parts in wholes.items():
            spec = self._builder.signature[arg]
            assert isinstance(spec, WeightSpec)
            columns = spec.k if transposed else spec.n
            g = parts[0][1]
            if [part.width for part, _ in parts] != [columns]:
                g = self._cotangent_of_product(parts, columns)
            self._add(x, self._builder.matmul(g, arg, not transposed))

    def _cotangent_of_product(self, parts: list[tuple[Node, Node]], columns: int) -> Node:
        """Return the cotangent of a whole product, a new argument to which parts contribute."""
        number = sum(what.kind == "product" for what in self.inputs)
        for part, g in parts:
            own = Contribution("product", number, part.start, part.width, columns)
            self._contributions.append((own, g))
        shape = (*parts[0][1].shape[:-1], columns)
        what = BackwardInput("product", number)
        return self._argument(f"product_{number}", shape, "f32", what)

    # --- the graph becomes programs ---------------------------------------------------------------

    def _levels(self) -> list[int]:
        """Return the number of the step that each contribution belongs to.

        A step comes after those that contribute to the products it takes.
        """
        after: dict[int, int] = {}  # by the number of a product, the last step that contributes
        levels = []
        for contribution, node in self._contributions:  # products come before what they give
            needed = {
                self.inputs[n.arg].number
                for n in reachable((node,))
                if n.op == "load" and self.inputs[n.arg].kind == "product"
            }
            level = max((after[number] + 1 for number in needed), default=0)
            if contribution.kind == "product":
                number = contribution.number
                after[number] = max(level, after.get(number, 0))
            levels.append(level)
        return levels

    def _step(self, contributions: list[tuple[Contribution, Node]], suffix: str) -> BackwardStep:
        outputs = tuple(node for _, node in contributions)
        used = sorted({n.arg for n in reachable(outputs) if n.arg >= 0})
        signature = smallest_signature(self.arguments)
        numbers = {old: new for new, old in enumerate(used)}
        operations, results = operations_of(outputs, signature, numbers)
        suffix = f"_gradient{suffix}"
        content = Content(
            f"{self._program.name[: LONGEST_NAME - len(suffix)]}{suffix}",
            tuple(self.arguments[i] for i in used),
            tuple(operations),
            tuple(results),
            tuple(self._float_type(contribution) for contribution, _ in contributions),
        )
        inputs = tuple(self.inputs[i] for i in used)
        return BackwardStep(Program(content), inputs, tuple(c for c, _ in contributions))

    def _columns(self, argument: int) -> int:
        array = self.arguments[argument]
        assert isinstance(array, ArrayArgument)
        return array.fixed[-1]

    def _float_type(self, contribution: Contribution) -> FloatType:
        argument = self.arguments[contribution.number]
        if contribution.kind == "argument" and isinstance(argument, ArrayArgument):
            return argument.float_type
        return "f32"

    def _refuse(self, what: str) -> NoReturn:
        refuse(
            f"differentiate {what} in {self._program.name}",
            "ask for no gradient of arguments that it depends on, or compute it outside",
        )
