"""`quantize`: make a weight from a float matrix."""

import ctypes
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.conversions import as_float32, as_numpy, is_tensor
from q4jit.errors import FormatError, expected
from q4jit.floats import FLOAT_NAMES, float_type_of
from q4jit.progress import progress
from q4jit.weights.checks import describe, matrix_shape
from q4jit.weights.encode import Band, bands, encode_band, find_encoder, refuse_element
from q4jit.weights.formats import Format, find_format
from q4jit.weights.scales import finite_blocks
from q4jit.weights.tensor import QuantizedTensor

# Weights of at least a quarter of a gigabyte in f32 get a progress bar: a search takes seconds.
_SHOWN_ELEMENTS: Final = 1 << 26

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
    """Quantise a float matrix [K, N] to a format.

    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 get the bytes of the gguf package. On
    normal data, the squared error of IQ4_NL, Q4_K, Q5_K and Q6_K is below that of ggml's quantiser
    without an importance matrix.

    w: float16, bfloat16, float32 or float64, with any strides and byte order. format: one of these
    names, in upper or lower case. Raises FormatError for another dtype, rank or format, for an
    empty matrix, if K is not a whole number of blocks, and for finite values that are beyond the
    range of the format's fields. NaN and Inf are kept as ggml keeps them; in IQ4_NL and the K
    formats they make their block NaN, and MXFP4, which has neither, refuses them. Large matrices
    show their progress on standard error.
    """
    fmt = find_format(format)
    matrix = _matrix(w)
    find_encoder(fmt)
    k, n = matrix_shape(matrix.shape)
    memory = _new_bytes(n * fmt.column_bytes(k))
    # nobody else has the object yet, so its bytes may still be written
    address = np.frombuffer(memory, np.uint8).ctypes.data
    writable = memoryview((ctypes.c_uint8 * len(memory)).from_address(address)).cast("B")
    columns = np.frombuffer(writable, np.uint8).reshape(n, -1)
    parts = bands(fmt, n, k)
    for band in progress(parts, f"quantising to {fmt.name}") if n * k >= _SHOWN_ELEMENTS else parts:
        _check_range(fmt, matrix.T, band, encode_band(fmt, matrix.T, band, columns))
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
    if float_type_of(matrix.dtype) is None and (
        matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8
    ):
        dtypes = "float16, bfloat16, float32 or float64"
        is_array = isinstance(w, np.ndarray)
        cure = f"use {as_float32('w', matrix.dtype) if is_array else as_numpy('w', w)}"
        got = f"{describe(matrix.dtype)} {list(matrix.shape)}"
        raise FormatError(expected(dtypes, got, where=where, cure=cure))
    return matrix


def _check_range(
    fmt: Format, columns: NDArray[Any], band: Band, encoded: NDArray[np.uint8]
) -> None:
    """Raise FormatError if a block of finite values has a scale or values that overflowed."""
    if fmt.scale_type == "e8m0":
        return  # has the range of float32
    finite = finite_blocks(fmt, encoded)
    if finite.all():
        return
    values = columns[band].reshape(-1, fmt.block_elements)
    overflowed = np.flatnonzero(~finite & np.isfinite(values).all(axis=1))
    if not overflowed.size:
        return
    first = int(overflowed[0])
    flat = first * fmt.block_elements + int(np.abs(values[first]).argmax())
    dtype = FLOAT_NAMES[fmt.float_type or "f16"]
    fields = "scale" if fmt.minimum_at is None else "scale and the minimum"
    part = "values" if fmt.float_type else f"the {fields} of a block"
    what = f"{part} within {dtype}'s range for {fmt.name}"
    cure = "scale the matrix down" + ("" if dtype == "float32" else ", or quantise to F32")
    raise refuse_element(columns, band, flat, what, cure)
