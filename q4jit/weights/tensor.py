"""`QuantizedTensor`: an immutable matrix of GGUF blocks."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.errors import ArgumentError
from q4jit.locks import BUILD
from q4jit.weights.checks import block_memory, matrix_shape, row_ids
from q4jit.weights.decode import batches, decode, decode_matrix
from q4jit.weights.formats import Format, find_format
from q4jit.weights.layouts import GGUF
from q4jit.weights.resident import ResidentCopies
from q4jit.weights.right_operand import RightOperand
from q4jit.weights.scales import scale_facts
from q4jit.weights.stored import GgufBlocks, PackedBlocks, StoredBlocks

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


class QuantizedTensor(RightOperand):
    """A weight matrix [K, N] in GGUF blocks: immutable, compared and hashed by identity.

    Make one with `from_bytes`, `quantize` or `load_gguf`. Column n of the matrix is row n of the
    GGUF tensor: K/block_elements contiguous blocks. `x @ w` with a NumPy array x computes the
    reference in float64.
    """

    __slots__ = ("_fmt", "_resident", "_scale_facts", "_shape", "_signature", "_tensor")
    _name: ClassVar[str] = "w"
    _axes: ClassVar[str] = "(K, N)"
    _fmt: Format
    _resident: ResidentCopies
    _scale_facts: tuple[bool, bool] | None
    _shape: tuple[int, int]
    _signature: tuple[str, int, int, bool, bool, str] | None
    _tensor: Any  # q4jit.torch keeps PyTorch's view of the blocks here

    def __init__(self, *_: object, **__: object) -> None:
        """Raise ArgumentError: tensors are made by functions that check their bytes."""
        raise ArgumentError(
            "a QuantizedTensor is not made by calling the class; use "
            'q4jit.quantize(w, "Q4_0") for a float matrix [K, N], '
            "QuantizedTensor.from_bytes(raw, shape=(K, N), format=...) for blocks, "
            "or q4jit.load_gguf(path)[name]"
        )

    @classmethod
    def of_memory(cls, fmt: Format, memory: memoryview, n: int) -> Self:
        """Wrap memory that nobody can write to, with the columns of `n` GGUF rows."""
        column_bytes = memory.nbytes // n
        k = column_bytes // fmt.block_bytes * fmt.block_elements
        return cls.of_stored(fmt, (k, n), GgufBlocks(memory, (n, column_bytes)))

    @classmethod
    def of_packed(
        cls,
        fmt: Format,
        k: int,
        n: int,
        layout: str,
        read: Callable[[], NDArray[np.uint8]],
        facts: tuple[bool, bool] | None = None,
    ) -> Self:
        """Make a tensor [K, N] that only has the bytes of a layout, not its GGUF blocks.

        Kernels on the CPU that take the layout read these bytes in place; whatever else needs the
        blocks, `raw` for example, unpacks them each time.

        read: returns the bytes on the host, contiguous uint8 of any shape, which never change.
        facts: has_finite_scales and suits_f16, if known; else they are computed when needed. Raises
        FormatError for an unknown layout, for one that the format does not have, and unless K is
        whole blocks; and later, unless `read` returns the bytes of the layout.
        """
        return cls.of_stored(fmt, (k, n), PackedBlocks(fmt, layout, (k, n), read), facts)

    @classmethod
    def of_stored(
        cls,
        fmt: Format,
        shape: tuple[int, int],
        stored: StoredBlocks,
        facts: tuple[bool, bool] | None = None,
    ) -> Self:
        """Wrap the blocks of a matrix of `shape` (K, N). facts: as in `of_packed`."""
        w = cls.__new__(cls)
        w._fmt, w._shape = fmt, shape
        # an attribute, not a property: launches read it in every call
        w._resident = ResidentCopies(fmt, stored)
        w._scale_facts = facts
        w._signature = None
        w._tensor = None
        return w

    @classmethod
    def from_bytes(
        cls,
        raw: "Buffer | NDArray[Any]",
        *,
        shape: tuple[int, int],
        format: str,  # noqa: A002 - the attribute's name
    ) -> "QuantizedTensor":
        """Make a tensor of `shape` (K, N) from the bytes of N GGUF rows (columns of the matrix).

        raw: a C-contiguous buffer of exactly the tensor's bytes. It is referenced if nobody can
        write to it (bytes, a read-only map, or a view of one), and copied otherwise. Raises
        FormatError if bytes, shape and format do not match.
        """
        fmt = find_format(format)
        k, n = matrix_shape(shape)
        column_bytes = fmt.column_bytes(k)
        columns = f"{n} columns of {column_bytes}"
        where = f"{fmt.name} of shape (K, N) = ({k}, {n})"
        return cls.of_memory(fmt, block_memory(raw, n * column_bytes, columns, where), n)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N): x [M, K] @ w gives [M, N]."""
        return self._shape

    @property
    def format(self) -> str:
        """The name of the block format, for example "Q4_0"."""
        return self._fmt.name

    @property
    def block_format(self) -> Format:
        """The description of the format."""
        return self._fmt

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, without repacked copies."""
        k, n = self._shape
        return n * self._fmt.column_bytes(k)

    @property
    def raw(self) -> NDArray[np.uint8]:
        """The blocks in GGUF's order: read-only uint8 [N, column_bytes].

        Each access makes an array of its own, so that changing its shape, strides or dtype in place
        does not change the tensor.
        """
        return self._resident.stored.columns()

    def dequantize(self) -> NDArray[np.float32]:
        """Decode every element: f32 [K, N] in Fortran order, because GGUF stores columns."""
        return decode_matrix(self._fmt, self.raw)

    def rows(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Look up GGUF rows (columns of the matrix, for example embeddings) and decode only these.

        ids: integers in 0..N-1, of any shape. Returns f32 [*ids.shape, K]. Raises ArgumentError
        for other ids.
        """
        k, n = self._shape
        index = row_ids(ids, n)
        flat, columns = index.reshape(-1), self.raw
        out = np.empty((flat.size, k), np.float32)
        for batch in batches(flat.size, k):
            out[batch] = decode(self._fmt, columns[flat[batch]])
        return out.reshape(*index.shape, k)

    @property
    def has_finite_scales(self) -> bool:
        """Whether every scale and minimum (every element of F16 and F32) is finite.

        Some kernels multiply zeros by scales, where Inf would give NaN; they are chosen only for
        finite scales. Computed once.
        """
        return self._scales[0]

    @property
    def suits_f16(self) -> bool:
        """Whether a product within 5e-4 may round the values of Q4_0 to f16, as well as x.

        Every |scale| must be below 128 (kernels need 2⁹ times each scale as an f16), no scale may
        dominate, and the rms relative error of the values must be at most 3.5e-4 (denormal values
        count as lost), whatever the quants are. True for other formats, because no kernel rounds
        their values. Computed once.
        """
        return self._scales[1]

    @property
    def signature(self) -> tuple[str, int, int, bool, bool, str]:
        """(format, K, N, has_finite_scales, suits_f16, held), which kernels are compiled for.

        held: the only layout that the tensor has; empty if it has its GGUF blocks.
        """
        if self._signature is None:
            stored = self._resident.stored
            held = "" if isinstance(stored, GgufBlocks) else stored.layout
            self._signature = (self.format, *self._shape, *self._scales, held)
        return self._signature

    @property
    def _scales(self) -> tuple[bool, bool]:
        """(has_finite_scales, suits_f16), computed from all scales once."""
        with BUILD:
            if self._scale_facts is None:
                with self._resident.stored.drained() as columns:
                    self._scale_facts = scale_facts(self._fmt, columns)
            return self._scale_facts

    @property
    def T(self) -> "TransposedTensor":  # noqa: N802 - NumPy's name
        """The transpose [N, K], without a copy: the right operand of y @ w.T."""
        return TransposedTensor(self)

    @property
    def mT(self) -> "TransposedTensor":  # noqa: N802 - NumPy's name
        """The same as `T`."""
        return self.T

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the blocks, without repacked copies; `from_bytes` checks them again.

        The array is always the same one, because joblib writes each large array to a file that all
        workers map. Packed blocks are unpacked for each pickle.
        """
        return _from_pickle, (self._resident.made(GGUF), self._shape, self.format)

    def __copy__(self) -> Self:
        return self  # immutable

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __repr__(self) -> str:
        k, n = self._shape
        return f"<QuantizedTensor {self.format} (K, N) = ({k}, {n}), {self.nbytes} bytes>"

    def _product(self, x: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield columns of x [M, K] @ w [K, N]."""
        for batch, values in self._decoded():
            yield batch, x @ values.T

    def _decoded(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield columns, some at a time, and their elements: f64 [columns, K]."""
        (k, n), columns = self._shape, self.raw
        for batch in batches(n, k):
            yield batch, decode(self._fmt, columns[batch]).astype(np.float64)


class TransposedTensor(RightOperand):
    """The transpose [N, K] of a `QuantizedTensor`, which it shares the blocks of.

    `y @ w.T` with a NumPy array y computes the reference in float64. Pass w itself to a decorated
    function, which writes `w.T`.
    """

    __slots__ = ("_w",)
    _name: ClassVar[str] = "w.T"
    _axes: ClassVar[str] = "(N, K)"

    def __init__(self, w: QuantizedTensor) -> None:
        """Wrap a tensor."""
        self._w = w

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): y [M, N] @ w.T gives [M, K]."""
        k, n = self._w.shape
        return n, k

    @property
    def format(self) -> str:
        """The name of the block format, for example "Q4_0"."""
        return self._w.format

    @property
    def T(self) -> QuantizedTensor:  # noqa: N802 - NumPy's name
        """The tensor itself."""
        return self._w

    @property
    def mT(self) -> QuantizedTensor:  # noqa: N802 - NumPy's name
        """The same as `T`."""
        return self._w

    def dequantize(self) -> NDArray[np.float32]:
        """Decode every element: f32 [N, K] in C order, because GGUF stores columns."""
        return self._w.dequantize().T

    def __repr__(self) -> str:
        return f"<transpose of {self._w!r}>"

    def _product(self, x: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield x [M, N] @ w.T [N, K], whole."""
        total = np.zeros((len(x), self._w.shape[0]))
        for batch, values in self._w._decoded():
            total += x[:, batch] @ values
        yield slice(None), total


def _from_pickle(raw: Any, shape: tuple[int, int], name: str) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(raw, shape=shape, format=name)
