"""Integer products on the CPU: x in digits, rough units, and the contract of `i8`."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import quantize, specialize
from q4jit.compilers import cache, llvm
from q4jit.cpu import schedule as schedule_cpu
from q4jit.cpu.digit_form import DigitForm
from q4jit.cpu.digits import add_digits
from q4jit.cpu.llvm_text import EXPONENT_SHIFT, Function, Module
from q4jit.cpu.schedule import DOTS, HEADER_BYTES, UNIT, digits_bytes, find_dot, tile_of, unit_bytes
from q4jit.dispatcher import Specialized
from q4jit.runtime.cpu import LoadedObject, function
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from tests.support.kernels import (
    F32,
    Floats,
    Guarded,
    Weight,
    all_bits,
    around,
    assert_contract,
    assert_ieee,
    block,
    distributions,
    each_guarded,
    lowered,
    not_finite_rows,
    one_product,
    products,
    random_blocks,
    random_x,
    relative_error,
    require_target,
    run_guarded,
    spoiled,
    weight,
    weights,
    wrap,
)
from tests.support.pairs import pairwise
from tests.support.paths import ROOT

K: Final = 512
WIDTHS: Final = (37, 64)
I8: Final = 2e-2
NORMAL_I8: Final = 1.5e-2  # for normal x: a step is up to 2/127 of the largest element
BLOCK_FORMATS: Final = tuple(f.name for f in FORMATS.values() if f.float_type is None)
TARGETS: Final = ("cpu", "cpu:x86-64-v3", "cpu:x86-64-v4+avx512vnni")

# several formats at a time share a kernel, and so the form of x in digits
THIRDS: Final = tuple(BLOCK_FORMATS[i::3] for i in range(3))


def i8(target: str, count: int) -> Specialized[..., Any]:
    return specialize(products(count), target=require_target(target), precision="i8")


def check_i8(target: str, x: Floats, factors: list[Weight], bound: float = I8) -> None:
    """Check the products of x with several weights, computed by one kernel."""
    ys = i8(target, len(factors))(x, *(w.tensor for w in factors))
    for y, w in zip(ys, factors, strict=True):
        assert_contract(y, x, w, bound)


# --- the contract of i8 ------------------------------------------------------------------------


@pairwise("m target names", [0, 1, 2, 5, 8, 9, 16, 17, 64], TARGETS, THIRDS)
def test_normal_rows(target: str, m: int, names: tuple[str, ...]) -> None:
    width = WIDTHS[m % 2]
    check_i8(target, random_x(m, K), weights(K, (width,), names=names), NORMAL_I8)


@pairwise(
    "scales target names", ["normal", "zero", "denormal", "largest", "mixed"], TARGETS, THIRDS
)
def test_distributions_and_scales(target: str, scales: str, names: tuple[str, ...]) -> None:
    x = np.stack([*distributions(K).values()] * 2)[:17]
    check_i8(target, x, weights(K, (37,), scales, names))


@pairwise("names target width", THIRDS, TARGETS, WIDTHS)
def test_not_finite_activations(target: str, width: int, names: tuple[str, ...]) -> None:
    x, factors = not_finite_rows(K), weights(K, (width,), "mixed", names)
    ys = i8(target, len(factors))(x, *(w.tensor for w in factors))
    for y, w in zip(ys, factors, strict=True):
        assert_ieee(y, x, w, I8)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_not_finite_scales(value: float) -> None:
    w, x = spoiled("Q4_0", K, 37, value, "d"), random_x(3, K)
    assert_ieee(specialize(one_product, precision="i8")(x, w.tensor), x, w, I8)


def test_i8_is_not_f32() -> None:
    w, x = weight("Q4_0", K, 64), random_x(3, K)
    y = specialize(one_product, target="cpu", precision="i8")(x, w.tensor)
    with pytest.raises(AssertionError, match="rms error"):
        assert_contract(y, x, w, 1e-4)


def test_a_fused_function() -> None:
    args, exact = around(random_x(5, K), weight("Q4_0", K, 37), weight("Q8_0", K, 37))
    y = specialize(block, target="cpu", precision="i8")(*args)
    assert relative_error(y, exact) < 3 * I8


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["f32", "i8"])
@pytest.mark.parametrize("m", [17, 48, 49, 101, 145])
def test_more_rows_than_a_band(precision: str, m: int) -> None:
    w, x = weight("Q4_0", 4096, 48), random_x(m, 4096)
    y = specialize(one_product, target="cpu", precision=precision)(x, w.tensor)
    assert_contract(y, x, w, I8 if precision == "i8" else 2e-6)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_formats_of_one_x(m: int) -> None:
    # super-blocks pad K to blocks of 256; F16 is multiplied as floats
    names = ["Q4_0", "Q6_K", "F16", "Q8_0", "Q4_1"]
    if m == 1:
        names += ["Q2_K", "Q5_K", "MXFP4"]
    factors = [weight(name, 768, 40) for name in names]
    x = random_x(m, 768)
    x[0, 700] = 1e7
    check_i8("cpu", x, factors)
    ys = specialize(products(len(names)), target="cpu")(x, *(w.tensor for w in factors))
    for y, w in zip(ys, factors, strict=True):
        assert_contract(y, x, w)


@each_guarded([Guarded("cpu:aarch64+dotprod"), Guarded("cpu:x86-64-v4+avx512vnni", native=True)])
@pytest.mark.parametrize("precision", ["f32", "i8"])
@pytest.mark.parametrize("m", [1, 8, 17])
def test_beside_guard_pages(precision: str, m: int, cpu: Guarded) -> None:
    x = np.stack([*distributions(96).values()] * 2)[:m]
    factors = [weight("Q4_0", 96, 37), weight("Q8_0", 96, 16)]
    args = [x, *(w.tensor for w in factors)]
    ys = run_guarded(products(2), cpu, args, precision=precision)
    for y, w in zip(ys, factors, strict=True):
        assert_contract(y, x, w, I8 if precision == "i8" else 2e-6)


# --- instructions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "instruction", "registers"),
    [
        ("cpu:x86-64-v4+avx512vnni", "vpdpbusd", "zmm"),
        ("cpu:x86-64-v3+avxvnni", "vpdpbusd", "ymm"),
        ("cpu:x86-64-v3", "vpmaddubsw", "ymm"),
        ("cpu:aarch64+dotprod", "sdot", ".16b"),
    ],
)
def test_the_instruction_of_a_cpu(target: str, instruction: str, registers: str) -> None:
    f = specialize(one_product, precision="i8")
    f.warmup(random_x(1, K), weight("Q4_0", K, 64).tensor)
    lines = [line for line in f.inspect_asm(target=target).splitlines() if instruction in line]
    assert len(lines) >= 8
    assert all(registers in line for line in lines)


@pytest.mark.parametrize("target", ["cpu:x86-64", "cpu:aarch64"])
def test_a_cpu_that_cannot_multiply_bytes_multiplies_floats(target: str) -> None:
    assert find_dot(find_target(target)) is None
    plan = lowered(
        one_product, find_target(target), [random_x(1, K), weight("Q4_0", K, 64).tensor], "i8"
    )
    assert [(k.dot, k.digits) for k in plan.kernels] == [(None, 0)]


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_dot_products_of_half_a_register(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the kernels of `avxvnni` CPUs, run by AVX-512VL's instruction of the same width
    require_target("cpu:x86-64-v4+avx512vnni")
    (narrow,) = (dot for dot in DOTS if dot.feature == "avxvnni")
    monkeypatch.setattr(schedule_cpu, "DOTS", (replace(narrow, feature="avx512vnni"),))
    for m, names in zip((1, 3, 9), THIRDS, strict=True):
        x, factors = random_x(m, K), weights(K, WIDTHS[:1], names=names)
        f = specialize(products(len(factors)), target="cpu", precision=precision)
        for y, w in zip(f(x, *(w.tensor for w in factors)), factors, strict=True):
            assert_contract(y, x, w, I8 if precision == "i8" else 2e-6)
        assert "@llvm.x86.avx512.vpdpbusd.256(" in f.inspect_source()
        assert "vpdpbusd.512" not in f.inspect_source()


def test_tiles_by_cpu_and_rows() -> None:
    def tiles(target: str, digits: int = 3) -> list[tuple[int, int]]:
        by_m = [tile_of(find_target(target), m, digits) for m in (1, 4, 8, 9, 16, 17, 512)]
        return [(tile.rows, tile.panels) for tile in by_m]

    wide = [(1, 1), (4, 1), (8, 1), (5, 1), (8, 1)]
    assert tiles("cpu:x86-64-v4+avx512vnni") == [*wide, (4, 2), (4, 2)]
    assert tiles("cpu:x86-64-v4+avx512vnni", 1) == [*wide, (6, 2), (6, 2)]
    assert tiles("cpu:x86-64-v4") == [(1, 1), (4, 1), (4, 1), (4, 1), (4, 1), (4, 1), (4, 1)]
    assert tiles("cpu:x86-64-v3") == tiles("cpu:aarch64+dotprod")


@pytest.mark.parametrize(
    ("name", "m", "precision", "tile"),
    [
        ("Q6_K", 17, "i8", (12, 1)),
        ("Q6_K", 17, "f32", (4, 2)),
        ("Q6_K", 16, "i8", (8, 1)),
        ("Q4_K", 17, "i8", (6, 2)),
    ],
)
def test_tiles_by_format(name: str, m: int, precision: str, tile: tuple[int, int]) -> None:
    target = find_target("cpu:x86-64-v4+avx512vnni")
    plan = lowered(one_product, target, [random_x(m, K), weight(name, K, 64).tensor], precision)
    assert [(k.tile.rows, k.tile.panels) for k in plan.kernels] == [tile]


def test_explain_names_the_weights_that_f32_serves() -> None:
    x, w = random_x(2, K), weight("F16", K, 37)
    f = specialize(lambda x, weights: x @ weights, target="cpu", precision="i8")
    f(x, w.tensor)
    assert "this CPU has no kernels of that class for weights" in f.explain()
    served = specialize(one_product, target="cpu", precision="i8")
    served(x, weight("Q4_0", K, 37).tensor)
    assert "more exact" not in served.explain()


# --- x in digits ----------------------------------------------------------------------------------


def unit_dtype(digits: int) -> np.dtype[np.void]:
    """Return the fields of a unit of x, as `DigitForm.unit` describes them."""
    fields = [
        ("lift", np.int32),
        ("sum" if digits == 1 else "low_sum", F32),
        ("half_sums", np.int32, 2),
        ("scaled_half_sums", F32, 2) if digits == 1 else ("top_half_sums", np.int32, 2),
        ("whole_sum", np.int32),
        ("top_sum", np.int32),
        ("digits", np.int8, (digits, UNIT)),
    ]
    return np.dtype(fields)


@dataclass(frozen=True)
class Row:
    """A row of x in digits, read back.

    Attributes:
        x: the values that the digits stand for.
        rough: the numbers of the rough units.
        units: the units, field by field.
        whole: the integers X, [units, 32].
        top: their highest digits, [units, 32].
    """

    x: NDArray[np.float64]
    rough: list[int]
    units: NDArray[np.void]
    whole: NDArray[np.int64]
    top: NDArray[np.int64]


def writer_of(form: DigitForm) -> Callable[[Floats], Row]:
    """Return a function that writes a row of x in digits by generated code and reads it back."""
    digits, target = form.digits, find_target(require_target("cpu"))
    module = Module(target)
    f = Function("void @row(ptr %x, ptr %units, i64 %count) #0")
    f.do(f"call void {add_digits(module, form)}(ptr %x, ptr %units, i64 %count)")
    f.do("ret void")
    module.add("row", f)
    code = LoadedObject(
        cache.fetch(target, llvm, "row", module.text("a test")).object_bytes, ("row",), target
    )

    def call(x: Floats) -> Row:
        count = len(x) // UNIT
        entry = function(code.addresses["row"], ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        memory = np.full(digits_bytes(len(x), digits), 0xFF, np.uint8)
        entry(x.ctypes.data, memory.ctypes.data, count)
        units = memory[: count * unit_bytes(digits)].view(unit_dtype(digits))
        row_end = memory[count * unit_bytes(digits) :].view(np.int32)
        smallest_step, rough = float(row_end.view(F32)[1]), row_end[2 : 2 + row_end[0]]
        each = units["digits"].astype(np.int64)
        whole = sum(each[:, i] * 256 ** (digits - 1 - i) for i in range(digits))
        values = whole * (powers(units) * smallest_step)[:, np.newaxis]
        return Row(values.ravel(), rough.tolist(), units, np.asarray(whole), each[:, 0])

    return call


@pytest.fixture(params=[1, 3])
def in_digits(request: pytest.FixtureRequest) -> Any:
    """Return the function that writes a row of x in digits, with all sums."""
    call: Any = writer_of(DigitForm(request.param, True, True, True))
    call.digits = request.param  # for the tests' bounds
    return call


def powers(units: NDArray[np.void]) -> NDArray[np.float64]:
    """Return 2^lift of units."""
    return np.asarray(2.0 ** (units["lift"] >> EXPONENT_SHIFT))


@pytest.mark.parametrize("digits", [1, 3])
def test_a_unit_has_the_same_fields_in_text_and_test(digits: int) -> None:
    form = DigitForm(digits, half_sums=True, top_sums=True, float_sums=True)
    struct, dtype = form.unit, unit_dtype(digits)
    assert dtype.names is not None
    assert dtype.fields is not None
    assert [field.name for field in struct.fields] == [*dtype.names]
    for name in dtype.names:
        assert struct.offset_bytes(name) == dtype.fields[name][1]
    assert struct.offset_bytes("digits") == HEADER_BYTES
    assert struct.offset_bytes("digits", digits - 1, 5) == unit_bytes(digits) - UNIT + 5
    assert dtype.itemsize == unit_bytes(digits)


def test_digits_reproduce_x(in_digits: Any) -> None:
    x = random_x(K) * np.repeat(F32(2) ** np.arange(-8, 8, dtype=F32), K // 16)
    row = in_digits(x)
    assert row.rough == []
    largest = np.abs(x.reshape(-1, UNIT)).max(1).repeat(UNIT)
    step = largest * (2.0**-6 if in_digits.digits == 1 else 2.0**-21.99)
    assert np.all(np.abs(row.x - x) <= step / 2)


def test_the_header_has_the_sums(in_digits: Any) -> None:
    row = in_digits(random_x(K))
    halves = row.whole.reshape(-1, 2, UNIT // 2).sum(-1)
    np.testing.assert_array_equal(row.units["half_sums"], -8 * halves)
    np.testing.assert_array_equal(row.units["whole_sum"], -8 * row.whole.sum(-1))
    if in_digits.digits == 1:
        sums = row.whole.sum(-1) * powers(row.units)
        np.testing.assert_array_equal(row.units["sum"], sums)
        scaled = halves * powers(row.units)[:, np.newaxis]
        np.testing.assert_array_equal(row.units["scaled_half_sums"], scaled)
    else:
        top_halves = row.top.reshape(-1, 2, UNIT // 2).sum(-1)
        np.testing.assert_array_equal(row.units["top_half_sums"], -8 * top_halves)
        np.testing.assert_array_equal(row.units["top_sum"], -8 * row.top.sum(-1))
        np.testing.assert_array_equal(row.units["low_sum"], (row.whole - (row.top << 16)).sum(-1))


def test_rounding_errors_of_half_a_unit_cancel_each_other() -> None:
    x = np.array(random_x(8 * K))
    x[:32], x[40:56] = 0.37, 0  # equal elements, and zeros
    row = writer_of(DigitForm(1, True, False, True, balanced=True))(x)
    assert row.rough == []
    steps = np.abs(row.x).reshape(-1, UNIT).max(1) / np.abs(row.whole).max(1)
    errors = (row.x - x).reshape(-1, UNIT) / steps[:, np.newaxis]
    assert np.abs(errors).max() < 1
    assert np.abs(errors.reshape(-1, 2, UNIT // 2).sum(-1)).max() < 0.5 + 1e-3
    assert np.mean(errors**2) < 1.2 / 12  # 1/12 if each number becomes the nearest integer


@pytest.mark.parametrize("size", [0.0, 1.0, 1 - 2.0**-24, 127.0, 8355700.0, 2.0**23 - 1, 1.999])
def test_the_largest_element_of_a_unit(in_digits: Any, size: float) -> None:
    x = np.full(UNIT, size, F32) * random_x(UNIT).clip(-1, 1)
    x[7] = -size
    row = in_digits(x)
    assert row.rough == []
    largest = 127 if in_digits.digits == 1 else 8355700
    assert largest / 2.1 <= np.abs(row.whole).max() <= largest or size == 0
    np.testing.assert_allclose(row.x[7], -size, rtol=2.0**-7 if in_digits.digits == 1 else 2.0**-22)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e20, 1e6])
def test_units_that_digits_cannot_hold(in_digits: Any, value: float) -> None:
    x = random_x(K)
    x[[3, 5 * UNIT + 31]] = value
    row = in_digits(x)
    assert row.rough == [0, 5]
    assert not row.x.reshape(-1, UNIT)[[0, 5]].any()
    unused = {"top_sum"} if in_digits.digits == 1 else set()
    for name in set(unit_dtype(in_digits.digits).names or ()) - unused:
        assert not row.units[[0, 5]][name].any()


def test_units_of_tiny_numbers_and_zeros(in_digits: Any) -> None:
    x = random_x(4 * UNIT)
    x[UNIT : 2 * UNIT] = 0
    x[3 * UNIT : 4 * UNIT - 1] = 0
    tiny = x * F32(1e-30)
    assert in_digits(tiny).rough == [0, 2, 3]  # 1/step would overflow f32
    for size, rough in ((1e-12, []), (1e-30, [0])):
        x[:UNIT] = random_x(UNIT) * F32(size)
        assert in_digits(x).rough == rough


def test_rows_of_mostly_zeros_are_not_rough(in_digits: Any) -> None:
    x = np.zeros(K, F32)
    x[300] = 7
    assert in_digits(x).rough == []
    x[300] = 1
    x[::64] = random_x(K // 64).clip(-2, 2)
    assert in_digits(x).rough == []


def test_few_units_of_a_gated_layer_are_rough(in_digits: Any) -> None:
    # heavy tails: in a third of the units most elements are below 1/32 of the largest
    g, u = random_x(2, 64 * K)
    x = (3 * g / (1 + np.exp(-3 * g)) * u).astype(F32)
    assert len(in_digits(x).rough) <= (0 if in_digits.digits == 3 else 20)


def test_several_huge_elements_in_an_ordinary_row(in_digits: Any) -> None:
    # all of them may meet weights of zero: one column in 256 has two such weights
    x = random_x(64 * K)
    huge = [100, 5000, 5001, 20000]
    x[huge] = [1e6, -2e6, 1e7, 1e5]
    assert in_digits(x).rough == [i // UNIT for i in huge if i != 5001]


def test_exactness_beside_weights_that_are_zero() -> None:
    # the one huge element of x meets a weight of zero, so only the others contribute
    w = weight("Q4_0", 32, 256)
    x = random_x(1, 32)
    for size in (30, 100, 1e4, 1e8):
        x[0, 7] = size
        y = specialize(one_product, target="cpu")(x, w.tensor)
        zero = w.values[7] == 0
        assert zero.sum() > 5
        exact = x.astype(np.float64) @ w.values
        sizes = np.sqrt(x.astype(np.float64) ** 2 @ w.values**2)
        # the bound is wider than the contract's: these are a 16th of all columns
        assert np.max(np.abs(y - exact)[:, zero] / sizes[:, zero]) < 6e-6


def on_rows(x: Floats, w: Weight, precision: str = "f32") -> Floats:
    """Return x @ w by the kernel for one row, and check it against the kernel for many rows."""
    f = specialize(one_product, target="cpu", precision=precision)
    y = np.stack([f(row, w.tensor) for row in x])
    many = np.tile(x, (20, 1))
    np.testing.assert_allclose(f(many, w.tensor), np.tile(y, (20, 1)), rtol=1e-4, atol=1e-30)
    return y


@pytest.mark.parametrize("k", [32, 512, 4096])
@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_rows_of_any_magnitude(precision: str, k: int) -> None:
    w = weight("Q4_0", k, 48)
    scales = 2.0 ** np.arange(-120, 100, 5)
    x = (random_x(len(scales), k) * scales[:, np.newaxis]).astype(F32)
    assert_contract(on_rows(x, w, precision), x, w, I8 if precision == "i8" else 2e-6)


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12, 1e-16, 1e-24])
def test_small_elements_beside_large_ones_that_meet_zeros(size: float) -> None:
    blocks = random_blocks(FORMATS["Q4_0"], K, 48, "normal", np.random.default_rng(3))
    blocks[:, 3, 2:] = 0x88  # weights of zero
    w = wrap("Q4_0", K, blocks)
    x = random_x(2, K) * F32(size)
    x[:, 96:128] = random_x(2, 32)
    assert_contract(on_rows(x, w), x, w)


@pytest.mark.parametrize("size", [20.0, 64.0, 510.0, 1e4, 1e8])
@pytest.mark.parametrize("every", [1, 3, 16])
def test_features_of_large_elements_that_meet_zeros(size: float, every: int) -> None:
    blocks = random_blocks(FORMATS["Q4_0"], K, 48, "normal", np.random.default_rng(3))
    large = np.arange(5, K, UNIT * every)
    blocks[:, large // UNIT, 2 + 5] = blocks[:, large // UNIT, 2 + 5] & 0xF0 | 0x08
    w = wrap("Q4_0", K, blocks)
    assert not w.values[large].any()
    x = random_x(3, K)
    x[:, large] = size
    assert_contract(on_rows(x, w), x, w)


@pytest.mark.parametrize(
    ("count", "size"), [(6, 30.0), (6, 3000.0), (16, 100.0), (16, 1e4), (60, 100.0)]
)
def test_weights_as_small_as_activations_are_large(size: float, count: int) -> None:
    rng = np.random.default_rng(count)
    large = rng.choice(576, count, replace=False)
    values = rng.standard_normal((576, 64)).astype(F32)
    values[large] /= F32(size)
    tensor = quantize(values, "Q8_0")
    w = Weight(tensor, tensor.dequantize().astype(np.float64))
    x = random_x(4, 576)
    x[:, large] *= F32(size)
    assert_contract(on_rows(x, w), x, w)


def test_scales_of_zero_give_zero() -> None:
    for name in ("Q4_0", "Q8_0", "Q4_1"):
        w = weight(name, 1 << 16, 16, "zero")
        x = random_x(2, 1 << 16) * F32(2.0**31)
        y = specialize(one_product, target="cpu")(x, w.tensor)
        assert not y.any(), name


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_weights_of_random_bits(precision: str) -> None:
    # most have NaN or Inf and are multiplied as floats in both precisions
    for w in all_bits() if precision == "f32" else all_bits()[::4]:
        x = random_x(3, len(w.values))
        y = specialize(one_product, target="cpu", precision=precision)(x, w.tensor)
        assert_ieee(y, x, w, I8 if precision == "i8" else 2e-6)


def test_the_table_in_the_docs() -> None:
    text = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(DOTS)
    for row, dot in zip(rows, DOTS, strict=True):
        few, many = dot.few, dot.many
        assert row[:4] == [
            f"| `{dot.feature}`",
            f"`{dot.instruction.name}`, {32 * dot.instruction.lanes} bits",
            "2" if dot.instruction.pairs else "4",
            "floats" if dot.instruction.pairs else "3 digits",
        ]
        few_codes = f"1 digit (codes up to {dot.instruction.largest_code})"
        assert row[4] == (few_codes if dot.instruction.pairs else "1 digit")
        assert row[5] == f"M ≤ {2 * few.rows}: up to {few.rows} × 16"
        tiles = ", ".join(f"{tile.rows} × {16 * tile.panels}" for tile in many)
        assert row[6].removesuffix(" |") == tiles
