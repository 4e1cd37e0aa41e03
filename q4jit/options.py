"""The options of `specialize`."""

from collections.abc import Iterator
from dataclasses import dataclass

from q4jit.backends import find_backend
from q4jit.errors import ArgumentError
from q4jit.frontend.graph import Graph, reachable
from q4jit.plan.options import PlanOptions
from q4jit.policy import names_device
from q4jit.precision import PRECISIONS
from q4jit.targets import find_target


@dataclass(frozen=True)
class Options:
    """How a function is specialised; see `specialize`."""

    K: int | None = None
    N: int | None = None
    block_size: int | None = None
    target: str | None = None
    precision: str = "f32"
    cache: bool = True
    tune: bool = False

    def __post_init__(self) -> None:
        for name in ("K", "N", "block_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value <= 0):
                raise ArgumentError(f"{name}={value!r}: accepted is a positive int, or None")
        for name in ("cache", "tune"):
            if type(getattr(self, name)) is not bool:
                value = getattr(self, name)
                raise ArgumentError(f"{name}={value!r}: accepted is True or False")
        if self.tune and self.block_size is not None:
            raise ArgumentError(
                f"tune=True and block_size={self.block_size}: accepted is one of them, a search "
                "chooses the block size"
            )
        if self.precision not in PRECISIONS:
            accepted = ", ".join(map(repr, PRECISIONS))
            raise ArgumentError(f"precision={self.precision!r}: accepted are {accepted}")
        if not isinstance(self.target, str | None):
            raise ArgumentError(
                f"target={self.target!r}: accepted are names, 'cpu' or 'hip:gfx1100', and None"
            )
        if self.target is not None and not names_device(self.target):
            target = find_target(self.target)
            find_backend(target).check(target, self.plan_options)

    @property
    def plan_options(self) -> PlanOptions:
        """What of them a schedule is asked for."""
        return PlanOptions(self.precision, self.block_size)

    def check(self, graph: Graph) -> None:
        """Raise ArgumentError unless a graph has the K and N that were asked for."""
        for k in _ks(graph):
            if self.K not in {None, k}:
                raise ArgumentError(f"specialize(K={self.K}): found a product of K = {k}")
        for node in graph.outputs:
            if self.N not in {None, node.width}:
                raise ArgumentError(f"specialize(N={self.N}): found a result of N = {node.width}")


def _ks(graph: Graph) -> Iterator[int]:
    """Yield the K of each product of x; the x of a chained product is another's result."""
    for node in graph.nodes():
        if node.op == "matmul" and all(n.op != "matmul" for n in reachable(node.operands)):
            yield node.operands[0].width
