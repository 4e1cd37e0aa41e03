"""Execute `tile_halves` without a GPU: rows of x in f16 terms × Q4_0 on matrix units."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from q4jit.floats import FloatType
from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip import search
from q4jit.hip.candidates import candidates, constants_of
from q4jit.hip.kernel import GEMV_MATRIX, ROWS, TILE_HALVES, HipKernel, HipPlan
from q4jit.hip.matrix_units import f16_unit
from q4jit.hip.memory import scratch
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.hip.tile_halves_sizes import TileHalvesSizes
from q4jit.hip.tunings import Choice, Trial
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target
from tests.support.compilers import compiler_for
from tests.support.halves import DTYPES
from tests.support.hip import hip_plan, run_on_host, run_tiles
from tests.support.hip_cases import gated, tensor, zeros
from tests.support.hip_host import KernelFaultError
from tests.support.hip_objects import faults, frame_bytes, in_parallel
from tests.support.kernels import (
    BOUND,
    F32,
    Weight,
    around,
    assert_contract,
    assert_ieee,
    block,
    distributions,
    joined_products,
    not_finite_rows,
    one_product,
    random_x,
    relative_error,
    slices,
    weight,
    without_weight,
    wrap,
)
from tests.support.pairs import pairwise

ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm_80", "sm_90")
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
PRECISIONS: Final = tuple(BOUNDS)
K, N = 416, 37  # three quads and a unit; two panels and five columns

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
# Tiles of two heights on every matrix unit; `test_every_class_of_rows` has all combinations.
every_arch_at_one_m = pytest.mark.parametrize(
    ("arch", "m"), [*zip(ARCHS, itertools.cycle([20, 70]), strict=False)]
)


def sections_of(arch: str) -> Iterator[tuple[HipPlan, HipKernel]]:
    """Yield kernels by rule and their candidates."""
    w = tensor("Q4_0", 1056, 1000)
    for m, precision, count in itertools.product((8, 33, 513), PRECISIONS, (1, 2)):
        args = [zeros(m, 1056), *[w] * count]
        plan = hip_plan(joined_products(count), f"hip:{arch}", args, PlanOptions(precision))
        kernel = plan.kernels[-1]
        if kernel.schedule == TILE_HALVES:
            yield from ((plan, k) for k in (kernel, *candidates(plan.target, kernel, m)))


@every_arch
def test_sizes_divide_the_work_without_a_rest(arch: str) -> None:
    for plan, kernel in sections_of(arch):
        sizes = TileHalvesSizes(plan.target.hip, kernel)
        assert sizes.waves_n * sizes.waves_k * plan.target.hip.wave == kernel.block_size
        assert sizes.waves_n * kernel.wave_panels * 16 == kernel.columns
        assert sizes.steps * f16_unit(plan.target.hip, kernel).tile_rows == kernel.rows_per_tile
        assert sizes.stage_quads * 4 == sizes.quad_stages * kernel.stage_units
        assert sizes.turns * sizes.waves_k == sizes.stage_quads
        assert sizes.owned_rows * kernel.splits == kernel.rows_per_tile
        runs = sorted((sizes.copiers, sizes.run_items))
        assert runs[1] % runs[0] == 0, "threads share the items of a run evenly"
        assert sizes.room_bytes == max(sizes.stages_bytes, sizes.sums_bytes)


@every_arch
def test_texts_have_no_constant_that_they_do_not_use(arch: str) -> None:
    different = {k: (p, k) for p, k in sections_of(arch)}
    for plan, kernel in [*different.values()][::5]:
        text = render(plan, kernel).text
        own = text[text.index("BLOCK_SIZE =") : text.index("LDS_BYTES =")]
        code = re.sub("//.*", "", text)
        for name in re.findall(r"^constexpr \w+ (\w+) =", own, re.MULTILINE):
            assert len(re.findall(rf"\b{name}\b", code)) > 1, (name, kernel.rows_class)


run = functools.partial(run_tiles, TILE_HALVES)


@pairwise("m arch precision", [17, 33, 70], ARCHS, PRECISIONS)
def test_every_class_of_rows(m: int, precision: str, arch: str) -> None:
    x, w = random_x(m, K), weight("Q4_0", K, N)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    assert_contract(y, x, w, BOUNDS[precision])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "arch"),
    [
        (33, "gfx90a"),
        (20, "gfx942"),
        (70, "gfx1100"),
        (33, "gfx1201"),
        (11, "sm_80"),
        (30, "sm_90"),
        (70, "sm_90"),
    ],
)
def test_one_term_of_a_half_precision_array(m: int, arch: str, kind: str) -> None:
    """The results are f32, so that a rounding of x would show."""

    def function(x: Any, w: Any) -> Any:
        return (x @ w).astype(np.float32)

    w = weight("Q4_0", K, N)
    x = random_x(m, K)
    exponents = np.random.default_rng(0).integers(-13, 1, (m, K))
    x[1] = np.ldexp(x[1], exponents[1])  # one term keeps all bits of these
    x[2] *= np.where(np.arange(K) % 37 == 5, 2.0**-20, 60.0)  # and of some of the others
    tiny = 1.7 * (2.0**-14 if kind == "f16" else 2.0**-20)
    x[3] = np.where(np.arange(K) % 2 == 0, 6e4, tiny)  # rough
    x[4] *= np.float32(2.0**-24 if kind == "f16" else 1e-39)  # denormal
    x[5:8, 3] = [np.nan, np.inf, -np.inf]
    x[8] = 0
    x[9] = 65504 if kind == "f16" else 1e36
    x = x.astype(DTYPES[kind])
    hidden = wrap("Q4_0", K, without(w, np.arange(0, K, 2)))
    plan = hip_plan(function, f"hip:{arch}", [x, w.tensor])
    assert [kernel.schedule for kernel in plan.kernels] == [ROWS, TILE_HALVES]
    # gfx90a's matrix units lose denormal terms, and on NVIDIA one term is slower from 33 rows on
    terms = 2 if arch == "gfx90a" or (m, arch) == (70, "sm_90") else 1
    assert [kernel.f16_terms for kernel in plan.kernels] == [terms, terms]
    for each in (w, hidden):
        (y,) = run_on_host(plan, [x, each.tensor])
        assert_ieee(y, x.astype(np.float32), each)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
def test_constants_that_were_measured_for_two_terms(arch: str, kind: FloatType) -> None:
    """One term leaves room for more units of x in a stage; the other constants are the same."""
    target, w, m = find_target(f"hip:{arch}"), WeightSpec("Q4_0", 4096, 4096), 32
    of_two = trace(one_product, (array_spec((m, 4096)), w))
    by_rule = make_plan(of_two, target, m, PlanOptions()).kernels[-1]
    wanted = constants_of(candidates(target, by_rule, m)[-1])
    assert wanted != constants_of(by_rule)
    trial = Trial(TILE_HALVES, tuple(sorted(wanted.items())), "", 1.0, 0.0, "", "")
    of_one = trace(one_product, (array_spec((m, 4096), float_type=kind), w))
    plan = make_plan(of_one, target, m, PlanOptions(), lambda key: Choice(trial, "a file"))
    kernel = plan.kernels[-1]
    assert (kernel.f16_terms, by_rule.f16_terms, kernel.origin) == (1, 2, "a file")
    assert constants_of(kernel) == wanted | {
        "stage_units": 2 * int(dict(trial.constants)["stage_units"])
    }


def without(w: Weight, elements: Any) -> Any:
    """Return the blocks of a Q4_0 weight with zeros as these elements of every column."""
    blocks = w.tensor.raw.reshape(N, K // 32, 18).copy()
    quants = blocks[:, :, 2:]
    codes = np.concatenate([quants & 15, quants >> 4], axis=-1).reshape(N, K)
    codes[:, elements] = 8
    low, high = np.split(codes.reshape(N, K // 32, 32), 2, axis=-1)
    blocks[:, :, 2:] = low | high << 4
    return blocks


@pairwise("m arch precision", [5, 8, 11, 16], ["sm_80", "sm_90"], PRECISIONS)
def test_few_rows(m: int, precision: str, arch: str) -> None:
    x, w = random_x(m, K), weight("Q4_0", K, N)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    assert_contract(y, x, w, BOUNDS[precision])


@every_arch
def test_fewer_rows_than_an_instruction_has(arch: str) -> None:
    """Use more of an instruction than there are rows: only a caller asks for that."""
    x, w = random_x(3, K), weight("Q4_0", K, N)
    plan = hip_plan(one_product, f"hip:{arch}", [x, w.tensor], PlanOptions(schedule=TILE_HALVES))
    (y,) = run_on_host(plan, [x, w.tensor])
    assert_contract(y, x, w)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("m", "k", "n", "constants"),
    [
        (8, 32, 5, {"splits": 1}),  # less than a quad
        (8, 1280, 70, {"columns": 32, "block_size": 128}),  # waves share columns
        (8, 4256, 40, {"columns": 16, "block_size": 128}),  # several stages, the last one in part
        (16, 1056, 130, {"columns": 112, "block_size": 224}),  # threads that copy nothing
        (16, 1280, 65, {"columns": 64, "block_size": 64, "wave_panels": 2}),
        (64, 416, 130, {"columns": 128, "block_size": 128, "wave_panels": 2, "splits": 1}),
        (40, 1280, 200, {"columns": 128, "block_size": 256}),
        (130, 288, 64, {}),
    ],
)
def test_every_shape(m: int, k: int, n: int, constants: dict[str, Any], arch: str) -> None:
    x, w = random_x(m, k), weight("Q4_0", k, n)
    (y,) = run(one_product, [x, w.tensor], arch, **constants)
    assert_contract(y, x, w)


@pairwise(
    "constants arch precision",
    [
        {"rows_per_tile": 64, "stage_units": 1, "stages": 4},
        {"stage_units": 2, "stages": 3, "columns": 128, "wave_panels": 2, "block_size": 128},
        {"rows_per_tile": 128, "stage_units": 1, "stages": 4},
        {"rows_per_tile": 128, "stage_units": 2, "stages": 2},
        {"stage_units": 4, "stages": 2, "splits": 2, "columns": 64, "block_size": 128},
    ],
    ["sm_80", "sm_90"],
    PRECISIONS,
)
def test_stages_of_x_and_tall_tiles(constants: dict[str, Any], precision: str, arch: str) -> None:
    """Check the last tile and the last stage in part, and more stages than K has."""
    constants = dict(constants)
    if precision == "f32":  # its two terms have the same room
        constants["rows_per_tile"] = constants.get("rows_per_tile", 64) // 2
    if arch == "sm_80":  # no clusters
        constants["splits"] = 1
    for m, k in ((130, 672), (100, 96)):
        x, w = random_x(m, k), weight("Q4_0", k, 70)
        (y,) = run(one_product, [x, w.tensor], arch, precision, **constants)
        assert_contract(y, x, w, BOUNDS[precision])


@every_arch_at_one_m
def test_scales_that_f16_values_cannot_have(m: int, arch: str) -> None:
    """Round weights to f16 if their scales allow it; else multiply quants."""
    w = weight("Q4_0", K, N)
    blocks = w.tensor.raw.reshape(N, -1, 18)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float64)
    large = scales * (127.0 / np.abs(scales).max())
    one = np.full_like(scales, 1.1455)
    for changed, suits in ((large, True), (large * 2, False), (large * 500, False), (one, False)):
        raw = blocks.copy()
        raw[..., :2] = changed.astype(np.float16)[..., None].view(np.uint8)
        other = wrap("Q4_0", K, raw)
        x = random_x(m, K)
        plan = hip_plan(one_product, f"hip:{arch}", [x, other.tensor], PlanOptions("f16"))
        assert plan.kernels[-1].folded == (suits and arch != "gfx90a")
        (y,) = run_on_host(plan, [x, other.tensor])
        assert_contract(y, x, other, BOUNDS["f16"])


@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
@pytest.mark.parametrize("step", [0, 2.0**-11, 2.0**-12, 0.3])
def test_a_few_elements_that_round_badly(step: float, arch: str) -> None:
    """Hold the bound where they are most of a row, so that no other error hides theirs."""
    x, w = random_x(32, K), weight("Q4_0", K, N)
    x[:8, 5] = 1024 * (1 + step)
    x[8:16] = 0
    x[8:16, 5] = 1 + step
    x[16:24, 7:9] = 4096 * (1 + step)
    (y,) = run(one_product, [x, w.tensor], arch, "f16")
    for row in range(32):
        one = slice(row, row + 1)
        assert_contract(y[one], x[one], w, BOUNDS["f16"])


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_scratch_has_room_for_whole_tiles(precision: str, arch: str) -> None:
    """Check the kernel by rule and every candidate, for the widest results too."""
    target, k = find_target(f"hip:{arch}"), 1024
    for n, count, m in itertools.product(
        (4096, 36864, 151936, 262144), (1, 2, 3), (8, 17, 32, 33, 64, 65, 512, 513, 2048)
    ):
        weights = [WeightSpec("Q4_0", k, n)] * count
        graph = trace(search.products, (array_spec((m, k)), *weights))
        plan = make_plan(graph, target, m, PlanOptions(precision))
        first, last = plan.kernels[0], plan.kernels[-1]
        if last.schedule != TILE_HALVES:
            continue
        sizes = {slot.kind: size for slot, size in scratch(first, m).items()}
        for kernel in candidates(plan.target, last, m):
            rows = -(-m // kernel.rows_per_tile) * kernel.rows_per_tile
            stage = kernel.rows_per_tile * kernel.stage_units * 32
            assert (rows * k + stage) * 2 * kernel.f16_terms <= sizes["x_terms"], (n, count, m)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("m", [3, 8, 16, 20, 64])
def test_blocks_of_a_cluster_share_k(m: int, splits: int) -> None:
    """Divide nine quads among blocks; some have none."""
    x, w = random_x(m, 1056), weight("Q4_0", 1056, 70)
    plan = hip_plan(one_product, "hip:sm_90", [x, w.tensor], PlanOptions())
    *before, last = plan.kernels
    assert last.schedule == (TILE_HALVES if m > 4 else GEMV_MATRIX)
    plan = replace(plan, kernels=(*before, replace(last, splits=splits)))
    (y,) = run_on_host(plan, [x, w.tensor])
    assert_contract(y, x, w)


@every_arch_at_one_m
def test_a_fused_function(m: int, arch: str) -> None:
    gate, up = weight("Q4_0", K, N, seed=1), weight("Q4_0", K, N, seed=2)
    args, exact = around(random_x(m, K), gate, up)
    (y,) = run(block, args, arch)
    assert relative_error(y, exact) < 3e-6


@every_arch
def test_slices_of_a_product(arch: str) -> None:
    """Begin at any column; a slice may be a kernel of its own."""
    x, w = random_x(20, K), weight("Q4_0", K, N)
    cuts = (slice(16, 32), slice(5, 36), slice(36, 37), slice(32, 37), slice(8))
    plan = hip_plan(slices, f"hip:{arch}", [x, w.tensor], PlanOptions())
    assert {k.schedule for k in plan.kernels} == {ROWS, TILE_HALVES}
    for y, cut in zip(run_on_host(plan, [x, w.tensor]), cuts, strict=True):
        assert_contract(y, x, Weight(w.tensor, w.values[:, cut]))


@pairwise("precision m arch", ["f32", "f16", "i8"], [8, 20], ["gfx1100", "sm_90"])
def test_beside_other_formats(m: int, precision: str, arch: str) -> None:
    """Prepare x in one way for all products of a function."""

    def both(x: Any, a: Any, b: Any) -> Any:
        return x @ a, x @ b

    x, a, b = random_x(m, K), weight("Q4_0", K, N), weight("Q8_0", K, N)
    plan = hip_plan(both, f"hip:{arch}", [x, a.tensor, b.tensor], PlanOptions(precision))
    assert not any(kernel.f16_terms and kernel.int8 for kernel in plan.kernels)
    results = run_on_host(plan, [x, a.tensor, b.tensor])
    for y, w in zip(results, (a, b), strict=True):
        assert_contract(y, x, w, {**BOUNDS, "i8": 2e-2}[precision])


@every_arch
def test_two_products(arch: str) -> None:
    x, weights = random_x(40, K), [weight("Q4_0", K, N, seed=seed) for seed in (1, 2)]
    first, second, both = run(joined_products(2), [x, *(w.tensor for w in weights)], arch)
    assert_contract(first, x, weights[0])
    assert_contract(second, x, weights[1])
    np.testing.assert_array_equal(both, first + second)


@pairwise(
    "scales arch precision", ["normal", "zero", "denormal", "largest", "mixed"], ARCHS, PRECISIONS
)
def test_distributions_and_scales(scales: str, precision: str, arch: str) -> None:
    w = weight("Q4_0", K, N, scales)
    rows = [*distributions(K).values()]
    x = np.stack([*rows, *rows, *rows])
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values)
    inside = sizes.max(1) <= np.finfo(F32).max
    assert inside[:5].all()
    assert_contract(y[inside], x[inside], w, BOUNDS[precision])


@every_arch
@every_precision
def test_an_outlier_that_a_weight_of_0_hides(precision: str, arch: str) -> None:
    """Multiply the elements beside it as exactly as without it."""
    x, w = random_x(48, K), without_weight(K, N, 100)
    x[:, 100] = F32(2) ** np.arange(48)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    for row in range(48):
        one = slice(row, row + 1)
        assert_contract(y[one], x[one], w, BOUNDS[precision])


@every_arch
@every_precision
def test_outliers_that_hide_each_other(precision: str, arch: str) -> None:
    x, w = random_x(48, K), without_weight(K, N, 100, 101, 300)
    x[:, 100] = F32(2) ** np.arange(48)
    x[:, 101], x[:, 300] = x[:, 100] / F32(64), x[:, 100] * F32(0.75)
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    for row in range(48):
        one = slice(row, row + 1)
        assert_contract(y[one], x[one], w, BOUNDS[precision])


@pytest.mark.parametrize("arch", ["gfx90a", "sm_90"])
def test_long_rows_that_terms_do_not_represent(arch: str) -> None:
    x, w = random_x(17, 8192) * F32(2) ** -90, weight("Q4_0", 8192, 16)
    (y,) = run(one_product, [x, w.tensor], arch, "f32")
    for row in range(17):
        one = slice(row, row + 1)
        assert_contract(y[one], x[one], w, BOUNDS["f32"])


@every_arch
@every_precision
def test_not_finite_activations(precision: str, arch: str) -> None:
    rows = not_finite_rows(K)
    x, w = np.concatenate([rows] * (1 + 20 // len(rows))), weight("Q4_0", K, N, "mixed")
    (y,) = run(one_product, [x, w.tensor], arch, precision)
    assert_ieee(y, x, w, BOUNDS[precision])


def test_x_is_not_overwritten_while_it_is_multiplied() -> None:
    """Compute products when they are awaited, as late as a GPU may: the host does so."""
    x, w = random_x(64, 1024), weight("Q4_0", 1024, N)

    def without_wait(text: str) -> str:
        """Return the text that awaits products after the last stage instead of after each."""
        wait, after_loop = "await_multiplied(before);", "\n    // --- reduce"
        if after_loop not in text:
            after_loop = "\n    // --- epilogue"
        assert text.count(wait) == text.count(after_loop) == 1
        late = f"    await_multiplied({{}});\n{after_loop}"
        return text.replace(wait, "").replace(after_loop, late)

    def check(edit: Callable[[str], str]) -> None:
        (y,) = run(one_product, [x, w.tensor], "sm_90", "f16", edit, splits=1)
        assert_contract(y, x, w, BOUNDS["f16"])

    check(str)
    with pytest.raises((AssertionError, KernelFaultError)):
        check(without_wait)


@every_arch
def test_results_of_rough_rows_are_stored(arch: str) -> None:
    x, w = random_x(20, K), without_weight(K, N, 5)
    x[3, 5], x[7] = 1e30, x[7] * F32(1e-37)  # hidden by a weight of 0; too small for f16

    def without_rough_rows(text: str) -> str:
        """Return the text without its last phase, which computes rough rows."""
        return text.replace("if (!any_rough) return;", "if (!any_rough || K > 0) return;")

    (right,) = run(one_product, [x, w.tensor], arch)
    assert_contract(right, x, w)
    with pytest.raises(KernelFaultError, match="74 of 740 elements of output0 were never written"):
        run(one_product, [x, w.tensor], arch, edit=without_rough_rows)


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvidias_compiler_keeps_all_in_registers(arch: str) -> None:
    w, compiler = tensor("Q4_0", 4096, 4096), compiler_for(arch)
    plans = [
        hip_plan(function, f"hip:{arch}", [zeros(m, 4096), *more], PlanOptions(precision))
        for m in (8, 16, 32, 64, 512)
        for precision in BOUNDS
        for function, more in ((one_product, [w]), (gated, [w, w, zeros(4096)]))
    ]
    kernels = [(plan, kernel) for plan in plans for kernel in plan.kernels]
    sources = [render(plan, kernel) for plan, kernel in kernels]
    cubins = in_parallel(lambda s: compiler.compile_object(s.text, s.target), sources)
    # Two terms of 64 rows in 128 registers are fastest with a few addresses in memory.
    allowed = [32 if k.is_bounded and not k.folded else 0 for _, k in kernels]
    assert all(frame_bytes(c) <= most for c, most in zip(cubins, allowed, strict=True))


@pytest.mark.ratchet
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("gfx")])
def test_amds_compiler_keeps_all_in_registers(arch: str) -> None:
    w = tensor("Q4_0", 4096, 4096)
    plans = [
        hip_plan(function, f"hip:{arch}", [zeros(m, 4096), *more], PlanOptions(precision))
        for m in (32, 64, 512)
        for precision in BOUNDS
        for function, more in ((one_product, [w]), (gated, [w, w, zeros(4096)]))
    ]
    sources = [render(plan, kernel) for plan in plans for kernel in plan.kernels]
    assert not any(in_parallel(faults, sources))
