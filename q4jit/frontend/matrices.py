"""The base of symbolic weights: the right operand of a product, whose elements have no values."""

from collections.abc import Callable
from typing import ClassVar, Final, NoReturn

import numpy as np

from q4jit.frontend.carets import located
from q4jit.frontend.cures import numpy_name
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.products import refuse_product
from q4jit.frontend.refusals import INDEX_PRODUCT, ROWS_OR_EXPERTS, USE_PRODUCT, refuse
from q4jit.frontend.traced_weight import TracedWeight

_INSTEAD: Final[dict[Callable[..., object], str]] = {
    np.take: "use w.rows(ids)",
    np.transpose: "use w.T",
}


class SymbolicMatrix(TracedWeight):
    """A quantised weight of the function being traced, or its transpose.

    `SymbolicArray` computes products, because it is always their left operand.

    Attributes:
        _transposed: whether it stands for the transpose.
        _attributes: what to use instead of an unknown attribute.
    """

    __slots__ = ()

    _transposed: ClassVar[bool]
    _attributes: ClassVar[str]

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @located
    def __rmatmul__(self, other: object) -> NoReturn:
        refuse_product(other, self)

    @located
    def __matmul__(self, other: object) -> NoReturn:
        refuse_product(self, other)

    @located
    def __getitem__(self, index: object) -> NoReturn:
        cure = ROWS_OR_EXPERTS if type(index) is SymbolicIds else INDEX_PRODUCT
        refuse("index a quantised weight", cure)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        cure = "use w.T" if name == "transpose" else self._attributes
        return located(refuse)(f"use the attribute .{name} of a quantised weight", cure)

    @located
    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> NoReturn:
        if ufunc is not np.matmul or method != "__call__" or kwargs:
            refuse(f"compute np.{ufunc.__name__} of a quantised weight", USE_PRODUCT)
        refuse_product(*inputs)

    @located
    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        cure = _INSTEAD.get(function, USE_PRODUCT)
        refuse(f"compute {numpy_name(function)} of a quantised weight", cure)
