"""Products with `w.T` on every CPU target: a sum over N, from the layout that `x @ w` reads."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import specialize
from q4jit.cpu.schedule import band_rows, m_class, make_plan
from q4jit.frontend.trace import trace
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16
from q4jit.weights.quantize import quantize
from q4jit.weights.tensor import QuantizedTensor
from tests.support.halves import DTYPES, assert_rounded_contract
from tests.support.kernels import (
    BOUND,
    F32,
    FLOAT_FORMATS,
    GUARDED,
    IN_PROCESS,
    Floats,
    Guarded,
    assert_contract,
    assert_ieee,
    distributions,
    every_guarded_cpu,
    hard_x,
    not_finite_rows,
    on,
    random_x,
    relative_error,
    run_guarded,
    specs_of,
    spoiled,
    turned,
    weight,
)
from tests.support.long_sums import LONG_K, LONGEST_K, assert_long_product
from tests.support.pairs import in_turn, pairwise

K, N = 512, 37  # N is no whole panel
SCALES = ("normal", "zero", "denormal", "largest", "mixed")
SEVERAL_STRETCHES = 2 * 1024 + 37  # of few rows; of many rows they are shorter

every_target = pytest.mark.parametrize("target", IN_PROCESS)
ROWS = (1, 5, 33)  # of few rows, of several tiles, of many
every_pair = pairwise("name target m", [*FORMATS], IN_PROCESS, ROWS)


def rows_of(name: str, target: str) -> int:
    """Return the rows that `every_pair` has for a format and a target: one kernel serves both."""
    return ROWS[([*FORMATS].index(name) + IN_PROCESS.index(target)) % len(ROWS)]


def transposed(y: Any, w: Any) -> Any:
    return y @ w.T


# --- shapes, formats, types -----------------------------------------------------------------------


@every_pair
def test_every_format(name: str, target: str, m: int) -> None:
    y, w = random_x(m, N), weight(name, K, N)
    assert_contract(on(target, transposed)(y, w.tensor), y, turned(w))


@in_turn("name m types", [*FORMATS], ROWS, [("f16", "i8"), ("bf16", "f16")])
def test_every_type_and_precision(name: str, m: int, types: tuple[str, str]) -> None:
    kind, precision = types
    y, w = random_x(m, N).astype(DTYPES[kind]), turned(weight(name, K, N))
    function = specialize(transposed, target="cpu", precision=precision)
    assert_rounded_contract(function(y, w.tensor), y, w, kind, BOUND)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 6, 7, 8, 9, 16, 17, 18, 28, 29, 191, 193, 400])
@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_every_number_of_rows(m: int, target: str) -> None:
    y, w = random_x(m, SEVERAL_STRETCHES), weight("Q4_0", 96, SEVERAL_STRETCHES)
    assert_contract(on(target, transposed)(y, w.tensor), y, turned(w))


@pairwise("target shape name", IN_PROCESS, [(2, 1), (33, 1), (2, 37), (33, 37)], FLOAT_FORMATS)
def test_floats_take_any_k(target: str, shape: tuple[int, int], name: str) -> None:
    m, k = shape
    y, w = random_x(m, 5), weight(name, k, 5)
    assert_contract(on(target, transposed)(y, w.tensor), y, turned(w))


@pytest.mark.parametrize("n", [1, 16, 64, 128, 129, 1024, 1025])
@pytest.mark.parametrize("m", [1, 33])
def test_every_number_of_columns(n: int, m: int) -> None:
    for name, k in (("Q4_0", 32), ("Q6_K", 256)):
        y, w = random_x(m, n), weight(name, k, n)
        assert_contract(on("cpu", transposed)(y, w.tensor), y, turned(w))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    y, w = random_x(*lead, N), weight("Q4_0", 64, N)
    assert_contract(on("cpu", transposed)(y, w.tensor), y, turned(w))


# --- slices, prologue and epilogue, several products ---------------------------------------------


def slices(y: Any, w: Any) -> tuple[Any, ...]:
    z = y @ w.T
    wide, unaligned = z[..., :64], z[..., 5:69]
    return wide, unaligned, wide + unaligned, z[..., 90:95], z[..., 95:], z[..., 7:8], z[..., 40:96]


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("name", ["Q4_0", "F16"])
def test_slices(name: str, m: int, target: str) -> None:
    y, w = random_x(m, N), weight(name, 96, N)
    exact = slices(y.astype(np.float64), Transposable(w.values))
    for got, expected in zip(on(target, slices)(y, w.tensor), exact, strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < BOUND


class Transposable:
    """Values whose transpose is the right operand of a product."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.T = values.T


