"""Execute `tile_halves_transposed` without a GPU: rows of x in f16 terms × w.T on matrix units."""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from q4jit.errors import TargetError
from q4jit.hip.kernel import (
    ADD_SPLITS,
    GEMV_TRANSPOSED,
    ROWS,
    TILE_HALVES_TRANSPOSED,
    HipKernel,
    HipPlan,
)
from q4jit.hip.memory import scratch
from q4jit.hip.render import render
from q4jit.hip.tile_halves_sizes import TransposedSizes
from q4jit.plan.options import PlanOptions
from tests.support.compilers import compiler_for
from tests.support.halves import DTYPES, assert_rounded_contract
from tests.support.hip import hip_plan, run_on_host, run_tiles
from tests.support.hip_cases import tensor, zeros
from tests.support.hip_host import KernelFaultError
from tests.support.hip_objects import frame_bytes, in_parallel
from tests.support.kernels import (
    BOUND,
    F32,
    Weight,
    assert_contract,
    assert_ieee,
    distributions,
    not_finite_rows,
    random_x,
    relative_error,
    turned,
    weight,
    wrap,
)
from tests.support.pairs import in_turn, pairwise

ARCHS: Final = ("sm_80", "sm_90")
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
PRECISIONS: Final = tuple(BOUNDS)
_IN_PAIRS: Final = [p for p in PRECISIONS for _ in range(2)]  # beside archs in turn
HALVES: Final = tuple(DTYPES)
K, N = 160, 200  # a quad and a unit; six units and a quarter of one: 12 panels and half of one

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def product(x: Any, w: Any) -> Any:
    return x @ w.T


