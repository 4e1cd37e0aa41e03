"""Products and values of weights: HIP text executed without a GPU, compared with the gguf package.

These tests have every schedule of the precisions `f32` and `f16`; `test_hip_i8` tests `i8`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.errors import TargetError
from q4jit.frontend.specs import WeightSpec, ids_spec
from q4jit.frontend.trace import trace
from q4jit.hip.kernel import (
    DEQUANTIZE,
    ELEMENT,
    GEMV,
    GEMV_MATRIX,
    LOOKUP,
    MAX_GRID_Y,
    ROWS,
    TILE_FMA,
    TILE_HALVES,
    TILE_MATRIX,
)
from q4jit.hip.schedule import make_plan
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, INTERLEAVED16, PLANAR, TILES16
from q4jit.weights.tiles import suits_tiles16
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import (
    BOUND,
    F32,
    FLOAT_FORMATS,
    FORMATS_OF_32,
    Floats,
    Weight,
    all_bits,
    assert_contract,
    assert_ieee,
    assert_rows,
    assert_same_bits,
    dequantizer,
    distributions,
    hard_x,
    in_step,
    joined_products,
    lookups,
    not_finite_rows,
    one_product,
    products,
    random_blocks,
    random_x,
    set_f16,
    slices,
    some_ids,
    spoiled,
    spoiled_weights,
    tables,
    weight,
    weights,
    wrap,
)
from tests.support.layouts import held_in
from tests.support.pairs import in_turn

K: Final = 256  # almost all tests have the same K and N, so that they share compiled texts
N: Final = 37
BOUNDS: Final = {"f32": BOUND, "f16": 5e-4}
BLOCK_FORMATS: Final = tuple(f.name for f in FORMATS.values() if f.float_type is None)
LAYOUTS: Final = (PLANAR, GGUF)


@dataclass(frozen=True)
class Way:
    """A way to compute a product: a schedule for a number of rows on an arch."""

    schedule: str
    rows: int
    arch: str
    layout: str = PLANAR
    precision: str = "f32"
    block_size: int | None = None

    def __str__(self) -> str:
        parts = [self.schedule, self.rows, self.arch, self.layout, self.precision, self.block_size]
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """Return the formats that the schedule multiplies."""
        return BLOCK_FORMATS if self.schedule == TILE_MATRIX else tuple(FORMATS)

    @property
    def columns(self) -> int:
        """Return N, which is small for `element`: on a CPU its many thread blocks take long."""
        return 3 if self.schedule == ELEMENT else N

    @property
    def plan_options(self) -> PlanOptions:
        return PlanOptions(self.precision, self.block_size, self.schedule, self.layout)

    def run(
        self, function: Callable[..., Any], args: Sequence[Any], **options: Any
    ) -> list[Floats]:
        """Return the results of `function`; all its products must be computed this way."""
        plan = hip_plan(function, f"hip:{self.arch}", args, self.plan_options)
        used = {kernel.schedule for kernel in plan.kernels} - {ROWS}
        assert used == {self.schedule}
        for kernel in plan.kernels:
            if kernel.schedule == GEMV:
                specs = [plan.weight(product.arg) for product in kernel.section.products]
                assert kernel.scales_late == all(map(_has_late_scales, specs))
        return run_on_host(plan, args, **options)

    def products(self, x: Floats, ws: Sequence[Weight], **options: Any) -> list[Floats]:
        """Return the products of x with weights of one N, in one kernel for `rows` rows each.

        In `gemv` a weight without late scales turns them off for the others of its kernel, so such
        weights have a kernel of their own.
        """
        if self.schedule != GEMV:
            return self.joined(x, ws, **options)
        late = [_has_late_scales(WeightSpec(*w.tensor.signature)) for w in ws]
        ys: dict[int, Floats] = {}
        for kind in (True, False):
            at = [i for i, each in enumerate(late) if each == kind]
            if at:
                ys |= zip(at, self.joined(x, [ws[i] for i in at], **options), strict=True)
        return [ys[i] for i in range(len(ws))]

    def joined(self, x: Floats, ws: Sequence[Weight], **options: Any) -> list[Floats]:
        """Return the products of x with weights of one N, all in one kernel."""
        function, tensors = joined_products(len(ws)), [w.tensor for w in ws]
        step = self.rows if self.schedule == GEMV else len(x)
        parts = [
            self.run(function, [x[at : at + step], *tensors], **options)[:-1]
            for at in range(0, len(x), step)
        ]
        return [np.concatenate(ys) for ys in zip(*parts, strict=True)]

    def check(self, x: Floats, ws: Sequence[Weight], **options: Any) -> None:
        """Check that all products of x keep the contract."""
        for y, w in zip(self.products(x, ws, **options), ws, strict=True):
            assert_contract(y, x, w, BOUNDS[self.precision])


def _has_late_scales(spec: WeightSpec) -> bool:
    """Return whether `gemv` may multiply a weight's quants before their scale."""
    return spec.block_format.float_type is None and spec.finite


