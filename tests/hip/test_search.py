"""The search without a GPU: candidates, rejections, and plans with measured constants."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import specialize
from q4jit.backends import find_backend
from q4jit.compilers import find as find_of_compilers
from q4jit.dispatch import specializer
from q4jit.dispatch.policy import Place
from q4jit.errors import ArgumentError, CompileError, DeviceError, TuningError
from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip import search, tunings
from q4jit.hip.candidates import candidates, constants_of
from q4jit.hip.choices import keys_of
from q4jit.hip.classes import MANY_ROWS
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.schedule import make_plan
from q4jit.hip.tunings import Choice, Key, Trial
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.runtime.driver import Device
from q4jit.targets import Target, find_target
from q4jit.weights.reference import random_weight, random_x
from tests.support import child, fake_gpu
from tests.support.fake_bench import DEVICE, MACHINE, SearchBench, product_kernel
from tests.support.fake_gpu import PRELUDE
from tests.support.hip import run_on_host

K, N = 64, 5
KEY = Key(K, N, "F16", 1, "f32")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache directory of its own."""
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tunings, "_kept", {})
    return tmp_path / "cache"


def searched(bench: SearchBench, *keys: Key) -> search.Results:
    return search.search(bench, keys)  # type: ignore[arg-type]  # it has all that a search uses


def is_smallest(kernel: HipKernel) -> bool:
    return (kernel.block_size, kernel.ahead, kernel.columns) == (64, 1, 1)


# --- a search -------------------------------------------------------------------------------------


def test_a_search_checks_and_times_all_candidates_and_chooses_the_fastest() -> None:
    bench = SearchBench()
    trials = searched(bench, KEY)[KEY]
    assert len(trials) > 10
    assert all(t.error is not None and t.error < BOUNDS["f32"] for t in trials)
    assert all(t.rejected == "" for t in trials)
    best = tunings.best(trials)
    assert best is not None
    assert {("block_size", 64), ("ahead", 1), ("columns", 1)} <= set(best.constants)
    assert len(bench.run_rows) == len(trials)
    # each once, and then the best four in three turns
    assert len(bench.timed) == len(trials) + 12
    last = [constants_of(kernel) for kernel in bench.timed[-12:]]
    assert last == last[:4] * 3


def test_a_wrong_candidate_is_rejected_and_reported() -> None:
    def fault(kernel: HipKernel, y: NDArray[Any]) -> None:
        if is_smallest(kernel):
            y[0, -1] *= 1.001

    bench = SearchBench()
    bench.fault = fault
    results = searched(bench, KEY)
    (wrong,) = (t for t in results[KEY] if t.rejected)
    assert wrong.us is None
    assert wrong.error is not None
    assert wrong.error > BOUNDS["f32"]
    assert re.fullmatch(r"wrong: error \d\.\de-\d\d, the bound is 2e-06", wrong.rejected)
    assert not any(map(is_smallest, bench.timed))
    best = tunings.best(results[KEY])
    assert best is not None
    assert best != wrong
    text = search.table(results)
    assert f"{wrong.name}\n{'':23}rejected: {wrong.rejected}" in text
    assert re.search(rf"^\* +\S+ +\S+  {re.escape(best.name)}$", text, re.MULTILINE)
    assert text.count("\n*") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_result_that_is_not_finite_is_rejected(value: float) -> None:
    def fault(kernel: HipKernel, y: NDArray[Any]) -> None:
        if is_smallest(kernel):
            y[0, 0] = value

    bench = SearchBench()
    bench.fault = fault
    (wrong,) = (t for t in searched(bench, KEY)[KEY] if t.rejected)
    assert wrong.rejected == "wrong: results are NaN or Inf"
    assert tunings.stored()[MACHINE, KEY]  # the file is readable: it contains no NaN


@pytest.mark.parametrize(
    "error",
    [CompileError("fake", (), "no such\nregister", ""), DeviceError("too many\x1b registers")],
)
def test_a_candidate_that_does_not_run_is_rejected(error: Exception) -> None:
    def fault(kernel: HipKernel, y: NDArray[Any]) -> None:
        if is_smallest(kernel):
            raise error

    bench = SearchBench()
    bench.fault = fault
    (rejected,) = (t for t in searched(bench, KEY)[KEY] if t.rejected)
    assert rejected.rejected.startswith(f"{type(error).__name__}: ")
    assert rejected.rejected.isprintable()
    assert rejected in tunings.stored()[MACHINE, KEY]


