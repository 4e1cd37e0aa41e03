"""`gemv_matrix`: few rows of x by Q4_0 on each matrix unit, executed without a GPU."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from q4jit.hip.kernel import GEMV_MATRIX, HipPlan
from q4jit.hip.render import render
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.targets import HIP_ARCHS
from q4jit.weights.formats import FORMATS
from tests.support.compilers import compiler_for
from tests.support.hip import hip_plan, run_on_host
from tests.support.hip_cases import (
    gated,
    layer_norm,
    product,
    tensor,
    zeros,
)
from tests.support.hip_objects import (
    LOAD_16,
    assembly,
    faults,
    in_parallel,
    instructions,
    matching,
)
from tests.support.kernels import (
    BOUND,
    F32,
    Floats,
    Weight,
    around,
    assert_contract,
    assert_ieee,
    block,
    distributions,
    joined_products,
    not_finite_rows,
    one_product,
    random_blocks,
    random_x,
    relative_error,
    slices,
    weight,
    without_weight,
    wrap,
)
from tests.support.pairs import pairwise

ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_90")  # each kind of matrix unit
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}  # the kernels of `f16` serve `i8` too
PRECISIONS: Final = tuple(BOUNDS)
K, N = 416, 37  # three quads and a unit; two panels and five columns

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def planned(
    function: Callable[..., Any],
    args: Sequence[Any],
    arch: str,
    precision: str = "f32",
    waves: int = 2,
    **constants: Any,
) -> HipPlan:
    """Return a plan whose products have these constants."""
    plan_options = PlanOptions(precision, waves * HIP_ARCHS[arch].wave, GEMV_MATRIX)
    plan = hip_plan(function, f"hip:{arch}", args, plan_options)
    assert {kernel.schedule for kernel in plan.kernels} == {GEMV_MATRIX}
    constants = {"columns": 16, "ahead": 1, "splits": 1} | constants
    return replace(plan, kernels=tuple(replace(k, **constants) for k in plan.kernels))


def run(
    function: Callable[..., Any],
    args: Sequence[Any],
    arch: str,
    *,
    edit: Callable[[str], str] = str,
    **how: Any,
) -> list[Floats]:
    return run_on_host(planned(function, args, arch, **how), args, edit=edit)


# --- shapes -----------------------------------------------------------------------------------


@pairwise("m arch precision", [1, 2, 3, 4, 8, 16], ARCHS, PRECISIONS)
def test_every_class_of_rows(m: int, precision: str, arch: str) -> None:
    x, w = random_x(m, K), weight("Q4_0", K, N)
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])


@every_arch
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 16])
def test_i8_is_served_by_the_kernels_of_f16(m: int, arch: str) -> None:
    """`i8` keeps the bound of `f16`, whose kernels it uses, and not only its own of 2e-2."""
    x, w = random_x(m, K), [weight("Q4_0", K, N, seed=seed).tensor for seed in (1, 2)]
    for function, args in ((one_product, [x, w[0]]), (joined_products(2), [x, *w])):
        texts = {
            precision: [render(plan, kernel).text for kernel in plan.kernels]
            for precision in ("f16", "i8")
            for plan in [planned(function, args, arch, precision)]
        }
        assert texts["i8"] == texts["f16"]


@every_arch
@pytest.mark.parametrize(
    ("k", "n", "waves", "constants"),
    [
        (32, 5, 2, {}),  # less than a quad
        (128, 16, 4, {}),  # some waves have no quad
        (1280, 65, 2, {"ahead": 2}),
        (1056, 48, 4, {"ahead": 2, "columns": 32}),
        (4256, 3, 2, {"ahead": 2}),  # several stages of x
    ],
)
def test_every_shape(k: int, n: int, waves: int, constants: dict[str, Any], arch: str) -> None:
    for m in (1, 16):
        x, w = random_x(m, k), weight("Q4_0", k, n)
        (y,) = run(one_product, [x, w.tensor], arch, waves=waves, **constants)
        assert_contract(y, x, w)


@every_arch
def test_more_rows_than_one_block_has(arch: str) -> None:
    """The last block has fewer rows; it neither reads nor stores others."""
    w, args = weight("Q4_0", K, N), [random_x(3, K), weight("Q4_0", K, N).tensor]
    plan = planned(one_product, args, arch)
    x = random_x(6, K)
    (y,) = run_on_host(plan, [x, w.tensor])
    assert_contract(y, x, w)


# --- prologue and epilogue ----------------------------------------------------------------------


@pairwise("m arch precision", [1, 4, 16], ARCHS, PRECISIONS)
def test_two_products(m: int, precision: str, arch: str) -> None:
    x, found = random_x(m, K), [weight("Q4_0", K, N, seed=seed) for seed in (1, 2)]
    args = [x, *(w.tensor for w in found)]
    first, second, both = run(joined_products(2), args, arch, precision=precision)
    assert_contract(first, x, found[0], BOUNDS[precision])
    assert_contract(second, x, found[1], BOUNDS[precision])
    np.testing.assert_array_equal(both, first + second)


@every_arch
@pytest.mark.parametrize("m", [1, 3, 16])
def test_a_fused_function(m: int, arch: str) -> None:
    gate, up = weight("Q4_0", K, N, seed=1), weight("Q4_0", K, N, seed=2)
    args, exact = around(random_x(m, K), gate, up)
    (y,) = run(block, args, arch)
    assert relative_error(y, exact) < 3e-6


@every_arch
@pytest.mark.parametrize("m", [2, 3, 16])
def test_each_row_has_its_own_row_values(m: int, arch: str) -> None:
    w, gain, bias = weight("Q4_0", K, N), random_x(1, K)[0], random_x(2, K)[1]
    x = random_x(m, K) * np.arange(1, m + 1, dtype=F32)[:, None] + F32(3)
    x[m - 1, 7] = 1e6  # a rough row
    args = [x, gain, bias, w.tensor]
    plan = planned(layer_norm, args, arch)
    in_registers = arch == "sm_90" and m == 2
    assert ("SHARED RowValues" in render(plan, plan.kernels[-1]).text) != in_registers
    (y,) = run_on_host(plan, args)
    wide = (a.astype(np.float64) for a in (x, gain, bias, w.values))
    exact = layer_norm(*wide)
    assert relative_error(y, exact) < 3e-6


@every_arch
def test_slices_of_a_product(arch: str) -> None:
    x, w = random_x(3, K), weight("Q4_0", K, N)
    cuts = (slice(16, 32), slice(5, 36), slice(36, 37), slice(32, 37), slice(8))
    for y, cut in zip(run(slices, [x, w.tensor], arch), cuts, strict=True):
        assert_contract(y, x, Weight(w.tensor, w.values[:, cut]))


# --- distributions, rough units ---------------------------------------------------------------


@pairwise(
    "scales arch precision", ["normal", "zero", "denormal", "largest", "mixed"], ARCHS, PRECISIONS
)
def test_distributions_and_scales(scales: str, precision: str, arch: str) -> None:
    rows, w = distributions(K), weight("Q4_0", K, N, scales)
    x = np.stack([*rows.values()])
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values)
    inside = sizes.max(1) <= np.finfo(F32).max
    assert inside[:5].all()
    assert_contract(y[inside], x[inside], w, BOUNDS[precision])


def with_outliers(k: int) -> Floats:
    """Return rows whose element `k` is larger than the others, by more in each row."""
    x = random_x(16, K)
    x[:, k] = 2.0 ** np.arange(2, 34, 2)
    return x


@every_arch
@every_precision
def test_an_outlier_that_a_weight_of_0_hides(precision: str, arch: str) -> None:
    """The other elements must be as exact as without the large one."""
    w, x = without_weight(K, N, 100), with_outliers(100)
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])


@every_arch
@every_precision
def test_outliers_that_hide_each_other(precision: str, arch: str) -> None:
    w, x = without_weight(K, N, 100, 101), with_outliers(100)
    x[:, 101] = x[:, 100] * F32(0.75)
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    assert_contract(y, x, w, BOUNDS[precision])


@every_arch
@every_precision
def test_how_far_terms_carry(precision: str, arch: str) -> None:
    """Each row has elements of one size and a larger one, by 2^8 to 2^39 times."""
    large = [*range(4, K, 32)]  # one in each unit
    w = without_weight(K, N, *large)
    for first in (8, 24):
        size = np.random.default_rng(first).uniform(1, 2, (16, K)).astype(F32)
        x = np.copysign(size, random_x(16, K))
        x[:, large] = F32(2) ** (first + np.arange(16))[:, np.newaxis]
        (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
        for row in range(16):
            one = slice(row, row + 1)
            assert_contract(y[one], x[one], w, BOUNDS[precision])


@pairwise("m arch precision", [1, 16], ARCHS, PRECISIONS)
def test_an_x_whose_scale_times_that_of_a_weight_is_beyond_f32(
    m: int, precision: str, arch: str
) -> None:
    blocks = random_blocks(FORMATS["Q4_0"], K, N, "normal", np.random.default_rng(m))
    blocks[..., :2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
    blocks[:, 5 // 32, 2 + 5] = 0x88
    w, x = wrap("Q4_0", K, blocks), np.full((m, K), 1e20, F32)
    x[:, :32], x[:, 5] = F32(2) ** 99, F32(2) ** 118
    assert not w.values[5].any()
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    assert np.isfinite(y).all()
    assert_contract(y, x, w, BOUNDS[precision])


def rough_x() -> Floats:
    """Every second row has a unit that f16 terms cannot hold."""
    x = random_x(16, K)
    x[1, 5], x[3, 100], x[5, 7], x[7] = 1e30, -3e38, 1e9, x[7] * F32(1e-37)
    x[9, 64:96], x[9, 70] = 1e-30, 1e30
    return x


@every_arch
def test_rough_units_are_what_saves_them(arch: str) -> None:
    w, x = without_weight(K, N, 5), rough_x()
    args = [x, w.tensor]
    (right,) = run(one_product, args, arch)
    assert_contract(right, x, w)
    (wrong,) = run(one_product, args, arch, edit=without_rough_units)
    for row in range(16):
        one = slice(row, row + 1)
        if row in (1, 3, 7):  # too large, too small, hidden by a weight of 0
            with pytest.raises(AssertionError):
                assert_contract(wrong[one], x[one], w)
        elif row % 2 == 0:
            np.testing.assert_array_equal(wrong[one], right[one])


def without_rough_units(text: str) -> str:
    """Return the text of a kernel that leaves out the units that terms cannot hold."""
    assert "if (any_rough) {" in text
    return text.replace("if (any_rough) {", "if (any_rough && K < 0) {")


@every_arch
@every_precision
def test_not_finite_activations(precision: str, arch: str) -> None:
    x, w = not_finite_rows(K), weight("Q4_0", K, N, "mixed")
    clean = np.where(np.isfinite(x), x, F32(1))
    (y,) = run(one_product, [x, w.tensor], arch, precision=precision)
    (other,) = run(one_product, [clean, w.tensor], arch, precision=precision)
    assert_ieee(y, x, w, BOUNDS[precision])
    same = np.isfinite(x).all(1)
    np.testing.assert_array_equal(y[same], other[same])


@every_arch
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_not_finite_neighbours(special: float, arch: str) -> None:
    """Four lanes share a unit: try any two of its elements, and all elements of a lane."""
    x, w = random_x(16, K), weight("Q4_0", K, N)
    pairs = [(3, 3), (20, 27), (23, 27), (3, 20), (0, 31), (4, 12), (7, 8), (16, 0)]
    for row, (first, second) in enumerate(pairs):
        x[row, [first, second]] = special
    x[8, 20:28], x[9, :32], x[10, 4:8] = special, special, special
    (y,) = run(one_product, [x, w.tensor], arch)
    assert_ieee(y, x, w)


@every_arch
def test_denormal_activations(arch: str) -> None:
    x = (random_x(16, K) * 1e-40).astype(F32)
    x[::2, :7] = 1  # beside numbers that are not
    w = weight("Q4_0", K, N, "largest")
    (y,) = run(one_product, [x, w.tensor], arch)
    assert_contract(y, x, w)


# --- machine code -----------------------------------------------------------------------------


def sources(arch: str) -> Iterator[Source]:
    """Return the texts of a layer's products."""
    w = tensor("Q4_0", 4096, 4096)
    for m, precision in itertools.product((1, 2, 4, 8, 16), ("f32", "f16")):
        bare = planned(product, [zeros(m, 4096), w], arch, precision)
        yield render(bare, bare.kernels[0])
        both = planned(gated, [zeros(m, 4096), w, w, zeros(4096)], arch, precision)
        yield render(both, both.kernels[0])


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("gfx")])
def test_amds_compiler_keeps_all_in_registers(arch: str) -> None:
    compiler_for(arch)  # in this thread, so that a missing compiler fails or skips the test here
    found = list(sources(arch))
    assert not any(in_parallel(faults, found))
    matrix = "v_mfma_f32_16x16x16_?f16|v_wmma_f32_16x16x16_f16"
    dot = r"v_(dual_)?dot2\w*_f32_f16"
    for source in found:
        counts = instructions(assembly(source))
        if "dot2_halves(x" in source.text:
            assert matching(counts, dot) >= 2 * 4 * 4, "words of a lane, four units of a quad"
        else:
            assert matching(counts, matrix) >= 2 * 4, "two k of 16, four units of a quad"
        assert matching(counts, "v_pk_(fma|add)_f16") >= 4 * 4, "four for a word, four units"
        assert matching(counts, LOAD_16) > 0
