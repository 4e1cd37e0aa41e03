"""What a weight may be made from, and what may be asked of it."""

import mmap
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.errors import ArgumentError, FormatError


def matrix_shape(shape: object) -> tuple[int, int]:
    """Return (K, N) as ints. Raises FormatError unless it is a pair of positive sizes."""
    try:
        k, n = (operator.index(size) for size in shape)  # type: ignore[attr-defined]  # raises TypeError
    except (TypeError, ValueError):
        raise FormatError(
            f"a weight has two dimensions (K, N): found shape {shape!r}, accepted is a pair of ints"
        ) from None
    if k <= 0 or n <= 0:
        raise FormatError(
            f"a weight cannot be empty: found (K, N) = ({k}, {n}), accepted are positive sizes"
        )
    return k, n


def contiguous(raw: Any) -> memoryview:
    """Return the bytes of a buffer. Raises FormatError unless it is C-contiguous."""
    try:
        view = memoryview(raw)
    except (TypeError, ValueError, BufferError) as error:
        raise FormatError(
            f"found {type(raw).__name__} ({error}), accepted is a contiguous buffer such as bytes, "
            "a memory map or a uint8 array"
        ) from None
    if not view.c_contiguous or view.format == "O":
        kind = "an object array" if view.format == "O" else "a strided or transposed buffer"
        raise FormatError(f"found {kind}, accepted is C-contiguous: np.ascontiguousarray(raw)")
    return view


def is_frozen(raw: object) -> bool:
    """Whether nobody can write to the memory of a buffer: it is cut from bytes or a read-only map.

    An array that owns its memory does not qualify, whatever its flag says now: an older view may
    be writable, and the flag can be set again.
    """
    while True:
        if isinstance(raw, np.ndarray):
            raw = raw.base
        elif isinstance(raw, memoryview):
            raw = raw.obj
        elif isinstance(raw, mmap.mmap):
            return memoryview(raw).readonly
        else:
            return isinstance(raw, bytes)


def row_ids(ids: ArrayLike, n: int) -> NDArray[np.intp]:
    """Return ids of rows as an index. Raises ArgumentError unless they are integers in 0..n-1."""
    index = np.asarray(ids)
    if index.size == 0 and not isinstance(ids, np.ndarray):
        index = index.astype(np.intp)  # NumPy calls [] float64
    if index.dtype.kind not in "iu":
        raise ArgumentError(
            f"rows takes integer ids: found {describe(index.dtype)}, "
            "accepted is ids.astype(np.int64)"
        )
    if index.size and (index.min() < 0 or index.max() >= n):
        wrong = index.min() if index.min() < 0 else index.max()
        raise ArgumentError(f"rows: found id {wrong}, accepted are 0 to {n - 1}")
    return index.astype(np.intp)


def describe(dtype: np.dtype[Any]) -> str:
    """Name a dtype in a message."""
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder('=')} in foreign byte order"
