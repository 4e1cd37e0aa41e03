"""`q4jit selftest` without a GPU: what it would run, how it judges, and its reports."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import QuantizedTensor
from q4jit.arrays.call_shapes import lead_shape
from q4jit.compilers.cache import Entry
from q4jit.errors import CompileError, DeviceError
from q4jit.frontend.trace import trace
from q4jit.hip import harness
from q4jit.hip.kernel import HipPlan
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.plan.options import Tuning
from q4jit.precision import BOUNDS
from q4jit.runtime.driver import Device
from q4jit.targets import Target, find_target
from q4jit.tools import selftest
from q4jit.tools.cli import main
from q4jit.tools.selftest import Case, cases
from q4jit.weights.formats import FORMATS
from q4jit.weights.reference import random_weight, random_x
from tests.runtime import test_devices
from tests.support import child, fake_gpu

MOST_KERNELS = 160  # at a second each, on a few cores, they and the rest take two minutes
DEVICE = Device(
    platform="amd",
    index=0,
    name="Fake",
    arch="gfx1100",
    id="0000:03:00.0/0",
    memory_bytes=1 << 20,
    compute_units=96,
    lds_bytes=64 << 10,
    max_block_size=1024,
    wave=32,
    l2_bytes=1 << 10,
    clock_khz=2_000_000,
    integrated=False,
)
Fault = Callable[[Any, list[NDArray[Any]]], None]


class FakeBench:
    """NumPy in the place of a GPU; `fault` may raise, or change what came out."""

    fault: Fault | None = None
    copy_us = 2.0
    fingerprint = "fake 1.0"

    def __init__(self, device: Device) -> None:
        self.device, self.target = device, Target("hip", device.arch)

    def __enter__(self) -> "FakeBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def build(self, function: Callable[..., Any], args: Sequence[Any], tuning: Tuning) -> Any:
        return function, tuning

    def run(self, built: Any, args: Sequence[Any]) -> list[NDArray[Any]]:
        function, tuning = built
        with np.errstate(all="ignore"):
            found = function(*map(_for_numpy, args))
        found = found if isinstance(found, tuple) else (found,)
        results = [np.array(value, np.float32) for value in found]
        if self.fault is not None:
            self.fault(tuning, results)
        return results

    def copy_bytes(self) -> int:
        return 1000

    def free_bytes(self) -> int:
        return self.device.memory_bytes

    def upload(self, args: Sequence[Any]) -> Sequence[Any]:
        return args

    def outputs(self, built: Any, args: Sequence[Any]) -> tuple[None]:
        return (None,)

    def bind(self, built: Any, args: Sequence[Any]) -> "FakeBench":
        return self

    def __call__(self, args: Sequence[Any], out: Any) -> NoReturn:
        raise AssertionError("timed by call_us alone")

    def prepare(self, args: Sequence[Any]) -> None:
        pass

    def call_us(self, calls: Sequence[Any]) -> float:
        assert len(calls) > 1  # weights that take turns
        return 100.0

    def compiled(self) -> list[tuple[str, str, Future[Entry]]]:
        good, bad = Future[Entry](), Future[Entry]()
        good.set_result(Entry("0" * 64, b"not ELF", "compiled", 0.5))
        bad.set_exception(CompileError("fake", (), "no such register", ""))
        return [("gemv", "q4jit_product", good), ("element", "q4jit_product", bad)]


def _for_numpy(value: Any) -> Any:
    if isinstance(value, QuantizedTensor):
        return _Decoded(value.dequantize().astype(np.float64))
    return value


class _Decoded:
    """Values that answer as a weight does."""

    __array_ufunc__ = None

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    def __rmatmul__(self, x: NDArray[Any]) -> NDArray[Any]:
        product: NDArray[Any] = x.astype(np.float64) @ self.values
        return product

    def dequantize(self) -> NDArray[Any]:
        return self.values

    def rows(self, ids: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = self.values.T[ids]
        return found


@pytest.fixture
def selftest_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command on the fake; gives the exit status, report.json and report.txt."""
    monkeypatch.setattr(selftest, "find_device", lambda name: DEVICE)
    monkeypatch.setattr(selftest, "Bench", FakeBench)
    monkeypatch.setattr(selftest, "_TIMED_SHAPES", ((256, 37), (512, 37)))
    monkeypatch.setattr(selftest, "find_streams", _no_streams)

    def run(*options: str, fault: Fault | None = None) -> tuple[int, dict[str, Any], str]:
        place = None if fault is None else staticmethod(fault)
        monkeypatch.setattr(FakeBench, "fault", place)
        status = main(["selftest", "--out", str(tmp_path / "a" / "b"), *options])
        text = (tmp_path / "a" / "b" / "report.json").read_text("utf-8")
        data = json.loads(text, parse_constant=_refuse)
        return status, data, (tmp_path / "a" / "b" / "report.txt").read_text("utf-8")

    return run


