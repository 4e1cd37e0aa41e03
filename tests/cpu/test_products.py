"""Products, dot products and dequantised weights on every CPU target, against the gguf package."""

from typing import Final

import numpy as np
import pytest

from q4jit import specialize
from q4jit.compilers import llvm
from q4jit.cpu.gguf_rows import add_dot
from q4jit.cpu.llvm_text import Module
from q4jit.cpu.lower import lower
from q4jit.cpu.schedule import layout
from q4jit.precision import error_scale
from q4jit.precision import relative_error as rms_error
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, INTERLEAVED16
from tests.support.kernels import (
    BOUND,
    F32,
    FLOAT_FORMATS,
    FORMATS_OF_32,
    GUARDED,
    IN_PROCESS,
    Doubles,
    Floats,
    Guarded,
    Weight,
    all_bits,
    around,
    assert_contract,
    assert_ieee,
    assert_same_bits,
    block,
    dequantizer,
    distributions,
    errors,
    every_guarded_cpu,
    hard_x,
    in_step,
    lowered,
    not_finite_rows,
    on,
    one_product,
    products,
    random_blocks,
    random_x,
    relative_error,
    run_guarded,
    slices,
    spoiled,
    spoiled_weights,
    weight,
    weights,
    weights_in_turn,
    wrap,
)
from tests.support.pairs import pairwise

K = 512
WIDTHS = (1, 37, 64)
# several formats at a time share a kernel
THIRDS: Final = tuple(tuple(FORMATS)[i::3] for i in range(3))

every_target = pytest.mark.parametrize("target", IN_PROCESS)


def check_products(target: str, x: Floats, factors: list[Weight]) -> None:
    """Check that the products of x with several weights, in one kernel, keep the contract."""
    results = on(target, products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        assert_contract(y, x, w)


# --- shapes -----------------------------------------------------------------------------------


def test_the_error_measure_detects_a_wrong_product() -> None:
    w, x = weight("Q4_0", K, 37), random_x(2, K)
    exact = x.astype(np.float64) @ w.values
    assert_contract(exact.astype(F32), x, w)
    size = np.sqrt(x.astype(np.float64) ** 2 @ w.values**2)
    with pytest.raises(AssertionError, match=r"rms error 3\.0.e-06 in row 1"):
        assert_contract((exact + np.array([[0], [3e-6]]) * size).astype(F32), x, w)
    exact[1, 5] = np.nan
    with pytest.raises(AssertionError, match="rms error nan"):
        assert_contract(exact.astype(F32), x, w)


@pairwise("m target names", [0, 1, 2, 3, 7, 8, 16, 17, 64], IN_PROCESS, THIRDS)
def test_every_number_of_rows(m: int, target: str, names: tuple[str, ...]) -> None:
    check_products(target, random_x(m, K), weights_in_turn(K, WIDTHS, names=names))


@every_target
def test_many_columns(target: str) -> None:
    check_products(target, random_x(3, 256), weights(256, [4096], names=["Q4_0"]))


VNNI: Final = "cpu:x86-64-v4+avx512vnni"


@pairwise("name target m", [*FORMATS], [VNNI, *IN_PROCESS[1:]], [1, 8, 40])
def test_every_format_alone(name: str, target: str, m: int) -> None:
    """Check what other formats in a kernel could hide: its tile, its sums of x, its path."""
    x, w = not_finite_rows(K), weight(name, K, 37)
    x[2, 5] = 1e35
    plan = lowered(one_product, find_target(target), [x[:m], w.tensor])
    (kernel,) = plan.kernels
    by_digits = target == VNNI and name not in FLOAT_FORMATS
    assert kernel.digits == (3 if by_digits else 0)
    joined = lowered(products(2), plan.target, [x[:m], w.tensor, weight("Q4_0", K, 37).tensor])
    is_other = kernel.tile != joined.kernels[0].tile
    assert is_other == (target == VNNI and not by_digits and m == 40)
    for rows in [x[i : i + 1] for i in (0, 1, 2, 19)] if m == 1 else [x[:m]]:
        assert_ieee(on(target, one_product)(rows, w.tensor), rows, w)


@pairwise("name target m", [*FORMATS], IN_PROCESS[1:], [1, 8])
def test_one_column_of_every_format_alone(name: str, target: str, m: int) -> None:
    x, w = not_finite_rows(K)[1 : 1 + m], weight(name, K, 1)
    x[m // 2, 5] = 1e35
    assert_ieee(on(target, one_product)(x, w.tensor), x, w)


GGML_SHAPES = [
    *((16, m, 256) for m in range(1, 10)),
    *((16, m, 1024) for m in (1, 8, 16)),
    (2880, 32, 2880),
    (576, 512, 576),
    (1, 2048, 8192),
    (1, 64, 256),
]


@pytest.mark.parametrize(("n", "m", "k"), GGML_SHAPES)
def test_shapes_of_ggml(n: int, m: int, k: int) -> None:
    w = weight("Q4_0", k, n)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (m, k)).astype(F32)
    y = on("cpu", one_product)(x, w.tensor)
    assert_contract(y, x, w)
    exact = x.astype(np.float64) @ w.values
    assert np.mean((y - exact) ** 2) / np.mean(exact**2) < 5e-4  # ggml's own criterion


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152, 768])
def test_shapes_of_marlin(m: int) -> None:
    w, x = weight("Q4_0", 1024, 256), random_x(m, 1024)
    y = on("cpu", one_product)(x, w.tensor)
    assert_contract(y, x, w)
    exact = x.astype(np.float64) @ w.values
    assert np.mean(np.abs(y - exact)) / np.mean(np.abs(exact)) < 1e-3  # Marlin's own criterion