def test_a_lost_device_ends_the_search_and_finished_keys_are_kept() -> None:
    def fault(kernel: HipKernel, y: NDArray[Any]) -> None:
        if len(y) > 1:
            bench.lost = True
            raise DeviceError("a fault")

    bench = SearchBench()
    bench.fault = fault
    with pytest.raises(DeviceError, match="the device is lost"):
        searched(bench, KEY, replace(KEY, m=4))
    assert [key for _, key in tunings.stored()] == [KEY]


def test_candidates_are_checked_with_full_and_partial_tiles() -> None:
    bench = SearchBench()
    keys = [replace(KEY, m=m) for m in (1, 2, 4, 8, 16, 32, 64, MANY_ROWS, 1024)]
    searched(bench, *keys)
    rows = {m for _, m in bench.run_rows}
    assert rows == {1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 511, 512, 2047, 2048}


def test_several_products_and_formats_are_one_key() -> None:
    bench = SearchBench()
    key = replace(KEY, format="Q4_0+Q8_0")
    trials = searched(bench, key)[key]
    assert all(t.error is not None and t.error < BOUNDS["f32"] for t in trials)
    assert len(bench.timed[0].section.products) == 2


@pytest.mark.parametrize("precision", ["f32", "f16", "i8"])
@pytest.mark.parametrize("name", ["F16", "Q6_K"])
def test_every_format_and_precision_has_candidates(precision: str, name: str) -> None:
    for arch in ("gfx1030", "gfx90a", "sm_90"):
        bench = SearchBench(replace(DEVICE, arch=arch))
        for m in (1, 64):
            key = Key(256, 3, name, m, precision)
            assert tunings.best(searched(bench, key)[key]) is not None


# --- a second search ------------------------------------------------------------------------------


def test_a_second_search_measures_nothing() -> None:
    first = searched(SearchBench(), KEY)
    again = SearchBench()
    second = searched(again, KEY)
    assert set(second[KEY]) == set(first[KEY])
    assert again.run_rows == []
    assert again.timed == []


def test_only_new_candidates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    few = _only(lambda kernel: kernel.block_size == 128)
    monkeypatch.setattr(search, "candidates", few)
    before = searched(SearchBench(), KEY)[KEY]
    monkeypatch.undo()
    bench = SearchBench()
    monkeypatch.setattr(tunings, "path", lambda: None)
    tunings.keep(MACHINE, KEY, before)
    trials = searched(bench, KEY, replace(KEY, n=7))[KEY]
    assert {trial.constants for trial in before} < {trial.constants for trial in trials}
    run = [kernel for kernel, _ in bench.run_rows if kernel.section.width == N]
    assert len(run) == len(trials) - len(before)
    assert not any(k.block_size == 128 for k in run)
    best = tunings.best(trials)
    assert best is not None
    assert ("block_size", 64) in best.constants


def _only(
    wanted: Callable[[HipKernel], bool],
) -> Callable[[Target, HipKernel, int], tuple[HipKernel, ...]]:
    return lambda target, kernel, m: tuple(c for c in candidates(target, kernel, m) if wanted(c))


def test_changed_text_is_measured_again_and_removed_candidates_are_dropped() -> None:
    trials = searched(SearchBench(), KEY)[KEY]
    changed = replace(trials[0], text="0" * 16)
    removed = replace(trials[1], constants=(("block_size", 96),), us=0.1)
    tunings.keep(MACHINE, KEY, (changed, removed, *trials[2:]))
    bench = SearchBench()
    again = searched(bench, KEY)[KEY]
    assert len(bench.run_rows) == 2
    assert {t.constants for t in again} == {t.constants for t in trials}
    tunings.keep(MACHINE, KEY, (*trials, removed))
    assert removed not in searched(SearchBench(), KEY)[KEY]
    assert removed not in tunings.stored()[MACHINE, KEY]


@pytest.mark.parametrize("platform", ["amd", "nvidia"])
def test_times_are_taken_from_a_graph(platform: str, tmp_path: Path) -> None:
    folder = str(fake_gpu.build(tmp_path, platform))
    variables = {"FAKE_PLATFORM": platform, "FAKE_FOLDER": folder, "ROCM_PATH": folder}
    child.run(
        """
        driver, first, _ = start()
        bench = Bench.__new__(Bench)  # without a compiler
        bench.device, bench._driver, bench._closing = first, driver, contextlib.ExitStack()
        kernel = driver.load(0, fake.code(), "scale_1")
        launch = driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 0, "i")
        turns = []
        def calls_on(stream):
            def call(number):
                turns.append((number, driver.is_capturing(0, stream)))
                launch(stream, number)
                if driver.is_capturing(0, stream):
                    held_by_graphs.append(DeviceArray((4,), first, stream=stream))
            return [functools.partial(call, number) for number in range(3)]
        kept = DeviceArray((4,), first)
        held_by_graphs.append(kept)
        us = bench.replay_us(calls_on)
        assert us == 1500 / 4, us  # the fake's events are 1500 µs apart; a graph has four calls
        assert turns == [(0, False), (0, False), (0, True), (1, True), (2, True), (0, True)]
        assert fake["replays"] == 4 and fake["graphs"] == 0 and fake["events"] == 0
        assert held_by_graphs == [kept]
        gc.collect()
        assert fake.allocations() == 1
        bench._closing.close()
        assert fake["streams"] == 0
        """,
        prelude=PRELUDE + _REPLAY_IMPORTS,
        **variables,
    )


