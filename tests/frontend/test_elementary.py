"""exp, log and tanh, computed with NumPy operations and compared with float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.frontend import elementary

Lanes = NDArray[Any]  # f32, i32 or bool lanes


class NumpyOps:
    """The operations of `elementary.Ops` on NumPy arrays. fused: an fma rounds only once."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def f32(self, value: float) -> Lanes:
        return np.array([value], np.float32)

    def i32(self, value: int) -> Lanes:
        return np.array([value], np.int32)

    def op(self, name: str, *v: Lanes) -> Lanes:
        match name:
            case "fma" if self.fused:
                exact = v[0].astype(np.float64) * v[1].astype(np.float64) + v[2]
                return exact.astype(np.float32)
            case "fma":
                return v[0] * v[1] + v[2]
            case "fadd" | "iadd":
                return v[0] + v[1]
            case "fsub" | "isub":
                return v[0] - v[1]
            case "fmul":
                return v[0] * v[1]
            case "fdiv":
                return v[0] / v[1]
            case "fabs":
                return np.abs(v[0])
            case "shl":
                return v[0] << v[1]
            case "ashr":
                return v[0] >> v[1]
            case "and":
                return v[0] & v[1]
            case "or":
                return v[0] | v[1]
            case "flt":
                return v[0] < v[1]
            case "feq":
                return np.equal(v[0], v[1])
            case "select":
                return np.where(v[0], v[1], v[2])
            case "as_int":
                return np.ascontiguousarray(v[0]).view(np.int32)
            case "as_float":
                return np.ascontiguousarray(v[0]).view(np.float32)
        raise AssertionError(name)


def _ulps(result: Lanes, exact: NDArray[np.float64]) -> float:
    rounded = exact.astype(np.float32)
    ulp = np.spacing(np.abs(rounded)).astype(np.float64)
    finite = np.isfinite(rounded)
    assert np.array_equal(result[~finite], rounded[~finite], equal_nan=True)
    return float((np.abs(result.astype(np.float64) - exact) / ulp)[finite].max())


def _inputs(low: float, high: float) -> Lanes:
    """Return every 1031st f32 between two bounds of one sign, and the bounds."""
    bits = np.sort(np.array([low, high], np.float32).view(np.uint32)).astype(np.int64)
    steps = np.append(np.arange(bits[0], bits[1], 1031), bits[1])
    return steps.astype(np.uint32).view(np.float32)


CASES = [
    ("exp", (1e-45, 88.7), 2),
    ("exp", (-1e-45, -110.0), 2),
    ("log", (1e-45, 3.4e38), 3),
    ("tanh", (1e-45, 20.0), 3),
    ("tanh", (-1e-45, -20.0), 3),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("name", "bounds", "bound_ulps"), CASES)
def test_error_in_ulps(
    name: str, bounds: tuple[float, float], bound_ulps: float, fused: bool
) -> None:
    x = _inputs(*bounds)
    with np.errstate(all="ignore"):
        result = getattr(elementary, name)(NumpyOps(fused), x)
        exact = getattr(np, name)(x.astype(np.float64))
        assert _ulps(result, exact) <= bound_ulps + (0 if fused else 1)


def test_special_values() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 89.0, -200.0, -1.0], np.float32)
    with np.errstate(all="ignore"):
        for name in ("exp", "log", "tanh"):
            result = getattr(elementary, name)(NumpyOps(True), x)
            expected = getattr(np, name)(x)
            np.testing.assert_allclose(result, expected, rtol=5e-7, err_msg=name)
            if name == "tanh":
                assert np.array_equal(np.signbit(result[:4]), np.signbit(expected[:4]))
