"""The one copy of a weight's blocks that its tensor keeps: as in a GGUF file, or in a layout."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
from numpy.typing import NDArray

from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, packed_bytes
from q4jit.weights.mapped import DrainedColumns
from q4jit.weights.unpack import check_bytes, unpack, unpack_experts


class GgufBlocks:
    """Blocks in GGUF's order, in memory that nobody can write to.

    Attributes:
        memory: their bytes.
    """

    __slots__ = ("_array", "_shape", "memory")
    layout: Final = GGUF

    def __init__(self, memory: memoryview, shape: tuple[int, ...]) -> None:
        """Wrap memory. shape: (N, column_bytes), or (E, N, column_bytes) for experts."""
        assert memory.readonly
        self.memory, self._shape = memory, shape
        self._array = self.columns()

    def columns(self) -> NDArray[np.uint8]:
        """Return the blocks as a new read-only array, uint8 [N, column_bytes] or [E, N, …]."""
        return np.frombuffer(self.memory, np.uint8).reshape(self._shape)

    def drained(self) -> AbstractContextManager[DrainedColumns]:
        """Return the blocks for one reading, which gives the pages of a mapped file back."""
        return DrainedColumns(self.memory, self._shape)

    def packed(self) -> NDArray[np.uint8]:
        """Return the bytes in the own layout, read-only: always the same array."""
        return self._array

    def expert(self, e: int) -> "GgufBlocks":
        """Return the blocks of one expert, in the same memory."""
        size = self.memory.nbytes // self._shape[0]
        return GgufBlocks(self.memory[e * size : (e + 1) * size], self._shape[1:])


class PackedBlocks:
    """Blocks in a layout only, which a function reads whenever they are needed.

    Attributes:
        layout: the layout.
    """

    __slots__ = ("_fmt", "_read", "_shape", "layout")

    def __init__(
        self,
        fmt: Format,
        layout: str,
        shape: tuple[int, ...],
        read: Callable[[], NDArray[np.uint8]],
    ) -> None:
        """Keep the function.

        shape: (K, N), or (E, K, N) for experts. read: returns the bytes of the layout on the host,
        contiguous uint8 of any shape, which are the same in every call. Raises FormatError for an
        unknown layout, for one that the format does not have, and unless K is whole blocks.
        """
        packed_bytes(fmt, layout, *shape[-2:])
        self._fmt, self._read, self._shape, self.layout = fmt, read, shape, layout

    def columns(self) -> NDArray[np.uint8]:
        """Unpack the blocks: a new read-only array, uint8 [N, column_bytes] or [E, N, …].

        Raises FormatError unless `read` returns the bytes of the layout.
        """
        make = unpack if len(self._shape) == 2 else unpack_experts
        return make(self._fmt, self.layout, self.packed(), *self._shape)

    def drained(self) -> AbstractContextManager[NDArray[np.uint8]]:
        """Return what `columns` does, for one reading."""
        return nullcontext(self.columns())

    def packed(self) -> NDArray[np.uint8]:
        """Return the bytes in the own layout, read-only and where `read` has them.

        Raises FormatError unless `read` returns the bytes of the layout.
        """
        packed = self._read()
        check_bytes(self._fmt, self.layout, packed, self._shape)
        packed = packed.reshape(-1)
        packed.flags.writeable = False
        return packed

    def expert(self, e: int) -> "PackedBlocks":
        """Return the blocks of one expert, which are a part of what `read` returns."""
        size = packed_bytes(self._fmt, self.layout, *self._shape[-2:])

        def read() -> NDArray[np.uint8]:
            return self.packed()[e * size : (e + 1) * size]

        return PackedBlocks(self._fmt, self.layout, self._shape[1:], read)


StoredBlocks = GgufBlocks | PackedBlocks
