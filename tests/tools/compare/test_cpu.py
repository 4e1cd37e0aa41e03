"""`q4jit bench` measures this machine's CPU."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from q4jit.tools.cli.main import main
from q4jit.tools.compare import cpu, cpu_peers, cpu_times
from q4jit.tools.compare.arena import READ, Running
from q4jit.tools.compare.work import TimedCall
from tests.support import child
from tests.support.halves import DTYPES


@pytest.fixture
def quick_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all measurements; their times mean nothing."""
    monkeypatch.setattr(cpu_times, "_CALLS_S", 1e-3)
    monkeypatch.setattr(cpu_times, "_REST_S", 0.0)
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 4 << 10)


@pytest.mark.usefixtures("quick_cpu")
@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_the_cpu_is_measured(fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--shape", "128x64", "--m", "1,5"]
    options += ["--fused", "--quick", "--format", fmt, "--json", str(path)]
    assert main(["bench", *options]) == 0
    out = capsys.readouterr().out
    assert "ggml: not available: no library was given" in out
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    timed = {(r["k"], r["m"], r["kind"], r["name"]) for r in run["rows"] if r["us"] is not None}
    wanted = {("product", name) for name in (READ, "q4jit f32", "dequantise + matmul")}
    wanted |= {("bare", "q4jit f32"), ("gated", "q4jit f32")}
    assert {(k, m, *each) for k in (64, 128) for m in (1, 5) for each in wanted} <= timed
    for row in run["rows"]:
        if row["us"] is not None:
            assert math.isfinite(row["us"])
            assert row["us"] > 0
            assert row["error"] <= row["bound"]
    assert "q4jit f32, bias and SiLU gating" in out


def test_the_requested_number_of_threads_is_used(tmp_path: Path) -> None:
    """Runs in a process of its own, because this one has started its thread pool."""
    path = tmp_path / "t.json"
    child.run(
        f"""
        from q4jit import config
        from q4jit.tools.cli.main import main
        from q4jit.tools.compare import cpu, cpu_times
        cpu_times._CALLS_S, cpu_times._REST_S = 1e-3, 0.0
        cpu.cache_bytes = lambda: 4 << 10
        options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "3", "--quick"]
        assert main(["bench", *options, "--json", {str(path)!r}]) == 0
        assert config.num_threads() == 3
        tasks = [open(f"/proc/self/task/{{t}}/comm").read() for t in os.listdir("/proc/self/task")]
        assert sum(name.startswith("q4jit-") for name in tasks) == 2
        """
    )
    assert json.loads(path.read_text("utf-8"))["runs"][0]["threads"] == 3


@pytest.mark.usefixtures("quick_cpu")
def test_a_weight_that_stays_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    running_of = cpu_times.running_of

    def counted(calls: Sequence[Callable[[], object]], *rest: Any) -> Running:
        counts.append(len(calls))
        return running_of(calls, *rest)

    monkeypatch.setattr(cpu, "running_of", counted)
    monkeypatch.setattr(cpu_peers, "running_of", counted)
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--quick", "--json", str(path)]
    assert main(["bench", *options]) == 0
    assert min(counts) > 1
    counts.clear()
    assert main(["bench", *options, "--cached", "--markdown"]) == 0
    assert set(counts) == {1}
    assert "Q4_0, f32 arrays, weight in the cache\n" in capsys.readouterr().out
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    assert run["cached"]
    assert not any(row["wrong"] for row in run["rows"])


@pytest.mark.usefixtures("quick_cpu")
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_arrays_of_a_product_have_the_dtype(
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs: list[NDArray[Any]] = []
    running_of = cpu_times.running_of

    def recorded(calls: Any, results: Any, work: TimedCall, note: str) -> Running:
        arrays = (work.x, *work.others, *results)
        assert {array.dtype for array in arrays} == {DTYPES[dtype]}
        outputs.extend(results)
        return running_of(calls, results, work, note)

    monkeypatch.setattr(cpu, "running_of", recorded)
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "256x37", "--m", "1,5", "--fused", "--quick"]
    assert main(["bench", *options, "--dtype", dtype, "--json", str(path)]) == 0
    assert len(outputs) == 2 * 2 * (1 + 2 + 1)  # M, precisions, results of the three functions
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    assert run["dtype"] == dtype
    own = [row for row in run["rows"] if row["own"]]
    assert {row["precision"] for row in own} == {"f32", "i8"}
    for row in own:
        assert row["dtype"] == dtype
        # the rounding of a result alone would exceed the bound
        assert row["error"] <= row["bound"]
    (peer,) = {row["note"] for row in run["rows"] if row["name"] == "numpy f32"}
    assert peer == "x in f32"
    assert f"Q4_0 [256, 37], M = 5, {dtype} arrays\n" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_cpu")
def test_a_note_names_a_more_exact_kernel(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--quick", "--format", "F16"]
    assert main(["bench", *options, "--precision", "f32,i8", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    notes = {row["name"]: row["note"] for row in run["rows"] if row["own"]}
    assert notes["q4jit f32"] == ""
    assert notes["q4jit i8"].startswith("precision='i8' is an upper bound")
