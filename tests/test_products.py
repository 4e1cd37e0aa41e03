"""Products, dot products and values of weights on every CPU target, against the gguf package."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import specialize
from q4jit.compilers import llvm
from q4jit.cpu_products import add_dot
from q4jit.formats import FORMATS
from q4jit.layouts import GGUF, INTERLEAVED16
from q4jit.llvm_text import Module
from q4jit.lower_cpu import lower
from q4jit.schedule_cpu import layout
from q4jit.targets import find_target
from tests.kernels import (
    F32,
    FLOAT_FORMATS,
    FORMATS_OF_32,
    GUARDED,
    IN_PROCESS,
    Doubles,
    Floats,
    Guarded,
    Weight,
    assert_contract,
    block,
    decoded,
    dequantizer,
    errors,
    halves,
    lowered,
    on,
    one_product,
    products,
    random_blocks,
    random_x,
    run_guarded,
    set_halves,
    weight,
    weights,
    wrap,
)

K = 512
WIDTHS = (1, 37, 64)

every_target = pytest.mark.parametrize("target", IN_PROCESS)
every_guarded_cpu = pytest.mark.parametrize("cpu", GUARDED, ids=str)


def check_products(target: str, x: Floats, found: list[Weight]) -> None:
    """All products of x, in one kernel, keep the contract."""
    results = on(target, products(len(found)))(x, *(w.tensor for w in found))
    for y, w in zip(results, found, strict=True):
        assert_contract(y, x, w)


# --- shapes -----------------------------------------------------------------------------------


def test_the_measure_sees_a_wrong_product() -> None:
    w, x = weight("Q4_0", K, 37), random_x(2, K)
    exact = x.astype(np.float64) @ w.values
    assert_contract(exact.astype(F32), x, w)
    size = np.sqrt(x.astype(np.float64) ** 2 @ w.values**2)
    with pytest.raises(AssertionError, match=r"rms error 3\.0.e-06 in row 1"):
        assert_contract((exact + np.array([[0], [3e-6]]) * size).astype(F32), x, w)
    exact[1, 5] = np.nan
    with pytest.raises(AssertionError, match="rms error nan"):
        assert_contract(exact.astype(F32), x, w)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8, 16, 17, 64])
def test_every_number_of_rows(m: int) -> None:
    check_products("cpu", random_x(m, K), weights(K, WIDTHS))


@every_target
@pytest.mark.parametrize("m", [0, 1, 8, 17])
def test_every_target(target: str, m: int) -> None:
    check_products(target, random_x(m, K), weights(K, WIDTHS))


@every_target
def test_many_columns(target: str) -> None:
    check_products(target, random_x(3, 256), weights(256, [4096], names=["Q4_0"]))


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
    check_products(target, random_x(3, 96), weights(96, [1, 37], names=FORMATS_OF_32))
    check_products(target, random_x(3, 768), weights(768, [1, 37], names=["Q6_K"]))


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
    # K = 64 and N = 32: M must never be mistaken for either
    function = specialize(lambda x, w: x @ w)
    w = weight("Q4_0", 64, 32)
    for rows in (m, 5, 1):
        x = random_x(rows, 64)
        assert_contract(function(x, w.tensor), x, w)
        assert len(function.signatures) <= 2  # one row broadcasts: a signature of its own


# --- distributions ------------------------------------------------------------------------------


def distributions(k: int) -> dict[str, Floats]:
    """A row of x for each distribution that the contract names."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(k)
    outliers = np.where(rng.random(k) < 0.02, 100 * normal, normal)
    rows = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, k),
        "lognormal": rng.lognormal(0, 3, k) * rng.choice([-1, 1], k),
        "outliers": outliers,
        "small": normal * 1e-30,
        "large": normal * 1e30,
        "zero": 0 * normal,
        "mixed magnitudes": normal * 10.0 ** rng.uniform(-20, 20, k),
    }
    for size in (1e4, 1e10, 1e20, 1e30, 1e38):
        rows[f"one element of {size:.0e}"] = np.where(np.arange(k) == 300, size, normal)
    return {name: row.astype(F32) for name, row in rows.items()}


@every_target
@pytest.mark.parametrize("scales", ["normal", "zero", "denormal", "largest", "mixed"])
def test_distributions_and_scales(target: str, scales: str) -> None:
    rows = distributions(K)
    x = np.stack([*rows.values()] * 2)[:17]
    check_products(target, x, weights(K, WIDTHS, scales))


@every_target
def test_a_huge_element_alone_in_its_row(target: str) -> None:
    # rows of a tile have exponents of their own
    x = random_x(17, K)
    x[3, 5], x[4, 300], x[5] = 1e38, -3e38, x[5] * 1e-44
    check_products(target, x[[0, 1, 2, 3, 4, *range(6, 17)]], weights(K, WIDTHS))


@every_target
def test_denormal_activations(target: str) -> None:
    x = (random_x(17, K) * 1e-40).astype(F32)
    assert np.any(np.abs(x[x != 0]) < np.finfo(F32).tiny)
    check_products(target, x, weights(K, WIDTHS, "largest"))


