"""`QuantizedTensor`: an immutable matrix of GGUF blocks, as users hold it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from q4jit.errors import ArgumentError, FormatError
from q4jit.locks import BUILD
from q4jit.weights.checks import contiguous, describe, is_frozen, matrix_shape, row_ids
from q4jit.weights.formats import Format, bands, decode, find_format
from q4jit.weights.resident import ResidentCopies
from q4jit.weights.scales import scale_facts

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on


class QuantizedTensor:
    """A weight matrix [K, N] kept in its GGUF blocks; immutable, compared and hashed by identity.

    Made by `from_bytes`, `quantize` and `load_gguf`. Column n of the matrix is row n of the GGUF
    tensor: one run of K/block_elements blocks. `x @ w` on NumPy arrays is the float64 reference.
    """

    __slots__ = (
        "__weakref__",
        "_fmt",
        "_raw",
        "_resident",
        "_scale_facts",
        "_shape",
        "_signature",
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
        # for launches, which look here at every call: an attribute, not a property
        self._resident = ResidentCopies(fmt, self._raw)
        self._scale_facts: tuple[bool, bool] | None = None  # finite, suits_f16
        self._signature: tuple[str, int, int, bool, bool] | None = None

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
        k, n = matrix_shape(shape)
        row_bytes = fmt.column_bytes(k)
        view = contiguous(raw)
        if view.nbytes != n * row_bytes:
            raise FormatError(
                f"{fmt.name} of shape (K, N) = ({k}, {n}) takes {n} rows of {row_bytes} bytes: "
                f"found {view.nbytes} bytes, accepted are exactly {n * row_bytes}"
            )
        source = view if is_frozen(raw) else view.tobytes()
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
        index = row_ids(ids, n)
        flat = index.reshape(-1)
        out = np.empty((flat.size, k), np.float32)
        for band in bands(flat.size, k):
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
                rows = (self._raw[band] for band in self._bands())
                self._scale_facts = scale_facts(self._fmt, rows)
            return self._scale_facts

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
        return bands(self._shape[1], self._shape[0])

    def _product(self, x: NDArray[Any]) -> NDArray[Any]:
        """The product in float64, rounded to the dtype of x: what kernels are held against."""
        k, n = self._shape
        if x.dtype not in (np.float32, np.float64):
            raise ArgumentError(
                f"x @ w takes float32 or float64 in native byte order: found {describe(x.dtype)}, "
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


def _knows_ufuncs(value: object) -> bool:
    """Whether a foreign object (a traced array) has its own say in NumPy operations."""
    if isinstance(value, (np.ndarray, np.generic, QuantizedTensor)):
        return False
    return getattr(type(value), "__array_ufunc__", None) is not None
