"""The base of all symbolic weights, and the ids that choose from them."""

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import Node
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.refusals import refuse_other_trace
from q4jit.frontend.refused_operators import RefusedOperators, RefusedWeightOperators
from q4jit.frontend.specs import WeightSpec


class TracedWeight(RefusedWeightOperators):
    """A weight argument of the function being traced, or a part of one."""

    __slots__ = ("_arg", "_builder")

    def __init__(self, builder: Builder, arg: int) -> None:
        self._builder = builder
        self._arg = arg

    @property
    def _spec(self) -> WeightSpec:
        spec = self._builder.signature[self._arg]
        assert isinstance(spec, WeightSpec)
        return spec

    @property
    def format(self) -> str:
        """The block format's name."""
        return self._spec.format

    def _ids_node(self, ids: object, what: str, where: str, cure: str) -> Node:
        """Return the node of ids. Raises TraceError for anything else, and for another trace."""
        if not isinstance(ids, SymbolicIds):
            shown = repr(ids) if isinstance(ids, RefusedOperators) else type(ids).__name__
            raise TraceError(expected(what, shown, where=where, cure=cure))
        if ids._builder is not self._builder:
            refuse_other_trace()
        return ids._node