@every_target
@pytest.mark.parametrize("scales", ["normal", "denormal"])
def test_denormal_results_are_rounded_once(target: str, scales: str) -> None:
    x = (random_x(17, K) * 1e-41).astype(F32)
    found = weights(K, WIDTHS, scales)
    results = on(target, products(len(found)))(x, *(w.tensor for w in found))
    for y, w in zip(results, found, strict=True):
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


# --- NaN and Inf ----------------------------------------------------------------------------------


def kinds(y: NDArray[Any]) -> NDArray[Any]:
    """What is NaN, Inf or −Inf in a result; finite numbers are 0."""
    return np.where(np.isfinite(y), 0, y)


def exact_products(x: Floats, w: Doubles) -> Doubles:
    """x @ w term by term: a BLAS may take shortcuts where NaN and Inf are."""
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.stack([(row[:, np.newaxis] * w).sum(0) for row in wide])


def assert_ieee(y: Floats, x: Floats, w: Weight) -> None:
    """NaN and Inf where float64 has them, and elsewhere the contract."""
    exact = exact_products(x, w.values)
    np.testing.assert_array_equal(kinds(y), kinds(exact), err_msg=str(w))
    rows, columns = np.isfinite(x).all(1), np.isfinite(w.values).all(0)
    clean = Weight(w.tensor, w.values[:, columns])
    assert_contract(np.ascontiguousarray(y[rows][:, columns]), x[rows], clean)


