"""`quantize`: a float matrix as a weight in GGUF blocks."""

import numpy as np
from numpy.typing import ArrayLike

from q4jit.errors import FormatError
from q4jit.weights.checks import describe, matrix_shape
from q4jit.weights.formats import bands, encode, find_format
from q4jit.weights.tensor import QuantizedTensor


def quantize(
    w: ArrayLike,
    format: str,  # noqa: A002 - as in QuantizedTensor.from_bytes
) -> QuantizedTensor:
    """Quantise a float matrix [K, N] to `format`, with the bytes of ggml's reference quantiser.

    w: float16, float32 or float64, of any strides and byte order; formats Q4_0, Q4_1, Q8_0, F16,
    F32. Raises FormatError for another dtype, rank or format, an empty matrix and a K that is not
    whole blocks.
    """
    fmt = find_format(format)
    matrix = np.asarray(w)
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        raise FormatError(
            f"quantize takes float16, float32 or float64: found {describe(matrix.dtype)}, "
            "accepted is w.astype(np.float32)"
        )
    k, n = matrix_shape(matrix.shape)
    rows = np.empty((n, fmt.column_bytes(k)), np.uint8)
    for band in bands(n, k):
        rows[band] = encode(fmt, matrix[:, band].T)
    rows.flags.writeable = False
    return QuantizedTensor(fmt, rows)
