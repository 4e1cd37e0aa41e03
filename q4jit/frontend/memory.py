"""Which traced arrays share memory in NumPy, so that writing in place is right or refused."""

import weakref
from typing import Final

from q4jit.errors import TraceError, expected
from q4jit.frontend.graph import Node
from q4jit.frontend.refusals import refuse
from q4jit.frontend.shapes import show_shape

_NEW_VALUE: Final = "compute a new value, as in y = y + 1"


class Memory:
    """The memory of a traced array and of its views.

    Traced values have no memory. This records what NumPy would share: an operation in place changes
    the array and every view of it.

    Attributes:
        of_argument: it belongs to the caller.
    """

    def __init__(self, of_argument: bool = False) -> None:
        self.of_argument = of_argument
        self._arrays: list[tuple[weakref.ref[object], range]] = []

    def add(self, array: object, start: int, width: int) -> None:
        """Record an array that has columns start..start + width of this memory."""
        self._arrays.append((weakref.ref(array), range(start, start + width)))

    def columns(self, array: object) -> range:
        """Return the columns of a recorded array."""
        return next(columns for known, columns in self._arrays if known() is array)

    def check_write(self, array: object, sign: str) -> None:
        """Raise TraceError if writing to an array would change the caller's or another array.

        sign: the operator in place, such as "+=".
        """
        if self.of_argument:
            refuse(
                f"change an argument in place with {sign}",
                f"{_NEW_VALUE}, or start with a copy, x = x.copy()",
            )
        own = self.columns(array)
        for known, columns in self._arrays:
            other = known()
            overlaps = columns.start < own.stop and own.start < columns.stop
            if other is not None and other is not array and overlaps:
                refuse(
                    f"change an array in place with {sign} while a slice or view shares its values",
                    f"{_NEW_VALUE}, or take a copy of the slice, y[..., a:b].copy()",
                )


def check_in_place(left: Node, result: Node, sign: str) -> None:
    """Raise TraceError unless the array of `left` can hold a result: its shape and dtype stay."""
    if result.shape != left.shape:
        raise TraceError(
            expected(
                f"a result of the left side's shape {show_shape(left.shape)}",
                show_shape(result.shape),
                where=sign,
                cure=_NEW_VALUE,
            )
        )
    if left.is_bool and not result.is_bool:
        raise TraceError(
            expected(
                "truth values (results of comparisons), as on its left side",
                "numbers",
                where=sign,
                cure=_NEW_VALUE,
            )
        )
