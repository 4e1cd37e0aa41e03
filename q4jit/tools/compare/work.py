"""What entrants do: a call with weights that no cache keeps, and how far its results are off."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.precision import relative_error
from q4jit.weights.reference import Doubles, exact_products, random_weight, random_x, rotated_copies
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Copies = tuple[tuple[QuantizedTensor, ...], ...]


@dataclass(frozen=True, eq=False)
class TimedCall:
    """A call of `function` with x [M, K], one of the `copies` of weights [K, N], and `others`.

    error: of the results, None where they are no numbers.
    """

    function: Callable[..., Any]
    x: Floats
    copies: tuple[tuple[QuantizedTensor, ...], ...]
    others: tuple[Floats, ...]
    error: Callable[[Sequence[Floats]], float | None]

    @property
    def operations(self) -> int:
        """Of the products of a call, two per multiply-add."""
        return 2 * len(self.x) * sum(math.prod(w.shape) for w in self.weights)

    @property
    def weights(self) -> tuple[QuantizedTensor, ...]:
        """The weights of a call."""
        return self.copies[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a call."""
        return sum(w.nbytes for w in self.weights)

    def args(self, weights: Sequence[QuantizedTensor]) -> tuple[Any, ...]:
        """The arguments of a call with one of the copies."""
        return (self.x, *weights, *self.others)


def product(x: Any, w: Any) -> Any:
    """A product alone."""
    return x @ w


def bare(x: Any, gate: Any, up: Any) -> Any:
    """Two products."""
    return x @ gate, x @ up


def gated(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Any:
    """Two products with bias and SiLU gating."""
    g = x @ gate + gate_bias
    return g / (1 + np.exp(-g)) * (x @ up + up_bias)


class WeightShape:
    """Weights [K, N] in copies that no cache keeps (or one, for 0 bytes), and work for each M."""

    def __init__(self, fmt: str, k: int, n: int, rows: Sequence[int], total_bytes: int) -> None:
        self.k, self.n, self.format = k, n, fmt
        self._x = random_x(max(rows), k)
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
        """x @ w."""
        error = functools.partial(_product_error, self._gate)
        return TimedCall(product, self._x[:m], self._singles, (), lambda ys: error(ys[0]))

    def bare(self, m: int) -> TimedCall:
        """Two products."""
        return TimedCall(bare, self._x[:m], self._pairs, (), self._bare_error)

    def gated(self, m: int) -> TimedCall:
        """Two products with bias and SiLU gating."""
        biases = tuple(random_x(2, self.n))
        error = functools.partial(self._gated_error, biases)
        return TimedCall(gated, self._x[:m], self._pairs, biases, lambda ys: error(ys[0]))

    def _bare_error(self, found: Sequence[Floats]) -> float | None:
        exacts = (self._gate, self._up)
        errors = [_product_error(exact, y) for exact, y in zip(exacts, found, strict=True)]
        known = [error for error in errors if error is not None]
        return max(known) if len(known) == len(errors) else None

    def _gated_error(self, biases: Sequence[Floats], found: Floats) -> float | None:
        m = len(found)
        g, u = self._gate[0][:m] + biases[0], self._up[0][:m] + biases[1]
        exact = g / (1 + np.exp(-g)) * u
        with np.errstate(all="ignore"):  # a wrong result may be anything
            error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        return error if np.isfinite(error) else None


def _product_error(exact: tuple[Doubles, Doubles], found: Floats) -> float | None:
    y, size = exact
    return relative_error(found, y[: len(found)], size[: len(found)])


def _copy(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_bytes(w.raw.tobytes(), shape=w.shape, format=w.format)
