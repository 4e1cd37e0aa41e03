"""Products with chosen experts on the CPU."""

from itertools import cycle
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, specialize, vecmat
from q4jit.cpu.experts import grouped
from q4jit.precision import BOUNDS
from q4jit.weights.formats import FORMATS
from tests.support.experts import (
    E,
    assert_experts,
    chosen,
    experts,
    moe,
    moe_arguments,
    numbers,
    of_rows,
    product,
)
from tests.support.kernels import Guarded, every_guarded_cpu, kinds, on, run_guarded

K, N = 256, 40


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, kind in zip(FORMATS, cycle(["f32", "f16", "bf16"]), strict=False)],
)
def test_every_format_and_dtype(name: str, kind: str) -> None:
    w, ids, x = experts(name, K, N), chosen(9, 2), numbers(9, 1, K, kind=kind)
    assert_experts(on("cpu", product)(x, w, ids), x, w, ids, BOUNDS["f32"], kind)


@pytest.mark.parametrize("precision", ["f16", "i8"])
@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3", "cpu:x86-64"])
def test_every_precision(target: str, precision: str) -> None:
    for name in ("Q4_0", "Q6_K"):
        w, ids, x = experts(name, K, N), chosen(30), numbers(30, K)
        y = specialize(product, target=target, precision=precision)(x, w, ids)
        assert_experts(y, x, w, ids, BOUNDS[precision])


@pytest.mark.parametrize(
    ("x_lead", "ids_shape"),
    [
        ((), (3,)),
        ((1,), (3,)),
        ((3,), (3,)),
        ((1, 1), (1, 8)),
        ((4, 1), (4, 2)),
        ((4, 2), (4, 2)),
        ((4, 2), (4, 1)),
        ((1, 1), (4, 2)),
        ((4, 1), (1, 2)),
        ((2, 3, 1), (2, 3, 2)),
        ((2, 3), (2, 3)),
        ((0,), (0,)),
        ((0, 1), (0, 2)),
    ],
    ids=str,
)
def test_leading_axes_broadcast(x_lead: tuple[int, ...], ids_shape: tuple[int, ...]) -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(*ids_shape), numbers(*x_lead, 64)
    assert_experts(on("cpu", product)(x, w, ids), x, w, ids, BOUNDS["f32"])
    assert_experts(on("cpu", product).py_func(x, w, ids), x, w, ids, 2e-7)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_axis_is_added_in_the_function(dtype: Any) -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(7, 3).astype(dtype), numbers(7, 64)
    assert_experts(on("cpu", of_rows)(x, w, ids), x[:, None], w, ids, BOUNDS["f32"])


@pytest.mark.parametrize("n", [1, 7, 8, 16, 33])
def test_every_width(n: int) -> None:
    """Columns one by one, whole panels, and panels that end inside of an expert."""
    for m in (1, 5, 40):
        w, ids, x = experts("Q4_1", 64, n), chosen(m), numbers(m, 64)
        assert_experts(on("cpu", product)(x, w, ids), x, w, ids, BOUNDS["f32"])


def test_slices_and_several_ids() -> None:
    def function(x: Any, w: Any, v: Any, a: Any, b: Any) -> Any:
        y = vecmat(x, w[a])
        return y[..., 16:32], y[..., 3:9], vecmat(x, v[b]) + vecmat(x, v[a])

    x, a, b = numbers(12, 64), chosen(12), chosen(12, seed=1)
    w, v = experts("Q4_0", 64, 40), experts("F16", 64, 24)
    first, second, total = specialize(function, target="cpu")(x, w, v, a, b)
    y = vecmat(x, w[a])
    assert np.allclose(first, y[:, 16:32], atol=1e-6)
    assert np.allclose(second, y[:, 3:9], atol=1e-6)
    assert np.allclose(total, vecmat(x, v[a]) + vecmat(x, v[b]), atol=1e-5)


def test_one_expert_has_all_vectors() -> None:
    w, x = experts("Q4_0", 64, 20), numbers(23, 64)
    ids = np.full(23, E - 1)
    assert_experts(on("cpu", product)(x, w, ids), x, w, ids, BOUNDS["f32"])


