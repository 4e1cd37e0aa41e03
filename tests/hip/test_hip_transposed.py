"""Products with `w.T` in the text of GPU kernels, executed without a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.errors import TargetError
from q4jit.hip.choices import keys_of
from q4jit.hip.explain import remarks
from q4jit.hip.kernel import (
    ADD_SPLITS,
    ELEMENT,
    ELEMENT_TRANSPOSED,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    GEMV_TRANSPOSED,
    ROWS,
    TILE_FMA,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    TILE_MATRIX,
    TILE_TRANSPOSED,
)
from q4jit.hip.transposed import split_columns
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, error_scale, one_sign_bound, relative_error
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR, TILES16
from q4jit.weights.reference import random_weight, without_signs
from tests.support.halves import DTYPES, assert_rounded_contract
from tests.support.hip import hip_plan, run_on_host
from tests.support.hip_cases import tensor, transposed, zeros
from tests.support.kernels import (
    F32,
    Floats,
    Weight,
    assert_contract,
    assert_ieee,
    decoded,
    exact_products,
    kinds,
    not_finite_rows,
    random_x,
    spoiled,
    turned,
    weight,
)
from tests.support.pairs import in_turn

K, N = 256, 37
HALVES: Final = ("f16", "bf16")
TRANSPOSED: Final = frozenset(
    {ELEMENT_TRANSPOSED, GEMV_TRANSPOSED, TILE_TRANSPOSED, TILE_HALVES_TRANSPOSED}
)


def six(y: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    zs = [y @ w.T for w in (a, b, c, d, e, f)]
    return *zs, zs[0] + zs[1] + zs[2] + zs[3] + zs[4] + zs[5]


@dataclass(frozen=True)
class Way:
    """A schedule for `rows` rows on an arch; `asked` is the name that a caller gives."""

    asked: str | None
    rows: int
    arch: str
    layout: str | None = None
    precision: str = "f32"
    block_size: int | None = None

    def __str__(self) -> str:
        parts = (self.asked or "by rule", self.rows, self.arch, self.layout, self.block_size)
        return "-".join(str(part) for part in parts if part is not None)

    def run(self, function: Callable[..., Any], args: Sequence[Any], **how: Any) -> list[Floats]:
        options = PlanOptions(self.precision, self.block_size, self.asked, self.layout)
        plan = hip_plan(function, f"hip:{self.arch}", args, options)
        used = {kernel.schedule for kernel in plan.kernels} - {ROWS, ADD_SPLITS}
        assert used <= TRANSPOSED
        return run_on_host(plan, args, **how)


ARCHS: Final = ("gfx1030", "gfx90a", "sm_90")  # waves of 32 and of 64, without and with tiles16
RULE: Final = tuple(Way(None, m, arch) for arch in ARCHS for m in (1, 2, 5, 33))
ASKED: Final = (
    Way(ELEMENT, 2, "gfx1100"),
    Way(GEMV, 1, "gfx1100"),
    Way(GEMV, 33, "sm_90"),
    Way(TILE_FMA, 5, "gfx942"),
    Way(None, 2, "gfx1201", GGUF),
    Way(None, 17, "sm_80", GGUF),
    Way(GEMV_DOT, 2, "sm_90", precision="i8"),
    Way(None, 1, "gfx1100", precision="f16"),
    Way(GEMV, 2, "gfx90a", block_size=64),
    Way(GEMV, 1, "gfx1030", block_size=512),
    Way(None, 5, "sm_90", block_size=1024),
    Way(None, 1, "gfx1100", block_size=32),
)
SOME: Final = (
    Way(None, 1, "gfx1030"),
    Way(None, 5, "gfx90a"),
    Way(None, 1, "sm_90"),
    Way(None, 33, "gfx1100"),
)
# Each way has two formats; each format has three ways, whose numbers of rows differ.
NAMES: Final = (*FORMATS,)
FORMATS_IN_TURN: Final = [NAMES[(i + i // 16 * 5) % 16] for i in range(48)]
some_ways = pytest.mark.parametrize("way", SOME, ids=str)


some_cases = in_turn("way name", 2 * [*RULE, *ASKED], FORMATS_IN_TURN)


def weight_for(way: Way, name: str, scales: str = "normal") -> Weight:
    """Return a weight, which is small for `element`: on a CPU its many thread blocks take long."""
    return weight(
        name, max(96, FORMATS[name].block_elements) if way.asked == ELEMENT else K, N, scales
    )


@some_cases
def test_every_format(way: Way, name: str) -> None:
    w, y = weight_for(way, name), random_x(way.rows, N)
    (z,) = way.run(transposed, [y, w.tensor])
    assert_contract(z, y, turned(w))  # f32's kernels compute f16 and i8, too


@pytest.mark.parametrize("way", SOME[1:3], ids=str)
def test_products_of_every_format_in_one_kernel(way: Way) -> None:
    ws = [weight(name, K, N) for name in ("F16", "Q4_0", "Q4_1", "Q6_K", "Q2_K", "MXFP4")]
    y = random_x(way.rows, N)
    for z, w in zip(way.run(six, [y, *(w.tensor for w in ws)]), ws, strict=False):
        assert_contract(z, y, turned(w))


SHAPES: Final = (
    ("Q4_0", 32, 1),
    ("Q4_0", 1056, 5),  # more than a tile of waves of 32, a part of a quad
    ("Q8_0", 2080, 3),  # more than a tile of waves of 64
    ("Q4_0", 160, 700),  # several splits, several stages
    ("F16", 40, 33),
    ("F32", 5, 3),
)


@in_turn("shape way", 2 * SHAPES, [*SOME, SOME[0]])
def test_every_shape(way: Way, shape: tuple[str, int, int]) -> None:
    name, k, n = shape
    w, y = weight(name, k, n), random_x(way.rows, n)
    (z,) = way.run(transposed, [y, w.tensor])
    assert_contract(z, y, turned(w))


@pytest.mark.parametrize("m", [3, 4, 6, 7, 8, 9, 16, 17])
def test_every_number_of_rows(m: int) -> None:
    w, y = weight("Q4_0", 96, N), random_x(m, N)
    (z,) = Way(None, m, "sm_90").run(transposed, [y, w.tensor])
    assert_contract(z, y, turned(w))


# --- NaN, Inf, and what scales cannot be applied to later -----------------------------------------


@some_cases
def test_nan_and_inf_in_y(way: Way, name: str) -> None:
    w, rows = weight_for(way, name, "denormal"), not_finite_rows(N)
    # few rows: NaN, Inf, both in a row, and an Inf among zeros
    for at in (0,) if way.rows > 16 else (1, 11, 63, len(rows) - way.rows):
        y = rows[at : at + way.rows].copy()
        if np.isfinite(y[-1]).all():
            y[-1, 3] = 1e38  # no result overflows
        (z,) = way.run(transposed, [y, w.tensor])
        assert_ieee(z, y, turned(w))


@pytest.mark.parametrize("size", [1e38, 1e-38, 1e-44, 1e30, 0.0])
@some_ways
def test_outsized_elements_of_y(way: Way, size: float) -> None:
    """Large scales times a large y overflow where their quants are 0, and small ones vanish."""
    for scales in ("normal", "largest", "denormal"):
        w, y = weight("Q4_0", K, N, scales), random_x(way.rows, N)
        y[:, 3] = size
        y[0] = np.where(np.arange(N) == 5, F32(size), F32(0))
        (z,) = way.run(transposed, [y, w.tensor])
        with np.errstate(over="ignore"):
            exact = exact_products(y, turned(w).values).astype(F32)
        np.testing.assert_array_equal(kinds(z), kinds(exact))
        if size < 1:  # results may be denormals, which correct rounding alone makes inexact
            assert_rounded_contract(z, y, turned(w), "f32", BOUNDS["f32"])
        else:
            assert_contract(z, y, turned(w))


@in_turn("name way value", NAMES, [*SOME, SOME[0]], [np.inf, np.nan, np.inf])
def test_weights_that_are_not_finite(way: Way, name: str, value: float) -> None:
    for field in ("d", "m") if name == "Q4_1" else ("d",):
        # y below 1: it must not take MXFP4's elements of 2^126 and more beyond f32
        w, y = spoiled(name, K, N, value, field), random_x(way.rows, N) * F32(0.2)
        y[0, 1 : N // 2] = 0
        (z,) = way.run(transposed, [y, w.tensor])
        assert_ieee(z, y, turned(w))


# --- prologue, epilogue, slices -------------------------------------------------------------------


def normed(y: Any, gain: Any, w: Any, bias: Any, r: Any) -> Any:
    h = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-5) * gain
    return np.tanh(h @ w.T + bias) + r, h


@in_turn("way name", SOME, ["Q4_0", "Q6_K", "F16"])
def test_prologue_and_epilogue(way: Way, name: str) -> None:
    w, m = weight(name, K, N), way.rows
    args = [random_x(m, N), random_x(N), w.tensor, random_x(K), random_x(m, K)]
    z, h = way.run(normed, args)
    wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else w.values for a in args]
    wide_z, wide_h = normed(*wide)  # a matrix has .T, too
    np.testing.assert_allclose(h, wide_h, rtol=1e-5)
    np.testing.assert_allclose(z, wide_z, rtol=1e-4, atol=2e-5)


def there_and_back(y: Any, w: Any) -> Any:
    x = y @ w.T
    return x, (x @ w) @ w.T


@pytest.mark.parametrize("way", SOME[2:], ids=str)
def test_a_product_after_another(way: Way) -> None:
    w, y = weight("Q4_0", K, N), random_x(way.rows, N)
    options = PlanOptions(way.precision, way.block_size, way.asked, way.layout)
    plan = hip_plan(there_and_back, f"hip:{way.arch}", [y, w.tensor], options)
    for z, exact in zip(run_on_host(plan, [y, w.tensor]), there_and_back(y, w.values), strict=True):
        np.testing.assert_allclose(z, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def sliced(y: Any, w: Any) -> Any:
    z = y @ w.T
    return z[..., 16:144], z[..., 5:133] * z[..., 128:256], z[..., 255:256], z[..., :8]


@in_turn("way name", SOME, ["Q4_0", "Q4_1", "F16"])
def test_slices(way: Way, name: str) -> None:
    w, y = weight(name, K, N), random_x(way.rows, N)
    exact = y.astype(np.float64) @ w.values.T
    for z, part in zip(way.run(sliced, [y, w.tensor]), sliced_values(exact), strict=True):
        np.testing.assert_allclose(z, part, rtol=1e-4, atol=1e-4)


def sliced_values(z: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    return z[:, 16:144], z[:, 5:133] * z[:, 128:256], z[:, 255:256], z[:, :8]


@in_turn("way kind", SOME, HALVES)
def test_half_precision(way: Way, kind: str) -> None:
    w = weight("Q4_0", K, N)
    y = random_x(way.rows, N).astype(DTYPES[kind])
    (z,) = way.run(transposed, [y, w.tensor])
    assert_rounded_contract(z, y, turned(w), kind, BOUNDS["f32"])


# --- long sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "name", "n", "one_sign"),
    [
        (Way(None, 1, "sm_90"), "Q4_0", 1 << 18, True),
        (Way(None, 1, "gfx90a"), "F16", 1 << 18, True),
        (Way(None, 1, "gfx90a"), "F16", 1 << 18, False),
        (Way(None, 2, "gfx1030"), "Q4_1", 14336, True),
        (Way(None, 17, "gfx1030"), "Q4_0", 14336, True),
        (Way(None, 17, "gfx942"), "F16", 40960, True),
        (Way(None, 17, "gfx1030"), "Q4_0", 14336, False),
    ],
)
def test_long_sums(way: Way, name: str, n: int, one_sign: bool) -> None:
    y, w = random_x(way.rows, n), random_weight(name, 32, n)
    if one_sign:
        y, w = np.abs(y), without_signs(w)
    (z,) = way.run(transposed, [y, w], seeds=(1,))
    wide, values = y.astype(np.float64), decoded(name, w.raw).astype(np.float64).T
    exact, squares = wide @ values, wide**2 @ values**2
    error = relative_error(z, exact, error_scale(squares, n))
    assert error is not None
    assert error < (one_sign_bound(n) if one_sign else BOUNDS["f32"])


# --- choices --------------------------------------------------------------------------------------


def both(x: Any, y: Any, w: Any) -> Any:
    return x @ w, y @ w.T


@pytest.mark.parametrize("asked", [None, GEMV, TILE_FMA, ELEMENT])
@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("arch", ["gfx1030", "gfx90a", "gfx1100", "sm_80", "sm_90"])
def test_one_copy_of_a_weight_serves_both_products(arch: str, m: int, asked: str | None) -> None:
    for name in FORMATS:
        w = weight(name, K, N)
        args = [random_x(m, K), random_x(m, N), w.tensor]
        plan = hip_plan(both, f"hip:{arch}", args, PlanOptions("f32", None, asked))
        assert len(plan.weight_layouts()) == 1
        has_tiles = name == "Q4_0" and arch != "gfx1030" and asked is None
        assert plan.weight_layouts()[0][1] == (TILES16 if has_tiles else PLANAR)


COUNTERPARTS: Final = {
    ELEMENT: ELEMENT_TRANSPOSED,
    GEMV: GEMV_TRANSPOSED,
    GEMV_MATRIX: GEMV_TRANSPOSED,
    TILE_FMA: TILE_TRANSPOSED,
    TILE_MATRIX: TILE_TRANSPOSED,
    TILE_HALVES: TILE_TRANSPOSED,
}


@pytest.mark.parametrize("asked", COUNTERPARTS)
def test_each_schedule_has_a_counterpart(asked: str) -> None:
    args = [random_x(3, N), weight("Q4_0", K, N).tensor]
    plan = hip_plan(transposed, "hip:sm_90", args, PlanOptions("f32", None, asked))
    assert plan.kernels[0].schedule == COUNTERPARTS[asked]
    assert plan.kernels[0].precision == "f32"


def test_an_impossible_schedule_is_refused() -> None:
    args = [random_x(3, N), weight("Q4_0", K, N).tensor]
    for asked, arch in ((TILE_HALVES, "gfx1030"), (GEMV_DOT, "sm_90"), (TILE_MATRIX, "gfx1030")):
        with pytest.raises(TargetError, match=f"schedule '{asked}' cannot compute"):
            hip_plan(transposed, f"hip:{arch}", args, PlanOptions("f32", None, asked))


@pytest.mark.parametrize("m", [1, 2, 4, 16])
@pytest.mark.parametrize(("k", "n"), [(4096, 14336), (14336, 4096), (4096, 4096)])
def test_splits_fill_the_gpu(k: int, n: int, m: int) -> None:
    options = PlanOptions(schedule=GEMV_MATRIX)
    plan = hip_plan(transposed, "hip:sm_90", [zeros(m, n), tensor("Q4_0", k, n)], options)
    first, last = plan.kernels
    assert (first.schedule, last.schedule) == (GEMV_TRANSPOSED, ADD_SPLITS)
    blocks = first.splits * first.transposed_tiles * -(-m // first.rows_per_tile)
    assert 0.7 * 132 <= blocks <= 4 * 132
    waves = first.block_size // 32
    assert (first.splits - 1) * split_columns(n, first.splits, waves) < n, "no split is empty"


def test_only_products_with_w_are_measured() -> None:
    w, options = weight("Q4_0", K, N), PlanOptions()
    plan = hip_plan(both, "hip:sm_90", [random_x(1, K), random_x(1, N), w.tensor], options)
    assert [(key.k, key.n) for key in keys_of(plan, 1, options)] == [(K, N)]


def test_explain_names_the_precision_once() -> None:
    options = PlanOptions("f16")
    args = [random_x(1, N), weight("Q4_0", K, N).tensor]
    plan = hip_plan(transposed, "hip:sm_90", args, options)
    (remark,) = remarks(plan, options)
    assert "gemv_transposed computes" in remark.text
    assert "more exact 'f32'" in remark.text
