"""`gemv` applies the scales of block formats late: each format alone, so that no other hides it.

If one weight of a kernel has no late scales (F16, F32, an Inf among its scales), none has. So these
tests have one format in a kernel, and check that its scales are late.
"""

import functools
from typing import Any, Final

import numpy as np
import pytest

from q4jit.hip.kernel import GEMV, ROWS, TILE_HALVES, TILE_MATRIX, HipPlan
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR
from tests.support.cancelling import cancelling, nearly_cancelling, only_zeros
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import (
    F32,
    Floats,
    Weight,
    assert_contract,
    assert_ieee,
    joined_products,
    not_finite_rows,
    one_product,
    random_blocks,
    random_x,
    relative_error,
    set_f16,
    spoiled,
    weight,
    wrap,
)
from tests.support.pairs import in_turn

K: Final = 256
N: Final = 37
BLOCK_FORMATS: Final = tuple(f.name for f in FORMATS.values() if f.float_type is None)
ARCHS: Final = ("gfx1100", "gfx942", "gfx90a", "gfx1030", "sm_90")
M_CLASSES: Final = (1, 2, 4, 8)  # other tests have 16

every_format = pytest.mark.parametrize("name", BLOCK_FORMATS)
some_pairs = in_turn("name arch m", 2 * BLOCK_FORMATS, ARCHS, M_CLASSES)


def planned(function: Any, args: list[Any], arch: str, layout: str = PLANAR) -> HipPlan:
    """Return the plan of a function, which must use `gemv` with late scales."""
    plan = hip_plan(function, f"hip:{arch}", args, PlanOptions(schedule=GEMV, layout=layout))
    assert [(k.schedule, k.scales_late) for k in plan.kernels] == [(GEMV, True)]
    return plan


def product(
    x: Floats, w: Weight, arch: str, m: int = 16, layout: str = PLANAR, **options: Any
) -> Floats:
    """Return x @ w, `m` rows a launch."""
    parts = []
    for first in range(0, len(x), m):
        args = [x[first : first + m], w.tensor]
        parts += run_on_host(planned(one_product, args, arch, layout), args, **options)
    return np.concatenate(parts)


def without_exact_results(text: str) -> str:
    """Return the text of a kernel that stores whatever late scales give."""
    assert "if (!is_final(" in text
    return text.replace("if (!is_final(", "if (false && !is_final(")