_REPLAY_IMPORTS = """
import contextlib, functools
from q4jit.hip.harness import Bench
from q4jit.arrays.device_array import DeviceArray
from q4jit.hip.workspace import held_by_graphs
"""


# --- plans ----------------------------------------------------------------------------------------


def plan_of(
    m: int,
    measured: tunings.Measured | None,
    arch: str = "gfx1100",
    finite: bool = True,
    shape: tuple[int, int] = (K, N),
    fmt: str = "F16",
) -> HipPlan:
    spec = WeightSpec(fmt, *shape, finite)
    graph = trace(search.products, (array_spec((m, shape[0])), spec))
    return make_plan(graph, find_target(f"hip:{arch}"), m, PlanOptions(), measured)


def choice_of(schedule: str = "gemv", **constants: int | str) -> tunings.Measured:
    trial = Trial(
        schedule, tuple(sorted(constants.items())), "0" * 16, 1.0, 0.0, "", tunings.today()
    )
    return lambda key: Choice(trial, "a file")


def test_a_plan_takes_measured_constants() -> None:
    asked = []

    def measured(key: Key) -> Choice | None:
        asked.append(key)
        return choice_of(block_size=64, columns=4)(key)

    plan = plan_of(1, measured)
    assert set(asked) == {KEY} == set(keys_of(plan, 1, PlanOptions()))
    kernel = product_kernel(plan)
    assert (kernel.block_size, kernel.columns, kernel.ahead) == (64, 4, 1)
    assert kernel.origin == "a file"
    default = product_kernel(plan_of(1, lambda key: None))
    assert constants_of(default) == constants_of(product_kernel(plan_of(1, None)))
    assert default.origin == ""


@pytest.mark.parametrize(("shape", "m"), [((4096, 4096), 1), ((4096, 14336), 64)])
def test_i8_takes_the_constants_of_f16_if_the_same_kernels_serve_both(
    shape: tuple[int, int], m: int
) -> None:
    graph = trace(
        lambda x, w: x @ w, (array_spec((m, shape[0])), WeightSpec("Q4_0", *shape, suits_f16=True))
    )
    target, shipped = find_target("hip:sm_90"), tunings.find("sm_90")
    kernels = [
        product_kernel(make_plan(graph, target, m, PlanOptions(precision), shipped))
        for precision in ("f16", "i8")
    ]
    assert constants_of(kernels[0]) == constants_of(kernels[1])
    assert kernels[0].origin == kernels[1].origin != ""
    by_rule = product_kernel(make_plan(graph, target, m, PlanOptions("i8")))
    assert constants_of(by_rule) != constants_of(kernels[1])


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "sm_90"])
@pytest.mark.parametrize("m", [1, 4, 17])
def test_many_products_of_one_function_have_a_tiling(m: int, arch: str) -> None:
    """Plan more products than a thread block has waves."""

    def many(x: Any, *weights: Any) -> Any:
        return sum(x @ w for w in weights)

    for count in (8, 17, 40):
        graph = trace(many, (array_spec((m, 256)), *[WeightSpec("Q4_0", 256, 64)] * count))
        plan = make_plan(graph, find_target(f"hip:{arch}"), m, PlanOptions())
        assert len(product_kernel(plan).work.sections[0].products) == count


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1201"])
def test_products_without_room_for_their_sums_take_another_schedule(arch: str) -> None:
    def many(x: Any, *weights: Any) -> Any:
        return sum(x @ w for w in weights)

    graph = trace(many, (array_spec((16, 256)), *[WeightSpec("Q4_0", 256, 64)] * 64))
    (kernel,) = make_plan(graph, find_target(f"hip:{arch}"), 16, PlanOptions()).kernels
    assert (kernel.schedule, kernel.schedule_of(kernel.section), kernel.f16_terms) == (
        "gemv",
        "gemv",
        0,
    )


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (choice_of(block_size=96), "candidates for products on hip:gfx1100 (with the constants "),
        (choice_of(block_size=96), "got gemv block_size=96; run q4jit tune again"),
        (choice_of(block_size="64"), "got gemv block_size=64"),
        (choice_of(warp=1), "got gemv warp=1"),
        (choice_of(layout="evil"), "got gemv layout=evil"),
        (choice_of(rows_per_tile=8), "got gemv rows_per_tile=8"),
        (choice_of("tile_fma"), "a file: expected schedule gemv for F16 [64, 5], M class 1"),
        (choice_of("element"), "got element; run q4jit tune again, which replaces the entry"),
    ],
)
def test_constants_of_no_candidate_are_an_error(measured: tunings.Measured, message: str) -> None:
    with pytest.raises(TuningError, match=re.escape(message)):
        plan_of(1, measured)


