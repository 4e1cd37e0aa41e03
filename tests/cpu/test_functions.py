"""Whole functions: random graphs against the same function in float64; element-wise accuracy."""

from typing import Final

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from q4jit import specialize
from tests.support.functions import (
    BOUND,
    ELEMENTWISE,
    assert_close,
    assert_same_specials,
    assert_within_4_ulp,
    every_operation,
    everywhere,
    random,
    reference,
    special_pairs,
)
from tests.support.kernels import IN_PROCESS, require_target
from tests.support.random_functions import Example, examples

EXAMPLES: Final = 80  # about 0.25 s each, because almost each compiles a kernel


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
@given(examples(), st.sampled_from(["cpu", "cpu", "cpu", "cpu:x86-64-v3", "cpu:x86-64"]))
def test_a_random_function(example: Example, target: str) -> None:
    function, args = example.function(), tuple(example.arguments.values())
    results = specialize(function, target=require_target(target))(*args)
    assert isinstance(results, tuple) == example.returns_tuple
    assert_close(results, reference(function, *args))


def test_the_error_measure_detects_a_wrong_function() -> None:
    y = random(3, 5)
    assert_close(y, (y.astype(np.float64),))
    with pytest.raises(AssertionError, match="result 0 differs by a relative rms of 4"):
        assert_close(y, (y.astype(np.float64) * (1 + 4.01e-6),))
    with pytest.raises(AssertionError, match=r"expected \(3, 5\), got \(5,\)"):
        assert_close(y[0], (y,))
    with pytest.raises(AssertionError):
        assert_close((y, y), (y,))
    assert BOUND == 3e-6


# --- element-wise functions ----------------------------------------------------------------------


@pytest.mark.parametrize("target", IN_PROCESS)
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("width", [0, 1], ids=["vector", "scalar"])
def test_element_wise_within_4_ulp(name: str, target: str, width: int) -> None:
    """Check functions in lanes, and in rows of one element, which kernels compute as scalars."""
    function, low, high = ELEMENTWISE[name]
    x = everywhere(low, high)
    x = x.reshape(-1, width) if width else x
    y = np.asarray(specialize(function, target=require_target(target))(x))
    assert_within_4_ulp(y, function, x)


@pytest.mark.parametrize("target", IN_PROCESS)
def test_special_values_give_what_numpy_gives(target: str) -> None:
    """Check every operation on every pair of special values against NumPy in f32."""
    a, b = special_pairs()
    results = specialize(every_operation, target=require_target(target))(a, b)
    assert_same_specials(results, a, b)
