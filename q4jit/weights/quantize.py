"""`quantize`: make a weight from a float matrix."""

import numpy as np
from numpy.typing import ArrayLike

from q4jit.errors import FormatError, expected
from q4jit.weights.checks import describe, matrix_shape
from q4jit.weights.formats import batches, encode, find_format
from q4jit.weights.tensor import QuantizedTensor


def quantize(
    w: ArrayLike,
    format: str,  # noqa: A002 - the name in QuantizedTensor.from_bytes
) -> QuantizedTensor:
    """Quantise a float matrix [K, N] to `format`, with the bytes of ggml's reference quantiser.

    w: float16, float32 or float64, with any strides and byte order. format: Q4_0, Q4_1, Q8_0, F16
    or F32. Raises FormatError for another dtype, rank or format, for an empty matrix, and if K is
    not a whole number of blocks.
    """
    fmt = find_format(format)
    matrix = np.asarray(w)
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        dtypes = "float16, float32 or float64"
        cure = "use w.astype(np.float32)"
        got = f"{describe(matrix.dtype)} {list(matrix.shape)}"
        raise FormatError(expected(dtypes, got, where="argument 'w' of quantize", cure=cure))
    k, n = matrix_shape(matrix.shape)
    columns = np.empty((n, fmt.column_bytes(k)), np.uint8)
    for batch in batches(n, k):
        columns[batch] = encode(fmt, matrix[:, batch].T)
    columns.flags.writeable = False
    return QuantizedTensor(fmt, columns)
