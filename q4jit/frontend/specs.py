"""Specs: a function is traced for one spec per argument; together they are its signature."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from q4jit.floats import FloatType
from q4jit.frontend.containers import Tree
from q4jit.frontend.shapes import ONE, Dim, LeadingAxis, Shape, show_shape
from q4jit.frontend.structures import Structure, classes_in, paths, show_tree
from q4jit.weights.formats import FORMATS, Format


@dataclass(frozen=True)
class ArraySpec:
    """An array argument of floats.

    Attributes:
        shape: the last axis is a number, the others are M or `ONE`.
        float_type: the type of its elements.
        is_aligned: four elements at a time can be loaded at once. Only set to False for arrays of
            f16 and bf16 on a GPU: kernels test the addresses of f32 arrays when they run.
    """

    shape: Shape
    float_type: FloatType = "f32"
    is_aligned: bool = True

    def __str__(self) -> str:
        aligned = "" if self.is_aligned else " unaligned"
        return f"{self.float_type} {show_shape(self.shape)}{aligned}"


@dataclass(frozen=True)
class WeightSpec:
    """A quantised weight argument [k, n].

    Attributes:
        format: the name of its block format, for example "Q4_0".
        finite: no scale is Inf or NaN.
        suits_f16: values of Q4_0 may be rounded to f16, where two roundings are allowed
            (`QuantizedTensor.suits_f16`).
    """

    format: str
    k: int
    n: int
    finite: bool = True
    suits_f16: bool = True

    @property
    def block_format(self) -> Format:
        """The description of the block format, which says how blocks are decoded."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        return f"{self.format} [{self.k}, {self.n}]{'' if self.finite else ' with Inf or NaN'}"


@dataclass(frozen=True)
class IdsSpec:
    """An int32 or int64 array argument of row numbers. Every axis is a leading axis."""

    shape: Shape

    def __str__(self) -> str:
        return f"ids {show_shape(self.shape)}"


@dataclass(frozen=True)
class ScalarSpec:
    """A number argument, whose value is read at every call.

    Attributes:
        kind: its type: float, a NumPy scalar, or np.ndarray for an array without axes.
        float_type: the type that it gives to results; None if it adapts to arrays, as Python's
            floats do. A number in float64 adapts too, because kernels compute in f32.
    """

    kind: type = float
    float_type: FloatType | None = None

    def __str__(self) -> str:
        return f"{self.float_type or 'f32'} []" if self.kind is np.ndarray else self.kind.__name__


@dataclass(frozen=True)
class StaticSpec:
    """An int, bool, str or None, whose value is part of the signature."""

    kind: type
    value: int | bool | str | None

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class StructureSpec:
    """The containers of the arguments, the last of a signature whose other specs are leaves."""

    structure: Structure

    def __str__(self) -> str:
        return "containers"


@dataclass(frozen=True)
class ContainerSpec:
    """A container argument, as users see it in a signature.

    Attributes:
        tree: its containers.
        leaves: the specs of its leaves, in order.
    """

    tree: Tree
    leaves: tuple["Spec", ...]

    def __str__(self) -> str:
        return show_tree(self.tree, map(str, self.leaves))


Spec = ArraySpec | WeightSpec | IdsSpec | ScalarSpec | StaticSpec | StructureSpec | ContainerSpec
Signature = tuple[Spec, ...]


def structure_in(signature: Signature) -> Structure | None:
    """Return the containers of the arguments; None if there are none."""
    last = signature[-1] if signature else None
    return last.structure if isinstance(last, StructureSpec) else None


def names_in(signature: Signature, parameters: Sequence[str]) -> Sequence[str]:
    """Return the expressions of the arguments: those of leaves, or the names of parameters."""
    structure = structure_in(signature)
    return parameters if structure is None else structure.names


def as_written(signature: Signature) -> Signature:
    """Return the specs of the arguments that a user wrote, from those of their leaves."""
    structure = structure_in(signature)
    if structure is None:
        return signature
    rest = list(signature[:-1])
    specs: list[Spec] = []
    for tree in structure.trees:
        count = sum(1 for _ in paths(tree, ""))
        leaves, rest = tuple(rest[:count]), rest[count:]
        specs.append(leaves[0] if tree is None else ContainerSpec(tree, leaves))
    return tuple(specs)


def classes_of(signatures: Iterable[Signature]) -> list[type]:
    """Return the classes of containers in signatures, without Python's own."""
    structures = [structure_in(signature) for signature in signatures]
    return classes_in([tree for s in structures if s is not None for tree in s.trees])


def array_spec(
    shape: tuple[int, ...], sized: bool = False, float_type: FloatType = "f32"
) -> ArraySpec:
    """Return the spec of an array of floats of `shape`.

    sized: leading axes keep their length, so that an error can show it.
    """
    return ArraySpec((*_leading(shape[:-1], sized), shape[-1]), float_type)


def ids_spec(shape: tuple[int, ...], sized: bool = False) -> IdsSpec:
    """Return the spec of an integer array of `shape`; sized: as in `array_spec`."""
    return IdsSpec(_leading(shape, sized))


def _leading(shape: tuple[int, ...], sized: bool) -> tuple[Dim, ...]:
    axes = range(len(shape), 0, -1)
    return tuple(
        ONE if length == 1 else LeadingAxis(axis, length if sized else None)
        for axis, length in zip(axes, shape, strict=True)
    )