def _no_streams(device: Device) -> NoReturn:
    raise selftest.NotRunError("needs torch or cupy")


def _refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


# --- what is run ----------------------------------------------------------------------------------


def plan_of(case: Case, target: Target) -> HipPlan:
    graph = trace(case.function, tuple(map(harness._spec, case.args)))
    return make_plan(graph, target, math.prod(lead_shape(case.args)), case.tuning)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1030", "gfx1100", "gfx1201", "sm_90"])
def test_every_case_has_its_kernels_and_they_are_not_too_many(arch: str) -> None:
    target = find_target(f"hip:{arch}")
    texts = set()
    for case in cases(target):
        plan = plan_of(case, target)
        texts |= {render(plan, kernel).text for kernel in plan.kernels}
        used = {kernel.schedule for kernel in plan.kernels}
        assert case.tuning.schedule is None or case.tuning.schedule in used
    assert 80 < len(texts) < MOST_KERNELS


def test_the_matrix_is_covered() -> None:
    found = cases(find_target("hip:gfx1100"))
    groups = {case.group for case in found}
    for schedule in ("element", "gemv", "tile_fma", "tile_matrix"):
        assert {f"{schedule} {layout} f32" for layout in ("planar", "gguf")} <= groups
    for group in ("tile_fma planar f32", "tile_matrix planar f32", "tile_matrix planar f16"):
        measures = {case.measure for case in found if case.group == group}
        assert measures == {selftest.against_values}
    assert {"gemv_dot planar i8", "gemv_dot gguf i8", "tile_matrix planar f16"} <= groups
    for group in groups:
        if group.startswith(("element", "gemv ", "tile_fma", "dequantize")):
            formats = {case.args[1].format for case in found if case.group == group}
            assert formats == set(FORMATS), group
    products = [case for case in found if case.function is selftest.product]
    assert {case.rows for case in products} == {1, 2, 3, 8, 16, 17, 64, 100}
    assert {case.args[1].shape[0] for case in products} == {256, 576, 4096}
    assert {1, 37} < {case.args[1].shape[1] for case in products}
    assert {case.bound for case in products} == {2e-6, 5e-4, 2e-2}


def test_an_arch_without_matrix_units_has_none_of_their_cases() -> None:
    assert not any("matrix" in case.group for case in cases(find_target("hip:gfx1030")))


def test_quick_is_a_part() -> None:
    target = find_target("hip:gfx1100")
    quick = {str(case) for case in cases(target, quick=True)}
    assert len(quick) < len(cases(target)) / 2
    assert quick < {str(case) for case in cases(target)}


# --- judging --------------------------------------------------------------------------------------


def product_case(precision: str = "f32") -> Case:
    args = (random_x(3, 256), random_weight("Q4_0", 256, 37))
    bound = BOUNDS[precision]
    measure = selftest.contract_error
    return Case("g", selftest.product, args, Tuning(precision), bound, measure)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1 + 1e-5, False)])
def test_the_bound_decides(factor: float, passed: bool) -> None:
    case = product_case()
    x, w = case.args
    outcome = selftest.judge(case, [(x @ w) * np.float32(factor)])
    assert outcome.passed is passed
    assert ("allowed are 2e-06" in outcome.message) is not passed


