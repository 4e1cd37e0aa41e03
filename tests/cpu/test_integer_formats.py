"""Integer products of every block format on the CPU: extreme blocks, hard rows, exact zeros."""

from typing import Final

import numpy as np
import pytest

from q4jit import specialize
from q4jit.cpu.dots import VPDPBUSD_512, VPMADDUBSW
from q4jit.cpu.schedule import is_integer, zero_of
from q4jit.precision import BOUNDS
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from tests.support.cancelling import cancelling_sub_blocks
from tests.support.kernels import (
    F32,
    Floats,
    Guarded,
    Weight,
    assert_contract,
    each_guarded,
    exact_products,
    f16_scales,
    kinds,
    lowered,
    one_product,
    products,
    random_blocks,
    random_x,
    require_target,
    run_guarded,
    set_f16,
    weight,
    wrap,
)
from tests.support.pairs import pairwise

BLOCK_FORMATS: Final = tuple(f.name for f in FORMATS.values() if f.float_type is None)
WITH_MINIMA: Final = tuple(f.name for f in FORMATS.values() if f.minimum_at is not None)
WITH_SUB_MINIMA: Final = tuple(f.name for f in FORMATS.values() if f.sub_minima is not None)
ON_AVX2: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "MXFP4")
TARGETS: Final = ("cpu", "cpu:x86-64-v3")
WITHOUT_VPERMB: Final = "cpu:x86-64-v4+avx512vnni"
CASES: Final = ((40, "f32", 2), (8, "i8", 1))  # M, precision, blocks along K
LARGEST: Final = {"f32": 8355700 / 2**22, "i8": 127 / 64}  # elements of the largest digits


def is_by_integers(target: str, precision: str, x: Floats, w: Weight) -> bool:
    plan = lowered(one_product, find_target(target), [x, w.tensor], precision)
    (kernel,) = plan.kernels
    (section,) = kernel.work.sections
    return is_integer(plan, kernel, section, section.products[0])


def product(target: str, precision: str, x: Floats, w: Weight) -> Floats:
    """Return x @ w by a kernel that has no other weight."""
    y: Floats = specialize(one_product, target=require_target(target), precision=precision)(
        x, w.tensor
    )
    return y


def extreme(name: str, blocks: int) -> Weight:
    """Return a weight of random columns, and of 16 columns each of bytes 0 and 255.

    The latter have the smallest and largest codes and factors of sub-blocks.
    """
    fmt = FORMATS[name]
    k = blocks * fmt.block_elements
    rng = np.random.default_rng(blocks)
    raw = random_blocks(fmt, k, 53, "normal", rng)
    fields = [at for at in (fmt.scale_at, fmt.minimum_at) if at is not None]
    kept = {byte for at in fields for byte in range(at, at + 1 + (fmt.scale_type == "f16"))}
    others = [byte for byte in range(fmt.block_bytes) if byte not in kept]
    raw[21:37, :, others] = 0
    raw[37:, :, others] = 255
    return wrap(name, k, raw)