def some_rows() -> Floats:
    """Return a fifth of `not_finite_rows`: every value, at different positions, and finite rows."""
    rows = not_finite_rows(K)
    some: Floats = rows[np.arange(len(rows)) // 2 % 5 == 3]
    return some


@some_pairs
def test_every_format_alone(name: str, arch: str, m: int) -> None:
    x, w = random_x(m, K), weight(name, K, N)
    assert_contract(product(x, w, arch, m), x, w)


@every_format
def test_blocks_in_the_layout_of_gguf(name: str) -> None:
    x, w = some_rows(), weight(name, K, N)
    assert_ieee(product(x, w, "gfx1030", layout=GGUF), x, w)


@some_pairs
def test_not_finite_activations(name: str, arch: str, m: int) -> None:
    x, w = some_rows(), weight(name, K, N, "mixed")
    y = product(x, w, arch, m)
    assert_ieee(y, x, w)
    finite = np.isfinite(x).all(1)
    clean = product(np.where(np.isfinite(x), x, F32(1)), w, arch, m)
    np.testing.assert_array_equal(y[finite], clean[finite])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("m", [1, 4])
def test_an_inf_beside_every_sign_of_scale_and_minimum(m: int, arch: str) -> None:
    """Check what gave NaN: Inf, from scale · code, less Inf, from the minimum."""
    heads = ((1, -3.25), (1, 2), (-0.5, 4.25), (0, 2), (0, -2), (2, 0), (0, 0))
    codes = np.arange(32) % 16
    blocks = np.zeros((len(heads), 1, 20), np.uint8)
    blocks[..., 4:] = codes[:16] | codes[16:] << 4
    set_f16(blocks, 0, np.array([[d] for d, _ in heads], np.float16))
    set_f16(blocks, 2, np.array([[least] for _, least in heads], np.float16))
    w, x = wrap("Q4_1", 32, blocks), np.ones((16, 32), F32)
    for row in range(16):
        x[row, 2 * row + row % 2] = np.inf if row % 3 else -np.inf
    assert_ieee(product(x, w, arch, m), x, w)


@functools.cache
def tiny_weight(name: str) -> Weight:
    """Return a weight whose scales are so small that products with huge x stay finite."""
    fmt = FORMATS[name]
    blocks = random_blocks(fmt, K, N, "zero", np.random.default_rng(0))
    if fmt.scale_type == "e8m0":
        blocks[..., fmt.scale_at] = 128 - 24
        return wrap(name, K, blocks)
    tiny = np.random.default_rng(1).choice([-1, 1], blocks.shape[:2]) * 2.0**-24
    for at in (fmt.scale_at, fmt.minimum_at):
        if at is not None:
            set_f16(blocks, at, tiny.astype(np.float16))
    return wrap(name, K, blocks)


def huge_rows() -> Floats:
    """Return rows of huge x: sums of x and of x times quants overflow before they are scaled."""
    x = random_x(4, K)
    x[0] = np.sign(x[0]) * F32(3e38)
    x[1] = 3e38
    x[2, 32:64] = 3e38
    x[3, :] = 0
    x[3, 7] = -3e38
    return x


@some_pairs
def test_huge_activations(name: str, arch: str, m: int) -> None:
    x, w = huge_rows(), tiny_weight(name)
    assert np.all(np.abs(x).astype(np.float64) @ np.abs(w.values) < np.finfo(F32).max)
    assert_contract(product(x, w, arch, m), x, w)


@some_pairs
def test_denormal_activations(name: str, arch: str, m: int) -> None:
    x = np.concatenate([random_x(2, K) * 1e-36, random_x(4, K) * 1e-40]).astype(F32)
    assert np.any(np.abs(x[x != 0]) < np.finfo(F32).tiny)
    w = weight(name, K, N, "largest")
    assert_contract(product(x, w, arch, m), x, w)


@pytest.mark.parametrize("arch", ARCHS)
def test_scales_and_minimums_that_cancel(arch: str) -> None:
    w, x = cancelling(K, N), random_x(8, K)
    x[1, 0], x[2, 5] = 1e20, 1e20
    y = product(x, w, arch, 8)
    assert_contract(y, x, w)
    np.testing.assert_array_equal(y[:, ::3], 0)
    x = only_zeros(K)
    np.testing.assert_array_equal(product(x, w, arch)[:, 1::3], 0)
    x[0, 16] = np.inf
    assert_ieee(product(x, w, arch), x, w)
    w, x = nearly_cancelling(K, N), random_x(8, K)
    assert_contract(product(x, w, arch, 8), x, w)


@pytest.mark.parametrize("schedule", [TILE_MATRIX, TILE_HALVES])
@pytest.mark.parametrize("arch", ["gfx1100", "gfx90a", "sm_90"])
def test_scales_and_minimums_that_cancel_in_tiles(arch: str, schedule: str) -> None:
    for w in (cancelling(K, N), nearly_cancelling(K, N), weight("Q4_1", K, N)):
        x = np.concatenate([random_x(20, K), only_zeros(K), (np.eye(K)[::7] * 1.7).astype(F32)])
        args = [x, w.tensor]
        plan = hip_plan(one_product, f"hip:{arch}", args, PlanOptions(schedule=schedule))
        assert [k.schedule for k in plan.kernels] == [ROWS, schedule]
        (y,) = run_on_host(plan, args)
        assert_contract(y, x, w)


@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
def test_single_elements_of_x(arch: str) -> None:
    """Check each element of a column by itself: some weights are much smaller than the minimum."""
    x, w = (np.eye(K)[::5] * 1.7).astype(F32), weight("Q4_1", K, N)
    assert_contract(product(x, w, arch), x, w)


@every_format
def test_results_need_a_path_of_their_own(name: str) -> None:
    """Check that late scales alone give a wrong result, so that these tests take both paths."""
    x, w = huge_rows(), tiny_weight(name)
    if FORMATS[name].minimum_at is not None:
        x[3, 5] = np.inf
    assert_ieee(product(x, w, "gfx1030"), x, w)
    with pytest.raises(AssertionError):
        assert_ieee(product(x, w, "gfx1030", edit=without_exact_results), x, w)


def projected(x: Any, gain: Any, gate: Any, up: Any) -> Any:
    """Return two products of RMSNorm, whose sum over a row is part of the kernel."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    return h @ gate + h @ up


@in_turn("name m", BLOCK_FORMATS, [1, 3])
def test_a_prologue_with_sums_of_the_row(name: str, m: int) -> None:
    gate, up = weight(name, K, N), weight(name, K, N, seed=1)
    x, gain = random_x(m, K), random_x(K)
    args = [x, gain, gate.tensor, up.tensor]
    plan = planned(projected, args, "gfx90a")
    assert "row_values(" in render(plan, plan.kernels[0]).text
    (y,) = run_on_host(plan, args)
    wide = [x.astype(np.float64), gain.astype(np.float64), gate.values, up.values]
    assert relative_error(y, projected(*wide)) < 5e-6
    gain[5] = np.inf  # x is Inf only after the prologue
    (y,) = run_on_host(plan, args)
    for row in range(m):
        with np.errstate(invalid="ignore"):
            wanted = np.inf * np.sign(x[row, 5]) * gate.values[5]
            wanted += np.inf * np.sign(x[row, 5]) * up.values[5]
        np.testing.assert_array_equal(y[row], wanted)


@pytest.mark.parametrize(
    "other", [weight("F16", K, N), spoiled("Q8_0", K, N, np.inf, "d")], ids=str
)
def test_a_weight_without_late_scales_turns_them_off(other: Weight) -> None:
    x, w = not_finite_rows(K), weight("Q4_1", K, N)
    args = [x[:16], w.tensor, other.tensor]
    plan = hip_plan(joined_products(2), "hip:gfx1030", args, PlanOptions(schedule=GEMV))
    assert [k.scales_late for k in plan.kernels] == [False]
    first, second, _ = run_on_host(plan, args)
    assert_ieee(first, x[:16], w)
    assert_ieee(second, x[:16], other)
