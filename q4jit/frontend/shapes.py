"""Symbolic shapes, and how they broadcast.

The last axis is a whole number that is known while tracing, and so is the inner axis before it,
which products with chosen experts have. Each leading axis is either `ONE` or a `LeadingAxis`, whose
length differs from call to call. Axes that NumPy adds in front are plain 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from q4jit.errors import TraceError


@dataclass(frozen=True)
class LeadingAxis:
    """An axis before the last, whose length is the call's own.

    Attributes:
        axis: its number, counted backwards from 1, the last of the leading axes.
        length: given only if it disagrees with another argument's, so that an error can show it.
    """

    axis: int
    length: int | None = None

    def __str__(self) -> str:
        return (
            f"M{'' if self.axis == 1 else self.axis}" if self.length is None else f"{self.length}"
        )


class LeadingOne(int):
    """The length 1 of a leading axis: it broadcasts like any 1, but is no axis of columns."""


ONE: Final = LeadingOne(1)

Dim = int | LeadingAxis
Shape = tuple[Dim, ...]


def has_columns(shape: Shape) -> bool:
    """Return whether the last axis is one of columns; a reduction may have removed it."""
    return bool(shape) and not isinstance(shape[-1], LeadingAxis | LeadingOne)


def leading_axes(shape: Shape) -> int:
    """Return how many axes come before those of fixed length."""
    return sum(isinstance(dim, LeadingAxis | LeadingOne) for dim in shape)


def inner_length(shape: Shape) -> int:
    """Return the length of the axis between the leading ones and the columns; 1 without one.

    It is that of the experts that are chosen for a row: the number of vectors that a row has.
    """
    fixed = [dim for dim in shape[-2:] if not isinstance(dim, LeadingAxis | LeadingOne)]
    return fixed[0] if len(fixed) == 2 else 1


def show_shape(shape: Shape) -> str:
    """Return a shape as people write it: [M, 576]."""
    return f"[{', '.join(map(str, shape))}]"


def broadcast(a: Shape, b: Shape) -> Shape:
    """Return the shape of two values combined element by element, as in NumPy.

    An axis M matches M or 1, never another number, whatever M is. Raises TraceError if two
    dimensions do not match.
    """
    result: list[Dim] = []
    for da, db in _aligned(a, b):
        if da != db and 1 not in (da, db):
            hint = ""
            if _is_open(da) != _is_open(db):
                hint = (
                    " (M, the number of rows, never matches a fixed length;"
                    " use keepdims=True in a reduction)"
                )
            elif str(da) == str(db):
                hint = f" (one {da} is a number of rows, the other a fixed length)"
            raise TraceError(
                f"cannot broadcast {show_shape(a)} with {show_shape(b)}; use equal dimensions, or "
                f"a dimension of 1{hint}"
            )
        result.append(db if da == 1 and (db != 1 or isinstance(db, LeadingOne)) else da)
    if _repeats(result):  # [M] + [M, 1] is an outer sum in NumPy
        raise TraceError(
            f"cannot broadcast {show_shape(a)} with {show_shape(b)} to "
            f"{show_shape(tuple(result))}, every row with every other; use keepdims=True in the "
            "reduction"
        )
    return tuple(result)


def _is_open(dim: Dim) -> bool:
    return isinstance(dim, LeadingAxis) and dim.length is None


def _repeats(shape: list[Dim]) -> bool:
    axes = [d.axis for d in shape if isinstance(d, LeadingAxis)]
    return len(axes) != len(set(axes))


def _aligned(a: Shape, b: Shape) -> Iterator[tuple[Dim, Dim]]:
    rank = max(len(a), len(b))
    yield from zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