def hard_rows(m: int, k: int, largest: float) -> Floats:
    """Return rows of the largest digits, of one sign and of both, and of random elements.

    Two rows have one element that is not finite, two a huge one.
    """
    x = np.array(random_x(m, k))
    signs = np.where(np.arange(k) % 3, 1, -1)
    x[1], x[2], x[3] = largest, -largest, largest * signs
    x[[4, 5, 6, 7], k // 2 + np.arange(4)] = np.inf, np.nan, 1e38, -1e30
    return x


@pairwise("case name target", CASES, BLOCK_FORMATS, TARGETS)
def test_extreme_blocks(name: str, target: str, case: tuple[int, str, int]) -> None:
    m, precision, blocks = case
    w = extreme(name, blocks)
    x = hard_rows(m, w.values.shape[0], LARGEST[precision])
    by_integers = target != "cpu:x86-64-v3" or (precision == "i8" and name in ON_AVX2)
    assert is_by_integers(target, precision, x, w) == by_integers
    y = product(target, precision, x, w)
    finite = np.isfinite(x).all(1)
    expected = kinds(exact_products(x[~finite], w.values))
    np.testing.assert_array_equal(kinds(y[~finite]), expected)
    one_sign = 2 * 2.0**-24 * np.sqrt(x.shape[1])  # of the sums, and of rounding the result
    assert_contract(y[finite], x[finite], w, BOUNDS[precision] + one_sign)


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_tables_by_another_instruction(precision: str) -> None:
    x = random_x(3, 512)
    for name in ("IQ4_NL", "IQ4_XS", "MXFP4"):
        w = weight(name, 512, 37)
        assert_contract(product(WITHOUT_VPERMB, precision, x, w), x, w, BOUNDS[precision])


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_each_exponent_of_e8m0(precision: str) -> None:
    x = random_x(3, 64)
    for exponents in ((0, 1), (2, 3), (1, 127), (128, 155), (0, 155), (3, 156), (100, 200)):
        blocks = random_blocks(FORMATS["MXFP4"], 64, 16, "normal", np.random.default_rng(0))
        blocks[..., 0] = exponents
        w = wrap("MXFP4", 64, blocks)
        assert is_by_integers("cpu", precision, x, w) == (max(exponents) < 156)
        assert_contract(product("cpu", precision, x, w), x, w, BOUNDS[precision])


# --- minima ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SUB_MINIMA)
@pytest.mark.parametrize("m", [1, 17])
def test_sub_blocks_that_are_exactly_0(name: str, m: int) -> None:
    w = cancelling_sub_blocks(name, 512, 40)
    x = random_x(m, 512)
    y = product("cpu", "f32", x, w)
    np.testing.assert_array_equal(y[:, ::2], 0)
    assert_contract(y, x, w)


@pytest.mark.parametrize("name", WITH_MINIMA)
def test_single_elements_of_x(name: str) -> None:
    """Check each element of a column by itself: some weights are much smaller than the minimum."""
    x, w = (np.eye(256) * 1.7).astype(F32), weight(name, 256, 40)
    assert_contract(product("cpu", "f32", x, w), x, w)


@pytest.mark.parametrize("name", WITH_SUB_MINIMA)
def test_minima_that_outweigh_scales(name: str) -> None:
    """Check that rounding errors of x do not add up where all weights are about the same."""
    fmt, rng = FORMATS[name], np.random.default_rng(5)
    assert fmt.minimum_at is not None
    blocks = random_blocks(fmt, 256, 40, "normal", rng)
    minima = 100 * f16_scales("normal", blocks.shape[:2], rng)
    set_f16(blocks, fmt.minimum_at, minima.astype(np.float16))
    w, x = wrap(name, 256, blocks), random_x(200, 256)
    assert_contract(product("cpu", "i8", x, w), x, w, 8e-3)


# --- instructions ---------------------------------------------------------------------------------


def test_codes_of_instructions() -> None:
    zeros = {name: zero_of(FORMATS[name], VPDPBUSD_512) for name in BLOCK_FORMATS}
    assert {name: zero for name, zero in zeros.items() if zero} == {
        "Q4_0": 8,
        "Q5_0": 16,
        "Q8_0": 128,
        "Q3_K": 4,
        "Q6_K": 32,
        "IQ4_NL": 128,
        "IQ4_XS": 128,
        "MXFP4": 16,
    }
    for name in ON_AVX2:
        codes = [number + zeros[name] for number in FORMATS[name].numbers]
        assert 0 <= min(codes) <= max(codes) <= VPMADDUBSW.largest_code
        assert 8 * 127 * max(codes) < 1 << 15


@each_guarded([Guarded("cpu:aarch64+dotprod")])
@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_beside_guard_pages(precision: str, cpu: Guarded) -> None:
    names = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
    x, factors = random_x(5, 256), [weight(name, 256, 37) for name in names]
    ys = run_guarded(
        products(len(names)), cpu, [x, *(w.tensor for w in factors)], precision=precision
    )
    for y, w in zip(ys, factors, strict=True):
        assert_contract(y, x, w, BOUNDS[precision])