def test_what_is_not_written_fails() -> None:
    case = product_case()
    x, w = case.args
    y = x @ w
    y[2, 36] = np.nan
    outcome = selftest.judge(case, [y])
    assert (outcome.passed, outcome.error) == (False, None)
    assert "1 of 111 results are NaN or Inf" in outcome.message


def test_one_bad_row_is_not_hidden_by_the_others() -> None:
    case = product_case("f16")
    x, w = case.args
    y = x @ w
    y[1] *= 1.001  # the mean over all three rows would pass
    assert not selftest.judge(case, [y]).passed


# --- the command ----------------------------------------------------------------------------------


def test_a_good_device_passes(selftest_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, data, text = selftest_in()
    assert status == 0
    assert data["failed"] == 0
    assert len(data["cases"]) == len(cases(find_target("hip:gfx1100"))) + len(selftest.checks())
    run = [case for case in data["cases"] if case["passed"] is not None]
    assert all(case["passed"] and not case["message"] for case in run)
    assert data["ended_by"] == ""
    assert len(data["timings"]) == 2 * 6 * 4
    assert data["copy"]["gb_per_s"] == pytest.approx(1.0)  # 1000 bytes read and written in 2 µs
    nbytes = 256 * 37 // 32 * 18
    assert data["timings"][0]["gb_per_s"] == pytest.approx(nbytes / 100 * 1e-3)
    assert data["device"]["arch"] == "gfx1100"
    assert data["compiler"] == "fake 1.0"
    out = capsys.readouterr()
    assert "0 failed" in text
    assert "0 failed" in out.out
    assert "running 1 of" in out.err  # where there is no terminal, lines
    assert "FAILED" not in text


def test_quick_runs_less(selftest_in: Any) -> None:
    status, data, _ = selftest_in("--quick")
    assert status == 0
    assert len(data["timings"]) == 6 * 4
    assert not any("Q6_K" in case["case"] for case in data["cases"])


def test_an_error_is_a_failed_case_and_the_next_one_runs(
    selftest_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(tuning: Tuning, results: list[NDArray[Any]]) -> None:
        if tuning.schedule == "gemv_dot":
            raise CompileError("fake", (), "no such register\n" * 50, "")

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = [case for case in data["cases"] if case["passed"] is False]
    assert {case["group"] for case in bad} == {"gemv_dot planar i8"}
    assert len(bad) > 1
    assert data["failed"] == len(bad)
    assert bad[0]["error"] is None
    assert bad[0]["message"].startswith("CompileError: ")
    assert bad[0]["message"].count("no such register") == 50
    assert text.count("no such register") >= 50 * len(bad)
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == len(bad)
    assert max(map(len, shown.splitlines())) < 250


def test_wrong_and_missing_results_are_told(selftest_in: Any) -> None:
    def fault(tuning: Tuning, results: list[NDArray[Any]]) -> None:
        if tuning.schedule == "tile_fma":
            results[0][0, 0] += 1
        if tuning.schedule == "element":
            results[0][-1] = np.nan

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = {case["group"].split()[0] for case in data["cases"] if case["passed"] is False}
    assert bad >= {"tile_fma", "element"}
    assert bad <= {"tile_fma", "element", "dequantize"}  # which looks at the same results
    assert "not written" in text
    assert "allowed are 2e-06" in text


def test_a_timing_that_fails_counts(selftest_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def call_us(self: FakeBench, calls: Sequence[Any]) -> float:
        raise DeviceError("gone")

    monkeypatch.setattr(FakeBench, "call_us", call_us)
    status, data, text = selftest_in("--quick")
    assert status == 1
    assert data["failed"] == len(data["timings"]) == 24
    assert "DeviceError: gone" in text


def test_what_is_not_run_is_told(selftest_in: Any) -> None:
    status, data, text = selftest_in()
    assert status == 0
    idle = {case["group"]: case for case in data["cases"] if case["passed"] is None}
    assert set(idle) == {"graph replay", "two streams", "M·N above 2³¹"}
    assert data["not_run"] == 5
    assert "5 not run" in text
    assert text.count("not run: needs torch or cupy") == 4
    assert "needs 10,747,904,000 bytes of the device's memory, free are 1,048,576" in text


def test_quick_leaves_the_large_result_out() -> None:
    assert "M·N above 2³¹" not in {check.group for check in selftest.checks(quick=True)}


def test_any_error_is_a_failed_case(selftest_in: Any) -> None:
    def fault(tuning: Tuning, results: list[NDArray[Any]]) -> None:
        if tuning.schedule == "gemv_dot":
            raise ZeroDivisionError("by nothing")
        if tuning.schedule == "tile_fma":
            results[0] = results[0][:, :2]  # which cannot be compared

    status, data, _ = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = {case["message"].split(":")[0] for case in data["cases"] if case["passed"] is False}
    assert bad == {"ZeroDivisionError", "ValueError"}
    assert data["timings"]


def test_what_was_found_before_ctrl_c_is_reported(selftest_in: Any) -> None:
    def fault(tuning: Tuning, results: list[NDArray[Any]]) -> None:
        if tuning.schedule == "tile_fma":
            raise KeyboardInterrupt

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 130
    assert data["ended_by"].startswith("KeyboardInterrupt")
    assert 0 < len(data["cases"]) < len(cases(find_target("hip:gfx1100"), quick=True))
    assert "INCOMPLETE: ended by KeyboardInterrupt" in text


def test_a_rate_that_cannot_be_measured_counts(
    selftest_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_us(self: FakeBench) -> float:
        raise DeviceError("gone")

    monkeypatch.setattr(FakeBench, "copy_us", property(copy_us))
    status, data, text = selftest_in("--quick")
    assert (status, data["failed"], data["timings"]) == (1, 1, [])
    assert "no times: DeviceError: gone" in text


@pytest.mark.parametrize(
    ("error", "passed"), [(0.0, True), (1e-6, True), (1e-5, False), (math.nan, False)]
)
def test_the_bound_decides_of_checks(error: float, passed: bool) -> None:
    check = selftest.Check("c", "g", 1, 2e-6, lambda bench: error)
    assert selftest.outcome_of(FakeBench(DEVICE), check).passed is passed  # type: ignore[arg-type]


def test_what_kernels_need_is_in_the_report(selftest_in: Any) -> None:
    _, data, text = selftest_in("--quick")
    good, bad = data["kernels"]
    assert good["origin"] == "compiled"
    assert "damaged code object" in good["message"]
    assert "no such register" in bad["message"]
    assert "symbol q4jit_product" in text


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "hip:999"]) == 1
    assert "no device 'hip:999': " in capsys.readouterr().err


def test_without_a_gpu_the_reason_is_told() -> None:
    out = child.run(
        """
        from q4jit.tools import cli
        from q4jit.runtime import devices
        devices._NODES.update(amd=("/dev/not-here",), nvidia=())
        assert cli.main(["selftest"]) == 1
        """,
        prelude="",
    )
    assert "no GPU is here: none of /dev/not-here exists" in out


def test_a_folder_that_cannot_be_written_is_told_first(
    selftest_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["selftest", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_the_arch_alone_names_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> NoReturn:
        raise DeviceError(f"asked for {name}")

    monkeypatch.setattr(selftest, "find_device", find)
    assert main(["selftest", "--device", "gfx1100"]) == 1
    assert "asked for hip:gfx1100" in capsys.readouterr().err


# --- the commit -----------------------------------------------------------------------------------


def test_the_commit_is_read_from_files(tmp_path: Path) -> None:
    assert selftest.commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert selftest.commit(tmp_path) is None
    (git / "packed-refs").write_text(
        "# pack-refs\nabc refs/heads/maintenance\ndef refs/heads/main\n"
    )
    assert selftest.commit(tmp_path) == "def"
    (git / "refs" / "heads" / "main").write_text("123\n")
    assert selftest.commit(tmp_path) == "123"
    (git / "HEAD").write_text("456\n")
    assert selftest.commit(tmp_path) == "456"


# --- the bench, on a fake runtime whose kernels do nothing ----------------------------------------


@pytest.fixture(params=["amd", "nvidia"])
def run_on_fake(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Runs a program with `bench`, a Bench whose compiler gives what the fake runtime loads."""
    folder = str(fake_gpu.build(tmp_path, request.param))
    prelude = (
        test_devices.PRELUDE
        + """
from q4jit.compilers import cache
from q4jit.tools import selftest
from q4jit.hip import harness
from q4jit.hip.harness import Bench
from q4jit.weights.reference import random_weight, random_x
from q4jit.errors import CompileError
from q4jit.plan.options import Tuning

class Compiler:
    SOURCE_SUFFIX, SUFFIX = ".hip", ".code"
    fingerprint = staticmethod(lambda target: "fake")
    compile_object = staticmethod(lambda text, target: fake.code())

harness.find_compiler = lambda target: Compiler
driver, first, _ = start()
x, w = random_x(3, 256), random_weight("Q4_0", 256, 37)
"""
    )

    def run(program: str) -> str:
        places = {"FAKE_PLATFORM": request.param, "FAKE_FOLDER": folder, "ROCM_PATH": folder}
        return child.run(program, prelude=prelude, **places)

    return run


def test_results_that_no_kernel_writes_are_nan(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            for function in (selftest.product, selftest.product_and_values):
                built = bench.build(function, (x, w), Tuning())
                launched = fake["launches"]
                results = bench.run(built, (x, w))
                assert fake["launches"] == launched + len(built.sources)
                assert [r.shape for r in results] == [(3, 37), (256, 37)][: len(results)]
                assert all(np.isnan(result).all() for result in results)
            assert {symbol for _, symbol, _ in bench.compiled()} >= {"q4jit_product"}
    """)


def test_calls_are_timed_while_copies_keep_the_device_busy(
    run_on_fake: Callable[[str], str],
) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            weights = selftest._rotation(first, 256, 37)
            assert len(weights) > 2 and len({id(w) for w in weights}) == len(weights)
            bench.copy_us = 1.0
            us = selftest._time_us(bench, Tuning(schedule="gemv"), 1, weights)
            assert us > 0
            assert bench.copy_bytes() == first.memory_bytes // 8
    """)


def test_checks_of_kernels_that_do_nothing_fail(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        class Streams:
            replays = 0
            make = staticmethod(lambda: 4096)
            handle = staticmethod(lambda stream: stream)
            def capture(self, stream, action):
                action()
                def replay():
                    Streams.replays += 1
                return replay

        selftest.find_streams = lambda device: Streams()
        with Bench(first) as bench:
            found = [selftest.outcome_of(bench, check) for check in selftest.checks(True)]
            built = bench.build(selftest.product, (x, w), Tuning())
            (y,) = bench.run_rows(built, (x, w), [slice(1, 3)])
        assert y.shape == (2, 37) and np.isnan(y).all()
        assert [o.message for o in found] == ["results are NaN or Inf"] * 4, found
        assert Streams.replays == 4
    """)


def test_rows_of_a_result_are_those_rows(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            there = bench.upload((x,), 4096)[0]
            assert there.stream == 4096
            bench.overwrite(there, 2 * x)
            np.testing.assert_array_equal(there.owner.to_numpy(), 2 * x)
            rows = bench._rows(there.owner, slice(1, 3))
            np.testing.assert_array_equal(rows, 2 * x[1:3])
            assert bench.free_bytes() > 0
    """)


def test_an_error_of_the_compiler_names_the_template(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        def refuse(text, target):
            lines = text.splitlines()
            line = 1 + next(i for i, t in enumerate(lines) if "extern" in t)
            raise CompileError("fake", (), f"kernel.hip:{line}: error: no", text)
        Compiler.compile_object = staticmethod(refuse)
        Compiler.fingerprint = staticmethod(lambda target: "nothing of it is in the cache")
        with Bench(first) as bench:
            case = selftest.Case(
                "g", selftest.product, (x, w), Tuning(), 1.0, selftest.contract_error
            )
            (outcome,) = selftest.outcomes(bench, [case])
            assert not outcome.passed
            assert "CompileError" in outcome.message
            assert ".j2:" in outcome.message, outcome.message
    """)
