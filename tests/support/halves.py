"""Half-precision arrays of tests, and the precision contract for results of every float type."""

from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.kernels import Doubles, Floats, Weight, assert_ieee, random_x

BF16: Final = np.dtype(ml_dtypes.bfloat16)
F16: Final = np.dtype(np.float16)
DTYPES: Final = {"f32": np.dtype(np.float32), "f16": F16, "bf16": BF16}
MANTISSA_BITS: Final = {"f32": 23, "f16": 10, "bf16": 7}
LEAST_EXPONENT: Final = {"f32": -126, "f16": -14, "bf16": -126}


def half_ulps(values: Doubles, kind: str) -> Doubles:
    """Return half the distance of neighbours in a float type, at each value."""
    with np.errstate(divide="ignore"):
        exponents = np.floor(np.log2(np.abs(values)))
    exponents = np.maximum(exponents, LEAST_EXPONENT[kind])
    halves: Doubles = 2.0 ** (exponents - MANTISSA_BITS[kind] - 1)
    return halves


def assert_rounded_contract(
    y: NDArray[Any], x: NDArray[Any], w: Weight, kind: str, bound: float
) -> None:
    """Check the contract of y = x @ w in a float type: what correct rounding costs is no error."""
    assert y.dtype == DTYPES[kind]
    wide = x.astype(np.float64)
    exact = wide @ w.values
    scale = np.sqrt(wide**2 @ w.values**2) + x.shape[-1] * 2.0**-149
    # without the half ulp at a value just below a power of two, where the distance doubles
    excess = np.maximum(0, np.abs(y.astype(np.float64) - exact) - half_ulps(exact, kind))
    rms = np.sqrt(np.mean((excess / scale) ** 2, axis=-1))
    assert rms.max() < bound, f"{w}: {rms.max():.2e} in {kind}"


def assert_same(got: NDArray[Any], exact: Doubles, kind: str) -> None:
    """Check that numbers, NaN and Inf included, are f32 values rounded to a float type."""
    with np.errstate(all="ignore"):
        wanted = exact.astype(np.float32).astype(DTYPES[kind])
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    numbers = ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(wanted)[numbers])


def special_values(kind: str) -> NDArray[Any]:
    """Return numbers in f32 whose rounding to a float type is special: ties, ranges, NaN, Inf."""
    finfo: Any = ml_dtypes.finfo  # its types differ from version to version
    info = finfo(DTYPES[kind])
    largest, least = float(info.max), float(info.smallest_subnormal)
    step = 2.0 ** -MANTISSA_BITS[kind]
    ties = [1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 * (1 + 2.0**-8), 2 - step / 2]
    small = [least, least / 2, least * 0.51, least * 1.5, least * 2.5, float(info.tiny)]
    large = [largest, largest * (1 + step / 8), largest * (1 + step / 4 * 1.01), 3e38]
    positive = np.array([0.0, *ties, *small, *large, np.inf, np.nan], np.float32)
    return np.concatenate([positive, -positive])


def rows_of_every_sort(kind: str, k: int) -> NDArray[Any]:
    """Return rows: usual, denormal, with NaN, with Inf of one or both signs, with huge results."""
    x = random_x(6, k)
    x[1] *= np.float32({"f16": 2.0**-20, "bf16": 1e-38}[kind])
    x[2, k // 2] = np.nan
    x[3, k - 1] = np.inf
    x[4, [0, k - 1]] = np.inf, -np.inf
    x[5] *= np.float32({"f16": 1e4, "bf16": 1e34}[kind])
    return x.astype(DTYPES[kind])


def in_both(x: Any, w: Any) -> Any:
    y = x @ w
    return y, y.astype(np.float32)


def assert_both(
    rounded: NDArray[Any], y: Floats, x: NDArray[Any], w: Weight, kind: str, bound: float
) -> None:
    """Check the results of `in_both`: one in f32, and the same rounded once to a float type."""
    assert_ieee(y, x.astype(np.float32), w, bound)
    assert_same(rounded, y.astype(np.float64), kind)
