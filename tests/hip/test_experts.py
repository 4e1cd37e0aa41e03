"""Products with chosen experts on the host prelude."""

from typing import Any

import numpy as np
import pytest

from q4jit import TargetError, vecmat
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.weights.formats import FORMATS
from tests.support import fake_gpu
from tests.support.experts import (
    E,
    assert_experts,
    chosen,
    experts,
    moe,
    moe_arguments,
    numbers,
    of_rows,
    product,
)
from tests.support.fake_gpu import PRELUDE, Run
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import kinds

K, N = 256, 40


def run(function: Any, args: Any, arch: str = "gfx1100", **options: Any) -> list[Any]:
    return run_on_host(hip_plan(function, f"hip:{arch}", args, PlanOptions(**options)), args)


@pytest.mark.parametrize(
    ("name", "kind", "arch"),
    [
        (name, kind, arch)
        for name, kind, arch in zip(
            FORMATS, ["f32", "f16", "bf16"] * 10, ["gfx90a", "gfx1100", "sm_90"] * 10, strict=False
        )
    ],
)
def test_every_format(name: str, kind: str, arch: str) -> None:
    w, ids, x = experts(name, K, N), chosen(5, 2), numbers(5, K, kind=kind)
    (y,) = run(of_rows, [x, w, ids], arch)
    assert_experts(y, x[:, None], w, ids, BOUNDS["f32"], kind)


@pytest.mark.parametrize(
    ("x_lead", "ids_shape", "options"),
    [
        ((3,), (3,), {}),
        ((1,), (3,), {"precision": "i8"}),
        ((1, 1), (1, 8), {"precision": "f16"}),
        ((4, 1), (4, 2), {"schedule": "element"}),
        ((4, 2), (4, 1), {"layout": "gguf"}),
        ((1, 1), (4, 2), {}),
        ((4, 1), (1, 2), {}),
        ((20,), (20,), {}),
        ((20,), (20,), {"precision": "i8", "layout": "gguf"}),
        ((23, 1), (23, 2), {}),
        ((1, 1), (1, 19), {}),
        ((1, 1), (9, 3), {}),
        ((70,), (1,), {}),
    ],
    ids=str,
)
def test_leading_axes_broadcast(
    x_lead: tuple[int, ...], ids_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(*ids_shape), numbers(*x_lead, 64)
    (y,) = run(product, [x, w, ids], **options)
    assert_experts(y, x, w, ids, BOUNDS["f32"])


def test_unknown_experts_give_nan_and_read_nothing_outside() -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(6), numbers(6, 64)
    ids[1:4] = -1, E, 1 << 40
    for options in ({}, {"schedule": "element"}):
        (y,) = run(product, [x, w, ids], **options)
        assert np.isnan(y[1:4]).all()
        assert_experts(y[[0, 4, 5]], x[[0, 4, 5]], w, ids[[0, 4, 5]], BOUNDS["f32"])
    many, x = np.concatenate([ids] * 5), numbers(30, 64)
    (y,) = run(product, [x, w, many])
    known = (many >= 0) & (many < E)
    assert np.isnan(y[~known]).all()
    assert_experts(y[known], x[known], w, many[known], BOUNDS["f32"])


def test_special_values() -> None:
    w, ids, x = experts("Q4_0", 64, 20), chosen(4), numbers(4, 64).copy()
    x[0, 3], x[1, 5], x[2, 7] = np.inf, np.nan, 1e38
    (y,) = run(product, [x, w, ids])
    np.testing.assert_array_equal(kinds(y), kinds(product(x, w, ids)))


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "sm_90"])
@pytest.mark.parametrize(("t", "a"), [(1, 4), (5, 3), (3, 1), (17, 2)])
def test_a_feed_forward_is_one_function(t: int, a: int, arch: str) -> None:
    args = moe_arguments(t, a)
    (y,) = run(moe, args, arch)
    wanted = moe(*args)
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_feed_forward_inside_of_a_layer() -> None:
    def layer(
        x: Any, gain: Any, g: Any, u: Any, d: Any, ids: Any, s: Any, v: Any, head: Any, w: Any
    ) -> Any:
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
        y = x + moe(normed, g, u, d, ids, s)
        hidden = vecmat(normed[:, None], g[ids])
        return normed @ v, y @ head, hidden - hidden.max(-1, keepdims=True), hidden @ w

    x, g, u, d, *rest = moe_arguments(6, 3)
    square = experts("Q8_0", 64, 64)
    args = x, np.abs(numbers(64)), g, u, d, *rest, square[0], square[1], d[0]

    for got, wanted in zip(run(layer, args), layer(*args), strict=True):
        assert got.shape == wanted.shape
        assert np.allclose(got, wanted, atol=1e-5)


