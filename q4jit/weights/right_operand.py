"""The right operand of a product of NumPy arrays, which computes the reference for kernels."""

from collections.abc import Iterator
from typing import Any, ClassVar, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from q4jit.conversions import as_float32, as_numpy
from q4jit.errors import ArgumentError, expected
from q4jit.floats import float_type_of
from q4jit.weights.checks import describe

_FIRST: Final = (
    "a {kind} must be the right operand of @, as in x @ {name} with x [..., {inner}]; "
    "here it is the left one, with {axes} = {shape}"
)


class RightOperand:
    """A matrix w of blocks, or its transpose. `x @ w` with a NumPy array x is exact in float64.

    It is no ABC, because calls check for QuantizedTensor, and isinstance would take longer.

    Attributes:
        _name: how errors call it.
        _axes: how errors call its dimensions.
    """

    __slots__ = ("__weakref__",)
    _name: ClassVar[str]
    _axes: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """The dimension that products sum over, and the columns of their results."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    def _product(self, x: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield columns of the product with x [M, K]: which ones, and their values."""
        raise NotImplementedError

    def __matmul__(self, other: object) -> Any:
        if knows_ufuncs(other):
            return NotImplemented  # a traced array raises an error that says more
        return self._refuse_left()

    def __rmatmul__(self, x: object) -> NDArray[Any]:
        inner, width = self.shape
        axes = f"{self._name} {self._axes} = {self.shape}"
        x = checked_left(x, f"x in x @ {self._name}", inner, axes)
        x64 = np.asarray(x, np.float64).reshape(-1, inner)
        y = np.empty((len(x64), width), x.dtype)
        with np.errstate(all="ignore"):  # NaN and Inf propagate
            for columns, values in self._product(x64):
                y[:, columns] = values
        return y.reshape(*x.shape[:-1], width)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(knows_ufuncs(value) for value in inputs):
            return NotImplemented
        if ufunc is not np.matmul or method != "__call__" or kwargs:
            call = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
            extra = f" with {', '.join(f'{name}=' for name in kwargs)}" if kwargs else ""
            raise ArgumentError(
                f"np.{call}{extra} cannot take a {type(self).__name__}; use x @ {self._name}, "
                f"or {self._name}.dequantize() for a float32 array"
            )
        if isinstance(inputs[0], RightOperand):
            inputs[0]._refuse_left()
        return self.__rmatmul__(inputs[0])

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ArgumentError(
            f"{self!r} does not become an array by itself; use x @ {self._name}, "
            f"or {self._name}.dequantize() for a float32 array"
        )

    def _refuse_left(self) -> NoReturn:
        raise ArgumentError(
            _FIRST.format(
                kind=type(self).__name__,
                name=self._name,
                inner=self._axes[1],
                axes=self._axes,
                shape=self.shape,
            )
        )


def checked_left(x: object, where: str, inner: int, axes: str) -> NDArray[Any]:
    """Return the left operand of a product. Raises ArgumentError unless it has floats [..., inner].

    where: how errors call it. axes: the right operand and its shape.
    """
    if not isinstance(x, np.ndarray):
        cure = f"use {as_numpy('x', x)}"
        raise ArgumentError(expected("a NumPy array", type(x).__name__, where=where, cure=cure))
    if x.dtype != np.float64 and float_type_of(x.dtype) is None:
        dtypes = "float32, float16, bfloat16 or float64 in native byte order"
        cure = f"use {as_float32('x', x.dtype)}"
        got = f"{describe(x.dtype)} {list(x.shape)}"
        raise ArgumentError(expected(dtypes, got, where=where, cure=cure))
    if x.ndim == 0 or x.shape[-1] != inner:
        where = f"{where} with {axes}"
        raise ArgumentError(expected(f"shape [..., {inner}]", str(list(x.shape)), where=where))
    return x


def knows_ufuncs(value: object) -> bool:
    """Return whether another object, such as a traced array, handles NumPy's operations itself."""
    if isinstance(value, (np.ndarray, np.generic, RightOperand)):
        return False
    return getattr(type(value), "__array_ufunc__", None) is not None