@pytest.mark.parametrize(
    ("k", "target"), [*((k, "cpu") for k in (1, 5, 100)), *((37, t) for t in IN_PROCESS)]
)
def test_floats_take_any_k(k: int, target: str) -> None:
    check_products(target, random_x(3, k), weights(k, [1, 37], names=FLOAT_FORMATS))


@every_target
def test_an_odd_number_of_blocks(target: str) -> None:
    check_products(target, random_x(3, 96), weights_in_turn(96, [1, 37], names=FORMATS_OF_32))
    of_256 = [name for name in FORMATS if name not in FORMATS_OF_32]
    check_products(target, random_x(3, 768), weights(768, [37], names=of_256))


@pytest.mark.parametrize("name", FORMATS)
def test_a_single_block(name: str) -> None:
    k = FORMATS[name].block_elements
    w, x = weight(name, k, 16), random_x(2, k)
    assert_contract(on("cpu", one_product)(x, w.tensor), x, w)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (1, 1, 8), (0,), (2, 0, 3)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    w, x = weight("Q4_0", 256, 37), random_x(*lead, 256)
    assert_contract(on("cpu", one_product)(x, w.tensor), x, w)


@pytest.mark.parametrize("m", [1, 64, 32])
def test_a_first_call_with_equal_sizes(m: int) -> None:
    # K = 64 and N = 32: M must not be confused with either
    function = specialize(lambda x, w: x @ w)
    w = weight("Q4_0", 64, 32)
    for rows in (m, 5, 1):
        x = random_x(rows, 64)
        assert_contract(function(x, w.tensor), x, w)
        assert len(function.signatures) <= 2  # one row broadcasts, which is another signature


# --- distributions ------------------------------------------------------------------------------


@every_target
@pytest.mark.parametrize("scales", ["normal", "zero", "denormal", "largest", "mixed"])
def test_distributions_and_scales(target: str, scales: str) -> None:
    rows = distributions(K)
    x = np.stack([*rows.values()] * 2)[:17]
    check_products(target, x, weights_in_turn(K, WIDTHS, scales))


@every_target
def test_a_huge_element_alone_in_its_row(target: str) -> None:
    # each row of a tile has a row factor of its own
    x = random_x(17, K)
    x[3, 5], x[4, 300] = 1e38, -3e38
    check_products(target, x, weights_in_turn(K, WIDTHS))


@every_target
def test_denormal_activations(target: str) -> None:
    x = (random_x(17, K) * 1e-40).astype(F32)
    assert np.any(np.abs(x[x != 0]) < np.finfo(F32).tiny)
    check_products(target, x, weights_in_turn(K, WIDTHS, "largest"))