# Waves of 64 and of 32 lanes. The numbers of rows give full and partial tiles.
_WAVES: Final = ("gfx90a", "gfx1030")
_MATRIX: Final = ("gfx90a", "gfx1100", "gfx1201", "sm_90")
VECTOR: Final = tuple(
    Way(schedule, rows, arch)
    for arch in _WAVES
    for schedule, rows in [(ELEMENT, 2), *((GEMV, m) for m in (1, 2, 3, 8, 16)), (TILE_FMA, 70)]
)
MATRIX: Final = tuple(Way(TILE_MATRIX, 70, arch) for arch in _MATRIX)
EVERY: Final = (*VECTOR, *MATRIX, Way(TILE_MATRIX, 70, "gfx1100", precision="f16"))
# blocks in the layout of GGUF: every schedule, waves of both sizes
UNPACKED: Final = tuple(
    replace(way, layout=GGUF)
    for way in (*VECTOR, *MATRIX)
    if way.schedule != GEMV or way.arch == "gfx1030" or way.rows == 2
)
# one of each kind, with waves of both sizes
SOME: Final = (
    Way(ELEMENT, 2, "gfx1030"),
    Way(GEMV, 1, "gfx90a"),
    Way(GEMV, 3, "gfx1030"),
    Way(GEMV, 8, "gfx90a"),
    Way(TILE_FMA, 70, "gfx1030"),
    Way(TILE_MATRIX, 70, "gfx90a"),
    Way(TILE_MATRIX, 70, "gfx1100", precision="f16"),
)
FEW: Final = SOME[:2] + SOME[3:6]  # one of each schedule, and two of gemv

every_way = pytest.mark.parametrize("way", EVERY, ids=str)
some_ways = pytest.mark.parametrize("way", SOME, ids=str)
a_few_ways = pytest.mark.parametrize("way", FEW, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "third"), [*zip((*EVERY, *UNPACKED), 20 * (0, 1, 2), strict=False)], ids=str
)
def test_every_format(way: Way, third: int) -> None:
    """Check a third of the formats each way, in one kernel; the next way has others."""
    way.check(random_x(way.rows, K), weights(K, [N], names=way.formats[third::3]))


ALONE: Final = (
    *MATRIX[:2],
    Way(ELEMENT, 2, "gfx1030"),
    Way(TILE_FMA, 70, "gfx1030"),
    Way(GEMV, 1, "gfx90a"),
    Way(GEMV, 3, "gfx1030"),
)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (way, name)
        for i, name in enumerate(FORMATS)
        for way in (ALONE[i % 2], *ALONE[2:4], ALONE[4 + i % 2])
        if name in way.formats
    ],
    ids=str,
)
def test_every_format_alone(way: Way, name: str) -> None:
    """Check what other formats in a kernel could hide: its functions, its arrays, its path."""
    x, w = not_finite_rows(K)[:70], weight(name, K, N, "denormal")
    x[2, 9] = 1e38  # no result overflows
    for y in way.joined(x, [w]):
        assert_ieee(y, x, w)


@pytest.mark.parametrize("way", [way for way in SOME if way.schedule == GEMV], ids=str)
def test_formats_with_and_without_late_scales_in_one_kernel(way: Way) -> None:
    x, ws = not_finite_rows(K), weights(K, [N])
    for y, w in zip(way.joined(x, ws), ws, strict=True):
        assert_ieee(y, x, w)


SHAPES: Final = [
    (32, 5, PLANAR, FORMATS_OF_32),
    (288, 1, GGUF, FORMATS_OF_32),
    (768, 65, PLANAR, ("Q6_K", "Q4_0")),  # three blocks, and one column beyond a tile
    (40, N, PLANAR, FLOAT_FORMATS),
    (40, 1, GGUF, FLOAT_FORMATS),
    (5, 3, PLANAR, FLOAT_FORMATS),
]


