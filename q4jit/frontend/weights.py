"""Symbolic weights and their transposes."""

from typing import ClassVar

from q4jit.frontend.carets import located
from q4jit.frontend.matrices import SymbolicMatrix
from q4jit.frontend.symbols import SymbolicArray
from q4jit.weights.tensor import QuantizedTensor, TransposedTensor


class SymbolicWeight(SymbolicMatrix):
    """A quantised weight [K, N] of the function being traced."""

    __slots__ = ()

    _transposed: ClassVar[bool] = False
    _attributes: ClassVar[str] = (
        "use x @ w, y @ w.T, w.rows(ids), w.dequantize(), w.shape, w.ndim or w.format"
    )

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        return QuantizedTensor

    def __repr__(self) -> str:
        return f"<traced weight {self._spec}>"

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self._spec.k, self._spec.n

    @property
    def T(self) -> "SymbolicTranspose":  # noqa: N802 - NumPy's name
        """The transpose [N, K], which reads the same blocks."""
        return SymbolicTranspose(self._builder, self._arg)

    mT = T  # noqa: N815 - NumPy's name

    @located
    def dequantize(self) -> SymbolicArray:
        """Return the weights as f32 [K, N], which can only be a result of the function."""
        return SymbolicArray(self._builder, self._builder.dequantize(self._arg))

    @located
    def rows(self, ids: object) -> SymbolicArray:
        """Return GGUF rows as f32 [*ids.shape, K], which can only be a result of the function."""
        cure = "pass np.array(ids, np.int64) as an argument"
        node = self._ids_node(ids, "an int32 or int64 array [M]", "w.rows(ids)", cure)
        return SymbolicArray(self._builder, self._builder.rows(self._arg, node))


class SymbolicTranspose(SymbolicMatrix):
    """The transpose [N, K] of a quantised weight of the function being traced."""

    __slots__ = ()

    _transposed: ClassVar[bool] = True
    _attributes: ClassVar[str] = "use y @ w.T, w.T.shape, w.T.ndim, w.T.format or w itself"

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        return TransposedTensor

    def __repr__(self) -> str:
        return f"<traced transpose of weight {self._spec}>"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._spec.n, self._spec.k

    @property
    def T(self) -> SymbolicWeight:  # noqa: N802 - NumPy's name
        """The weight itself."""
        return SymbolicWeight(self._builder, self._arg)

    mT = T  # noqa: N815 - NumPy's name
