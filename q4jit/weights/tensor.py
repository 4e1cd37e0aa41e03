"""Quantised weights: `QuantizedTensor`, an immutable matrix of GGUF blocks, and `quantize`."""

import functools
import mmap
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.errors import ArgumentError, FormatError
from q4jit.locks import BUILD
from q4jit.weights.formats import Format, decode, encode, find_format
from q4jit.weights.layouts import pack, suits_tiles16

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

__all__ = ["QuantizedTensor", "quantize"]

# Work is cut into bands of about this many elements: a megabyte of f32, so that what a band needs
# stays in cache and no call holds more than a few MB beyond its result.
_BAND_ELEMENTS: Final = 1 << 18
_F16_MAGNITUDE: Final = 0x7FFF  # of the bits, which are ordered as magnitudes are
_F16_INFINITY: Final = 0x7C00
_F16_128: Final = 0x5800
# Of values rounded to f16: the largest rms of relative errors, and the largest part that one scale
# has in the squares of all scales. Its errors point in one direction, those of many do not.
_ROUNDING_ERROR: Final = 3.5e-4
_SCALE_SHARE: Final = 1 / 16


class QuantizedTensor:
    """A weight matrix [K, N] kept in its GGUF blocks; immutable, compared and hashed by identity.

    Made by `from_bytes`, `quantize` and `load_gguf`. Column n of the matrix is row n of the GGUF
    tensor: one run of K/block_elements blocks. `x @ w` on NumPy arrays is the float64 reference.
    """

    __slots__ = (
        "__weakref__",
        "_fmt",
        "_raw",
        "_repacked",
        "_scale_facts",
        "_shape",
        "_signature",
        "addresses",
        "uploads",
    )

    def __init__(self, fmt: Format, rows: NDArray[np.uint8]) -> None:
        """Wrap GGUF rows, uint8 [N, row_bytes] (read-only, C-contiguous), without copying them."""
        assert rows.ndim == 2
        assert rows.dtype == np.uint8
        assert rows.flags.c_contiguous
        assert not rows.flags.writeable
        self._fmt = fmt
        self._raw = rows.view()  # a view of a read-only array cannot be made writable again
        self._shape = (rows.shape[1] // fmt.block_bytes * fmt.block_elements, rows.shape[0])
        self._repacked: dict[str, NDArray[np.uint8]] = {}
        self._scale_facts: tuple[bool, bool] | None = None  # finite, suits_f16
        self._signature: tuple[str, int, int, bool, bool] | None = None
        # its copies in devices' memory, by device and layout, which go with it; an attribute,
        # because every launch looks here
        self.uploads: dict[str, Any] = {}
        self.addresses: dict[str, int] = {}  # of its blocks in this process, by layout; likewise

    @classmethod
    def from_bytes(
        cls,
        raw: "Buffer | NDArray[Any]",
        *,
        shape: tuple[int, int],
        format: str,  # noqa: A002 - the attribute's name too
    ) -> "QuantizedTensor":
        """Make a tensor of `shape` (K, N) from the bytes of N GGUF rows.

        raw: any C-contiguous buffer of exactly N·row_bytes bytes. It is referenced where nothing
        can write to it (bytes, a read-only map, views of these), copied otherwise. Raises
        FormatError.
        """
        fmt = find_format(format)
        k, n = _matrix_shape(shape)
        row_bytes = fmt.row_bytes(k)
        view = _contiguous(raw)
        if view.nbytes != n * row_bytes:
            raise FormatError(
                f"{fmt.name} of shape (K, N) = ({k}, {n}) takes {n} rows of {row_bytes} bytes: "
                f"found {view.nbytes} bytes, accepted are exactly {n * row_bytes}"
            )
        source = view if _is_frozen(raw) else view.tobytes()
        return cls(fmt, np.frombuffer(source, np.uint8).reshape(n, row_bytes))

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N): x [M, K] @ w gives [M, N]."""
        return self._shape

    @property
    def format(self) -> str:
        """The name of the block format, for example "Q4_0"."""
        return self._fmt.name

    @property
    def block_format(self) -> Format:
        """The description of the format."""
        return self._fmt

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, without repacked forms."""
        return self._raw.nbytes

    @property
    def raw(self) -> NDArray[np.uint8]:
        """The blocks as they lie in a GGUF file: read-only uint8 [N, row_bytes]."""
        return self._raw

    def dequantize(self) -> NDArray[np.float32]:
        """Decode every element: f32 [K, N], Fortran-ordered because GGUF stores its columns."""
        k, n = self._shape
        columns = np.empty((n, k), np.float32)
        for band in self._bands():
            columns[band] = decode(self._fmt, self._raw[band])
        return columns.T

    def rows(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Look up GGUF rows (embeddings), reading only their blocks.

        ids: integers in 0..N-1, any shape. Returns f32 [*ids.shape, K]. Raises ArgumentError.
        """
        k, n = self._shape
        index = _row_ids(ids, n)
        flat = index.reshape(-1)
        out = np.empty((flat.size, k), np.float32)
        for band in _bands(flat.size, k):
            out[band] = decode(self._fmt, self._raw[flat[band]])
        return out.reshape(*index.shape, k)

    @property
    def has_finite_scales(self) -> bool:
        """Whether every f16 field d and m (every float, for F16 and F32) is finite; computed once.

        Kernels that may not multiply by zero early (0·Inf is NaN) ask this before they are chosen.
        """
        return self._scales[0]

    @property
    def suits_f16(self) -> bool:
        """Whether values of Q4_0 may be rounded to f16 beside x, within 5e-4; computed once.

        Scales must be within ±128, exclusive (kernels need 2⁹ times each as an f16) and many, and
        values must not err by more than 3.5e-4 (rms; those that are denormal count as lost).
        Quants are taken for the worst ones. True for other formats, which no kernel rounds.
        """
        return self._scales[1]

    @property
    def signature(self) -> tuple[str, int, int, bool, bool]:
        """(format, K, N, has_finite_scales, suits_f16): what kernels are made for."""
        if self._signature is None:
            self._signature = (self.format, *self._shape, *self._scales)
        return self._signature

    @property
    def _scales(self) -> tuple[bool, bool]:
        """(has_finite_scales, suits_f16), for which all scales are looked at once."""
        with BUILD:
            if self._scale_facts is None:
                bands = (self._raw[band] for band in self._bands())
                self._scale_facts = _facts(self._fmt, bands)
            return self._scale_facts

    def repacked(self, layout: str) -> NDArray[np.uint8]:
        """The blocks in the byte order that a kernel wants: read-only, made once per layout.

        The tensor owns the result, so it lives as long as the tensor. Raises what
        `layouts.pack` raises for an unknown layout.
        """
        packed = self._repacked.get(layout)
        if packed is None:
            with BUILD:
                packed = self._repacked.get(layout)
                if packed is None:
                    packed = self._repacked[layout] = pack(self._fmt, layout, self._raw)
        return packed

    def __matmul__(self, other: object) -> Any:
        if _knows_ufuncs(other):
            return NotImplemented  # a traced array explains itself better
        raise ArgumentError(_WEIGHT_FIRST.format(shape=self._shape))

    def __rmatmul__(self, x: object) -> NDArray[Any]:
        if not isinstance(x, np.ndarray):
            raise ArgumentError(
                f"x @ w takes a NumPy array x: found {type(x).__name__}, "
                "accepted is np.asarray(x, dtype=np.float32)"
            )
        return self._product(x)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(_knows_ufuncs(value) for value in inputs):
            return NotImplemented
        if ufunc is not np.matmul or method != "__call__" or kwargs:
            call = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
            extra = f" with {', '.join(f'{name}=' for name in kwargs)}" if kwargs else ""
            raise ArgumentError(
                f"np.{call}{extra} does not take a QuantizedTensor: accepted is x @ w, "
                "or w.dequantize() for a plain f32 array [K, N]"
            )
        if isinstance(inputs[0], QuantizedTensor):
            raise ArgumentError(_WEIGHT_FIRST.format(shape=inputs[0].shape))
        return self.__rmatmul__(inputs[0])

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ArgumentError(
            f"{self!r} is not decoded silently: accepted are x @ w, w.rows(ids), "
            "and w.dequantize() for a plain f32 array [K, N]"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a QuantizedTensor cannot be pickled or copied: keep w.raw, w.shape and w.format, "
            "and give them to QuantizedTensor.from_bytes"
        )

    def __repr__(self) -> str:
        k, n = self._shape
        return f"<QuantizedTensor {self.format} (K, N) = ({k}, {n}), {self.nbytes} bytes>"

    def _bands(self) -> Iterator[slice]:
        return _bands(self._shape[1], self._shape[0])

    def _product(self, x: NDArray[Any]) -> NDArray[Any]:
        """The product in float64, rounded to the dtype of x: what kernels are held against."""
        k, n = self._shape
        if x.dtype not in (np.float32, np.float64):
            raise ArgumentError(
                f"x @ w takes float32 or float64 in native byte order: found {_describe(x.dtype)}, "
                "accepted is x.astype(np.float32)"
            )
        if x.ndim == 0 or x.shape[-1] != k:
            raise ArgumentError(
                f"shapes do not match in x @ w: found x {x.shape} and w (K, N) = ({k}, {n}), "
                f"accepted is x [..., {k}]"
            )
        x64 = np.asarray(x, np.float64).reshape(-1, k)
        y = np.empty((len(x64), n), x.dtype)
        with np.errstate(all="ignore"):  # NaN and Inf go where IEEE puts them
            for band in self._bands():
                y[:, band] = x64 @ decode(self._fmt, self._raw[band]).astype(np.float64).T
        return y.reshape(*x.shape[:-1], n)


_WEIGHT_FIRST: Final = (
    "a QuantizedTensor stands on the right of @: found w @ ... with w (K, N) = {shape}, "
    "accepted is x @ w with x [..., K]"
)


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
            f"quantize takes float16, float32 or float64: found {_describe(matrix.dtype)}, "
            "accepted is w.astype(np.float32)"
        )
    k, n = _matrix_shape(matrix.shape)
    rows = np.empty((n, fmt.row_bytes(k)), np.uint8)
    for band in _bands(n, k):
        rows[band] = encode(fmt, matrix[:, band].T)
    rows.flags.writeable = False
    return QuantizedTensor(fmt, rows)


def _bands(rows: int, row_elements: int) -> Iterator[slice]:
    step = max(1, _BAND_ELEMENTS // row_elements)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _matrix_shape(shape: object) -> tuple[int, int]:
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


def _contiguous(raw: Any) -> memoryview:
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


def _is_frozen(raw: object) -> bool:
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


def _row_ids(ids: ArrayLike, n: int) -> NDArray[np.intp]:
    index = np.asarray(ids)
    if index.size == 0 and not isinstance(ids, np.ndarray):
        index = index.astype(np.intp)  # NumPy calls [] float64
    if index.dtype.kind not in "iu":
        raise ArgumentError(
            f"rows takes integer ids: found {_describe(index.dtype)}, "
            "accepted is ids.astype(np.int64)"
        )
    if index.size and (index.min() < 0 or index.max() >= n):
        wrong = index.min() if index.min() < 0 else index.max()
        raise ArgumentError(f"rows: found id {wrong}, accepted are 0 to {n - 1}")
    return index.astype(np.intp)


def _facts(fmt: Format, bands: Iterator[NDArray[np.uint8]]) -> tuple[bool, bool]:
    if not suits_tiles16(fmt):
        return all(_finite(fmt, rows) for rows in bands), True
    counts = np.zeros(_F16_MAGNITUDE + 1, np.int64)  # of each |d|, by its bits
    for rows in bands:
        found = np.bincount(_field(fmt, rows, 0) & _F16_MAGNITUDE)
        counts[: len(found)] += found
    return not counts[_F16_INFINITY:].any(), _rounds_well(counts)


def _finite(fmt: Format, rows: NDArray[np.uint8]) -> bool:
    if fmt.float_dtype is not None:
        return bool(np.isfinite(rows.view(fmt.float_dtype)).all())
    offsets = [at for at in (fmt.d_offset_bytes, fmt.m_offset_bytes) if at is not None]
    return all((_field(fmt, rows, at) & _F16_MAGNITUDE < _F16_INFINITY).all() for at in offsets)


def _rounds_well(counts: NDArray[np.int64]) -> bool:
    """Whether values may be rounded to f16; counts: of each |d|, by its bits."""
    if counts[_F16_128:].any():
        return False
    squares, errors = _f16_squares()
    energy = counts[:_F16_128] * squares
    total = float(energy.sum())
    if total == 0.0:
        return True
    error = float((energy * errors).sum()) / total
    return error <= _ROUNDING_ERROR**2 and float(energy.max()) <= _SCALE_SHARE * total


def _field(fmt: Format, rows: NDArray[np.uint8], at: int) -> NDArray[np.uint16]:
    """The f16 fields at byte `at` of all blocks, as bits."""
    blocks = rows.reshape(-1, fmt.block_bytes)
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2").reshape(-1)


@functools.cache
def _f16_squares() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By the bits of d: d², and the largest square of a relative error of 1…8 times d in f16."""
    d = np.arange(_F16_128, dtype=np.uint16).view(np.float16).astype(np.float64)
    values = d[:, None] * np.arange(1, 9)
    with np.errstate(invalid="ignore"):  # 0 by 0
        errors = np.abs(values.astype(np.float16) / values - 1)
    errors[values < np.finfo(np.float16).smallest_normal] = 1
    return d**2, np.square(errors.max(axis=1))


def _knows_ufuncs(value: object) -> bool:
    """Whether a foreign object (a traced array) has its own say in NumPy operations."""
    if isinstance(value, (np.ndarray, np.generic, QuantizedTensor)):
        return False
    return getattr(type(value), "__array_ufunc__", None) is not None


def _describe(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder('=')} in foreign byte order"
