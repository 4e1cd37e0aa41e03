"""The options of `specialize`."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from q4jit.backends import find_backend
from q4jit.dispatch.policy import names_device
from q4jit.errors import ArgumentError, expected
from q4jit.frontend.graph import Node, reachable
from q4jit.plan.options import PlanOptions
from q4jit.precision import PRECISIONS
from q4jit.sizes import whole_number
from q4jit.targets import find_target


@dataclass(frozen=True)
class Options:
    """How a function is specialised; `specialize` describes each option."""

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
            if value is not None:
                object.__setattr__(self, name, _positive(name, value))
        for name in ("cache", "tune"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ArgumentError(expected("True or False", repr(value), where=name))
        if self.tune and self.block_size is not None:
            raise ArgumentError(
                f"tune=True cannot be combined with block_size={self.block_size}: the search "
                "chooses it"
            )
        if self.precision not in PRECISIONS:
            known = ", ".join(map(repr, PRECISIONS))
            raise ArgumentError(
                expected(f"one of {known}", repr(self.precision), where="precision")
            )
        if not isinstance(self.target, str | None):
            raise ArgumentError(
                expected(
                    "a name such as 'cpu' or 'hip:gfx1100', or None",
                    repr(self.target),
                    where="target",
                )
            )
        if self.target is not None and not names_device(self.target):
            target = find_target(self.target, calls=True)
            find_backend(target).check(target, self.plan_options)

    @property
    def plan_options(self) -> PlanOptions:
        """The options that the schedules read."""
        return PlanOptions(self.precision, self.block_size)

    def check(self, outputs: Sequence[Node], nodes: Sequence[Node], function: str = "") -> None:
        """Raise ArgumentError unless results and products have the N and K of these options.

        nodes: those that the function computes, at least the products. function: its name, for a
        function among several.
        """
        owner = f"{function}: " if function else ""
        for k in () if self.K is None else _ks(nodes):
            if k != self.K:
                raise ArgumentError(
                    expected(
                        f"products with K = {self.K}",
                        f"K = {k}",
                        where=f"{owner}specialize(K={self.K})",
                    )
                )
        for node in outputs:
            if self.N not in {None, node.width}:
                raise ArgumentError(
                    expected(
                        f"results with N = {self.N}",
                        f"N = {node.width}",
                        where=f"{owner}specialize(N={self.N})",
                    )
                )


def unknown_arguments(names: Set[str]) -> str:
    """Return a remark about the names of arguments that a function does not have."""
    if not names:
        return ""
    options = sorted(names & Options.__dataclass_fields__.keys())
    advice = f" ({', '.join(options)}: an option of @specialize, not of a call)" if options else ""
    listed = ", ".join(map(repr, sorted(names)))
    return f"unknown argument{'' if len(names) == 1 else 's'} {listed}{advice}"


def _positive(name: str, value: object) -> int:
    """Return a positive whole number of Python, NumPy or another library as an int."""
    try:
        number = whole_number(value)
    except TypeError:
        number = 0
    if number <= 0:
        raise ArgumentError(expected("a positive int or None", repr(value), where=name))
    return number


def _ks(nodes: Sequence[Node]) -> Iterator[int]:
    """Yield the K of each product whose x does not depend on another product of `nodes`."""
    products = {node.id: node for node in nodes if node.op == "matmul"}
    after: set[int] = set()  # values that depend on a product
    for node in reachable(tuple(products.values())):  # operands first
        if any(n.id in products or n.id in after for n in node.operands):
            after.add(node.id)
    for node in products.values():
        if node.id not in after:
            yield node.operands[0].width