@pytest.mark.parametrize(("suits", "precision"), [(True, "f16"), (False, "f16"), (False, "f32")])
def test_constants_measured_with_f16_weights_serve_only_such_weights(
    suits: bool, precision: str
) -> None:
    target, m = find_target("hip:sm_90"), 512
    graph = trace(search.products, (array_spec((m, 4096)), WeightSpec("Q4_0", 4096, 4096)))
    by_rule = make_plan(graph, target, m, PlanOptions(precision))
    tall = candidates(target, product_kernel(by_rule), m)[-1]
    spec = WeightSpec("Q4_0", 4096, 4096, suits_f16=suits)
    graph = trace(search.products, (array_spec((m, 4096)), spec))
    measured = choice_of(tall.schedule, **constants_of(tall))
    kernel = product_kernel(make_plan(graph, target, m, PlanOptions(precision), measured))
    assert kernel.folded == (suits and precision == "f16")
    assert bool(kernel.origin) == (suits or precision == "f32")


def test_a_callers_options_override_measured_constants() -> None:
    def measured(key: Key) -> Choice | None:
        raise AssertionError("looked up")

    graph = plan_of(1, None).graph
    target = find_target("hip:gfx1100")
    for plan_options in (
        PlanOptions(block_size=128),
        PlanOptions(schedule="element"),
        PlanOptions(layout="gguf"),
    ):
        make_plan(graph, target, 1, plan_options, measured)
    # no candidate was measured with NaN among the scales
    plan_of(1, measured, finite=False, fmt="Q4_1")


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100"])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_candidates_are_legal_and_distinct(arch: str, m: int) -> None:
    plan = plan_of(m, None, arch)
    kernels = candidates(plan.target, product_kernel(plan), m)
    assert kernels[0] == product_kernel(plan)
    assert len(set(kernels)) == len(kernels) > 5
    wave = plan.target.hip.wave
    assert all(k.block_size % wave == 0 for k in kernels)
    assert all(k.rows_per_tile * k.columns <= k.lanes for k in kernels)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "gfx1201", "sm_90"])
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 64, 512, 2048])
def test_candidates_for_matrix_units_are_legal_and_distinct(m: int, arch: str) -> None:
    plan = plan_of(m, None, arch, shape=(4096, 4096), fmt="Q4_0")
    kernels = candidates(plan.target, product_kernel(plan), m)
    assert kernels[0] == product_kernel(plan)
    assert len(set(kernels)) == len(kernels) > 3
    for k in kernels:
        waves_n, splits = k.columns // 16 // k.wave_panels, k.splits
        assert k.block_size % (plan.target.hip.wave * waves_n) == 0
        assert k.block_size <= 1024
        assert splits <= plan.target.hip.cluster_blocks


