"""Checks of the bytes and shapes that weights are made from, and of row ids."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.errors import ArgumentError, FormatError, expected
from q4jit.floats import float_type_of
from q4jit.sizes import whole_number
from q4jit.weights.mapped import address_of


def matrix_shape(shape: object) -> tuple[int, int]:
    """Return (K, N) as ints. Raises FormatError unless it is a pair of positive sizes."""
    k, n = tensor_shape(shape, "(K, N)")
    return k, n


def tensor_shape(shape: object, axes: str) -> tuple[int, ...]:
    """Return a shape as ints. Raises FormatError unless it has a positive size for each of `axes`.

    axes: for example "(K, N)".
    """
    count = axes.count(",") + 1
    words = {2: "a pair", 3: "a triple"}[count]
    where = "shape of a weight"
    try:
        sizes = tuple(map(whole_number, shape))  # type: ignore[call-overload]  # raises TypeError
        if len(sizes) != count:
            raise TypeError
    except TypeError:
        raise FormatError(expected(f"{words} of ints {axes}", f"{shape!r}", where=where)) from None
    if min(sizes) <= 0:
        raise FormatError(expected(f"positive sizes {axes}", str(sizes), where=where))
    return sizes


def contiguous(raw: Any) -> memoryview:
    """Return the bytes of a buffer. Raises FormatError unless it is C-contiguous."""
    if isinstance(raw, np.ndarray) and float_type_of(raw.dtype) == "bf16":
        raw = raw.view(np.uint16)  # NumPy makes no buffer of the dtype of ml_dtypes
    try:
        view = memoryview(raw)
    except (TypeError, ValueError, BufferError) as error:
        buffers = "a contiguous buffer such as bytes, a memory map or a uint8 array"
        raise FormatError(expected(buffers, f"{type(raw).__name__} ({error})")) from None
    if not view.c_contiguous or view.format == "O":
        kind = "an object array" if view.format == "O" else "a strided or transposed buffer"
        cure = "use np.ascontiguousarray(raw)"
        raise FormatError(expected("a C-contiguous buffer", kind, cure=cure))
    return view


def block_memory(raw: Any, size: int, columns: str, where: str) -> memoryview:
    """Return a buffer of exactly `size` bytes as memory that nobody can write to.

    columns: what the bytes are, for the FormatError that other buffers raise.
    """
    view = contiguous(raw)
    if view.nbytes != size:
        what = f"{size} bytes ({columns})"
        raise FormatError(expected(what, f"{view.nbytes} bytes", where=where))
    return immutable_memory(raw, view)


def immutable_memory(raw: object, view: memoryview) -> memoryview:
    """Return the bytes of `view`, a buffer of `raw`, as memory that nobody can write to.

    It is part of the bytes object or of the read-only map that `raw` refers to, or else a copy. An
    array that owns its memory is copied even if it is read-only now: an older view may be writable,
    and the flag can be changed back. The arrays between `raw` and the bytes are not kept, because
    they can be made to refer to other memory.
    """
    root = _root(raw)
    if root is not None:
        offset = address_of(view) - address_of(root)
        if 0 <= offset <= root.nbytes - view.nbytes:
            return root[offset : offset + view.nbytes]
    return memoryview(view.tobytes())


def _root(raw: object) -> memoryview | None:
    """Return the whole memory of the bytes object or read-only map behind a buffer."""
    while isinstance(raw, np.ndarray | memoryview):
        raw = raw.base if isinstance(raw, np.ndarray) else raw.obj
    if not isinstance(raw, bytes | mmap.mmap):
        return None
    whole = memoryview(raw).cast("B")
    return whole if whole.readonly and whole.nbytes else None


def row_ids(ids: ArrayLike, n: int) -> NDArray[np.intp]:
    """Return row ids as an index array. Raises ArgumentError unless all are integers in 0..n-1."""
    return index_array(ids, n, "row ids", "ids of w.rows(ids)")


def index_array(ids: ArrayLike, n: int, noun: str, where: str) -> NDArray[np.intp]:
    """Return ids, which errors call `noun`, as an index array. Raises as `row_ids` does."""
    index = np.asarray(ids)
    if index.size == 0 and not isinstance(ids, np.ndarray):
        index = index.astype(np.intp)  # np.asarray([]) is float64
    if index.dtype.kind not in "iu":
        is_array = isinstance(ids, np.ndarray)
        cure = f"use {'ids.astype(np.int64)' if is_array else 'np.asarray(ids, dtype=np.int64)'}"
        got = describe(index.dtype)
        raise ArgumentError(expected("integers", got, where=where, cure=cure))
    if index.size and (index.min() < 0 or index.max() >= n):
        wrong = index.min() if index.min() < 0 else index.max()
        what = f"{noun} from 0 to {n - 1}"
        raise ArgumentError(expected(what, str(wrong), where=where))
    return index.astype(np.intp)


def describe(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name for a message."""
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder('=')} in foreign byte order"
