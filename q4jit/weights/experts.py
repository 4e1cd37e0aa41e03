"""`ExpertTensor`: the weights of a mixture's experts, an immutable tensor of GGUF blocks."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import ArgumentError, expected
from q4jit.locks import BUILD
from q4jit.sizes import whole_number
from q4jit.weights.checks import block_memory, index_array, tensor_shape
from q4jit.weights.decode import decode_matrix
from q4jit.weights.formats import Format, find_format
from q4jit.weights.indexed import USE_VECMAT, IndexedExperts
from q4jit.weights.layouts import GGUF
from q4jit.weights.resident import ResidentCopies
from q4jit.weights.scales import scale_facts
from q4jit.weights.stored import GgufBlocks, PackedBlocks, StoredBlocks
from q4jit.weights.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


class ExpertTensor(Sequence[QuantizedTensor]):
    """A weight [E, K, N] in GGUF blocks, a matrix per expert: immutable, compared by identity.

    Make one with `from_bytes`, `stack` or `load_gguf`. It is a sequence of `QuantizedTensor`s
    [K, N] that share its blocks. Column n of matrix e is row e·N + n of the GGUF tensor.
    """

    __slots__ = (
        "__weakref__",
        "_experts",
        "_format",
        "_resident",
        "_scale_facts",
        "_shape",
        "_signature",
        "_tensor",
    )
    __hash__: ClassVar[Any] = object.__hash__
    _experts: dict[int, QuantizedTensor]  # those that were asked for: a file may have millions
    _format: Format
    _resident: ResidentCopies
    _scale_facts: tuple[bool, bool] | None
    _shape: tuple[int, int, int]
    _signature: tuple[str, int, int, int, bool, bool] | None
    _tensor: Any  # q4jit.torch keeps PyTorch's view of the blocks here

    def __init__(self, *_: object, **__: object) -> None:
        """Raise ArgumentError: tensors are made by functions that check their bytes."""
        raise ArgumentError(
            "an ExpertTensor is not made by calling the class; use "
            "ExpertTensor.from_bytes(raw, shape=(E, K, N), format=...) for blocks, "
            "ExpertTensor.stack(weights) for a list of matrices, or q4jit.load_gguf(path)[name]"
        )

    @classmethod
    def of_memory(cls, fmt: Format, memory: memoryview, experts: int, n: int) -> Self:
        """Wrap memory that nobody can write to, with `experts` times the columns of `n` rows."""
        column_bytes = memory.nbytes // (experts * n)
        k = column_bytes // fmt.block_bytes * fmt.block_elements
        stored = GgufBlocks(memory, (experts, n, column_bytes))
        return cls._of_stored(fmt, (experts, k, n), stored)

    @classmethod
    def of_packed(
        cls,
        fmt: Format,
        experts: int,
        k: int,
        n: int,
        layout: str,
        read: Callable[[], NDArray[np.uint8]],
        facts: tuple[bool, bool] | None = None,
    ) -> Self:
        """Make a tensor [E, K, N] that only has the bytes of a layout, expert after expert.

        facts: whether all matrices have finite scales, and whether all suit f16, if known. The rest
        is as in `QuantizedTensor.of_packed`.
        """
        shape = (experts, k, n)
        return cls._of_stored(fmt, shape, PackedBlocks(fmt, layout, shape, read), facts)

    @classmethod
    def _of_stored(
        cls,
        fmt: Format,
        shape: tuple[int, int, int],
        stored: StoredBlocks,
        facts: tuple[bool, bool] | None = None,
    ) -> Self:
        w = cls.__new__(cls)
        w._format, w._shape, w._experts = fmt, shape, {}
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
        shape: tuple[int, int, int],
        format: str,  # noqa: A002 - the attribute's name
    ) -> "ExpertTensor":
        """Make a tensor of `shape` (E, K, N) from the bytes of E·N GGUF rows, matrix after matrix.

        raw: a C-contiguous buffer of exactly the tensor's bytes. It is referenced if nobody can
        write to it (bytes, a read-only map, or a view of one), and copied otherwise. Raises
        FormatError if bytes, shape and format do not match.
        """
        fmt = find_format(format)
        experts, k, n = tensor_shape(shape, "(E, K, N)")
        column_bytes = fmt.column_bytes(k)
        columns = f"{experts} × {n} columns of {column_bytes}"
        where = f"{fmt.name} of shape (E, K, N) = ({experts}, {k}, {n})"
        memory = block_memory(raw, experts * n * column_bytes, columns, where)
        return cls.of_memory(fmt, memory, experts, n)

    @classmethod
    def stack(cls, weights: Sequence[QuantizedTensor]) -> "ExpertTensor":
        """Make a tensor of a copy of matrices [K, N], one per expert.

        Raises ArgumentError unless there is at least one, and all have one K, N and format.
        """
        matrices: list[Any] = list(weights)
        for e, w in enumerate(matrices):
            if not isinstance(w, QuantizedTensor):
                where = f"expert {e}"
                raise ArgumentError(expected("a QuantizedTensor", type(w).__name__, where=where))
            if (w.format, w.shape) != (matrices[0].format, matrices[0].shape):
                raise ArgumentError(expected(repr(matrices[0]), repr(w), where=f"expert {e}"))
        if not matrices:
            raise ArgumentError(expected("at least one QuantizedTensor", "none", where="stack"))
        raw = b"".join(w.raw.data for w in matrices)
        k, n = matrices[0].shape
        return cls.from_bytes(raw, shape=(len(matrices), k, n), format=matrices[0].format)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N): E experts, each a matrix that x [M, K] is multiplied by to give [M, N]."""
        return self._shape

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    @property
    def format(self) -> str:
        """The name of the block format, for example "Q4_0"."""
        return self._format.name

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, without repacked copies."""
        experts, k, n = self._shape
        return experts * n * self._format.column_bytes(k)

    @property
    def raw(self) -> NDArray[np.uint8]:
        """The blocks in GGUF's order: read-only uint8 [E, N, column_bytes]."""
        return self._resident.stored.columns()

    def dequantize(self) -> NDArray[np.float32]:
        """Decode every element: f32 [E, K, N]."""
        return np.stack([decode_matrix(self._format, columns) for columns in self.raw])

    @property
    def signature(self) -> tuple[str, int, int, int, bool, bool]:
        """(format, E, K, N, has_finite_scales, suits_f16), which kernels are compiled for."""
        if self._signature is None:
            self._signature = (self.format, *self._shape, *self._scales)
        return self._signature

    @property
    def _scales(self) -> tuple[bool, bool]:
        """Whether all matrices have finite scales, and whether all suit f16; computed once."""
        with BUILD:
            if self._scale_facts is None:
                with self._resident.stored.drained() as columns:
                    facts = [scale_facts(self._format, columns[e]) for e in range(len(self))]
                finite, suits_f16 = map(all, zip(*facts, strict=True))
                self._scale_facts = finite, suits_f16
            return self._scale_facts

    def __len__(self) -> int:
        return self._shape[0]

    def __iter__(self) -> Iterator[QuantizedTensor]:
        return map(self._expert, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Return the matrix [K, N] of an expert, which shares the blocks, or those of many.

        index: a number, or an integer array of numbers from 0 to E - 1, for `np.vecmat(x, w[ids])`.
        Raises IndexError for a number beyond the experts, ArgumentError for another index.
        """
        is_array = isinstance(index, np.ndarray | list)
        if is_array and (type(index) is not np.ndarray or index.ndim):
            where = "ids of w[ids]"
            return IndexedExperts(self, index_array(index, len(self), "experts", where))
        try:
            e = whole_number(index)
        except TypeError:
            got = f"{type(index).__name__} {index!r}"
            where = "index of an ExpertTensor"
            raise ArgumentError(
                expected("the number of an expert, or an array of ids", got, where=where)
            ) from None
        if not -len(self) <= e < len(self):
            what = f"an expert from 0 to {len(self) - 1}"
            raise IndexError(expected(what, str(e), where="index of an ExpertTensor"))
        return self._expert(e % len(self))

    def _expert(self, e: int) -> QuantizedTensor:
        """Return the matrix of an expert: always the same object."""
        w = self._experts.get(e)
        if w is None:
            facts = self._scale_facts if self._scale_facts == (True, True) else None
            stored = self._resident.stored.expert(e)
            new = QuantizedTensor.of_stored(self._format, self._shape[1:], stored, facts)
            w = self._experts.setdefault(e, new)  # two threads get the same object
        return w

    def __eq__(self, other: object) -> bool:
        return self is other

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ArgumentError(
            f"{self!r} does not become an array by itself; {USE_VECMAT}, "
            "or w.dequantize() for a float32 array"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the blocks, without repacked copies; `from_bytes` checks them again."""
        return _from_pickle, (self._resident.made(GGUF), self._shape, self.format)

    def __copy__(self) -> Self:
        return self  # immutable

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<ExpertTensor {self.format} (E, K, N) = {self._shape}, {self.nbytes} bytes>"


def _from_pickle(raw: Any, shape: tuple[int, int, int], name: str) -> ExpertTensor:
    return ExpertTensor.from_bytes(raw, shape=shape, format=name)
