"""What formats may be: one that exists only in tests, extreme scales, and minima that cancel."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest

from q4jit.hip.kernel import (
    DEQUANTIZE,
    ELEMENT,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    LOOKUP,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
)
from q4jit.hip.render import render_generic
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR, TILES16
from tests.support.hip import hip_plan, run_on_host
from tests.support.hip_cases import transposed
from tests.support.hip_host import compile_host
from tests.support.kernels import (
    F32,
    Floats,
    Weight,
    assert_contract,
    dequantizer,
    lookups,
    one_product,
    random_blocks,
    random_x,
    set_f16,
    turned,
    wrap,
)
from tests.support.made_up import MADE_UP, made_up_weight, registered

K: Final = 192  # three blocks; in `tiles16`, a quad and a half
N: Final = 37
BY_SCHEDULE: Final = (  # rows and an arch
    (ELEMENT, 2, "gfx1030"),
    (GEMV, 1, "sm_90"),
    (GEMV, 3, "gfx90a"),
    (GEMV_DOT, 2, "gfx1100"),
    (TILE_FMA, 17, "gfx1030"),
    (TILE_MATRIX, 17, "gfx942"),
)
IN_TILES: Final = (
    (GEMV_MATRIX, 1, "sm_90", TILES16),
    (GEMV_MATRIX, 4, "gfx1201", TILES16),
    (TILE_HALVES, 17, "gfx942", TILES16),
    (TILE_HALVES, 17, "sm_90", TILES16),
)
TRANSPOSED: Final = ((None, 1, "gfx1100"), (None, 2, "sm_90"), (None, 33, "gfx90a"))
PACKED: Final = [*((*way, PLANAR) for way in BY_SCHEDULE), *IN_TILES]
EVERY_WAY: Final = [*PACKED, *((*way, GGUF) for way in BY_SCHEDULE)]
WAY: Final = ("schedule", "m", "arch", "layout")


def precision_of(schedule: str) -> str:
    return "i8" if schedule == GEMV_DOT else "f32"


def product(x: Floats, w: Weight, schedule: str, arch: str, layout: str = PLANAR) -> Floats:
    """Return x @ w by a schedule."""
    options = PlanOptions(precision_of(schedule), schedule=schedule, layout=layout)
    plan = hip_plan(one_product, f"hip:{arch}", [x, w.tensor], options)
    assert plan.kernels[-1].schedule == schedule
    (y,) = run_on_host(plan, [x, w.tensor])
    return y


# --- a made-up format -----------------------------------------------------------------------------


@pytest.fixture
def _made_up_format() -> Iterator[None]:
    with registered():
        yield


@pytest.mark.usefixtures("_made_up_format")
@pytest.mark.parametrize(WAY, EVERY_WAY)
def test_products(schedule: str, m: int, arch: str, layout: str) -> None:
    x, w = random_x(m, K), made_up_weight(K, 3 if schedule == ELEMENT else N)
    y = product(x, w, schedule, arch, layout)
    assert_contract(y, x, w, BOUNDS[precision_of(schedule)])


@pytest.mark.usefixtures("_made_up_format")
@pytest.mark.parametrize(("schedule", "m", "arch"), [*TRANSPOSED, (ELEMENT, 2, "gfx1201")])
def test_transposed_products(schedule: str | None, m: int, arch: str) -> None:
    y, w = random_x(m, N), made_up_weight(K, N)
    plan = hip_plan(transposed, f"hip:{arch}", [y, w.tensor], PlanOptions(schedule=schedule))
    (z,) = run_on_host(plan, [y, w.tensor])
    assert_contract(z, y, turned(w))


@pytest.mark.usefixtures("_made_up_format")
@pytest.mark.parametrize("layout", [PLANAR, GGUF])
def test_values_and_rows(layout: str) -> None:
    w, ids = made_up_weight(K, N), np.array([0, 36, 5])
    functions: dict[str, tuple[Any, list[Any]]] = {
        DEQUANTIZE: (dequantizer(1), [w.tensor]),
        LOOKUP: (lookups(1), [ids, w.tensor]),
    }
    for schedule, (function, args) in functions.items():
        plan = hip_plan(function, "hip:gfx1100", args, PlanOptions(layout=layout))
        assert [kernel.schedule for kernel in plan.kernels] == [schedule]
        (got,) = run_on_host(plan, args)
        wanted = w.values if schedule == DEQUANTIZE else w.values.T[ids]
        np.testing.assert_array_equal(got, wanted.astype(F32))


@pytest.mark.usefixtures("_made_up_format")
def test_the_generic_kernel() -> None:
    x, w = random_x(2, K), made_up_weight(K, 5)
    source = render_generic(MADE_UP, find_target("hip:gfx1100"), 64, "host")
    arguments: list[Any] = [x, w.tensor.raw, np.zeros((2, 5), F32), 2, 5, K]
    (y,) = compile_host(source.text, source.symbol).run((5, 2), 64, arguments)
    assert_contract(y, x, w)


# --- scales in E8M0 -------------------------------------------------------------------------------


@pytest.mark.parametrize(WAY, PACKED)
def test_extreme_scales_in_e8m0(schedule: str, m: int, arch: str, layout: str) -> None:
    """Check the least scales, which are denormal, and the largest that kernels apply late."""
    k, n = 64, 3 if schedule == ELEMENT else N
    for exponents, size in (((0, 1, 2), 1e30), ((0, 1, 4), 1.0), ((153, 154, 155), 1.0)):
        blocks = random_blocks(FORMATS["MXFP4"], k, n, "normal", np.random.default_rng(0))
        blocks[..., 0] = np.resize(exponents, blocks.shape[:2])
        w = wrap("MXFP4", k, blocks)
        assert w.tensor.has_finite_scales
        x = (random_x(m, k) * size).astype(F32)
        y = product(x, w, schedule, arch, layout)
        assert_contract(y, x, w, BOUNDS[precision_of(schedule)])


@pytest.mark.parametrize(("schedule", "m", "arch"), [(GEMV, 2, "gfx1100"), (TILE_FMA, 17, "sm_90")])
def test_scales_in_e8m0_beyond_f32(schedule: str, m: int, arch: str) -> None:
    blocks = random_blocks(FORMATS["MXFP4"], 64, N, "normal", np.random.default_rng(0))
    blocks[..., 0] = np.resize((254, 255, 253, 127, 192), blocks.shape[:2])
    w = wrap("MXFP4", 64, blocks)
    assert not w.tensor.has_finite_scales
    x = np.zeros((m, 64), F32)
    x[:, 5] = 1  # one element, so that the order of a sum does not matter
    with np.errstate(all="ignore"):
        wanted = np.where(np.isfinite(w.values).all(0), w.values[5], np.nan)
    y = product(x, w, schedule, arch)
    np.testing.assert_array_equal(y, np.broadcast_to(wanted.astype(F32), y.shape))


# --- minima that cancel ---------------------------------------------------------------------------


def cancelling(name: str, n: int) -> Weight:
    """Return a weight whose every third column is 0: its scales times its codes are its minima."""
    fmt = FORMATS[name]
    blocks = random_blocks(fmt, 256, n, "normal", np.random.default_rng(1))
    d = np.random.default_rng(2).normal(0, 0.05, blocks.shape[:2]).astype(np.float16)
    assert fmt.scale_at is not None
    assert fmt.minimum_at is not None
    set_f16(blocks, fmt.scale_at, d)
    set_f16(blocks, fmt.minimum_at, d)
    if name == "Q2_K":  # 2 · 3 − 6
        blocks[::3, :, :16] = 2 | 6 << 4
        blocks[::3, :, 16:80] = 0xFF
    else:  # 3 · 5 − 15
        blocks[::3, :, 4:16] = [3] * 4 + [15] * 4 + [3 | 15 << 4] * 4
        blocks[::3, :, 16:] = 0x55
    w = wrap(name, 256, blocks)
    assert not w.values[:, ::3].any()
    return w


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K"])
@pytest.mark.parametrize(WAY, PACKED[1:])
def test_scales_and_minima_that_cancel(
    schedule: str, m: int, arch: str, layout: str, name: str
) -> None:
    x, w = random_x(m, 256), cancelling(name, N)
    y = product(x, w, schedule, arch, layout)
    np.testing.assert_array_equal(y[:, ::3], 0)
    assert_contract(y, x, w, BOUNDS[precision_of(schedule)])
