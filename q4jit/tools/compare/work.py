"""The call that entrants time, with weights that no cache holds, and the error of its results."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType
from q4jit.precision import beyond_rounding, relative_error
from q4jit.weights.reference import Doubles, exact_products, random_weight, random_x, rotated_copies
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[Any]
Copies = tuple[tuple[QuantizedTensor, ...], ...]


class ErrorOf(Protocol):
    """Returns the error of results; None if they contain NaN or Inf."""

    def __call__(
        self, results: Sequence[Floats], float_type: FloatType | None = None
    ) -> float | None:
        """float_type: the type that they were rounded to, if it is not that of the arrays."""


@dataclass(frozen=True, eq=False)
class TimedCall:
    """A call with several copies of the weights, which repeated calls use in turns.

    Attributes:
        function: the function to call.
        dtype: the float type of x, of the other arguments and of the results.
        x: activations [M, K].
        copies: equal sets of weights [K, N].
        others: the other arguments.
        error: returns the error of results.
    """

    function: Callable[..., Any]
    dtype: FloatType
    x: Floats
    copies: Copies
    others: tuple[Floats, ...]
    error: ErrorOf

    @property
    def operations(self) -> int:
        """The operations of a call's products, two per multiply-add."""
        return 2 * len(self.x) * sum(math.prod(w.shape) for w in self.weights)

    @property
    def weights(self) -> tuple[QuantizedTensor, ...]:
        """The first copy of the weights."""
        return self.copies[0]

    @property
    def weight_bytes(self) -> int:
        """The size of the weights of one call."""
        return sum(w.nbytes for w in self.weights)

    def args(self, weights: Sequence[QuantizedTensor]) -> tuple[Any, ...]:
        """Return the arguments of a call with one of the copies."""
        return (self.x, *weights, *self.others)


def product(x: Any, w: Any) -> Any:
    """Return a product."""
    return x @ w


def bare(x: Any, gate: Any, up: Any) -> Any:
    """Return two products."""
    return x @ gate, x @ up


def gated(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Any:
    """Return two products with bias and SiLU gating."""
    g = x @ gate + gate_bias
    return g / (1 + np.exp(-g)) * (x @ up + up_bias)


class WeightShape:
    """Weights [K, N] in copies of `total_bytes` or more (one for 0 bytes), and calls for each M.

    dtype: the float type of the calls' arrays. Raises ImportError for bf16 without ml_dtypes.
    """

    def __init__(
        self,
        fmt: str,
        k: int,
        n: int,
        rows: Sequence[int],
        total_bytes: int,
        dtype: FloatType = "f32",
    ) -> None:
        self.k, self.n, self.format, self.dtype = k, n, fmt, dtype
        self._x = random_x(max(rows), k, dtype)
        self._weights = [random_weight(fmt, k, n, seed=i) for i in range(2)]
        self._total_bytes = total_bytes

    @functools.cached_property
    def _gate(self) -> tuple[Doubles, Doubles]:
        return exact_products(self._x, self._weights[:1])

    @functools.cached_property
    def _up(self) -> tuple[Doubles, Doubles]:
        return exact_products(self._x, self._weights[1:])

    @functools.cached_property
    def _singles(self) -> Copies:
        return self._copies(self._weights[:1])

    @functools.cached_property
    def _pairs(self) -> Copies:
        return self._copies(self._weights)

    def _copies(self, weights: Sequence[QuantizedTensor]) -> Copies:
        count = rotated_copies(self._total_bytes, sum(w.nbytes for w in weights))
        return (tuple(weights), *(tuple(map(_copy, weights)) for _ in range(count - 1)))

    def product(self, m: int) -> TimedCall:
        """Return the call of one product."""
        error = functools.partial(_largest_error, (self._gate,))
        return TimedCall(product, self.dtype, self._x[:m], self._singles, (), error)

    def bare(self, m: int) -> TimedCall:
        """Return the call of two products."""
        error = functools.partial(_largest_error, (self._gate, self._up))
        return TimedCall(bare, self.dtype, self._x[:m], self._pairs, (), error)

    def gated(self, m: int) -> TimedCall:
        """Return the call of two products with bias and SiLU gating."""
        biases = tuple(random_x(2, self.n, self.dtype))
        error = functools.partial(self._gated_error, biases)
        return TimedCall(gated, self.dtype, self._x[:m], self._pairs, biases, error)

    def _gated_error(
        self,
        biases: Sequence[Floats],
        results: Sequence[Floats],
        float_type: FloatType | None = None,
    ) -> float | None:
        (result,) = results
        m = len(result)
        g, u = self._gate[0][:m] + biases[0], self._up[0][:m] + biases[1]
        exact = g / (1 + np.exp(-g)) * u
        with np.errstate(all="ignore"):  # a wrong result may overflow or be NaN
            errors = beyond_rounding(result, exact, float_type)
            error = float(np.linalg.norm(errors) / np.linalg.norm(exact))
        return error if np.isfinite(error) else None


def _largest_error(
    exacts: Sequence[tuple[Doubles, Doubles]],
    results: Sequence[Floats],
    float_type: FloatType | None = None,
) -> float | None:
    errors = [
        relative_error(result, y[: len(result)], scale[: len(result)], float_type)
        for (y, scale), result in zip(exacts, results, strict=True)
    ]
    known = [error for error in errors if error is not None]
    return max(known) if len(known) == len(errors) else None


def _copy(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(w.raw.tobytes(), shape=w.shape, format=w.format)
