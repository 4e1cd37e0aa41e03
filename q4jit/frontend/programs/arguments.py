"""The arguments of a program: what a call has to pass, with leading axes of any length."""

from collections.abc import Sequence
from dataclasses import dataclass

from q4jit.floats import FloatType
from q4jit.frontend.shapes import ONE, LeadingAxis, Shape, leading_axes
from q4jit.frontend.specs import (
    ArraySpec,
    IdsSpec,
    ScalarSpec,
    Signature,
    Spec,
    WeightSpec,
)


@dataclass(frozen=True)
class ArrayArgument:
    """An array of floats.

    Attributes:
        leading: how many leading axes it had when the function was traced.
        fixed: the lengths of the axes behind them: of the columns, or of the inner axis and them.
        float_type: the type of its elements.
    """

    name: str
    leading: int
    fixed: tuple[int, ...]
    float_type: FloatType = "f32"

    def __str__(self) -> str:
        return f"an array [..., {', '.join(map(str, self.fixed))}]"

    def accepts(self, shape: Sequence[object]) -> bool:
        """Return whether arrays of a shape fit, whatever their leading axes are."""
        return tuple(shape[-len(self.fixed) :]) == self.fixed

    def spec(self, axes: Shape) -> ArraySpec:
        """Return the spec with these leading axes."""
        return ArraySpec((*axes, *self.fixed), self.float_type)


@dataclass(frozen=True)
class WeightArgument:
    """A quantised weight [k, n], or with `experts` an expert tensor [experts, k, n]."""

    name: str
    format: str
    k: int
    n: int
    experts: int = 0

    def __str__(self) -> str:
        return f"a weight {WeightSpec(self.format, self.k, self.n, experts=self.experts)}"

    @property
    def facts(self) -> tuple[str, int, int, int]:
        """What has to be the same for every weight that is passed."""
        return self.format, self.k, self.n, self.experts

    def spec(self, axes: Shape) -> WeightSpec:
        """Return the spec; axes: not used."""
        return WeightSpec(self.format, self.k, self.n, experts=self.experts)


@dataclass(frozen=True)
class IdsArgument:
    """An array of numbers of rows or experts.

    Attributes:
        leading: how many leading axes it had when the function was traced.
        fixed: the length of the axis behind them, if a row has several experts.
    """

    name: str
    leading: int
    fixed: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"ids [{', '.join(('...', *map(str, self.fixed)))}]"

    def accepts(self, shape: Sequence[object]) -> bool:
        """Return whether ids of a shape fit, whatever their leading axes are."""
        return not self.fixed or tuple(shape[-1:]) == self.fixed

    def spec(self, axes: Shape) -> IdsSpec:
        """Return the spec with these leading axes."""
        return IdsSpec((*axes, *self.fixed))


@dataclass(frozen=True)
class NumberArgument:
    """A number, whose value is read at every call."""

    name: str

    def __str__(self) -> str:
        return "a number"

    def spec(self, axes: Shape) -> ScalarSpec:
        """Return the spec; axes: not used."""
        return ScalarSpec()


AnyArgument = ArrayArgument | WeightArgument | IdsArgument | NumberArgument


def argument_of(name: str, spec: Spec) -> AnyArgument | None:
    """Return the argument of a spec; None for a static value, which is part of the graph."""
    if isinstance(spec, ArraySpec | IdsSpec):
        leading = leading_axes(spec.shape)
        fixed = tuple(int(dim) for dim in spec.shape[leading:] if isinstance(dim, int))
        if isinstance(spec, IdsSpec):
            return IdsArgument(name, leading, fixed)
        return ArrayArgument(name, leading, fixed, spec.float_type)
    if isinstance(spec, WeightSpec):
        return WeightArgument(name, spec.format, spec.k, spec.n, spec.experts)
    return NumberArgument(name) if isinstance(spec, ScalarSpec) else None


def open_signature(arguments: Sequence[AnyArgument]) -> Signature:
    """Return the signature in which every leading axis has any length."""
    return tuple(
        a.spec(tuple(LeadingAxis(axis) for axis in range(getattr(a, "leading", 0), 0, -1)))
        for a in arguments
    )


def smallest_signature(arguments: Sequence[AnyArgument]) -> Signature:
    """Return the signature in which every leading axis is 1: it takes all that any other takes."""
    return tuple(a.spec((ONE,) * getattr(a, "leading", 0)) for a in arguments)
