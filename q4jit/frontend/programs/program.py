"""Programs: traced functions without the function."""

import inspect
import keyword
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from q4jit.errors import ArgumentError, TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.operands import operand
from q4jit.frontend.programs.arguments import (
    AnyArgument,
    ArrayArgument,
    IdsArgument,
    NumberArgument,
    WeightArgument,
    argument_of,
    open_signature,
    smallest_signature,
)
from q4jit.frontend.programs.evaluation import evaluated
from q4jit.frontend.programs.operations import Leaf, operations_of, rebuilt
from q4jit.frontend.programs.text import Content, read, written
from q4jit.frontend.refusals import refuse_other_trace
from q4jit.frontend.refused_operators import RefusedOperators, RefusedWeightOperators
from q4jit.frontend.shapes import show_shape
from q4jit.frontend.specs import Signature
from q4jit.frontend.symbols import SymbolicArray
from q4jit.frontend.traced_weight import TracedWeight
from q4jit.frontend.weights import SymbolicTranspose
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

_NO_RESULTS: Final = frozenset({"ids", "expand"})


class Program:
    """A traced function that can be written as text, and called without the function's source.

    Call it with the leaves of the function's arguments, in order, without its static values (ints,
    bools, strs and None, which tracing has turned into constants): `program(*leaves)` returns a
    tuple of the computed arrays. It computes in NumPy, and on symbols it records the same graph, so
    `Specialized(program, options)` compiles it like the function. Leading axes may have any length
    and number. Programs are immutable; those with the same text are equal.

    Attributes:
        name: the function's name.
        arguments: what each leaf has to be.
        outputs: the nodes of the results, in a graph whose leading axes are all 1.
        result_types: the float type of each result.
        text: JSON, which `parse` reads. The same graph always gives the same text.
    """

    __slots__ = (
        "__name__",
        "__signature__",
        "__weakref__",
        "_content",
        "arguments",
        "name",
        "outputs",
        "result_types",
        "text",
    )

    def __init__(self, content: Content) -> None:
        """Check the operations of a program. Raises TraceError for operands that do not fit."""
        signature = smallest_signature(content.arguments)
        builder = Builder(signature, [a.name for a in content.arguments])
        leaves = [first_leaf(builder, i, a) for i, a in enumerate(content.arguments)]
        nodes = rebuilt(content.operations, builder, leaves)
        outputs = tuple(nodes[i] for i in content.outputs)
        for i, node in enumerate(outputs):
            if node.is_bool or node.op in _NO_RESULTS:
                where = f"program.outputs[{i}]"
                raise TraceError(expected("an array of floats", node.op, where=where))
        numbers = {i: i for i in range(len(content.arguments))}
        kept, positions = operations_of(outputs, signature, numbers)
        self._content = Content(
            content.name, content.arguments, tuple(kept), tuple(positions), content.result_types
        )
        self.name = self.__name__ = content.name
        self.arguments, self.outputs = content.arguments, outputs
        self.result_types = content.result_types
        self.text = written(self._content)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(a.name, kind) for a in content.arguments]
        )

    @classmethod
    def of(cls, graph: Graph) -> "Program":
        """Return the program of a traced function, without the containers of its results."""
        pairs = zip(graph.names, graph.signature, strict=True)
        made = [argument_of(_parameter(name), spec) for name, spec in pairs]
        kept = [i for i, argument in enumerate(made) if argument is not None]
        numbers = {old: new for new, old in enumerate(kept)}
        operations, outputs = operations_of(graph.outputs, graph.signature, numbers)
        arguments = tuple(a for a in made if a is not None)
        name = _parameter(graph.name)
        content = (name, arguments, tuple(operations), tuple(outputs), graph.result_types)
        return cls(Content(*content))

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Return the program of a text, which may come from anywhere.

        Raises ArgumentError that names the field that is wrong.
        """
        try:
            return cls(read(text))
        except TraceError as error:
            raise ArgumentError(str(error)) from None

    @property
    def signature(self) -> Signature:
        """The signature of calls with as many leading axes as when the function was traced."""
        return open_signature(self.arguments)

    def __call__(self, *leaves: Any) -> tuple[Any, ...]:
        """Return the results: NumPy arrays, or symbols if a leaf is one.

        Raises ArgumentError for leaves that do not fit the arguments.
        """
        if len(leaves) != len(self.arguments):
            what = f"{len(self.arguments)} arguments"
            raise ArgumentError(expected(what, str(len(leaves)), where=f"{self.name}()"))
        builders = [leaf._builder for leaf in leaves if _is_symbol(leaf)]
        if builders:
            return self._traced(builders[0], leaves)
        pairs = zip(self.arguments, leaves, strict=True)
        values = [_checked(argument, leaf, self.name) for argument, leaf in pairs]
        signature = smallest_signature(self.arguments)
        return evaluated(self.outputs, self.result_types, signature, values)

    def _traced(self, builder: Builder, leaves: Sequence[Any]) -> tuple[SymbolicArray, ...]:
        pairs = zip(self.arguments, leaves, strict=True)
        known = [_traced_leaf(builder, argument, leaf, self.name) for argument, leaf in pairs]
        nodes = self.rebuilt(builder, known)
        results = zip(nodes, self.result_types, strict=True)
        return tuple(SymbolicArray(builder, n, float_type=kind) for n, kind in results)

    def rebuilt(self, builder: Builder, leaves: Sequence[Leaf]) -> list[Node]:
        """Return the results as nodes of another graph. Raises TraceError if leaves do not fit."""
        # whoever calls a function knows its name, but not the numbers of its operations
        nodes = rebuilt(self._content.operations, builder, leaves, lambda _: self.name)
        return [nodes[i] for i in self._content.outputs]

    def __repr__(self) -> str:
        return f"<program {self.name}({', '.join(f'{a.name}: {a}' for a in self.arguments)})>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        return Program.parse, (self.text,)


def first_leaf(builder: Builder, number: int, argument: AnyArgument) -> Leaf:
    """Return an argument of a graph as its operations use it."""
    if isinstance(argument, ArrayArgument):
        return builder.load(number, builder.signature[number].shape)  # type: ignore[union-attr]
    if isinstance(argument, IdsArgument):
        return builder.ids(number)
    return builder.scalar(number) if isinstance(argument, NumberArgument) else number


def _parameter(name: str) -> str:
    """Return a name that a parameter of a specialised function can have."""
    return f"{name}_" if keyword.iskeyword(name) or name == "out" else name


# --- leaves of calls ------------------------------------------------------------------------------


def _is_symbol(value: object) -> bool:
    return type(value) is SymbolicIds or isinstance(
        value, RefusedOperators | RefusedWeightOperators
    )


def _misfit(argument: AnyArgument, got: str, function: str) -> ArgumentError:
    where = f"argument {argument.name!r} of {function}"
    return ArgumentError(expected(str(argument), got, where=where))


def _traced_leaf(builder: Builder, argument: AnyArgument, leaf: Any, function: str) -> Leaf:
    """Return a leaf of a traced call. Raises ArgumentError unless it fits its argument."""
    if isinstance(argument, NumberArgument):
        node = operand(builder, leaf, function)
        if node.shape:
            raise _misfit(argument, repr(leaf), function)
        return node
    fits = False
    if isinstance(argument, WeightArgument):
        if isinstance(leaf, TracedWeight) and type(leaf) is not SymbolicTranspose:
            spec = leaf._spec
            fits = (spec.format, spec.k, spec.n, spec.experts) == argument.facts
    elif type(leaf) is (SymbolicIds if isinstance(argument, IdsArgument) else SymbolicArray):
        fits = argument.accepts(leaf._node.shape)
    if not fits:
        raise _misfit(argument, repr(leaf), function)
    if leaf._builder is not builder:
        refuse_other_trace()
    known: Leaf = leaf._arg if isinstance(argument, WeightArgument) else leaf._node
    return known


def _checked(argument: AnyArgument, leaf: Any, function: str) -> Any:
    """Return a leaf of a call in NumPy. Raises ArgumentError unless it fits its argument."""
    got = type(leaf).__name__
    fits = False
    if isinstance(argument, NumberArgument):
        fits = isinstance(leaf, int | float | np.number) or getattr(leaf, "shape", None) == ()
    elif isinstance(argument, WeightArgument):
        if isinstance(leaf, QuantizedTensor | ExpertTensor):
            got, shape = repr(leaf), leaf.shape
            experts = shape[0] if isinstance(leaf, ExpertTensor) else 0
            fits = (leaf.format, *shape[-2:], experts) == argument.facts
    elif isinstance(leaf, np.ndarray):
        got = f"{leaf.dtype} {show_shape(leaf.shape)}"
        is_ids = isinstance(argument, IdsArgument)
        fits = (leaf.dtype.kind in "iu") is is_ids and argument.accepts(leaf.shape)
    if not fits:
        raise _misfit(argument, got, function)
    return leaf