def four_products(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return x @ a.T + x @ b.T + x @ c.T + x @ d.T


def two_products(x: Any, a: Any, b: Any) -> Any:
    y, z = x @ a.T, x @ b.T
    return y, z, y + z


def around(x: Any, gain: Any, gate: Any, up: Any, residual: Any) -> Any:
    """Return RMSNorm, two products, SiLU and a residual, which make one kernel."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate.T
    return residual + g / (1 + np.exp(-g)) * (h @ up.T)


run = functools.partial(run_tiles, TILE_HALVES_TRANSPOSED)


def kernels_of(arch: str) -> Iterator[tuple[HipPlan, HipKernel]]:
    """Yield kernels by rule for all classes of M."""
    w = tensor("Q4_0", 4096, 14336)
    for m, precision in itertools.product((8, 16, 32, 64, 512, 1024), PRECISIONS):
        for function, count in ((product, 1), (two_products, 2), (four_products, 4)):
            args = [zeros(m, 14336), *[w] * count]
            plan = hip_plan(function, f"hip:{arch}", args, PlanOptions(precision))
            yield plan, plan.kernels[-1]


@every_arch
def test_sizes_divide_the_work_without_a_rest(arch: str) -> None:
    for plan, kernel in kernels_of(arch):
        sizes = TransposedSizes(plan.target.hip, kernel)
        assert sizes.waves_n * plan.target.hip.wave == kernel.block_size
        assert sizes.tile_quads * 4 == sizes.waves_n
        assert sizes.owned_rows * kernel.splits == kernel.rows_per_tile
        assert sizes.stage_quads == 1, "quads are whole stages"
        assert sizes.staged_bytes <= plan.target.hip.lds_bytes
        first = plan.kernels[0]
        room = next(size for slot, size in scratch(first, 520).items() if slot.kind == "x_terms")
        rows = -(-520 // kernel.rows_per_tile) * kernel.rows_per_tile
        assert rows * 14336 * 2 * kernel.f16_terms <= room


@every_arch
def test_texts_have_no_constant_that_they_do_not_use(arch: str) -> None:
    for plan, kernel in kernels_of(arch):
        text = render(plan, kernel).text
        own = text[text.index("BLOCK_SIZE =") : text.index("LDS_BYTES =")]
        code = re.sub("//.*", "", text)
        for name in re.findall(r"^constexpr \w+ (\w+) =", own, re.MULTILINE):
            assert len(re.findall(rf"\b{name}\b", code)) > 1, (name, kernel.rows_class)


@in_turn("m arch precision", [5, 8, 11, 17, 33, 70], ARCHS, _IN_PAIRS)
def test_every_class_of_rows(m: int, precision: str, arch: str) -> None:
    x, w = random_x(m, N), weight("Q4_0", K, N)
    (y,) = run(product, [x, w.tensor], arch, precision)
    assert_contract(y, x, turned(w), BOUNDS[precision])


@every_arch
def test_i8_is_computed_as_f32_is(arch: str) -> None:
    x, w = random_x(9, N), weight("Q4_0", K, N)
    plan = hip_plan(product, f"hip:{arch}", [x, w.tensor], PlanOptions("i8"))
    assert [kernel.precision for kernel in plan.kernels] == ["f32", "f32"]  # explain() says so
    (y,) = run(product, [x, w.tensor], arch, "i8")
    assert_contract(y, x, turned(w))


@in_turn(
    "shape arch precision",
    [(32, 1), (96, 15), (128, 32), (288, 130), (160, 256), (544, 127), (128, 1000)],
    ARCHS,
    _IN_PAIRS,
)
def test_every_shape(shape: tuple[int, int], precision: str, arch: str) -> None:
    k, n = shape
    x, w = random_x(20, n), weight("Q4_0", k, n)
    (y,) = run(product, [x, w.tensor], arch, precision)
    assert_contract(y, x, turned(w), BOUNDS[precision])


@in_turn(
    "constants arch precision",
    [
        {"rows_per_tile": 32, "stage_units": 1, "stages": 4},
        {"rows_per_tile": 16, "stage_units": 4, "stages": 2},
        {"rows_per_tile": 64, "stage_units": 1, "stages": 2},
        {"rows_per_tile": 32, "columns": 256, "block_size": 256, "stage_units": 1, "stages": 2},
    ],
    ARCHS,
    _IN_PAIRS,
)
def test_stages_and_tiles(constants: dict[str, Any], precision: str, arch: str) -> None:
    """Check tiles with rows and columns beyond the result, and more stages than N has."""
    for n in (200, 24):  # 24: memory ends with the scales of the last quad
        x, w = random_x(100, n), weight("Q4_0", 288, n)
        (y,) = run(product, [x, w.tensor], arch, precision, **constants)
        assert_contract(y, x, turned(w), BOUNDS[precision])


@pytest.mark.parametrize("splits", [1, 2])
def test_tall_tiles(splits: int) -> None:
    """Add up the sums of two blocks in lanes; rough rows are computed by the first block."""
    x, w = random_x(130, 300), weight("Q4_0", K, 300)
    x[3, 5], x[100, 7] = np.inf, np.nan
    constants = {"rows_per_tile": 128, "stage_units": 2, "stages": 2}
    (y,) = run(product, [x, w.tensor], "sm_90", "f16", str, splits=splits, **constants)
    assert_ieee(y, x, turned(w), BOUNDS["f16"])


@in_turn("m splits precision", [8, 20, 8, 20, 8, 20], [2, 4, 8], _IN_PAIRS)
def test_blocks_of_a_cluster_share_n(m: int, splits: int, precision: str) -> None:
    """Divide nine quads among blocks; some have none."""
    x, w = random_x(m, 1050), weight("Q4_0", K, 1050)
    (y,) = run(product, [x, w.tensor], "sm_90", precision, splits=splits)
    assert_contract(y, x, turned(w), BOUNDS[precision])


@every_arch
def test_sums_of_one_sign_over_a_long_n(arch: str) -> None:
    w = weight("Q4_0", 32, 20000)
    x = np.abs(random_x(8, 20000)) * np.where(w.values[:8] > 0, F32(1), F32(-1))
    x = x.astype(F32)
    (y,) = run(product, [x, w.tensor], arch)
    exact = x.astype(np.float64) @ w.values.T
    assert (exact.diagonal() > 0.9 * np.abs(x[0].astype(np.float64) @ np.abs(w.values[0]))).any()
    np.testing.assert_allclose(y.diagonal(), exact.diagonal(), rtol=2e-6)


@every_arch
@every_precision
def test_not_finite_activations(precision: str, arch: str) -> None:
    rows = not_finite_rows(N)
    x, w = np.concatenate([rows] * (1 + 20 // len(rows))), weight("Q4_0", K, N)
    (y,) = run(product, [x, w.tensor], arch, precision)
    assert_ieee(y, x, turned(w), BOUNDS[precision])


@every_arch
@every_precision
def test_distributions(precision: str, arch: str) -> None:
    x, w = np.stack([*distributions(N).values()]), weight("Q4_0", K, N)
    (y,) = run(product, [x, w.tensor], arch, precision)
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values.T)
    inside = sizes.max(1) <= np.finfo(F32).max
    assert inside[:5].all()
    assert_contract(y[inside], x[inside], turned(w), BOUNDS[precision])


@every_arch
@every_precision
def test_small_and_large_scales(precision: str, arch: str) -> None:
    """Round what suits f16, split anything else into terms, and what terms cannot be into none."""
    w = weight("Q4_0", 32, N)
    blocks = w.tensor.raw.reshape(N, -1, 18)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float64)
    largest = np.abs(scales).max()
    for size in (127.9375, 128.0, 60000.0, 2.0**-9, 2.0**-20):
        raw = blocks.copy()
        changed = (scales * (size / largest)).astype(np.float16)
        raw[..., :2] = changed[..., np.newaxis].view(np.uint8)
        other = wrap("Q4_0", 32, raw)
        x = random_x(5, N)
        plan = hip_plan(product, f"hip:{arch}", [x, other.tensor], PlanOptions(precision))
        assert plan.kernels[-1].folded == (precision == "f16" and other.tensor.suits_f16)
        for splits in (1, 2) if arch == "sm_90" else (1,):
            first, last = plan.kernels
            split = replace(plan, kernels=(first, replace(last, splits=splits)))
            (y,) = run_on_host(split, [x, other.tensor])
            assert_contract(y, x, turned(other), BOUNDS[precision])


@every_arch
def test_slices_of_a_product(arch: str) -> None:
    """Compute slices from a quad on with matrix units, and others by another schedule."""

    def slices(x: Any, w: Any) -> Any:
        y = x @ w.T
        return y[..., 128:160], y[..., 256:], y[..., :40]

    x, w = random_x(9, N), weight("Q4_0", 416, N)
    cuts = (slice(128, 160), slice(256, None), slice(40))
    plan = hip_plan(slices, f"hip:{arch}", [x, w.tensor])
    assert {k.schedule for k in plan.kernels} == {ROWS, TILE_HALVES_TRANSPOSED}
    for y, cut in zip(run_on_host(plan, [x, w.tensor]), cuts, strict=True):
        assert_contract(y, x, Weight(w.tensor, w.values[cut].T))

    def beside_a_quad(x: Any, w: Any) -> Any:
        return (x @ w.T)[..., 3:50]

    plan = hip_plan(beside_a_quad, f"hip:{arch}", [x, w.tensor])
    assert [k.schedule for k in plan.kernels] == [GEMV_TRANSPOSED, ADD_SPLITS]
    (y,) = run_on_host(plan, [x, w.tensor])
    assert_contract(y, x, Weight(w.tensor, w.values[3:50].T))


@pairwise("m arch precision", [8, 40], ARCHS, PRECISIONS)
def test_two_products(m: int, precision: str, arch: str) -> None:
    x, weights = random_x(m, N), [weight("Q4_0", K, N, seed=seed) for seed in (1, 2)]
    args = [x, *(w.tensor for w in weights)]
    first, second, both = run(two_products, args, arch, precision)
    assert_contract(first, x, turned(weights[0]), BOUNDS[precision])
    assert_contract(second, x, turned(weights[1]), BOUNDS[precision])
    np.testing.assert_array_equal(both, first + second)


@every_arch
@pytest.mark.parametrize("m", [8, 40])
def test_a_fused_function(m: int, arch: str) -> None:
    gate, up = weight("Q4_0", K, N, seed=1), weight("Q4_0", K, N, seed=2)
    x, gain, residual = random_x(m, N), random_x(N), random_x(m, K)
    (y,) = run(around, [x, gain, gate.tensor, up.tensor, residual], arch)
    wide = [a.astype(np.float64) for a in (x, gain, residual)]
    in_rows = turned(gate).values.T, turned(up).values.T
    assert relative_error(y, around(wide[0], wide[1], *in_rows, wide[2])) < 3e-6


@pytest.mark.parametrize("kind", HALVES)
@every_arch
@every_precision
def test_narrow_arrays(precision: str, arch: str, kind: str) -> None:
    x, w = random_x(11, N).astype(DTYPES[kind]), weight("Q4_0", K, N)
    (y,) = run(product, [x, w.tensor], arch, precision)
    assert_rounded_contract(y, x, turned(w), kind, BOUNDS[precision])


@pairwise("m arch precision", [9, 20], ARCHS, PRECISIONS)
@pytest.mark.parametrize("splits", [1, 2])
def test_only_rough_rows_are_computed_from_decoded_weights(
    precision: str, arch: str, m: int, splits: int
) -> None:
    """Also where a tile has rows beyond the last, whose sums may be NaN."""

    def spoiled(text: str) -> str:
        """Return the text with wrong results from decoded weights."""
        assert text.count("total += sum;") in {0, 1}  # `rows` has no such results
        return text.replace("total += sum;", "total = 1e9f;")

    x, w = random_x(m, 300), weight("Q4_0", K, 300)
    splits = splits if arch == "sm_90" else 1
    (y,) = run(product, [x, w.tensor], arch, precision, spoiled, splits=splits)
    assert_contract(y, x, turned(w), BOUNDS[precision])


@every_arch
def test_results_of_rough_rows_are_stored(arch: str) -> None:
    x, w = random_x(20, N), weight("Q4_0", K, N)
    x[7] *= F32(1e-37)  # too small for f16

    def without_rough_rows(text: str) -> str:
        """Return the text without its last phase, which computes rough rows."""
        return text.replace("if (!any_rough) return;", "if (!any_rough || N > 0) return;")

    (right,) = run(product, [x, w.tensor], arch)
    assert_contract(right, x, turned(w))
    with pytest.raises(KernelFaultError, match="160 of 3200 elements of output0 were never"):
        run(product, [x, w.tensor], arch, edit=without_rough_rows)


def test_x_is_not_overwritten_while_it_is_multiplied() -> None:
    """Compute products when they are awaited, as late as a GPU may: the host does so."""
    x, w = random_x(64, 1024), weight("Q4_0", K, 1024)

    def without_wait(text: str) -> str:
        """Return the text that awaits products after the last stage instead of after each."""
        wait, after_loop = "await_multiplied(before);", "    UNROLL for (int n = 0; n < WAVE_PANELS"
        after_loop += "; ++n) settle_sums("
        assert text.count(wait) == text.count(after_loop)
        late = f"    await_multiplied({{}});\n{after_loop}"
        return text.replace(wait, "").replace(after_loop, late)

    (y,) = run(product, [x, w.tensor], "sm_90", "f16", splits=1)
    assert_contract(y, x, turned(w), BOUNDS["f16"])
    with pytest.raises(KernelFaultError, match="depends on the order of threads"):
        run(product, [x, w.tensor], "sm_90", "f16", without_wait, splits=1)


def test_an_asked_schedule_that_does_not_suit_is_refused() -> None:
    w = weight("Q8_0", K, N)
    options = PlanOptions(schedule=TILE_HALVES_TRANSPOSED)
    with pytest.raises(TargetError, match="tile_halves_transposed"):
        hip_plan(product, "hip:sm_90", [random_x(9, N), w.tensor], options)


@pytest.mark.ratchet
@every_arch
def test_nvidias_compiler_keeps_all_in_registers(arch: str) -> None:
    compiler = compiler_for(arch)
    sources = [render(plan, kernel) for plan, kernel in kernels_of(arch)]
    cubins = in_parallel(lambda s: compiler.compile_object(s.text, s.target), sources)
    assert not any(map(frame_bytes, cubins))
