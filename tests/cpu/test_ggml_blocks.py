"""Blocks that ggml's own quantiser wrote: decoded as ggml decodes them, and multiplied."""

from typing import Any

import numpy as np
import pytest

from q4jit import QuantizedTensor, specialize
from q4jit.precision import BOUNDS, error_scale
from q4jit.weights.decode import decode
from q4jit.weights.formats import FORMATS
from tests.support.ggml_blocks import COLUMNS, K, load_blocks
from tests.support.pairs import pairwise


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_ggmls(name: str) -> None:
    blocks, values = load_blocks(name)
    np.testing.assert_array_equal(decode(FORMATS[name], blocks), values)


@pairwise("name precision m", [*FORMATS], [*BOUNDS], [1, 5])
def test_products_with_ggmls_blocks(name: str, precision: str, m: int) -> None:
    blocks, values = load_blocks(name)
    # 16 times the columns: fewer than eight results are multiplied as floats
    w = QuantizedTensor.from_bytes(np.tile(blocks, (16, 1)), shape=(K, 16 * COLUMNS), format=name)
    exact = np.tile(values.astype(np.float64), (16, 1)).T

    @specialize(precision=precision, target="cpu")
    def product(x: Any, w: Any) -> Any:
        return x @ w

    x = np.random.default_rng(m).standard_normal((m, K)).astype(np.float32)
    wide = x.astype(np.float64)
    errors = (product(x, w) - wide @ exact) / error_scale(wide**2 @ exact**2, K)
    assert np.sqrt(np.mean(errors**2)) <= BOUNDS[precision]
