"""What a function is traced for: a spec per argument, together the signature."""

from dataclasses import dataclass

from q4jit.frontend.shapes import Dim, Lead, Shape, show_shape
from q4jit.weights.formats import FORMATS, Format


@dataclass(frozen=True)
class ArraySpec:
    """An f32 array argument: the last axis of `shape` is a number, leading ones a `Lead` or 1."""

    shape: Shape

    def __str__(self) -> str:
        return f"f32 {show_shape(self.shape)}"


@dataclass(frozen=True)
class WeightSpec:
    """A quantised weight argument [k, n].

    finite: no scale is Inf or NaN. suits_f16: values of Q4_0 may be rounded to f16 where two such
    roundings are allowed (`QuantizedTensor.suits_f16`).
    """

    format: str
    k: int
    n: int
    finite: bool = True
    suits_f16: bool = True

    @property
    def block_format(self) -> Format:
        """How the blocks of the weight are laid out and decoded."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        return f"{self.format} [{self.k}, {self.n}]{'' if self.finite else ' with Inf or NaN'}"


@dataclass(frozen=True)
class IdsSpec:
    """An int32 or int64 array argument of row numbers: every axis is a leading one."""

    shape: Shape

    def __str__(self) -> str:
        return f"ids {show_shape(self.shape)}"


@dataclass(frozen=True)
class ScalarSpec:
    """A float argument: its value is read at every call."""

    def __str__(self) -> str:
        return "float"


@dataclass(frozen=True)
class StaticSpec:
    """An int, bool, str or None: its value is part of the signature."""

    kind: type
    value: int | bool | str | None

    def __str__(self) -> str:
        return repr(self.value)


Spec = ArraySpec | WeightSpec | IdsSpec | ScalarSpec | StaticSpec
Signature = tuple[Spec, ...]


def array_spec(shape: tuple[int, ...], sized: bool = False) -> ArraySpec:
    """The spec of an f32 array of `shape`; where `sized`, leading axes keep their length."""
    return ArraySpec((*_leading(shape[:-1], sized), shape[-1]))


def ids_spec(shape: tuple[int, ...], sized: bool = False) -> IdsSpec:
    """The spec of an integer array of `shape`; where `sized`, its axes keep their length."""
    return IdsSpec(_leading(shape, sized))


def _leading(shape: tuple[int, ...], sized: bool) -> tuple[Dim, ...]:
    axes = range(len(shape), 0, -1)
    return tuple(
        1 if length == 1 else Lead(axis, length if sized else None)
        for axis, length in zip(axes, shape, strict=True)
    )
