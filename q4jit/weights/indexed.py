"""Matrices that ids choose from an expert tensor, and their products with vectors."""

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import ArgumentError, expected
from q4jit.weights.right_operand import RightOperand, checked_left, knows_ufuncs

USE_VECMAT: Final = "use np.vecmat(x, w[ids]) (q4jit.vecmat before NumPy 2.2)"


class IndexedExperts:
    """The matrices w[ids] [..., K, N] of an expert tensor w, which no copy is made of.

    `np.vecmat(x, w[ids])` with a NumPy array x computes the reference in float64.
    """

    __slots__ = ("_ids", "_matrices")

    def __init__(self, matrices: Sequence[RightOperand], ids: NDArray[np.intp]) -> None:
        """Choose matrices by their numbers; the caller has checked the ids."""
        self._matrices, self._ids = matrices, ids

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N), where ... is the shape of the ids."""
        return *self._ids.shape, *self._matrices[0].shape

    @property
    def ndim(self) -> int:
        """Two axes more than the ids have."""
        return self._ids.ndim + 2

    def _vecmat(self, x: object) -> NDArray[Any]:
        """Return x [..., K] times the matrix of each id, which leading axes broadcast with."""
        k, n = self._matrices[0].shape
        axes = f"w[ids] (..., K, N) = {self.shape}"
        x = checked_left(x, "x in np.vecmat(x, w[ids])", k, axes)
        try:
            lead = np.broadcast_shapes(x.shape[:-1], self._ids.shape)
        except ValueError:
            got = f"x {list(x.shape)} with ids {list(self._ids.shape)}"
            what = "leading axes of x that broadcast with the axes of ids"
            raise ArgumentError(expected(what, got, where="np.vecmat(x, w[ids])")) from None
        rows = np.broadcast_to(np.asarray(x, np.float64), (*lead, k)).reshape(-1, k)
        ids = np.broadcast_to(self._ids, lead).reshape(-1)
        y = np.empty((len(ids), n), x.dtype)
        with np.errstate(all="ignore"):  # NaN and Inf propagate
            for e in np.unique(ids):
                chosen = np.flatnonzero(ids == e)
                for columns, values in self._matrices[e]._product(rows[chosen]):
                    y[chosen, columns] = values
        return y.reshape(*lead, n).view(type(x))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(knows_ufuncs(value) for value in inputs if value is not self):
            return NotImplemented
        is_left = inputs[0] is self
        if ufunc.__name__ != "vecmat" or method != "__call__" or kwargs or is_left:
            raise ArgumentError(f"cannot compute np.{ufunc.__name__} of {self!r}; {USE_VECMAT}")
        return self._vecmat(inputs[0])

    def _refuse(self, *_: object) -> NoReturn:
        raise ArgumentError(f"cannot compute with {self!r}; {USE_VECMAT}")

    __array__ = __matmul__ = __rmatmul__ = _refuse

    def __repr__(self) -> str:
        return f"<experts w[ids] (..., K, N) = {self.shape}>"


def vecmat(x: Any, w: Any) -> Any:
    """Return x [..., K] times matrices w [..., K, N] of an expert tensor: [..., N].

    The same as `np.vecmat(x, w)`, which NumPy has from 2.2 on. w: `experts[ids]` of an
    `ExpertTensor`; leading axes of x and axes of ids broadcast. Computes in float64 for NumPy
    arrays; decorated functions compile it. Raises ArgumentError for other operands.
    """
    for operand in (x, w):
        traced = getattr(type(operand), "_traced_vecmat", None)
        if traced is not None:
            return traced(x, w)
    if not isinstance(w, IndexedExperts):
        what, got = "w[ids] of an ExpertTensor w", type(w).__name__
        raise ArgumentError(expected(what, got, where="right operand of vecmat"))
    return w._vecmat(x)