@pytest.mark.parametrize(("k", "n", "layout", "names"), SHAPES)
@pytest.mark.parametrize("way", [FEW[0], *FEW[2:]], ids=str)
def test_every_shape(way: Way, k: int, n: int, layout: str, names: tuple[str, ...]) -> None:
    ws = weights(k, [n], names=[name for name in names if name in way.formats])
    if ws:
        replace(way, layout=layout).check(random_x(way.rows, k), ws)


@pytest.mark.parametrize("way", [*MATRIX[:3], Way(TILE_FMA, 70, "gfx1030")], ids=str)
@pytest.mark.parametrize("m", [1, 17, 63, 64, 65, 129])
def test_every_number_of_rows_of_a_tile(way: Way, m: int) -> None:
    way.check(random_x(m, K), weights(K, [N], names=["Q4_0", "Q4_1", "Q6_K"]))


@pytest.mark.parametrize("arch", _WAVES)
@pytest.mark.parametrize("m", range(1, 18))
def test_every_number_of_rows_of_a_gemv(m: int, arch: str) -> None:
    Way(GEMV, m, arch).check(random_x(m, K), weights(K, [N], names=["Q4_0"]))


@pytest.mark.parametrize("arch", _WAVES)
@pytest.mark.parametrize("k", [32, 512, 544, 1056, 2080])
def test_lanes_that_share_a_column(k: int, arch: str) -> None:
    """Multiply columns with fewer units than half the lanes of a wave, with more, with many."""
    Way(GEMV, 3, arch).check(random_x(3, k), weights(k, [5], names=["Q4_0"]))


def test_a_column_longer_than_shared_memory_holds() -> None:
    for layout in LAYOUTS:
        way = Way(ELEMENT, 2, "gfx1030", layout)
        way.check(random_x(2, 8224), weights(8224, [2], names=["Q4_0"]))


@pytest.mark.parametrize("arch", _WAVES)
@pytest.mark.parametrize("block_size", [32, 64, 192, 512, 1024])
@pytest.mark.parametrize(("schedule", "rows"), [(ELEMENT, 2), (GEMV, 8)])
def test_block_sizes(schedule: str, rows: int, block_size: int, arch: str) -> None:
    way = Way(schedule, rows, arch, block_size=block_size)
    ws = weights(256, [N], names=["Q4_0", "Q6_K"])
    if arch == "gfx90a" and block_size == 32:
        with pytest.raises(TargetError, match=r"block_size .* a multiple of 64 .*, got 32"):
            way.check(random_x(rows, 256), ws)
    else:
        way.check(random_x(rows, 256), ws)


def test_the_default_schedules() -> None:
    w = weight("Q4_0", 256, N).tensor
    infinite = spoiled("Q4_0", 256, N, np.inf, "d").tensor
    floats = weight("F16", 256, N).tensor
    for m, tensor, arch, expected in [
        (1, w, "gfx1030", [GEMV]),
        (16, w, "gfx1030", [GEMV]),
        (17, w, "gfx1030", [TILE_FMA]),
        *((1, w, arch, [GEMV_MATRIX]) for arch in _MATRIX),
        *((4, w, arch, [GEMV_MATRIX]) for arch in _MATRIX),
        *(
            (16, w, arch, [ROWS, TILE_HALVES] if arch == "sm_90" else [GEMV_MATRIX])
            for arch in _MATRIX
        ),
        *((17, w, arch, [ROWS, TILE_HALVES]) for arch in _MATRIX),
        (1, infinite, "gfx1100", [GEMV]),
        (17, infinite, "gfx1100", [TILE_FMA]),
        (17, floats, "gfx1100", [TILE_FMA]),
    ]:
        plan = hip_plan(one_product, f"hip:{arch}", [random_x(m, 256), tensor])
        assert [kernel.schedule for kernel in plan.kernels] == expected
        in_quads = tensor is w and arch != "gfx1030"
        assert plan.kernels[-1].layout == (TILES16 if in_quads else PLANAR), "one layout for all M"
    for tensor in (infinite, floats):
        with pytest.raises(TargetError, match="block formats with finite scales"):
            MATRIX[0].run(one_product, [random_x(17, 256), tensor])


def test_rows_beyond_a_grids_y_axis() -> None:
    """Check rows that are counted by the z axis of the grid."""
    m = MAX_GRID_Y + 3
    way = Way(ELEMENT, m, "gfx1030", block_size=32)
    way.check(random_x(m, 32), weights(32, [1], names=["Q4_0"]), seeds=(1,))