@pytest.mark.parametrize("m", [1, 3])
def test_candidates_compute_the_product(m: int) -> None:
    """Run the smallest, the largest and a middle candidate on the host."""
    x, w = random_x(m, 4096), random_weight("F16", 4096, 9)
    signature = (array_spec(x.shape), WeightSpec("F16", 4096, 9))
    plan = make_plan(
        trace(search.products, signature), find_target("hip:gfx1030"), m, PlanOptions()
    )
    kernel = product_kernel(plan)
    variants = candidates(plan.target, kernel, m)
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64)
    for variant in (variants[1], variants[len(variants) // 2], variants[-1]):
        (y,) = run_on_host(search._with(plan, kernel, variant), (x, w))
        np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5)


# --- calls ----------------------------------------------------------------------------------------


class FakeCompiler:
    SOURCE_SUFFIX, SUFFIX = ".hip", ".bin"

    def fingerprint(self, target: Target) -> str:
        return MACHINE.compiler

    def compile_object(self, text: str, target: Target) -> bytes:
        return b"code"

    def compile_assembly(self, text: str, target: Target) -> str:
        return "nop"


class FakeCall:
    def __call__(self, args: Sequence[Any], out: Any = None) -> str:
        return "run"

    def bind(self, args: Sequence[Any], out: Any = None) -> Callable[[], str]:
        return partial(self, args, out)

    def prepare(self, args: Sequence[Any]) -> None:
        pass


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> list[SearchBench]:
    """Send calls to a GPU that runs nothing; return the benches of all searches."""
    made: list[SearchBench] = []
    hip = replace(
        find_backend(Target("hip", DEVICE.arch)),
        compiler=lambda target: FakeCompiler(),
        load=lambda code, source, device: None,
        launch=lambda plan, loaded, shapes, args, names, device: FakeCall(),
    )

    def bench(device: Device) -> SearchBench:
        made.append(SearchBench(device))
        return made[-1]

    def find(target: Target) -> Any:
        return hip if target.backend == "hip" else find_backend(target)

    place = Place(Target("hip", DEVICE.arch), DEVICE, "for a test")
    monkeypatch.setattr(specializer, "find_backend", find)
    monkeypatch.setattr(find_of_compilers, "find_compiler", lambda target: FakeCompiler())
    monkeypatch.setattr(specializer, "choose_place", lambda *_: place)
    monkeypatch.setattr(search, "Bench", bench)
    return made


def double(x: Any, w: Any) -> Any:
    return 2 * (x @ w)


def test_only_the_first_call_of_a_class_searches(benches: list[SearchBench]) -> None:
    f: Any = specialize(double, tune=True)
    w = random_weight("F16", K, N)
    assert f(random_x(1, K), w) == "run"
    assert len(benches) == 1
    assert len(benches[0].timed) > 10
    assert "BLOCK_SIZE = 64;" in f.inspect_source()
    date = tunings.stored()[MACHINE, KEY][0].date[:10]
    assert f"double: measured constants ({tunings.path()}, {date}" in f.explain()
    f(random_x(1, K), w)
    f(random_x(3, K), w)
    assert len(benches) == 2
    f(random_x(4, K), w)  # the same class
    assert len(benches) == 2
    # another function measures nothing, with or without tune=True
    for options in ({"tune": True}, {}):
        other: Any = specialize(lambda x, w: x @ w + 1, **options)
        other(random_x(1, K), w)
        assert "measured constants (" in other.explain()
        assert "BLOCK_SIZE = 64;" in other.inspect_source()
    assert all(not bench.timed for bench in benches[2:])


def test_without_a_search_the_rules_choose_the_constants(benches: list[SearchBench]) -> None:
    f: Any = specialize(double)
    f(random_x(1, K), random_weight("F16", K, N))
    assert benches == []
    assert "double: constants from the rules" in f.explain()


def test_a_search_without_a_right_candidate_is_an_error(
    benches: list[SearchBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SearchBench, "fault", staticmethod(lambda kernel, y: y.fill(0)))
    f: Any = specialize(double, tune=True)
    with pytest.raises(TuningError, match=r"every candidate .*\n(.|\n)*rejected: wrong: error"):
        f(random_x(1, K), random_weight("F16", K, N))


def test_an_error_names_the_entry_of_an_unknown_candidate(benches: list[SearchBench]) -> None:
    (*_, trial) = searched(SearchBench(), KEY)[KEY]
    tunings.keep(MACHINE, KEY, (replace(trial, constants=(("block_size", 96),)),))
    f: Any = specialize(double)
    with pytest.raises(TuningError, match=r"tunings\.json.*, got gemv block_size=96"):
        f(random_x(1, K), random_weight("F16", K, N))


def test_explain_says_that_the_cpu_has_no_search() -> None:
    f: Any = specialize(double, tune=True, target="cpu")
    x, w = random_x(1, K), random_weight("F16", K, N)
    np.testing.assert_allclose(f(x, w), 2 * (x @ w.dequantize()), rtol=1e-4, atol=1e-6)
    assert "tune=True is ignored: CPU kernels have no constants to search for" in f.explain()
    g: Any = specialize(double, target="cpu")
    g(x, w)
    assert "tune" not in g.explain()


@pytest.mark.parametrize(
    "options", [{"tune": 1}, {"tune": "yes"}, {"tune": True, "block_size": 64}]
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ArgumentError, match=r"^tune: expected True or False|^tune=True cannot be combined"
    ):
        specialize(double, **options)