@every_target
@pytest.mark.parametrize("scales", ["normal", "denormal"])
def test_denormal_results_are_rounded_once(target: str, scales: str) -> None:
    x = (random_x(17, K) * 1e-41).astype(F32)
    factors = weights_in_turn(K, WIDTHS, scales)
    results = on(target, products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        exact = x.astype(np.float64) @ w.values
        size = np.sqrt(x.astype(np.float64) ** 2 @ w.values**2)
        assert np.any((y != 0) & (np.abs(y) < np.finfo(F32).tiny))
        assert np.all(np.abs(y - exact) <= 2.0**-150 + 1e-5 * size), str(w)


@every_target
def test_results_beyond_f32_are_infinite(target: str) -> None:
    x = np.full((17, K), 1e38, F32)
    x[::2] *= -1
    w = weight("Q4_0", K, 37, "largest")
    x[1] = np.where(w.values[:, 0] < 0, -1e38, 1e38)
    y = on(target, one_product)(x, w.tensor)
    exact = x.astype(np.float64) @ w.values
    beyond = np.abs(exact) > np.finfo(F32).max
    assert beyond.any()
    np.testing.assert_array_equal(y[beyond], np.sign(exact[beyond]) * np.inf)


def scales_of_8_bits(first: int, end: int) -> Weight:
    """Return MXFP4 with scales from 2^(first - 128) on, below 2^(end - 128)."""
    rng = np.random.default_rng(first)
    blocks = random_blocks(FORMATS["MXFP4"], K, 37, "normal", rng)
    blocks[..., 0] = rng.integers(first, end, blocks.shape[:2])
    return wrap("MXFP4", K, blocks)


@every_target
@pytest.mark.parametrize("ends", [(0, 2), (0, 3), (100, 140), (0, 156), (150, 192)], ids=str)
def test_scales_of_8_bits(target: str, ends: tuple[int, int]) -> None:
    """Check products with scales from 2^-128 on, which are denormal, like some of the products."""
    w = scales_of_8_bits(*ends)
    transposed = on(target, lambda y, w: y @ w.T)
    for size in (1, 2.0**-30, 2.0**-120, 2.0**30):
        for m in (1, 40):
            x, y = (F32(size) * random_x(m, k) for k in w.values.shape)
            check_rounded(on(target, one_product)(x, w.tensor), x, w.values)
            check_rounded(transposed(y, w.tensor), y, w.values.T)


def check_rounded(y: Floats, x: Floats, w: Doubles) -> None:
    """Check the contract; correct rounding of a result is no error."""
    wide = x.astype(np.float64)
    scale = error_scale(wide**2 @ w**2, x.shape[1])
    error = rms_error(y, wide @ w, scale)
    assert error is not None
    assert error < BOUND


# --- NaN and Inf ----------------------------------------------------------------------------------


@every_target
def test_not_finite_activations(target: str) -> None:
    x = not_finite_rows(K)
    factors = weights_in_turn(K, WIDTHS, "mixed")
    args = [w.tensor for w in factors]
    results = on(target, products(len(factors)))(x, *args)
    clean = np.where(np.isfinite(x), x, F32(1))
    others = on(target, products(len(factors)))(clean, *args)
    same = np.isfinite(x).all(1)
    for y, other, w in zip(results, others, factors, strict=True):
        assert_ieee(y, x, w)
        np.testing.assert_array_equal(y[same], other[same])


@pytest.mark.parametrize("k", [1, 5, 37])
def test_not_finite_activations_beside_padding(k: int) -> None:
    x = not_finite_rows(k)
    factors = weights(k, [1, 37], names=FLOAT_FORMATS)
    results = on("cpu", products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        assert_ieee(y, x, w)


@every_target
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_not_finite_scales(target: str, value: float) -> None:
    factors = spoiled_weights(K, (1, 37), value)
    function = on(target, products(len(factors)))
    aligned = [in_step(w) for w in spoiled_weights(K, (1, 37), 1.0)]
    for x in [*hard_x(K), *aligned]:
        for y, w in zip(function(x, *(w.tensor for w in factors)), factors, strict=True):
            assert not np.isfinite(w.values).all()
            assert_ieee(y, x, w)


@pytest.mark.parametrize("m", [1, 8])
def test_not_finite_scales_with_other_numbers_of_rows(m: int) -> None:
    x = random_x(m, K)
    factors = [spoiled(name, K, 37, np.inf, "d") for name in ("Q4_0", "Q6_K", "F32")]
    results = on("cpu", products(len(factors)))(x, *(w.tensor for w in factors))
    for y, w in zip(results, factors, strict=True):
        assert_ieee(y, x, w)


# --- slices and dot products ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"), [*((f, "cpu") for f in FORMATS), *(("Q4_0", t) for t in IN_PROCESS[1:])]
)
def test_slices_of_a_product(name: str, target: str) -> None:
    w, x = weight(name, 256, 37), random_x(3, 256)
    for y, cut in zip(
        on(target, slices)(x, w.tensor),
        (slice(16, 32), slice(5, 36), slice(36, 37), slice(32, 37), slice(8)),
        strict=True,
    ):
        assert_contract(y, x, Weight(w.tensor, w.values[:, cut]))


@pytest.mark.parametrize("n", range(1, 10))
def test_the_schedule_of_narrow_results(n: int) -> None:
    w, x = weight("Q4_0", 256, n), random_x(2, 256)
    assert_contract(on("cpu", one_product)(x, w.tensor), x, w)
    plan = lowered(one_product, find_target("cpu"), [x, w.tensor])
    (section,) = plan.kernels[0].work.sections
    assert layout(section) == (GGUF if n < 8 else INTERLEAVED16)


# --- values -------------------------------------------------------------------------------------


@every_target
def test_dequantised_values_are_those_of_the_gguf_package(target: str) -> None:
    factors = all_bits()
    results = on(target, dequantizer(len(factors)))(*(w.tensor for w in factors))
    for got, w in zip(results, factors, strict=True):
        assert_same_bits(got, w)


# --- every CPU, and every access within its array ----------------------------------------------


@every_guarded_cpu
@pytest.mark.parametrize("m", [1, 3, 8, 9])
def test_products_beside_guard_pages(cpu: Guarded, m: int) -> None:
    x = random_x(m, 256)
    names = THIRDS[(m + GUARDED.index(cpu)) % 3]
    factors = weights_in_turn(256, (37, 16, 1), names=names)
    for y, w in zip(
        run_guarded(products(len(factors)), cpu, [x, *(w.tensor for w in factors)]),
        factors,
        strict=True,
    ):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_padded_k_beside_guard_pages(cpu: Guarded) -> None:
    x = random_x(3, 37)
    factors = weights(37, (37, 1), names=FLOAT_FORMATS)
    for y, w in zip(
        run_guarded(products(len(factors)), cpu, [x, *(w.tensor for w in factors)]),
        factors,
        strict=True,
    ):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_unaligned_rows_beside_guard_pages(cpu: Guarded) -> None:
    x = random_x(2, 256)
    factors = weights_in_turn(256, (1, 7))
    args = [x, *(w.tensor for w in factors)]
    for y, w in zip(
        run_guarded(products(len(factors)), cpu, args, gap_bytes=1), factors, strict=True
    ):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_not_finite_beside_guard_pages(cpu: Guarded) -> None:
    x = hard_x(256)[1]
    factors = spoiled_weights(256, (37, 1), np.inf)
    for y, w in zip(
        run_guarded(products(len(factors)), cpu, [x, *(w.tensor for w in factors)]),
        factors,
        strict=True,
    ):
        assert_ieee(y, x, w)


@every_guarded_cpu
def test_values_beside_guard_pages(cpu: Guarded) -> None:
    factors = all_bits()
    results = run_guarded(dequantizer(len(factors)), cpu, [w.tensor for w in factors])
    for got, w in zip(results, factors, strict=True):
        assert_same_bits(got, w)


@every_guarded_cpu
@pytest.mark.parametrize("n", [37, 5])
def test_a_fused_function_beside_guard_pages(cpu: Guarded, n: int) -> None:
    gate, up = weight("Q4_0", 256, n, seed=1), weight("Q6_K", 256, n, seed=2)
    args, exact = around(random_x(3, 256), gate, up)
    (y,) = run_guarded(block, cpu, args)
    assert relative_error(y, exact) < 3e-6


def test_each_level_has_its_own_vectors() -> None:
    args = [random_x(1, 256), weight("Q4_0", 256, 16).tensor]
    assembly = {}
    for name in ("cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64"):
        target = find_target(name)
        plan = lowered(one_product, target, args)
        assembly[name] = llvm.compile_assembly(lower(plan, plan.kernels[0]).text, target)
    assert "zmm" in assembly["cpu:x86-64-v4"]
    assert "zmm" not in assembly["cpu:x86-64-v3"]
    assert "ymm" in assembly["cpu:x86-64-v3"]
    assert "ymm" not in assembly["cpu:x86-64"]


@pytest.mark.parametrize("target", ["cpu:x86-64", "cpu:x86-64-v3", "cpu:aarch64"])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_dot_assumes_no_alignment_of_rows(format_: str, target: str) -> None:
    module = Module(find_target(target))
    add_dot(module, FORMATS[format_], 512, early_scale=False)
    loads = [line for line in module.text("").splitlines() if " = load " in line]
    of_rows = [line for line in loads if "ptr %x" not in line]
    assert of_rows
    assert all(line.endswith("align 1") or "= load i8," in line for line in of_rows)


def test_the_error_measure_is_that_of_the_contract() -> None:
    x, w = np.array([[3, 4]], F32), np.array([[1.0], [1.0]])
    error = errors(np.array([[7 + 5e-6]], F32), x, w)
    np.testing.assert_allclose(error, 1e-6, rtol=0.1)
    assert np.isnan(errors(np.array([[0]], F32), np.array([[1e38, 1e38]], F32), 10 * w))