def mlp(x: Any, gain: Any, up: Any, gate: Any, bias: Any) -> Any:
    """Return products of both kinds: the second kernel sums over N."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    u = h @ up
    v = u * u - 1
    return x + (v @ up.T) * 0.5 + np.tanh(v @ gate.T) + bias


@every_target
@pytest.mark.parametrize("m", [1, 33])
def test_a_prologue_an_epilogue_and_two_formats(m: int, target: str) -> None:
    up, gate = weight("Q4_0", K, N), weight("Q6_K", K, N)
    x, gain, bias = random_x(m, K), random_x(K), random_x(K)
    got = on(target, mlp)(x, gain, up.tensor, gate.tensor, bias)
    values = [a.astype(np.float64) for a in (x, gain, bias)]
    exact = mlp(values[0], values[1], Both(up.values), Both(gate.values), values[2])
    assert relative_error(got, exact) < 1e-5


class Both(np.ndarray[Any, np.dtype[np.float64]]):
    """Values that are the right operand of both kinds of products."""

    def __new__(cls, values: NDArray[np.float64]) -> "Both":
        return values.view(cls)


def test_both_kinds_of_products_read_one_copy() -> None:
    up, gate = weight("Q4_0", K, N).tensor, weight("Q6_K", K, N).tensor
    on("cpu", mlp)(random_x(3, K), random_x(K), up, gate, random_x(K))
    for tensor in (up, gate):
        assert [*tensor._resident.addresses] == [INTERLEAVED16]


# --- precision -----------------------------------------------------------------------------------


def long_weight(name: str, n: int, m: int, *, one_sign: bool) -> tuple[Floats, QuantizedTensor]:
    """Return y [m, n], and a weight [one block, n] whose products with y have one sign or both."""
    k = max(32, FORMATS[name].block_elements)
    rng = np.random.default_rng(n)
    values = rng.uniform(0.5, 1.5, (k, n)) if one_sign else rng.standard_normal((k, n))
    y = random_x(m, n)
    return (np.abs(y) if one_sign else y), quantize(values.astype(F32), name)


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
@pytest.mark.parametrize("m", [1, 33])
def test_products_of_one_sign(target: str, name: str, m: int) -> None:
    y, w = long_weight(name, LONG_K, m, one_sign=True)
    check_long(on(target, transposed)(y, w), y, w)


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("n", [128, 256, 1024, 4096])
def test_fewer_products_of_one_sign(n: int, m: int) -> None:
    y, w = long_weight("Q4_0", n, m, one_sign=True)
    check_long(on("cpu", transposed)(y, w), y, w)


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("one_sign", [False, True])
def test_products_of_largest_n(m: int, one_sign: bool) -> None:
    y, w = long_weight("Q4_0", LONGEST_K, m, one_sign=one_sign)
    check_long(on("cpu", transposed)(y, w), y, w)


def check_long(z: Floats, y: Floats, w: QuantizedTensor) -> None:
    turned_values = w.dequantize().T
    assert_long_product(z, y, quantize(np.ascontiguousarray(turned_values), "F32"))


@pairwise("name scales target", [*FORMATS], SCALES, IN_PROCESS)
def test_distributions_and_scales(name: str, scales: str, target: str) -> None:
    w = turned(weight(name, K, N, scales))
    y = np.stack([*distributions(N).values()])
    y = {1: y[:1], 5: y[:5], 33: np.concatenate([y, y, y])}[rows_of(name, target)]
    assert_contract(on(target, transposed)(y, w.tensor), y, w)


@every_pair
def test_not_finite_rows(name: str, target: str, m: int) -> None:
    y, w = not_finite_rows(N), turned(weight(name, K, N))
    y[2, 5] = 1e35
    for rows in {1: [y[i : i + 1] for i in (1, 2, 19)], 5: [y[1:6]], 33: [y]}[m]:
        assert_ieee(on(target, transposed)(rows, w.tensor), rows, w)


@pairwise("name target value", [*FORMATS], IN_PROCESS, [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite(name: str, target: str, value: float) -> None:
    hard, m = np.concatenate(hard_x(N)), rows_of(name, target)
    rows = {1: np.split(hard, 6), 5: [hard[:5], hard[1:]], 33: [np.tile(hard, (6, 1))]}[m]
    for field in ("d", "m") if FORMATS[name].minimum_at is not None else ("d",):
        w = turned(spoiled(name, K, N, value, field))
        for y in rows:
            assert_ieee(on(target, transposed)(y, w.tensor), y, w)


@every_guarded_cpu
@pytest.mark.parametrize("m", [3, 18])
def test_beside_guard_pages(cpu: Guarded, m: int) -> None:
    y = random_x(m, N)
    shapes = ("Q4_0", 96), ("Q6_K", 256), ("F16", 37), ("Q4_K", 256), ("MXFP4", 96)
    for name, k in shapes[(m + GUARDED.index(cpu)) % 2 :: 2]:
        w = turned(weight(name, k, N))
        (z,) = run_guarded(transposed, cpu, [y, w.tensor])
        assert_contract(z, y, w)


# --- plans ---------------------------------------------------------------------------------------


@every_target
def test_plans_of_a_class_are_equal_and_tiles_fit(target: str) -> None:
    cpu, w = find_target(target), weight("Q6_K", 256, N).tensor
    graph = trace(transposed, specs_of([random_x(2, N), w]))
    plans: dict[int, Any] = {}
    for m in range(1, 40):
        plan = make_plan(graph, cpu, m)
        first = plans.setdefault(m_class(cpu, m), plan)
        assert plan == first
        assert plan.kernels[0].tile.rows <= m


def test_explain_names_the_more_exact_class() -> None:
    function = specialize(transposed, target="cpu", precision="i8")
    w = weight("Q4_0", 64, N)
    function(random_x(2, N), w.tensor)
    assert "for w, and uses the more exact 'f32'" in str(function.explain())


@every_target
@pytest.mark.parametrize("m", [1, 8, 64])
def test_sums_of_many_products_fit_on_the_stack(m: int, target: str) -> None:
    def many(y: Any, *weights: Any) -> Any:
        return sum((y @ w.T for w in weights[1:]), start=y @ weights[0].T)

    weights = [weight("Q4_0", 64, N).tensor] * 900
    cpu, graph = find_target(target), trace(many, specs_of([random_x(m, N), *weights]))
    plan = make_plan(graph, cpu, m)
    (kernel,) = plan.kernels
    rows = band_rows(plan, kernel) or kernel.tile.rows
    assert len(weights) * rows * (kernel.tile.panels + 2) * 128 <= 512 << 10
