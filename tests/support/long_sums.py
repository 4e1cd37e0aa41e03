"""Products of many elements, of one sign or of mixed signs, and the bound of their error."""

import numpy as np

from q4jit.precision import BOUNDS, one_sign_bound, relative_error
from q4jit.weights.reference import exact_products, random_weight, random_x, without_signs
from q4jit.weights.tensor import QuantizedTensor
from tests.support.kernels import Floats

LONG_K = 14336  # of a model's largest layers
LONGEST_K = 1 << 18


def long_product(
    name: str, m: int, k: int, n: int, one_sign: bool
) -> tuple[Floats, QuantizedTensor]:
    """Return activations [m, k] and a weight [k, n] of a format."""
    x, w = random_x(m, k), random_weight(name, k, n)
    return (np.abs(x), without_signs(w)) if one_sign else (x, w)


def assert_long_product(y: Floats, x: Floats, w: QuantizedTensor) -> None:
    """Check the rms error of a whole result of `long_product`, whose signs decide the bound."""
    one_sign = bool((x >= 0).all())
    exact, scale = exact_products(x, [w])
    assert not one_sign or (exact > 0.4 * np.sqrt(x.shape[1]) * scale).all(), "not of one sign"
    error = relative_error(y.reshape(1, -1), exact.reshape(1, -1), scale.reshape(1, -1))
    bound = one_sign_bound(x.shape[1]) if one_sign else BOUNDS["f32"]
    assert error is not None
    assert error < bound, f"{w.format} {list(w.shape)}, M = {len(x)}: {error:.2e} > {bound:.2e}"