def not_finite_rows(k: int) -> Floats:
    """A row for each kind of value and class of position, and clean rows between them."""
    places = sorted({0, 3, 15, 16, 31, 32, k // 2, k - 1} & set(range(k)))
    values = [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.inf, np.inf], [np.nan, np.inf]]
    cases = list(itertools.product(values, places))
    x = random_x(2 * len(cases) + 1, k)
    for row, (pair, place) in enumerate(cases):
        for i, value in enumerate(pair):
            x[2 * row + 1, (place + 33 * i) % k] = value
    x[-1, :] = 0
    x[-1, k // 2] = np.inf  # Inf times the weight, and 0 times the others
    return x


@every_target
def test_not_finite_activations(target: str) -> None:
    x = not_finite_rows(K)
    found = weights(K, WIDTHS, "mixed")
    args = [w.tensor for w in found]
    results = on(target, products(len(found)))(x, *args)
    clean = np.where(np.isfinite(x), x, F32(1))
    others = on(target, products(len(found)))(clean, *args)
    same = np.isfinite(x).all(1)
    for y, other, w in zip(results, others, found, strict=True):
        assert_ieee(y, x, w)
        np.testing.assert_array_equal(y[same], other[same])


@pytest.mark.parametrize("k", [1, 5, 37])
def test_not_finite_activations_beside_padding(k: int) -> None:
    x = not_finite_rows(k)
    found = weights(k, [1, 37], names=FLOAT_FORMATS)
    results = on("cpu", products(len(found)))(x, *(w.tensor for w in found))
    for y, w in zip(results, found, strict=True):
        assert_ieee(y, x, w)


def spoiled(name: str, k: int, n: int, value: float, field: str) -> Weight:
    """A weight with `value` in field d or m of some blocks (an element, for F16 and F32)."""
    fmt = FORMATS[name]
    rng = np.random.default_rng([k, n])
    columns = sorted({0, 5, 16, n - 1} & set(range(n)))
    if fmt.float_dtype is not None:
        values = halves("normal", (n, k), rng).astype(fmt.float_dtype)
        for i, column in enumerate(columns):
            values[column, [0, k // 2, k - 1][i % 3]] = value
        return wrap(name, k, values)
    at = fmt.d_offset_bytes if field == "d" else fmt.m_offset_bytes
    assert at is not None
    blocks = random_blocks(fmt, k, n, "normal", rng)
    for i, column in enumerate(columns):
        block = i % blocks.shape[1]
        set_halves(blocks[column, block], at, np.asarray(value, np.float16))
    return wrap(name, k, blocks)


def spoiled_weights(k: int, widths: tuple[int, ...], value: float) -> list[Weight]:
    """Every format, and Q4_1 by its m as well."""
    found = [spoiled(name, k, n, value, "d") for name in FORMATS for n in widths]
    return found + [spoiled("Q4_1", k, n, value, "m") for n in widths]


def hard_x(k: int) -> list[Floats]:
    """Two times three rows that meet scales of Inf: zeros, numbers, huge ones, NaN and Inf."""
    x = random_x(6, k)
    x[0, 1 : k // 2] = 0  # 0·Inf is NaN
    x[1] = 0
    x[2] *= F32(1e30)
    x[4, 3], x[5, k - 1] = np.inf, np.nan
    return [x[:3], x[3:]]


def in_step(w: Weight) -> Floats:
    """Rows whose products with spoiled columns all have one sign: a zero among them shows."""
    columns = w.values[:, [0, 5, 16]] if w.values.shape[1] > 1 else w.values[:, [0, 0, 0]]
    return np.where(columns > 0, F32(1), F32(-1)).T.copy()


@every_target
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_not_finite_scales(target: str, value: float) -> None:
    found = spoiled_weights(K, (1, 37), value)
    function = on(target, products(len(found)))
    aligned = [in_step(w) for w in spoiled_weights(K, (1, 37), 1.0)]
    for x in [*hard_x(K), *aligned]:
        for y, w in zip(function(x, *(w.tensor for w in found)), found, strict=True):
            assert not np.isfinite(w.values).all()
            assert_ieee(y, x, w)


@pytest.mark.parametrize("m", [1, 8])
def test_not_finite_scales_with_other_numbers_of_rows(m: int) -> None:
    x = random_x(m, K)
    found = [spoiled(name, K, 37, np.inf, "d") for name in ("Q4_0", "Q6_K", "F32")]
    results = on("cpu", products(len(found)))(x, *(w.tensor for w in found))
    for y, w in zip(results, found, strict=True):
        assert_ieee(y, x, w)


# --- slices and dot products ------------------------------------------------------------------


def slices(x: Any, w: Any) -> tuple[Any, ...]:
    y = x @ w
    return y[..., 16:32], y[..., 5:36], y[..., 36:37], y[..., 32:37], y[..., :8]


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
    (section,) = plan.kernels[0].sections
    assert layout(section) == (GGUF if n < 8 else INTERLEAVED16)


# --- values -------------------------------------------------------------------------------------


def all_bits() -> list[Weight]:
    """Weights of random bits, NaN, Inf and denormals included, with whole and padded K and N."""
    found = [weight(name, 512, 37, "bits") for name in FORMATS]
    return [*found, weight("Q4_0", 96, 16, "bits"), weight("F16", 37, 5, "bits")]


def assert_same_bits(got: Floats, w: Weight) -> None:
    """Equal bit for bit, but for the payload of a NaN."""
    expected = decoded(w.tensor.format, w.tensor.raw)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), err_msg=str(w))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        got[numbers].view(np.uint32), expected[numbers].view(np.uint32), err_msg=str(w)
    )


@every_target
def test_values_are_ggufs(target: str) -> None:
    found = all_bits()
    results = on(target, dequantizer(len(found)))(*(w.tensor for w in found))
    for got, w in zip(results, found, strict=True):
        assert_same_bits(got, w)


# --- every CPU, and every access within its array ----------------------------------------------


@every_guarded_cpu
@pytest.mark.parametrize("m", [1, 3, 8, 9])
def test_products_beside_guard_pages(cpu: Guarded, m: int) -> None:
    x = random_x(m, 256)
    found = weights(256, (37, 16, 1))
    for y, w in zip(
        run_guarded(products(len(found)), cpu, [x, *(w.tensor for w in found)]), found, strict=True
    ):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_padded_k_beside_guard_pages(cpu: Guarded) -> None:
    x = random_x(3, 37)
    found = weights(37, (37, 1), names=FLOAT_FORMATS)
    for y, w in zip(
        run_guarded(products(len(found)), cpu, [x, *(w.tensor for w in found)]), found, strict=True
    ):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_unaligned_rows_beside_guard_pages(cpu: Guarded) -> None:
    x = random_x(2, 256)
    found = weights(256, (1, 7))
    args = [x, *(w.tensor for w in found)]
    for y, w in zip(run_guarded(products(len(found)), cpu, args, gap_bytes=1), found, strict=True):
        assert_contract(y, x, w)


@every_guarded_cpu
def test_not_finite_beside_guard_pages(cpu: Guarded) -> None:
    x = hard_x(256)[1]
    found = spoiled_weights(256, (37, 1), np.inf)
    for y, w in zip(
        run_guarded(products(len(found)), cpu, [x, *(w.tensor for w in found)]), found, strict=True
    ):
        assert_ieee(y, x, w)


@every_guarded_cpu
def test_values_beside_guard_pages(cpu: Guarded) -> None:
    found = all_bits()
    results = run_guarded(dequantizer(len(found)), cpu, [w.tensor for w in found])
    for got, w in zip(results, found, strict=True):
        assert_same_bits(got, w)


@every_guarded_cpu
@pytest.mark.parametrize("n", [37, 5])
def test_a_fused_function_beside_guard_pages(cpu: Guarded, n: int) -> None:
    gate, up = weight("Q4_0", 256, n, seed=1), weight("Q6_K", 256, n, seed=2)
    x, gain, bias = random_x(3, 256), random_x(256), random_x(n)
    residual = random_x(3, n)
    args = [x, gain, gate.tensor, up.tensor, bias, residual, 0.5]
    (y,) = run_guarded(block, cpu, args)
    wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
    wide[2:4] = [gate.values, up.values]
    exact = block(*wide)
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 3e-6


def test_every_level_gets_code_of_its_own() -> None:
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


def test_the_measure_is_the_contracts() -> None:
    x, w = np.array([[3, 4]], F32), np.array([[1.0], [1.0]])
    found = errors(np.array([[7 + 5e-6]], F32), x, w)
    np.testing.assert_allclose(found, 1e-6, rtol=0.1)
    assert np.isnan(errors(np.array([[0]], F32), np.array([[1e38, 1e38]], F32), 10 * w))
