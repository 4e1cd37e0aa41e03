"""`q4jit selftest` without a GPU: its cases, its reports and its exit status."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.compilers.cache import Entry
from q4jit.errors import CompileError, DeviceError
from q4jit.plan.options import PlanOptions
from q4jit.runtime.driver import Device
from q4jit.targets import Target, find_target
from q4jit.tools.cli.main import main
from q4jit.tools.selftest import checks, cpu, timing
from q4jit.tools.selftest.cases import cases
from q4jit.tools.selftest.checks import Check
from q4jit.tools.selftest.halves import half_cases
from q4jit.tools.selftest.run import outcome_of
from q4jit.tools.selftest.streams import NotRunError
from q4jit.tools.selftest.transposed import transposed_cases
from tests.support import child
from tests.support.fake_bench import DEVICE, for_numpy

Fault = Callable[[Any, list[NDArray[Any]]], None]


class FakeBench:
    """A Bench that computes with NumPy; `fault` may raise, or change the results."""

    fault: Fault | None = None
    copy_us = 2.0
    fingerprint = "fake 1.0"

    def __init__(self, device: Device) -> None:
        self.device, self.target = device, Target("hip", device.arch)

    def __enter__(self) -> "FakeBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def build(
        self, function: Callable[..., Any], args: Sequence[Any], plan_options: PlanOptions
    ) -> Any:
        return function, plan_options

    def run(self, built: Any, args: Sequence[Any]) -> list[NDArray[Any]]:
        function, plan_options = built
        with np.errstate(all="ignore"):
            returned = function(*map(for_numpy, map(_widened, args)))
            values = returned if isinstance(returned, tuple) else (returned,)
            results = [value.astype(_dtype_of(value, args)) for value in values]
        if self.fault is not None:
            self.fault(plan_options, results)
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
        raise AssertionError("only call_us times launches")

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


def _widened(value: Any) -> Any:
    """Return an array of half-precision numbers in f64: kernels round no intermediate result."""
    is_half = isinstance(value, np.ndarray) and value.dtype.itemsize == 2
    return value.astype(np.float64) if is_half else value


def _dtype_of(value: NDArray[Any], args: Sequence[Any]) -> np.dtype[Any]:
    """Return the dtype of a result: that of x, unless the function names another."""
    if value.dtype != np.float64:
        return value.dtype
    dtype: np.dtype[Any] = args[0].dtype
    return np.dtype(np.float32) if dtype.kind == "i" else dtype


@pytest.fixture
def selftest_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs the command; it returns status, report.json, report.txt."""
    monkeypatch.setattr("q4jit.tools.cli.arguments.find_device", lambda name, without: DEVICE)
    monkeypatch.setattr("q4jit.tools.cli.selftest.Bench", FakeBench)
    monkeypatch.setattr(timing, "_TIMED_SHAPES", ((256, 37), (512, 37)))
    monkeypatch.setattr(checks, "find_streams", _no_streams)

    def run(*options: str, fault: Fault | None = None) -> tuple[int, dict[str, Any], str]:
        method = None if fault is None else staticmethod(fault)
        monkeypatch.setattr(FakeBench, "fault", method)
        status = main(["selftest", "--out", str(tmp_path / "a" / "b"), *options])
        text = (tmp_path / "a" / "b" / "report.json").read_text("utf-8")
        data = json.loads(text, parse_constant=_refuse)
        return status, data, (tmp_path / "a" / "b" / "report.txt").read_text("utf-8")

    return run


def _no_streams(device: Device) -> NoReturn:
    raise NotRunError("needs PyTorch or CuPy")


