"""Symbolic shapes, and how they broadcast.

The last axis is a whole number known while tracing; each leading axis is either 1 or the call's own
length there, written as a `Lead`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from q4jit.errors import TraceError


@dataclass(frozen=True)
class Lead:
    """Leading axis number `axis`, counted from the last but one.

    `length` is given only where it disagrees with another argument's, so that an error can show it.
    """

    axis: int
    length: int | None = None

    def __str__(self) -> str:
        return (
            f"M{'' if self.axis == 1 else self.axis}" if self.length is None else f"{self.length}"
        )


Dim = int | Lead
Shape = tuple[Dim, ...]


def show_shape(shape: Shape) -> str:
    """A shape as people write it: [M, 576]."""
    return f"[{', '.join(map(str, shape))}]"


def broadcast(a: Shape, b: Shape) -> Shape:
    """NumPy's broadcasting, by symbol: an axis M never matches a number, whatever M is."""
    result: list[Dim] = []
    for da, db in _aligned(a, b):
        if da != db and 1 not in (da, db):
            hint = ""
            if (isinstance(da, Lead) and da.length is None) != (
                isinstance(db, Lead) and db.length is None
            ):
                hint = (
                    " (M stands for the rows of x and is never matched with a fixed length;"
                    " after a reduction use keepdims=True)"
                )
            raise TraceError(
                f"shapes {show_shape(a)} and {show_shape(b)} do not match{hint}: accepted are "
                "equal shapes, or a dimension of 1 to broadcast"
            )
        result.append(db if da == 1 else da)
    if _repeats(result):  # [M] + [M, 1] is an outer sum in NumPy
        raise TraceError(
            f"shapes {show_shape(a)} and {show_shape(b)} meet as {show_shape(tuple(result))}, "
            "every row with every other: accepted are values row by row; after a reduction use "
            "keepdims=True"
        )
    return tuple(result)


def _repeats(shape: list[Dim]) -> bool:
    leads = [d.axis for d in shape if isinstance(d, Lead)]
    return len(leads) != len(set(leads))


def _aligned(a: Shape, b: Shape) -> Iterator[tuple[Dim, Dim]]:
    rank = max(len(a), len(b))
    yield from zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
