"""Products with `w.T` in the text of GPU kernels, executed without a GPU."""

from typing import Any

import numpy as np
import pytest

from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import random_x, weight

K, N = 96, 37
FORMATS = ("Q4_0", "Q4_1", "Q8_0", "F16", "F32")


def transposed(y: Any, w: Any) -> Any:
    return y @ w.T


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    w = weight(name, K, N)
    y = random_x(2, N)
    plan = hip_plan(transposed, "hip:gfx1100", [y, w.tensor], PlanOptions("f32", None, "element"))
    (z,) = run_on_host(plan, [y, w.tensor])
    exact = y.astype(np.float64) @ w.values.T
    scale = np.sqrt(y.astype(np.float64) ** 2 @ w.values.T**2)
    assert np.sqrt(np.mean(((z - exact) / scale) ** 2)) < BOUNDS["f32"]
