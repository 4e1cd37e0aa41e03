"""Helpers for tests of chosen experts: tensors, functions, and the precision contract."""

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit import ExpertTensor, vecmat
from q4jit.weights.reference import random_weight
from tests.support.halves import DTYPES, half_ulps
from tests.support.kernels import Ids

E: Final = 5


@functools.cache
def experts(name: str, k: int, n: int, count: int = E) -> ExpertTensor:
    """Return a random expert tensor, which tests share."""
    return ExpertTensor.stack([random_weight(name, k, n, seed=e) for e in range(count)])


def chosen(*shape: int, count: int = E, seed: int = 0) -> Ids:
    """Return random ids of experts."""
    ids: Ids = np.random.default_rng([seed, *shape]).integers(0, count, shape)
    return ids


def numbers(*shape: int, kind: str = "f32") -> NDArray[Any]:
    """Return random activations."""
    return np.random.default_rng(shape).standard_normal(shape).astype(DTYPES[kind])


def product(x: Any, w: Any, ids: Any) -> Any:
    return vecmat(x, w[ids])


def of_rows(x: Any, w: Any, ids: Any) -> Any:
    return vecmat(x[..., None, :], w[ids])


def moe(x: Any, gate: Any, up: Any, down: Any, ids: Any, weights: Any) -> Any:
    """Compute the feed-forward of a mixture of experts."""
    rows = x[..., None, :]
    g = vecmat(rows, gate[ids])
    h = g / (1 + np.exp(-g)) * vecmat(rows, up[ids])
    return (vecmat(h, down[ids]) * weights[..., None]).sum(axis=-2)


def moe_arguments(t: int, a: int, k: int = 64, f: int = 96, name: str = "Q4_0") -> tuple[Any, ...]:
    """Return x [t, k], the weights of `moe` with f hidden columns, ids [t, a] and their weights."""
    matrices = experts(name, k, f), experts("Q8_0", k, f), experts(name, f, k)
    return numbers(t, k), *matrices, chosen(t, a), np.abs(numbers(t, a))


def assert_experts(
    y: NDArray[Any], x: NDArray[Any], w: ExpertTensor, ids: Ids, bound: float, kind: str = "f32"
) -> None:
    """Check the contract of vecmat(x, w[ids]) for each vector."""
    assert y.dtype == DTYPES[kind]
    k, n = w.shape[1:]
    lead = np.broadcast_shapes(x.shape[:-1], ids.shape)
    assert y.shape == (*lead, n)
    vectors = np.broadcast_to(x.astype(np.float64), (*lead, k)).reshape(-1, k)
    for got, vector, e in zip(
        y.reshape(-1, n), vectors, np.broadcast_to(ids, lead).reshape(-1), strict=True
    ):
        values = w[e].dequantize().astype(np.float64)
        exact = vector @ values
        scale = np.sqrt(vector**2 @ values**2) + k * 2.0**-149
        excess = np.maximum(0, np.abs(got.astype(np.float64) - exact) - half_ulps(exact, kind))
        rms = np.sqrt(np.mean((excess / scale) ** 2))
        assert rms < bound, f"{w}: {rms:.2e} of expert {e}"
