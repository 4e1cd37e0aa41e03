"""The number of rows while a function is traced: it has no value."""

from typing import Final

from q4jit.frontend.refusals import forbidden
from q4jit.frontend.shapes import LeadingAxis

ROWS_AS_NUMBER: Final = (
    "use the number of rows as a number",
    "a kernel serves any number of them, so only the last dimension, x.shape[-1], is known",
)


class RowCount:
    """The length of a leading axis. One kernel serves every length, so it has no value."""

    __slots__ = ("_dim",)

    def __init__(self, dim: LeadingAxis) -> None:
        self._dim = dim

    def __repr__(self) -> str:
        return str(self._dim)

    __index__ = __int__ = __float__ = __bool__ = forbidden(*ROWS_AS_NUMBER)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __index__
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __index__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __index__
    __hash__ = object.__hash__

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        return int
