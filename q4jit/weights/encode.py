"""Encode floats in blocks: the table of encoders, and bands that bound temporary memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import FormatError, expected
from q4jit.weights.encoders import exact
from q4jit.weights.encoders.iq4_nl import iq4_nl
from q4jit.weights.encoders.k_quants import q4_k, q5_k, q6_k
from q4jit.weights.formats import Format

# Elements of a band: half a megabyte of f32. The dozen arrays of a search then stay in cache, and
# the cost of a call of NumPy is small beside that of its loop.
_BAND_ELEMENTS: Final = 1 << 17

# Columns of a band at least: a row of 16 floats in C order is a whole cache line.
_BAND_COLUMNS: Final = 16

Band = tuple[slice, slice]
"""Columns, and elements of each: whole blocks."""


@dataclass(frozen=True)
class Encoder:
    """How a format's blocks are made.

    Attributes:
        encode: takes blocks [n, elements] in `dtype`; returns their bytes, uint8 [n, block_bytes].
        dtype: NumPy's name of the type that floats are converted to first.
        only_finite: whether the format has no NaN and Inf, so that such elements are refused.
    """

    encode: Callable[[NDArray[Any]], NDArray[np.uint8]]
    dtype: str = "<f4"
    only_finite: bool = False


ENCODERS: Final[dict[str, Encoder]] = {
    "F32": Encoder(exact.floats),
    # float64 goes to F16 in one step; through f32 it would be rounded twice
    "F16": Encoder(exact.floats, dtype="<f2"),
    "BF16": Encoder(exact.bf16),
    "Q4_0": Encoder(exact.q4_0),
    "Q4_1": Encoder(exact.q4_1),
    "Q5_0": Encoder(exact.q5_0),
    "Q5_1": Encoder(exact.q5_1),
    "Q8_0": Encoder(exact.q8_0),
    "MXFP4": Encoder(exact.mxfp4, only_finite=True),
    "IQ4_NL": Encoder(iq4_nl),
    "Q4_K": Encoder(q4_k),
    "Q5_K": Encoder(q5_k),
    "Q6_K": Encoder(q6_k),
}


def find_encoder(fmt: Format) -> Encoder:
    """Return the encoder of a format. Raises FormatError for a format that q4jit only reads."""
    encoder = ENCODERS.get(fmt.name)
    if encoder is None:
        known = ", ".join(ENCODERS)
        raise FormatError(f"q4jit cannot quantise to {fmt.name}, only to {known}")
    return encoder


def bands(fmt: Format, n: int, k: int) -> list[Band]:
    """Divide `n` columns of `k` elements into bands that are encoded at a time."""
    columns = min(n, max(_BAND_COLUMNS, _BAND_ELEMENTS // k))
    blocks = max(1, _BAND_ELEMENTS // columns // fmt.block_elements)
    run = blocks * fmt.block_elements
    return [
        (slice(column, min(column + columns, n)), slice(first, min(first + run, k)))
        for column in range(0, n, columns)
        for first in range(0, k, run)
    ]


def encode(fmt: Format, columns: NDArray[Any]) -> NDArray[np.uint8]:
    """Quantise float columns [n, K], of any strides, to uint8 [n, column_bytes].

    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 get the bytes of the gguf package. Raises
    FormatError for a format that q4jit only reads, for NaN and Inf in MXFP4, and unless K is whole
    blocks. Values beyond the range of an f16 field make it ±Inf, as in ggml.
    """
    find_encoder(fmt)
    n, k = columns.shape
    out = np.empty((n, fmt.column_bytes(k)), np.uint8)
    for band in bands(fmt, n, k):
        encode_band(fmt, columns, band, out)
    return out


def encode_band(
    fmt: Format, columns: NDArray[Any], band: Band, out: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Quantise a band of columns [n, K] to its place in `out`, uint8 [n, column_bytes].

    Returns that part of `out`. Raises FormatError as `encode` does.
    """
    encoder = find_encoder(fmt)
    rows, elements = band
    with np.errstate(all="ignore"):  # f16 overflows to Inf, as in ggml
        values = np.ascontiguousarray(columns[band], encoder.dtype)
        if encoder.only_finite:
            _check_finite(fmt, columns, band, values)
        blocks = encoder.encode(values.reshape(-1, fmt.block_elements))
    first, last = (
        e // fmt.block_elements * fmt.block_bytes for e in (elements.start, elements.stop)
    )
    part = out[rows, first:last]
    part[:] = blocks.reshape(part.shape)
    return part


def refuse_element(
    columns: NDArray[Any], band: Band, flat: int, what: str, cure: str
) -> FormatError:
    """Return an error that names element `flat` of a band, in C order, as one of w = columns.T."""
    rows, elements = band
    column, row = divmod(flat, elements.stop - elements.start)
    column, row = column + rows.start, row + elements.start
    got = f"w[{row}, {column}] = {float(columns[column, row]):g}"
    return FormatError(expected(what, got, where="argument 'w' of quantize", cure=cure))


def _check_finite(
    fmt: Format, columns: NDArray[Any], band: Band, values: NDArray[np.float32]
) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    what = f"finite float32 values for {fmt.name}, which has neither NaN nor Inf"
    raise refuse_element(columns, band, int(finite.argmin()), what, "quantise to another format")
