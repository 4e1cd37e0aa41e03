"""Compare whole functions with NumPy in float64."""

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit import QuantizedTensor, quantize, specialize
from q4jit.dispatcher import Specialized

F32: Final = np.float32
BOUND: Final = 3e-6
"""The largest relative rms error of a whole function on well-conditioned data."""

Floats = NDArray[np.float32]


def random(*shape: int, seed: int = 0) -> Floats:
    """Return normally distributed f32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(F32)


def weight(k: int, n: int, format_: str = "F32", seed: int = 0) -> QuantizedTensor:
    """Return a random weight whose products are about as large as x."""
    return quantize(random(k, n, seed=seed + 1) / np.sqrt(k), format_)


def in_float64(value: object) -> object:
    """Return an argument in float64."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    return float(value) if isinstance(value, np.floating) else value


def reference(function: Callable[..., object], *args: object, **keywords: object) -> Any:
    """Run `function` with NumPy in float64, and return the results as a tuple."""
    wide = {name: in_float64(value) for name, value in keywords.items()}
    with np.errstate(all="ignore"):
        result = function(*map(in_float64, args), **wide)
    return result if isinstance(result, tuple) else (result,)


def relative_rms(result: Floats, wanted: NDArray[Any]) -> float:
    """Return the rms of the error divided by the rms of `wanted`; 0 if the arrays are empty."""
    if wanted.size == 0:
        return 0.0
    error = np.sqrt(np.mean((result.astype(np.float64) - wanted) ** 2))
    return float(error / max(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))), 1e-30))


def assert_close(result: object, wanted: tuple[object, ...]) -> None:
    """Check the shapes of an array or tuple, and its values within the bound."""
    results = result if isinstance(result, tuple) else (result,)
    assert len(results) == len(wanted)
    for i, (y, exact) in enumerate(zip(results, wanted, strict=True)):
        assert isinstance(y, np.ndarray)
        assert y.dtype == F32
        r = np.asarray(exact)
        assert y.shape == r.shape, f"result {i}: expected {r.shape}, got {y.shape}"
        error = relative_rms(y, r)
        assert error <= BOUND, f"result {i} differs by a relative rms of {error:.2e}"


def check(
    function: Callable[..., object], *args: object, **keywords: object
) -> Specialized[..., object]:
    """Compile `function`, compare its results with the float64 run, and return it."""
    compiled = function if isinstance(function, Specialized) else specialize(function)
    assert_close(compiled(*args, **keywords), reference(compiled.py_func, *args, **keywords))
    return compiled


# --- element-wise functions ---------------------------------------------------------------------


def ulps(result: Floats, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return errors in f32's units in the last place of the exact result."""
    with np.errstate(all="ignore"):
        size = np.abs(exact)
        _, exponent = np.frexp(size)
        unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
        return np.asarray(np.abs(result.astype(np.float64) - exact) / unit)


def everywhere(low: float, high: float) -> Floats:
    """Return f32 numbers of evenly spaced bits, and evenly spaced from low to high."""
    bits = np.arange(0, 2**32, 104729, dtype=np.uint64).astype(np.uint32).view(F32)
    line = np.linspace(low, high, 30_000).astype(F32)
    edges = np.array([1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38, 0.625, 1, 3.4028235e38], F32)
    with np.errstate(all="ignore"):
        around = np.concatenate([np.nextafter(edges, F32(s)) for s in (-np.inf, np.inf)])
    both = np.concatenate([edges, around, [0.0, np.inf, np.nan]]).astype(F32)
    return np.concatenate([bits, line, both, -both])


def assert_within_4_ulp(result: Floats, function: Callable[[Any], Any], x: Floats) -> None:
    """Check that `result` is `function` of x; ±0, Inf and NaN must be exact."""
    with np.errstate(all="ignore"):
        exact = function(x.astype(np.float64))
        rounded = exact.astype(F32)
    special = ~np.isfinite(rounded)
    assert np.array_equal(result[special], rounded[special], equal_nan=True)
    assert np.array_equal(np.signbit(result[rounded == 0]), np.signbit(rounded[rounded == 0]))
    assert ulps(result[~special], exact[~special]).max() <= 4


ELEMENTWISE: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "exp": (lambda x: np.exp(x), -105, 90),  # noqa: PLW0108 - like a user's function
    "log": (lambda x: np.log(x), 0, 3),  # noqa: PLW0108
    "tanh": (lambda x: np.tanh(x), -10, 10),  # noqa: PLW0108
    "sqrt": (lambda x: np.sqrt(x), 0, 3),  # noqa: PLW0108
}


def special_pairs() -> tuple[Floats, Floats]:
    """Return two matrices with every pair of zeros, infinities, NaN, denormals and numbers."""
    specials = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38], F32)
    a, b = np.broadcast_arrays(specials[:, None], specials)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def every_operation(a: Any, b: Any) -> tuple[Any, ...]:
    """Return the results of every operation that f32 determines exactly."""
    sums = (a + b, a - b, a * b, a / b, -a, abs(a), a**2, a**-1, a**0)
    order = (np.maximum(a, b), np.minimum(a, b), np.clip(a, -1, 2), np.where(a, 1.0, 2.0))
    tests = (a < b, a <= b, a > b, a >= b, a == b, a != b, (a < b) | (b < a), ~(a < b))
    return *sums, *order, *(np.where(t, 1.0, 0.0) for t in tests)


def assert_same_specials(results: Iterable[Floats], a: Floats, b: Floats) -> None:
    """Check that `results` equal NumPy's `every_operation` of a and b."""
    with np.errstate(all="ignore"):
        wanted = every_operation(a, b)
    for i, (y, r) in enumerate(zip(results, wanted, strict=True)):
        assert np.array_equal(y, r.astype(F32), equal_nan=True), i
