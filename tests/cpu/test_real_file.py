"""Every tensor of a real file in Q4_K_M (Gemma 3 270M) is multiplied, against float64."""

from typing import Any

import numpy as np
import pytest

from q4jit import QuantizedTensor, load_gguf, specialize
from q4jit.weights.gguf.file import GGUFFile
from tests.support.kernels import Weight, assert_contract, decoded, on, one_product, random_x
from tests.support.tools import gemma_file

ROWS = (1, 5, 33)
MOST_COLUMNS = 4096  # of the embedding, which has 262144

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> GGUFFile:
    return load_gguf(gemma_file())


def last_columns(w: QuantizedTensor) -> QuantizedTensor:
    """Return the last columns of a weight, at most `MOST_COLUMNS`."""
    raw = w.raw[-MOST_COLUMNS:]
    return QuantizedTensor.from_bytes(raw, shape=(w.shape[0], len(raw)), format=w.format)


@pytest.mark.parametrize(("name", "count"), {"Q4_K": 27, "Q5_0": 81, "Q6_K": 9, "Q8_0": 10}.items())
def test_every_matrix_of_a_model_keeps_the_contract(model: GGUFFile, name: str, count: int) -> None:
    multiply = on("cpu", one_product)
    tensors = [model[t] for t, entry in model.tensors.items() if entry.format == name]
    assert len(tensors) == count
    for tensor in tensors:
        assert isinstance(tensor, QuantizedTensor)
        columns = last_columns(tensor)
        w = Weight(columns, decoded(name, columns.raw).astype(np.float64))
        rows = [random_x(m, tensor.shape[0]) for m in ROWS]
        y = np.concatenate([multiply(x, columns) for x in rows])
        assert_contract(y, np.concatenate(rows), w)  # once: squares of all values take a while


def test_every_vector_of_a_model_is_multiplied(model: GGUFFile) -> None:
    @specialize(target="cpu")
    def scaled(x: Any, gain: Any) -> Any:
        return x * gain

    vectors = [v for v in model.values() if isinstance(v, np.ndarray)]
    assert len(vectors) == 109
    for vector in vectors:
        for m in ROWS:
            x = random_x(m, len(vector))
            assert np.array_equal(scaled(x, vector), x * vector)
