"""`quantize`: make a weight from a float matrix."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.conversions import as_float32, as_numpy, is_tensor
from q4jit.errors import FormatError, expected
from q4jit.floats import float_type_of
from q4jit.weights.checks import describe, matrix_shape
from q4jit.weights.formats import Format, batches, encode, find_format
from q4jit.weights.scales import finite_blocks
from q4jit.weights.tensor import QuantizedTensor

_from_string = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def _new_bytes(size: int) -> bytes:
    """Return a new bytes object with arbitrary content; C code may fill one that it just made."""
    memory: bytes = _from_string(None, size)
    return memory


def quantize(
    w: ArrayLike,
    format: str,  # noqa: A002 - the name in QuantizedTensor.from_bytes
) -> QuantizedTensor:
    """Quantise a float matrix [K, N] to `format`, with the bytes of ggml's reference quantiser.

    w: float16, bfloat16, float32 or float64, with any strides and byte order. format: Q4_0, Q4_1,
    Q8_0, F16 or F32, in upper or lower case. Raises FormatError for another dtype, rank or format,
    for an empty matrix, if K is not a whole number of blocks, and for finite values that are beyond
    the range of the format's f16 (F32: f32) fields. NaN and Inf in w are kept as ggml keeps them.
    """
    fmt = find_format(format)
    matrix = _matrix(w)
    k, n = matrix_shape(matrix.shape)
    memory = _new_bytes(n * fmt.column_bytes(k))
    # nobody else has the object yet, so its bytes may still be written
    address = np.frombuffer(memory, np.uint8).ctypes.data
    writable = memoryview((ctypes.c_uint8 * len(memory)).from_address(address)).cast("B")
    columns = np.frombuffer(writable, np.uint8).reshape(n, -1)
    for batch in batches(n, k):
        columns[batch] = encode(fmt, matrix[:, batch].T)
        _check_range(fmt, matrix, batch, columns[batch])
    return QuantizedTensor.of_memory(fmt, memoryview(memory), n)


def _matrix(w: ArrayLike) -> NDArray[Any]:
    """Return floats that `encode` takes, from the argument of `quantize`."""
    where = "argument 'w' of quantize"
    try:
        matrix = np.asarray(w)
    except Exception as error:
        if not is_tensor(w):
            raise
        cure = f"use {as_numpy('w', w)}"
        got = f"a tensor that NumPy cannot read ({error})"
        raise FormatError(expected("a float matrix", got, where=where, cure=cure)) from error
    if float_type_of(matrix.dtype) == "bf16":
        return matrix.astype(np.float32)
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        dtypes = "float16, bfloat16, float32 or float64"
        is_array = isinstance(w, np.ndarray)
        cure = f"use {as_float32('w', matrix.dtype) if is_array else as_numpy('w', w)}"
        got = f"{describe(matrix.dtype)} {list(matrix.shape)}"
        raise FormatError(expected(dtypes, got, where=where, cure=cure))
    return matrix


def _check_range(
    fmt: Format, matrix: NDArray[Any], batch: slice, columns: NDArray[np.uint8]
) -> None:
    """Raise FormatError if a block of finite values has a scale or values that overflowed."""
    finite = finite_blocks(fmt, columns)
    if finite.all():
        return
    values = matrix[:, batch].T.reshape(-1, fmt.block_elements)
    overflowed = np.flatnonzero(~finite & np.isfinite(values).all(axis=1))
    if not overflowed.size:
        return
    first = int(overflowed[0])
    element = first * fmt.block_elements + int(np.abs(values[first]).argmax())
    column, row = divmod(element, len(matrix))
    column += batch.start
    dtype = "float32" if fmt.float_type == "f32" else "float16"
    part = "values" if fmt.float_type else "the scale and the minimum of a block"
    what = f"{part} within {dtype}'s range for {fmt.name}"
    got = f"w[{row}, {column}] = {matrix[row, column]:g}"
    cure = "scale the matrix down" + ("" if dtype == "float32" else ", or quantise to F32")
    raise FormatError(expected(what, got, where="argument 'w' of quantize", cure=cure))