# --- slices, sections and arguments -------------------------------------------------------------


CUTS: Final = (slice(16, 32), slice(5, 36), slice(36, 37), slice(32, 37), slice(8))


def check_slices(way: Way, name: str, function: Callable[..., Any], *cuts: slice) -> None:
    w, x = weight(name, 256, N), random_x(way.rows, 256)
    for y, cut in zip(way.run(function, [x, w.tensor]), cuts, strict=True):
        assert_contract(y, x, Weight(w.tensor, w.values[:, cut]), BOUNDS[way.precision])


def one_slice(x: Any, w: Any) -> Any:
    return (x @ w)[..., 5:29]


@a_few_ways
def test_slices_of_a_product(way: Way) -> None:
    check_slices(way, "Q4_0", slices, *CUTS)


@in_turn("name layout", [*FORMATS], LAYOUTS)
def test_a_slice_of_every_format(name: str, layout: str) -> None:
    for way in FEW[2:]:
        if name in way.formats:
            check_slices(replace(way, layout=layout), name, one_slice, slice(5, 29))


def sections(x: Any, z: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    """Multiply two x: the first with weights of two widths; join two products; slice one."""
    first, second = x @ a, x @ b
    return first, second, first + second, x @ c, z @ d, first[..., 5:29]


@a_few_ways
def test_several_sections(way: Way) -> None:
    x, z = random_x(way.rows, 256), random_x(way.rows, 64, seed=1)
    name = way.formats[-1]
    a, b, c = (weight(name, 256, n, seed=s) for n, s in ((N, 1), (N, 2), (70, 3)))
    d = weight("Q4_0", 64, 5)
    args = [x, z, *(w.tensor for w in (a, b, c, d))]
    first, second, both, third, fourth, cut = way.run(sections, args)
    bound = BOUNDS[way.precision]
    for y, factor, w in [(first, x, a), (second, x, b), (third, x, c), (fourth, z, d)]:
        assert_contract(y, factor, w, bound)
    np.testing.assert_array_equal(both, first + second)
    assert_contract(cut, x, Weight(a.tensor, a.values[:, 5:29]), bound)


@some_ways
def test_nothing_is_read_before_an_array(way: Way) -> None:
    way.check(random_x(way.rows, K), weights(K, [N], names=way.formats), low_guard=True)


@some_ways
def test_results_at_any_f32(way: Way) -> None:
    """Write results to any address of an f32: kernels must not store wider values."""
    aligned = {f"output{i}": 4 for i in range(len(way.formats) + 1)}
    ws = weights(K, [N], names=way.formats)
    way.check(random_x(way.rows, K), ws, alignments=aligned)


# --- distributions ------------------------------------------------------------------------------


SCALES: Final = ("normal", "zero", "denormal", "largest", "mixed")


@some_ways
def test_distributions_and_scales(way: Way) -> None:
    x = np.stack([*distributions(K).values()])
    for scales in SCALES:
        ws = weights(K, [way.columns], scales, way.formats)
        for y, w in zip(way.products(x, ws), ws, strict=True):
            inside = stays_inside(x, w)
            assert inside[:5].all()
            assert_contract(y[inside], x[inside], w, BOUNDS[way.precision])


def stays_inside(x: Floats, w: Weight) -> NDArray[np.bool_]:
    """Return the rows of x whose sums stay in the range of f32, in any order of the terms."""
    sizes = np.abs(x).astype(np.float64) @ np.abs(w.values)
    return np.asarray(sizes.max(1) <= np.finfo(F32).max)


@pytest.mark.parametrize("way", [FEW[0], *FEW[2:]], ids=str)
def test_a_huge_element_times_a_q4_1_weight_of_0(way: Way) -> None:
    """Check that scale · quant and minimum, which cancel out, are added before the product."""
    blocks = random_blocks(FORMATS["Q4_1"], K, N, "normal", np.random.default_rng(0))
    d = np.random.default_rng(1).normal(0, 0.05, blocks.shape[:2]).astype(np.float16)
    quants = np.arange(N)[:, np.newaxis] % 16  # of 0, by column
    set_f16(blocks, 0, d)
    set_f16(blocks, 2, (-d * quants).astype(np.float16))
    blocks[:, 0, 4] = quants[:, 0] * 17  # elements 0 and 16
    w, x = wrap("Q4_1", K, blocks), random_x(2, K)
    x[:, 0] = 1e20
    assert np.all(np.abs(w.values[0]) < 1e-2)
    assert np.count_nonzero(w.values[0] == 0) > 5
    way.check(x, [w])


@some_ways
def test_denormal_activations(way: Way) -> None:
    x = (random_x(17, K) * 1e-40).astype(F32)
    assert np.any(np.abs(x[x != 0]) < np.finfo(F32).tiny)
    x[::2, :7] = 1  # normal numbers beside denormals
    way.check(x, weights(K, [way.columns], "largest", way.formats))


@some_ways
def test_denormal_results_are_rounded_once(way: Way) -> None:
    x = (random_x(17, K) * 1e-41).astype(F32)
    for scales in ("normal", "denormal"):
        ws = weights(K, [way.columns], scales, way.formats)
        for y, w in zip(way.products(x, ws), ws, strict=True):
            exact = x.astype(np.float64) @ w.values
            size = np.sqrt(x.astype(np.float64) ** 2 @ w.values**2)
            assert np.any((y != 0) & (np.abs(y) < np.finfo(F32).tiny))
            assert np.all(np.abs(y - exact) <= K * 2.0**-150 + 1e-5 * size), str(w)


@some_ways
def test_results_beyond_f32_are_infinite(way: Way) -> None:
    # each format has rows of its own, and every weight is multiplied by all rows
    names = [
        name for name in ("F16", "Q4_0", "Q4_1", "Q6_K", "Q5_K", "MXFP4") if name in way.formats
    ]
    ws = weights(K, [N], "largest", names)
    rows = 8
    xs = [np.where(w.values[:, :rows] < 0, F32(-1e38), F32(1e38)).T for w in ws]
    for i, y in enumerate(way.products(np.concatenate(xs), ws)):
        x, own = xs[i].astype(np.float64), y[rows * i : rows * (i + 1)]
        exact = x @ ws[i].values
        same = np.eye(rows, N, dtype=bool)  # sums whose terms all have the same sign
        assert np.all(np.abs(exact[same]) > np.finfo(F32).max)
        np.testing.assert_array_equal(own[same], np.sign(exact[same]) * np.inf)
        assert not np.isfinite(own[np.abs(exact) > np.finfo(F32).max]).any()


# --- NaN and Inf ----------------------------------------------------------------------------------


@some_ways
def test_not_finite_activations(way: Way) -> None:
    x = not_finite_rows(K)
    ws = weights(K, [way.columns], "mixed", way.formats)
    clean = np.where(np.isfinite(x), x, F32(1))
    same = np.isfinite(x).all(1)
    others = way.products(clean, ws)
    for y, other, w in zip(way.products(x, ws), others, ws, strict=True):
        assert_ieee(y, x, w, BOUNDS[way.precision])
        np.testing.assert_array_equal(y[same], other[same])


@every_layout
@pytest.mark.parametrize("way", FEW[:4], ids=str)
def test_not_finite_activations_beside_padding(way: Way, layout: str) -> None:
    x = not_finite_rows(N)
    ws = weights(N, [5], names=FLOAT_FORMATS)
    for y, w in zip(replace(way, layout=layout).products(x, ws), ws, strict=True):
        assert_ieee(y, x, w)


@pytest.mark.parametrize("way", SOME[:5], ids=str)
def test_not_finite_scales(way: Way) -> None:
    n = 1 if way.schedule == ELEMENT else N
    for value in (np.inf, -np.inf, np.nan):
        ws = spoiled_weights(K, (n,), value)
        aligned = [in_step(w) for w in spoiled_weights(K, (n,), 1.0)]
        x = np.concatenate([*hard_x(K), *aligned])
        for y, w in zip(way.products(x, ws), ws, strict=True):
            assert not np.isfinite(w.values).all()
            assert_ieee(y, x, w)


@pytest.mark.parametrize("way", [MATRIX[0], MATRIX[1]], ids=str)
def test_rough_rows_need_a_path_of_their_own(way: Way) -> None:
    """Check that bf16 terms alone lose Inf, huge and tiny numbers."""
    w = weight("Q4_0", K, N)
    x = random_x(20, K)
    x[3, 5], x[4, 100], x[5] = np.inf, -3e38, x[5] * 1e-37
    (right,) = way.run(one_product, [x, w.tensor])
    (wrong,) = way.run(one_product, [x, w.tensor], edit=without_rough_rows)
    assert_ieee(right, x, w)
    for row in range(20):
        one = slice(row, row + 1)
        if row in (3, 4, 5):
            with pytest.raises(AssertionError):
                assert_ieee(wrong[one], x[one], w)
        else:
            assert_ieee(wrong[one], x[one], w)


def without_rough_rows(text: str) -> str:
    """Return the text of a kernel that treats every row as one that bf16 terms can hold."""
    return text.replace("a.x_rough[row] == 0", "true").replace("a.x_rough[row] != 0", "false")


# --- values -------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("arch", _WAVES)
def test_values_equal_those_of_the_gguf_package(arch: str, layout: str) -> None:
    ws = all_bits()
    args = [w.tensor for w in ws]
    plan = hip_plan(dequantizer(len(ws)), f"hip:{arch}", args, PlanOptions(layout=layout))
    assert {kernel.schedule for kernel in plan.kernels} == {DEQUANTIZE}
    for got, w in zip(run_on_host(plan, args), ws, strict=True):
        assert_same_bits(got, w)


@every_layout
@pytest.mark.parametrize("block_size", [None, 32])
def test_rows_equal_those_of_the_gguf_package(layout: str, block_size: int | None) -> None:
    ws, ids = tables(), some_ids(2, 9)
    args = [ids, *(w.tensor for w in ws)]
    plan_options = PlanOptions(layout=layout, block_size=block_size)
    plan = hip_plan(lookups(len(ws)), "hip:gfx1030", args, plan_options)
    assert {kernel.schedule for kernel in plan.kernels} == {LOOKUP}
    for got, w in zip(run_on_host(plan, args), ws, strict=True):
        assert_rows(got, ids, w)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if suits_tiles16(fmt)])