def test_a_launch_covers_vectors_and_columns_and_no_schedule_for_tiles_serves() -> None:
    args = [numbers(1, 2048), experts("Q4_0", 2048, 64, 3), chosen(1, 8, count=3)]
    plan = hip_plan(of_rows, "hip:sm_90", args)
    (kernel,) = plan.kernels
    assert (kernel.schedule, kernel.work.rows_of(1)) == ("gemv", 8)
    assert "vecmat(v0, w[ids])" in str(plan)
    assert "a.w += (is_known ? (u64)expert : 0) * " in render(plan, kernel).text
    with pytest.raises(TargetError, match="it needs products that have no ids of experts"):
        hip_plan(of_rows, "hip:sm_90", args, PlanOptions(schedule="gemv_matrix"))


def test_many_vectors_are_sorted_on_the_device() -> None:
    def schedules(t: int, a: int) -> list[str]:
        plan = hip_plan(moe, "hip:gfx1100", moe_arguments(t, a))
        return [kernel.schedule for kernel in plan.kernels]

    single, by_expert = ["gemv", "gemv", "rows"], ["sort_experts", "gemv", "gemv", "rows"]
    for t, a, wanted in [(1, 16, single), (2, 8, single), (1, 17, by_expert), (3, 6, by_expert)]:
        assert schedules(t, a) == wanted
    assert schedules(4, 5) == schedules(3, 5) == single  # one class of M
    assert "sort vectors by ids" in str(hip_plan(moe, "hip:sm_90", moe_arguments(40, 2)))


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "sm_90"])
def test_all_vectors_of_one_expert_and_more_experts_than_threads_count(arch: str) -> None:
    w, x = experts("Q4_0", 64, 20), numbers(37, 64)
    ids = np.full(37, E - 1)
    (y,) = run(product, [x, w, ids], arch)
    assert_experts(y, x, w, ids, BOUNDS["f32"])
    for count in (1100, 2100):  # sorted by, and too many to be sorted by
        w, ids = experts("F16", 32, 3, count), chosen(37, count=count)
        (y,) = run(product, [x[:, :32], w, ids], arch)
        assert_experts(y, x[:, :32], w, ids, BOUNDS["f32"])


# --- launches on a fake device --------------------------------------------------------------------

IMPORTS = """
from q4jit.arrays.device_array import DeviceArray
from q4jit.hip import harness
from q4jit.hip.harness import Bench
from q4jit.plan.options import PlanOptions
from tests.support.experts import chosen, experts, moe, moe_arguments, numbers, of_rows

class Compiler:
    SOURCE_SUFFIX, SUFFIX = ".hip", ".code"
    fingerprint = staticmethod(lambda target: "fake")
    compile_object = staticmethod(lambda text, target: fake.code())

harness.find_compiler = lambda target: Compiler
_, first, _ = start()
"""


@pytest.fixture(params=["amd", "nvidia"], scope="module")
def on_fake(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program on a fake platform, and checks that it succeeds."""
    folder = tmp_path_factory.mktemp("fake")
    return fake_gpu.runner(folder, request.param, prelude=PRELUDE + IMPORTS)


def test_launches_depend_on_the_number_of_vectors_only(on_fake: Run) -> None:
    on_fake("""
        w, x = experts("Q4_0", 64, 20), numbers(3, 64)
        with Bench(first) as bench:
            for dtype in ("int32", "int64"):
                args = x, w, chosen(3, 2).astype(dtype)
                built = bench.build(of_rows, args, PlanOptions())
                uploaded = bench.upload(args)
                launch = bench.bind(built, uploaded)
                (out,) = bench.outputs(built, uploaded)
                assert out.shape == (3, 2, 20)
                launch(uploaded, out)
                assert fake.shape()[1:3] == [6, 1], fake.shape()
                integer = {"int32": "i32", "int64": "i64"}[dtype]
                assert f"const {integer}* ids;" in built.sources[0].text
            args = moe_arguments(5, 3)
            built = bench.build(moe, args, PlanOptions())
            launched = fake["launches"]
            (y,) = bench.run(built, args)
            assert fake["launches"] == launched + 3
            assert y.shape == (5, 64)
            assert fake.shape()[1:3] == [5, 1]
    """)