def _refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def test_a_correct_device_passes(selftest_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, data, text = selftest_in()
    assert status == 0
    assert data["failed"] == 0
    target = find_target("hip:gfx1100")
    every = [*cases(target), *half_cases(target), *transposed_cases(), *checks.checks()]
    assert len(data["cases"]) == len(every)
    groups = {case["group"] for case in data["cases"]}
    assert {"products in bf16, f16", "special f16, i8", "loads of bf16"} <= groups
    assert groups >= {case.group for case in transposed_cases()}
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
    assert "running 1 of" in out.err  # lines, because there is no terminal
    assert "FAILED" not in text


def test_quick_runs_less(selftest_in: Any) -> None:
    status, data, _ = selftest_in("--quick")
    assert status == 0
    assert len(data["timings"]) == 6 * 4
    assert not any("Q6_K" in case["case"] for case in data["cases"])


def test_an_error_is_a_failed_case_and_the_next_one_runs(
    selftest_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(plan_options: PlanOptions, results: list[NDArray[Any]]) -> None:
        if plan_options.schedule == "gemv_dot":
            raise CompileError("fake", (), "no such register\n" * 50, "")

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = [case for case in data["cases"] if case["passed"] is False]
    assert {case["group"] for case in bad} == {
        "gemv_dot planar i8",
        "products in f16, i8",
        "special f16, i8",
    }
    assert len(bad) > 1
    assert data["failed"] == len(bad)
    assert bad[0]["error"] is None
    assert bad[0]["message"].startswith("CompileError: ")
    assert bad[0]["message"].count("no such register") == 50
    assert text.count("no such register") >= 50 * len(bad)
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == len(bad)
    assert max(map(len, shown.splitlines())) < 250


def test_wrong_and_missing_results_are_reported(selftest_in: Any) -> None:
    def fault(plan_options: PlanOptions, results: list[NDArray[Any]]) -> None:
        if plan_options.schedule == "tile_fma":
            results[0][0, 0] += 1
        if plan_options.schedule == "element":
            results[0][-1] = np.nan

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = {case["group"].split()[0] for case in data["cases"] if case["passed"] is False}
    assert bad >= {"tile_fma", "element"}
    assert bad <= {"tile_fma", "element", "dequantize"}  # checks the same results
    assert "not written" in text
    assert "exceeds the bound 2e-06" in text


def test_a_failed_timing_counts_as_a_failure(
    selftest_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_us(self: FakeBench, calls: Sequence[Any]) -> float:
        raise DeviceError("gone")

    monkeypatch.setattr(FakeBench, "call_us", call_us)
    status, data, text = selftest_in("--quick")
    assert status == 1
    assert data["failed"] == len(data["timings"]) == 24
    assert "DeviceError: gone" in text


def test_checks_that_are_not_run_are_reported(selftest_in: Any) -> None:
    status, data, text = selftest_in()
    assert status == 0
    not_run = {case["group"]: case for case in data["cases"] if case["passed"] is None}
    assert set(not_run) == {"graph replay", "two streams", "M·N above 2³¹"}
    assert data["not_run"] == 5
    assert "5 not run" in text
    assert text.count("not run: needs PyTorch or CuPy") == 4
    assert "needs 10,747,904,000 bytes of device memory, 1,048,576" in text


def test_quick_skips_the_large_result() -> None:
    assert "M·N above 2³¹" not in {check.group for check in checks.checks(quick=True)}


def test_any_error_is_a_failed_case(selftest_in: Any) -> None:
    def fault(plan_options: PlanOptions, results: list[NDArray[Any]]) -> None:
        if plan_options.schedule == "gemv_dot":
            raise ZeroDivisionError("by nothing")
        if plan_options.schedule == "tile_fma":
            results[0] = results[0][:, :2]  # a shape that cannot be compared

    status, data, _ = selftest_in("--quick", fault=fault)
    assert status == 1
    bad = {case["message"].split(":")[0] for case in data["cases"] if case["passed"] is False}
    assert bad == {"ZeroDivisionError", "ValueError"}
    assert data["timings"]


def test_an_interrupted_run_reports_its_findings(selftest_in: Any) -> None:
    def fault(plan_options: PlanOptions, results: list[NDArray[Any]]) -> None:
        if plan_options.schedule == "tile_fma":
            raise KeyboardInterrupt

    status, data, text = selftest_in("--quick", fault=fault)
    assert status == 130
    assert data["ended_by"] == "KeyboardInterrupt"
    assert 0 < len(data["cases"]) < len(cases(find_target("hip:gfx1100"), quick=True))
    assert "INCOMPLETE: stopped by KeyboardInterrupt\n" in text


def test_a_copy_that_cannot_be_timed_counts_as_a_failure(
    selftest_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_us(self: FakeBench) -> float:
        raise DeviceError("gone")

    monkeypatch.setattr(FakeBench, "copy_us", property(copy_us))
    status, data, text = selftest_in("--quick")
    assert (status, data["failed"], data["timings"]) == (1, 1, [])
    assert "nothing was timed: DeviceError: gone" in text


@pytest.mark.parametrize(
    ("error", "passed"), [(0.0, True), (1e-6, True), (1e-5, False), (math.nan, False)]
)
def test_a_check_passes_within_its_bound(error: float, passed: bool) -> None:
    check = Check("c", "g", 1, 2e-6, lambda bench: error)
    assert outcome_of(FakeBench(DEVICE), check).passed is passed  # type: ignore[arg-type]


def test_the_report_lists_the_kernels(selftest_in: Any) -> None:
    _, data, text = selftest_in("--quick")
    good, bad = data["kernels"]
    assert good["origin"] == "compiled"
    assert "damaged code object" in good["message"]
    assert "no such register" in bad["message"]
    assert "symbol q4jit_product" in text


def test_a_device_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "hip:999"]) == 1
    assert "no device 'hip:999': " in capsys.readouterr().err


def test_without_a_gpu_the_reason_is_printed() -> None:
    out = child.run(
        """
        from q4jit.tools.cli.main import main
        from q4jit.runtime import devices
        devices._NODES.update(amd=("/dev/not-here",), nvidia=())
        assert main(["selftest"]) == 1
        """,
        prelude="",
    )
    assert "(none of /dev/not-here exists)" in out


def test_a_folder_that_cannot_be_written_fails_first(
    selftest_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["selftest", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_an_arch_alone_selects_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str, without: str) -> NoReturn:
        raise DeviceError(f"asked for {name}")

    monkeypatch.setattr("q4jit.tools.cli.arguments.find_device", find)
    assert main(["selftest", "--device", "gfx1100"]) == 1
    assert "asked for hip:gfx1100" in capsys.readouterr().err


# --- the CPU --------------------------------------------------------------------------------------


def test_the_kernels_of_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["failed"] == report["not_run"] == 0
    assert report["device"]["platform"] == "cpu"
    assert {case["group"] for case in report["cases"]} >= {"product f32", "product i8", "lookup"}
    shown = capsys.readouterr().out
    assert "nothing was timed: the CPU is timed by: q4jit bench --target cpu" in shown
    assert "threads" in shown or "1 thread\n" in shown


def test_a_wrong_kernel_of_the_cpu_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object, case: Any) -> list[NDArray[Any]]:
        if case.group == "lookup":
            raise CompileError("llvm", (), "no such register", "")
        x, w, *_ = case.args
        return [np.zeros((len(x), w.shape[1]), np.float32)]

    some = [case for case in cpu.cpu_cases(True) if case.group in {"lookup", "product f32"}]
    monkeypatch.setattr(cpu, "cpu_cases", lambda _: some)
    monkeypatch.setattr(cpu.CpuBench, "run", run)
    assert main(["selftest", "--device", "cpu", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["failed"] == len(some)
    assert "FAILED" in capsys.readouterr().out
