"""Blocks in mapped files, whose pages the process gives back once it has read them.

A page of a mapped file counts as memory of the process from the first read of it on. Repacking
reads a whole weight once, so its pages would double the memory of a model while it is loaded.
"""

import contextlib
import mmap
from types import TracebackType
from typing import Final, Self, overload

import numpy as np
from numpy.typing import NDArray

_GIVES_BACK: Final = hasattr(mmap, "MADV_DONTNEED")  # Windows cannot
# Reading a page of a file maps its neighbours as well: all that Linux caches together with it, at
# most a huge page of 2 MB.
_MAPPED_TOGETHER: Final = 2 << 20


def give_back(memory: memoryview) -> None:
    """Give the pages of memory back to the system, if it is part of a read-only mapped file.

    Later reads get the same bytes from the file again, as neighbours in the same pages do. Pages
    that the system does not take, such as locked ones, stay.
    """
    mapped = memory.obj
    if not (_GIVES_BACK and isinstance(mapped, mmap.mmap) and memory.nbytes):
        return
    whole = memoryview(mapped)
    if not whole.readonly:  # what was written to a private map would be lost
        return
    start = address_of(memory) - address_of(whole)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_DONTNEED, first, start + memory.nbytes - first)


def address_of(memory: memoryview) -> int:
    """Return where memory begins; 0 if it is empty."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data) if memory.nbytes else 0


class DrainedColumns:
    """Columns in GGUF's order that are read once, in bands from the first to the last.

    Pages of a mapped file are given back as soon as later bands are read, and all of them at the
    end of a `with` statement.

    Attributes:
        shape: (N, column_bytes), or (E, N, column_bytes) for experts.
    """

    def __init__(self, memory: memoryview, shape: tuple[int, ...]) -> None:
        """Wrap memory with the bytes of `shape`."""
        self._memory, self.shape = memory, shape
        self._given = 0  # bytes

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: slice) -> NDArray[np.uint8]: ...

    @overload
    def __getitem__(self, index: int) -> "DrainedColumns": ...

    def __getitem__(self, index: slice | int) -> "NDArray[np.uint8] | DrainedColumns":
        """Return columns, or the columns of an expert; give back the pages of those before."""
        size = self._memory.nbytes // len(self)
        start = index if isinstance(index, int) else index.indices(len(self))[0]
        self._give_back(start * size)
        if isinstance(index, int):
            return DrainedColumns(self._memory[start * size : (start + 1) * size], self.shape[1:])
        return np.frombuffer(self._memory, np.uint8).reshape(self.shape)[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back(self._memory.nbytes)

    def _give_back(self, end: int) -> None:
        """Give back the pages of the bytes before `end`, also those that were mapped again."""
        give_back(self._memory[max(0, self._given - _MAPPED_TOGETHER) : end])
        self._given = max(self._given, end)