def test_changed_ids_need_no_new_kernel() -> None:
    function = specialize(product, target="cpu")
    w, x = experts("Q4_0", 64, 20), numbers(6, 64)
    for seed in range(3):
        ids = chosen(6, seed=seed)
        assert_experts(function(x, w, ids), x, w, ids, BOUNDS["f32"])
    assert function.stats.misses == 1
    bound = function.bind(x, w, ids)
    ids[...] = chosen(6, seed=9)
    assert_experts(bound(), x, w, ids, BOUNDS["f32"])


@pytest.mark.parametrize("bad", [-1, E])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    ids = np.array([0, 1, bad, 2])
    message = rf"argument 'ids' at \[2\]: expected ids from 0 to {E - 1}, got {bad}$"
    with pytest.raises(ArgumentError, match=message):
        on("cpu", product)(numbers(4, 64), experts("Q4_0", 64, 20), ids)


def test_special_values() -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(4), numbers(4, 64).copy()
    x[0, 3], x[1, 5], x[2, 7] = np.inf, np.nan, 1e38
    y = on("cpu", product)(x, w, ids)
    np.testing.assert_array_equal(kinds(y), kinds(product(x, w, ids)))


@every_guarded_cpu
def test_kernels_read_and_write_only_their_arrays(cpu: Guarded) -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(11), numbers(11, 64)
    (y,) = run_guarded(product, cpu, [x, w, ids])
    assert_experts(y, x, w, ids, BOUNDS["f32"])
    args = moe_arguments(5, 3)
    (y,) = run_guarded(moe, cpu, args)
    assert np.allclose(y, moe(*args), atol=1e-5)


# --- a whole feed-forward -------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "a"), [(1, 1), (1, 4), (2, 3), (17, 2), (40, 1)])
def test_a_feed_forward_is_one_function(t: int, a: int) -> None:
    args = moe_arguments(t, a)
    y = on("cpu", moe)(*args)
    wanted = moe(*args)
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_feed_forward_inside_of_a_layer() -> None:
    def layer(x: Any, dense: Any, gain: Any, g: Any, u: Any, d: Any, ids: Any, s: Any) -> Any:
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
        y = moe(normed, g, u, d, ids, s)
        return x + y + normed @ dense, vecmat(normed[:, None], g[ids])

    x, *rest = moe_arguments(6, 3)
    args = x, experts("Q8_0", 64, 64)[0], np.abs(numbers(64)), *rest
    for got, wanted in zip(specialize(layer, target="cpu")(*args), layer(*args), strict=True):
        assert got.shape == wanted.shape
        assert np.allclose(got, wanted, atol=1e-5)


def test_values_of_rows_with_several_vectors() -> None:
    def function(x: Any, w: Any, ids: Any, s: Any, bias: Any) -> Any:
        y = vecmat(x[..., None, :], w[ids])
        largest = y.max(axis=-1, keepdims=True)
        scaled = y * (1 / (1 + np.exp(-s)))[..., None] + x[..., None, :20] + bias
        kept = np.where(y > 0, y, 0.0)
        return largest, scaled, y - largest, kept.mean(axis=-2), scaled.sum(axis=1, keepdims=True)

    def keep(x: Any, w: Any, ids: Any, s: Any, bias: Any) -> Any:
        *results, total = function(x, w, ids, s, bias)
        return *results, total * 1.0

    args = numbers(6, 64), experts("Q4_0", 64, 20), chosen(6, 3), numbers(6, 3), numbers(20)
    for got, wanted in zip(specialize(keep, target="cpu")(*args), keep(*args), strict=True):
        assert got.shape == wanted.shape
        assert np.allclose(got, wanted, atol=1e-5)


def test_explain_names_the_indexed_product() -> None:
    function = specialize(product, target="cpu")
    function(numbers(3, 64), experts("Q4_0", 64, 20), chosen(3))
    assert "vecmat(v0, w[ids])    Q4_0 [5, 64, 20]" in function.explain()
    assert "grouped by expert" in function.explain()


def test_vectors_are_sorted_by_expert() -> None:
    order, buckets = grouped(np.array([3, 1, 3, 0, 1, 3]))
    assert order.tolist() == [3, 1, 4, 0, 2, 5]
    assert buckets.tolist() == [[0, 0, 1], [1, 1, 3], [3, 3, 6]]
    order, buckets = grouped(np.zeros(0, np.int64))
    assert (order.shape, buckets.shape) == ((0,), (0, 3))
