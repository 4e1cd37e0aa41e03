"""Whole functions: random graphs against a float64 run of themselves, and element-wise accuracy."""

from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from q4jit import specialize
from tests.functions import (
    BOUND,
    ELEMENTWISE,
    F32,
    assert_close,
    everywhere,
    random,
    reference,
    ulps,
)
from tests.kernels import IN_PROCESS, require_target
from tests.random_functions import Example, examples

EXAMPLES: Final = 80  # about 0.25 s each: almost all of them compile


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
@given(examples(), st.sampled_from(["cpu", "cpu", "cpu", "cpu:x86-64-v3", "cpu:x86-64"]))
def test_a_random_function(example: Example, target: str) -> None:
    function, args = example.function(), tuple(example.arguments.values())
    found = specialize(function, target=require_target(target))(*args)
    assert isinstance(found, tuple) == example.returns_tuple
    assert_close(found, reference(function, *args))


def test_the_measure_sees_a_wrong_function() -> None:
    y = random(3, 5)
    assert_close(y, (y.astype(np.float64),))
    with pytest.raises(AssertionError, match="result 0 differs by a relative rms of 4"):
        assert_close(y, (y.astype(np.float64) * (1 + 4.01e-6),))
    with pytest.raises(AssertionError, match="has the shape"):
        assert_close(y[0], (y,))
    with pytest.raises(AssertionError):
        assert_close((y, y), (y,))
    assert BOUND == 3e-6


# --- element-wise functions ----------------------------------------------------------------------


@pytest.mark.parametrize("target", IN_PROCESS)
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("width", [0, 1], ids=["vector", "scalar"])
def test_element_wise_within_4_ulp(name: str, target: str, width: int) -> None:
    """In lanes, and for rows of one element, where kernels compute scalars."""
    function, low, high = ELEMENTWISE[name]
    x = everywhere(low, high)
    x = x.reshape(-1, width) if width else x
    found = np.asarray(specialize(function, target=require_target(target))(x))
    with np.errstate(all="ignore"):
        exact = function(x.astype(np.float64))
        rounded = exact.astype(F32)
    special = ~np.isfinite(rounded)
    assert np.array_equal(found[special], rounded[special], equal_nan=True)
    assert np.array_equal(np.signbit(found[rounded == 0]), np.signbit(rounded[rounded == 0]))
    assert ulps(found[~special], exact[~special]).max() <= 4


@pytest.mark.parametrize("target", IN_PROCESS)
def test_where_nan_and_infinity_go(target: str) -> None:
    """Every operation on every pair of special values does what NumPy does in f32."""
    specials = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38], F32)
    a, b = (np.ascontiguousarray(v) for v in np.broadcast_arrays(specials[:, None], specials))

    def function(a: Any, b: Any) -> tuple[Any, ...]:
        sums = (a + b, a - b, a * b, a / b, -a, abs(a), a**2, a**-1, a**0)
        order = (np.maximum(a, b), np.minimum(a, b), np.clip(a, -1, 2), np.where(a, 1.0, 2.0))
        tests = (a < b, a <= b, a > b, a >= b, a == b, a != b, (a < b) | (b < a), ~(a < b))
        return *sums, *order, *(np.where(t, 1.0, 0.0) for t in tests)

    found = specialize(function, target=require_target(target))(a, b)
    with np.errstate(all="ignore"):
        wanted = function(a, b)
    for i, (y, r) in enumerate(zip(found, wanted, strict=True)):
        assert np.array_equal(y, r.astype(F32), equal_nan=True), i
