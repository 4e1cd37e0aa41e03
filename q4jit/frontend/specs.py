"""Specs: a function is traced for one spec per argument; together they are its signature."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from q4jit.floats import FloatType
from q4jit.frontend.containers import Tree
from q4jit.frontend.shapes import ONE, Dim, LeadingAxis, Shape, inner_length, show_shape
from q4jit.frontend.structures import Structure, classes_in, paths, show_tree
from q4jit.weights.formats import FORMATS, Format


@dataclass(frozen=True)
class ArraySpec:
    """An array argument of floats.

    Attributes:
        shape: the last axis is a number, the others are M or `ONE`. With chosen experts the one
            before the last may be a number too.
        float_type: the type of its elements.
        is_aligned: four elements at a time can be loaded at once. Only set to False for arrays of
            f16 and bf16 on a GPU: kernels test the addresses of f32 arrays when they run.
    """

    shape: Shape
    float_type: FloatType = "f32"
    is_aligned: bool = True

    @property
    def copies(self) -> int:
        """Vectors of a row: the length of the inner axis."""
        return inner_length(self.shape)

    def __str__(self) -> str:
        aligned = "" if self.is_aligned else " unaligned"
        return f"{self.float_type} {show_shape(self.shape)}{aligned}"


@dataclass(frozen=True)
class WeightSpec:
    """A quantised weight argument [k, n], or one for each expert [experts, k, n].

    Attributes:
        format: the name of its block format, for example "Q4_0".
        finite: no scale is Inf or NaN.
        suits_f16: values of Q4_0 may be rounded to f16, where two roundings are allowed
            (`QuantizedTensor.suits_f16`).
        held: the only layout that its bytes are in; empty if it has its GGUF blocks, so that
            kernels get copies in any layout.
        experts: the matrices of an `ExpertTensor`; 0 for a `QuantizedTensor`.
    """

    format: str
    k: int
    n: int
    finite: bool = True
    suits_f16: bool = True
    held: str = ""
    experts: int = 0

    @property
    def block_format(self) -> Format:
        """The description of the block format, which says how blocks are decoded."""
        return FORMATS[self.format]

    def rows_layout(self, readable: Sequence[str]) -> str:
        """Return the layout in which look-ups read the weight, of those that they can read.

        It is the one that the weight is held in, so that it needs no copy; else the first.
        """
        return self.held if self.held in readable else readable[0]

    def __str__(self) -> str:
        experts = f"{self.experts}, " if self.experts else ""
        finite = "" if self.finite else " with Inf or NaN"
        return f"{self.format} [{experts}{self.k}, {self.n}]{finite}"


@dataclass(frozen=True)
class IdsSpec:
    """An int32 or int64 array argument of the numbers of rows or experts.

    Attributes:
        shape: every axis is a leading axis, but for experts the last may be a number.
        is_narrow: kernels get 32 bits for each id. Only for arrays on a GPU: others are converted.
    """

    shape: Shape
    is_narrow: bool = False

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


def with_inner_axes(signature: Signature, shapes: Sequence[tuple[int, ...]]) -> Signature:
    """Return a signature with fixed inner axes if the rows of arrays have several experts each.

    Ids [..., A] choose A experts for each row if an array has as many axes, such as x [..., K] for
    ids with at least two, or if one has a 1 before its columns, x [..., 1, K]. Then A is a fixed
    length, and arrays [..., 1, n] and [..., A, n] have an inner axis. Otherwise there is an id for
    each row of x, and every axis of ids is a leading axis.

    shapes: of the arguments; those of other arguments than arrays are not used.
    """
    if not any(isinstance(spec, WeightSpec) and spec.experts for spec in signature):
        return signature
    ids = [shapes[i] for i, spec in enumerate(signature) if isinstance(spec, IdsSpec)]
    rank = max(map(len, ids), default=0)
    if not rank:
        return signature
    chosen = next(shape[-1] for shape in ids if len(shape) == rank)
    arrays = [shapes[i] for i, spec in enumerate(signature) if isinstance(spec, ArraySpec)]
    inner = [shape for shape in arrays if len(shape) == rank + 1 and shape[-2] in (1, chosen)]
    if not any(rank > 1 and len(shape) == rank for shape in arrays) and (
        chosen == 1 or all(shape[-2] == chosen for shape in inner)
    ):
        return signature
    pairs = zip(signature, shapes, strict=True)
    return tuple(_with_inner_axis(spec, shape, rank, chosen) for spec, shape in pairs)


def _with_inner_axis(spec: Spec, shape: tuple[int, ...], rank: int, chosen: int) -> Spec:
    """Return the spec of an argument with an inner axis of 1 or `chosen`, if it has one.

    rank: the axes of ids.
    """
    is_array = isinstance(spec, ArraySpec)
    if not isinstance(spec, ArraySpec | IdsSpec) or len(shape) != rank + is_array:
        return spec
    if shape[rank - 1] not in (1, chosen):
        return spec
    leading = _renumbered(spec.shape[: rank - 1])
    return replace(spec, shape=(*leading, shape[rank - 1], *spec.shape[rank:]))


def _renumbered(axes: Shape) -> Shape:
    """Return leading axes after the one behind them has become an inner axis."""
    return tuple(
        replace(dim, axis=dim.axis - 1) if isinstance(dim, LeadingAxis) else dim for dim in axes
    )


def _leading(shape: tuple[int, ...], sized: bool) -> tuple[Dim, ...]:
    axes = range(len(shape), 0, -1)
    return tuple(
        ONE if length == 1 else LeadingAxis(axis, length if sized else None)
        for axis, length in zip(axes, shape, strict=True)
    )
