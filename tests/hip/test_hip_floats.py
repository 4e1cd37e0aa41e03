"""Half-precision arrays in the text of GPU kernels, executed without a GPU."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.frontend.specs import ArraySpec
from q4jit.frontend.trace import trace
from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    ROWS,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
)
from q4jit.hip.schedule import make_plan
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import PLANAR, TILES16
from tests.support.halves import (
    DTYPES,
    assert_both,
    assert_rounded_contract,
    assert_same,
    half_ulps,
    in_both,
    rows_of_every_sort,
    special_values,
)
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import random_x, some_ids, specs_of, weight
from tests.support.pairs import covering, pairs_in

K: Final = 256
N: Final = 37
HALVES: Final = ("f16", "bf16")


@dataclass(frozen=True)
class Way:
    """A way to compute a product, and the formats that are tested with it."""

    schedule: str
    rows: int
    arch: str
    layout: str = PLANAR
    precision: str = "f32"
    formats: tuple[str, str] = ("Q4_0", "Q6_K")

    def __str__(self) -> str:
        return f"{self.schedule}-{self.rows}-{self.arch}-{self.precision}"

    def run(self, function: Any, args: list[Any]) -> list[NDArray[Any]]:
        """Return the results of a function whose products are computed this way."""
        options = PlanOptions(self.precision, None, self.schedule, self.layout)
        plan = hip_plan(function, f"hip:{self.arch}", args, options)
        assert {kernel.schedule for kernel in plan.kernels} - {ROWS} == {self.schedule}
        return run_on_host(plan, args)


WAYS: Final = (
    Way(ELEMENT, 2, "gfx1100", formats=("F16", "Q8_0")),
    Way(GEMV, 1, "gfx1100"),
    Way(GEMV, 3, "gfx942", formats=("Q4_1", "F32")),
    Way(GEMV, 8, "sm_90", formats=("Q8_0", "Q4_0")),
    Way(GEMV_DOT, 1, "gfx1100", precision="i8"),
    Way(GEMV_MATRIX, 1, "sm_90", TILES16, formats=("Q4_0", "Q4_0")),
    Way(GEMV_MATRIX, 5, "gfx942", TILES16, "f16", ("Q4_0", "Q4_0")),
    Way(GEMV_MATRIX, 16, "gfx1201", TILES16, formats=("Q4_0", "Q4_0")),
    Way(TILE_FMA, 17, "gfx1030"),
    Way(TILE_MATRIX, 17, "gfx90a", formats=("Q8_0", "Q6_K")),
    Way(TILE_HALVES, 33, "sm_90", TILES16, formats=("Q4_0", "Q4_0")),
    Way(TILE_HALVES, 33, "gfx1100", TILES16, formats=("Q4_0", "Q4_0")),
)


def product(x: Any, w: Any) -> Any:
    return x @ w


def around(x: Any, w: Any, gain: Any, residual: Any) -> Any:
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    y = (x / scale) @ w
    return y * gain + residual, x / scale, scale


class Case(NamedTuple):
    """What a product of a half-precision array depends on."""

    kind: str
    schedule: str
    arch: str
    format: str
    is_aligned: bool


ARCHS: Final = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "gfx1030", "sm_80", "sm_90")
ROWS_OF: Final = {
    ELEMENT: 2,
    GEMV: 3,
    GEMV_DOT: 2,
    GEMV_MATRIX: 4,
    TILE_FMA: 17,
    TILE_MATRIX: 17,
    TILE_HALVES: 33,
}


# the types of x and of results do not meet the format in a text, so a few formats suffice
SOME_FORMATS: Final = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K")


def exists(case: Case) -> bool:
    """Return whether a kernel for it exists."""
    in_blocks = FORMATS[case.format].float_type is None
    if case.schedule in {GEMV_MATRIX, TILE_HALVES, TILE_MATRIX}:
        return find_target(f"hip:{case.arch}").hip.matrix is not None and in_blocks
    return in_blocks or case.schedule != GEMV_DOT


EVERY: Final = [
    case
    for each in itertools.product(HALVES, ROWS_OF, ARCHS, SOME_FORMATS, (True, False))
    if exists(case := Case(*each))
]
CASES: Final = covering(EVERY)


def test_every_pair_is_covered() -> None:
    assert pairs_in(CASES) == pairs_in(EVERY)
    assert len(CASES) < len(EVERY) / 5
    for place, values in enumerate((HALVES, ROWS_OF, ARCHS, SOME_FORMATS, (True, False))):
        assert {case[place] for case in CASES} == set(values)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_products_keep_the_contract(case: Case) -> None:
    precision = "i8" if case.schedule == GEMV_DOT else "f32"
    k = K if FORMATS[case.format].float_type is None else K - 15  # a tail
    w = weight(case.format, k, 3 if case.schedule == ELEMENT else N)
    m = ROWS_OF[case.schedule]
    rows = rows_of_every_sort(case.kind, k)
    layout = TILES16 if case.schedule in {GEMV_MATRIX, TILE_HALVES} else PLANAR
    options = PlanOptions(precision, None, case.schedule, layout)
    spec, of_weight = specs_of([np.resize(rows, (m, k)), w.tensor])
    assert isinstance(spec, ArraySpec)
    graph = trace(in_both, (replace(spec, is_aligned=case.is_aligned), of_weight))
    plan = make_plan(graph, find_target(f"hip:{case.arch}"), m, options)
    assert {kernel.schedule for kernel in plan.kernels} - {ROWS} == {case.schedule}
    odd: dict[str, Any] = {} if case.is_aligned else {"alignments": {"x": 2, "output0": 2}}
    for first in range(0, len(rows), m):
        x = np.resize(rows[first : first + m], (m, k))
        rounded, y = run_on_host(plan, [x, w.tensor], **odd)
        assert_both(rounded, y, x, w, case.kind, BOUNDS[precision])


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("way", [w for w in WAYS if w.precision == "f32"], ids=str)
def test_types_mix_in_prologue_and_epilogue(way: Way, kind: str) -> None:
    columns = 3 if way.schedule == ELEMENT else N
    w = weight(way.formats[0], K, columns)
    other = HALVES[1 - HALVES.index(kind)]
    x = random_x(way.rows, K).astype(DTYPES[kind])
    gain = random_x(columns, seed=1).astype(DTYPES[kind])
    residual = random_x(way.rows, columns, seed=2).astype(DTYPES[other])
    y, normed, scale = way.run(around, [x, w.tensor, gain, residual])
    assert [r.dtype for r in (y, normed, scale)] == [DTYPES[t] for t in ("f32", kind, kind)]
    wide = x.astype(np.float64)
    exact_scale = np.sqrt((wide**2).mean(-1, keepdims=True))
    exact_normed = wide / exact_scale
    exact = exact_normed @ w.values * gain.astype(np.float64) + residual.astype(np.float64)
    for got, wanted, of in ((normed, exact_normed, kind), (scale, exact_scale, kind)):
        slack = half_ulps(wanted, of) * (1 + 2.0**-8) + 1e-6 * np.abs(wanted)
        assert (np.abs(got.astype(np.float64) - wanted) <= slack).all()
    # the product has seen x / scale in f32, not the rounded result
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 3e-6


@pytest.mark.parametrize("arch", ["gfx1100", "gfx942", "sm_90"])
@pytest.mark.parametrize("kind", HALVES)
def test_rounding_and_special_values(kind: str, arch: str) -> None:
    numbers = special_values(kind)[np.newaxis]

    def rounded(x: Any) -> Any:
        return x.astype(DTYPES[kind])

    plan = hip_plan(rounded, f"hip:{arch}", [numbers])
    (y,) = run_on_host(plan, [numbers])
    with np.errstate(all="ignore"):
        wanted = numbers.astype(DTYPES[kind])
    np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(np.float32))
    assert (np.signbit(y) == np.signbit(wanted)).all()


@pytest.mark.parametrize("kind", HALVES)
def test_every_number_is_loaded_exactly(kind: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[kind])[np.newaxis]

    def widened(x: Any) -> Any:
        return x.astype(np.float32)

    (y,) = run_on_host(hip_plan(widened, "hip:gfx1100", [every]), [every])
    np.testing.assert_array_equal(y, every.astype(np.float32))


@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
@pytest.mark.parametrize("kind", HALVES)
def test_decoded_weights_are_rounded(kind: str, arch: str) -> None:
    w, ids, dtype = weight("Q4_1", 96, N, "bits"), some_ids(3), DTYPES[kind]

    def function(ids: Any, w: Any) -> Any:
        return w.dequantize().astype(dtype), w.rows(ids).astype(dtype)

    args = [ids, w.tensor]
    values, rows = run_on_host(hip_plan(function, f"hip:{arch}", args), args)
    assert_same(values, w.values, kind)
    assert_same(rows, w.values.T[ids], kind)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("way", [w for w in WAYS if w.layout == TILES16], ids=str)
def test_unaligned_arrays(way: Way, kind: str) -> None:
    w = weight(way.formats[0], K, N)
    x = random_x(way.rows, K).astype(DTYPES[kind])
    options = PlanOptions(way.precision, None, way.schedule, way.layout)
    aligned, spec = specs_of([x, w.tensor])
    assert isinstance(aligned, ArraySpec)
    graph = trace(product, (replace(aligned, is_aligned=False), spec))
    plan = make_plan(graph, find_target(f"hip:{way.arch}"), way.rows, options)
    (y,) = run_on_host(plan, [x, w.tensor], alignments={"x": 2, "output0": 2})
    assert_rounded_contract(y, x, w, kind, BOUNDS[way.precision])


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("first", [1, 4])
def test_slices_of_x(kind: str, first: int) -> None:
    w = weight("Q4_0", K, N)
    x = random_x(1, K + first).astype(DTYPES[kind])

    def sliced(x: Any, w: Any) -> Any:
        return x[..., first:] @ w

    plan = hip_plan(sliced, "hip:sm_90", [x, w.tensor])
    (y,) = run_on_host(plan, [x, w.tensor])
    assert_rounded_contract(y, x[:, first:], w, kind, BOUNDS["f32"])