def test_rows_of_tiles(name: str) -> None:
    elements = FORMATS[name].block_elements
    for k, arch in ((elements, "gfx1030"), (3 * elements, "gfx90a"), (2 * elements, "sm_90")):
        w, ids = weight(name, k, N, "bits"), some_ids(9)
        table = held_in(TILES16, w.tensor)
        plan = hip_plan(lookups(1), f"hip:{arch}", [ids, table])
        assert plan.weight_layouts() == [(1, TILES16)]
        (got,) = run_on_host(plan, [ids, table])
        assert_rows(got, ids, w)
        assert set(table._resident._copies) == {TILES16}  # there is no second copy


@pytest.mark.parametrize(
    ("held", "read"),
    [("", PLANAR), (GGUF, GGUF), (PLANAR, PLANAR), (TILES16, TILES16), (INTERLEAVED16, PLANAR)],
)
def test_which_layout_look_ups_read(held: str, read: str) -> None:
    graph = trace(lookups(1), (ids_spec((3,)), WeightSpec("Q4_K", K, N, held=held)))
    for arch in ("gfx1030", "sm_90"):
        plan = make_plan(graph, find_target(f"hip:{arch}"), 3, PlanOptions())
        assert plan.weight_layouts() == [(1, read)]


@in_turn("name layout", [*FORMATS], LAYOUTS)
def test_ids_out_of_range_give_nan(name: str, layout: str) -> None:
    """Check that kernels read nothing for such ids, which a device array may contain."""
    w = weight(name, 256, N)
    ids = np.array([0, N, -1, N - 1, 2**31, -(2**63), 2**63 - 1, 2**32], np.int64)
    known = (ids >= 0) & (ids < N)
    args = [ids, w.tensor]
    plan = hip_plan(lookups(1), "hip:gfx90a", args, PlanOptions(layout=layout))
    for low_guard in (False, True):
        (got,) = run_on_host(plan, args, low_guard=low_guard)
        assert_rows(np.ascontiguousarray(got[known]), ids[known], w)
        assert np.isnan(got[~known]).all()


def test_many_ids() -> None:
    w = weight("Q4_0", 32, N)
    ids = some_ids(MAX_GRID_Y + 5)
    args = [ids, w.tensor]
    plan = hip_plan(lookups(1), "hip:gfx1030", args, PlanOptions(block_size=32))
    (got,) = run_on_host(plan, args, seeds=(1,))
    assert_rows(got, ids, w)


def test_products_of_one_row_and_of_none() -> None:
    w = weight("Q4_0", 64, N)
    for x in (random_x(64), random_x(2, 3, 64), random_x(0, 64)):
        args = [x, w.tensor]
        (y,) = run_on_host(hip_plan(products(1), "hip:gfx1030", args), args)
        assert_contract(y, x, w)
