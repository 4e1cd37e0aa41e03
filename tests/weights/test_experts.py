"""Expert tensors: sequences of matrices that share their blocks."""

import copy
import pickle
import weakref

import numpy as np
import pytest

import q4jit
from q4jit import ArgumentError, ExpertTensor, FormatError, QuantizedTensor
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16, pack
from q4jit.weights.reference import random_weight

E, K, N = 3, 256, 5


def blocks(name: str) -> bytes:
    return bytes(random_weight(name, K, E * N).raw.data)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
def test_an_expert_tensor_is_a_sequence_of_matrices(name: str) -> None:
    raw = blocks(name)
    w = ExpertTensor.from_bytes(raw, shape=(E, K, N), format=name)
    whole = QuantizedTensor.from_bytes(raw, shape=(K, E * N), format=name).dequantize()
    assert (w.shape, w.ndim, w.format, w.nbytes, len(w)) == ((E, K, N), 3, name, len(raw), E)
    for e, matrix in enumerate(w):
        assert isinstance(matrix, QuantizedTensor)
        assert matrix is w[e] is w[e - E] is w[np.int64(e)]
        assert np.array_equal(matrix.dequantize(), whole[:, e * N : (e + 1) * N])
    assert np.array_equal(w.dequantize(), np.stack([m.dequantize() for m in w]))
    assert w.signature == (name, E, K, N, True, True)


def test_experts_share_the_memory() -> None:
    raw = np.frombuffer(blocks("Q4_0"), np.uint8)
    w = ExpertTensor.from_bytes(raw, shape=(E, K, N), format="Q4_0")
    assert np.shares_memory(w[1].raw, raw)
    assert not w.raw.flags.writeable
    writable = raw.copy()
    copied = ExpertTensor.from_bytes(writable, shape=(E, K, N), format="Q4_0")
    writable[:] = 0
    assert np.array_equal(copied.raw, w.raw)


def test_stacked_matrices() -> None:
    w = ExpertTensor.from_bytes(blocks("Q4_0"), shape=(E, K, N), format="Q4_0")
    assert np.array_equal(ExpertTensor.stack(list(w)).raw, w.raw)
    with pytest.raises(ArgumentError, match="at least one QuantizedTensor, got none"):
        ExpertTensor.stack([])
    other = q4jit.quantize(np.zeros((K, N + 1), np.float32), "Q4_0")
    with pytest.raises(ArgumentError, match=r"expert 1: expected <QuantizedTensor"):
        ExpertTensor.stack([w[0], other])
    with pytest.raises(ArgumentError, match="expert 1: expected a QuantizedTensor, got int"):
        ExpertTensor.stack([w[0], 3])  # type: ignore[list-item]


def test_wrong_bytes_and_indices_raise_errors() -> None:
    raw = blocks("Q4_0")
    with pytest.raises(FormatError, match=r"\(3 × 5 columns of 144\), got 2159 bytes"):
        ExpertTensor.from_bytes(raw[1:], shape=(E, K, N), format="Q4_0")
    for shape in ((K, N), (E, K, 0), 5):
        with pytest.raises(FormatError, match=r"\(E, K, N\)"):
            ExpertTensor.from_bytes(raw, shape=shape, format="Q4_0")  # type: ignore[arg-type]
    w = ExpertTensor.from_bytes(raw, shape=(E, K, N), format="Q4_0")
    for index in (E, -E - 1):
        with pytest.raises(IndexError, match=f"expected an expert from 0 to 2, got {index}"):
            w[index]
    for wrong in (slice(1), True, "0", 1.0):
        with pytest.raises(ArgumentError, match="index of an ExpertTensor: expected"):
            w[wrong]
    with pytest.raises(ArgumentError, match="is not made by calling the class"):
        ExpertTensor(raw)
    with pytest.raises(ArgumentError, match="does not become an array by itself"):
        np.asarray(w)


def test_it_is_pickled_and_compared_by_identity() -> None:
    w = ExpertTensor.from_bytes(blocks("Q4_0"), shape=(E, K, N), format="Q4_0")
    again = pickle.loads(pickle.dumps(w))
    assert again != w
    assert len({w, again}) == 2
    assert np.array_equal(again.raw, w.raw)
    assert copy.copy(w) is copy.deepcopy(w) is weakref.ref(w)() is w
    assert repr(w) == "<ExpertTensor Q4_0 (E, K, N) = (3, 256, 5), 2160 bytes>"


def test_each_expert_is_repacked_by_itself() -> None:
    w = ExpertTensor.from_bytes(blocks("Q4_0"), shape=(E, K, N), format="Q4_0")
    packed = w._resident.blocks(INTERLEAVED16).reshape(E, -1)
    for own, matrix in zip(packed, w, strict=True):
        assert np.array_equal(own, pack(FORMATS["Q4_0"], INTERLEAVED16, matrix.raw))


def test_matrices_are_made_when_they_are_asked_for() -> None:
    """A small file may claim a million experts."""
    w = ExpertTensor.from_bytes(bytes(4 << 20), shape=(1 << 20, 1, 1), format="F32")
    assert w[-1] is w[(1 << 20) - 1]
    assert len(w._experts) == 1
