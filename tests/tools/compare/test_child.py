"""Several numbers of threads: one child process each, and one report."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from q4jit.tools.cli.main import main
from q4jit.tools.compare import child
from q4jit.tools.compare.request import BenchRequest
from tests.support.paths import ROOT

QUICK = """
from q4jit.tools.compare import cpu, cpu_times
cpu_times._CALLS_S, cpu_times._REST_S = 1e-3, 0.0
cpu.cache_bytes = lambda: 4 << 10
"""


KILLED = """
import os, signal
begin = cpu.CpuArena.__init__

def killed(arena, threads, *rest):
    if threads == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(arena, threads, *rest)

cpu.CpuArena.__init__ = killed
"""


def begin_with(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Python run a program first in every child process."""
    (folder / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")


def test_several_numbers_of_threads_give_one_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(QUICK, tmp_path, monkeypatch)
    path = tmp_path / "t.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1,5", "--threads", "1,2", "--quick"]
    options += ["--dtype", "f32,bf16"]
    assert main(["bench", *options, "--precision", "f32", "--json", str(path)]) == 0
    out, _ = capfd.readouterr()
    report = json.loads(path.read_text("utf-8"))
    assert report["command"] == [
        "q4jit",
        "bench",
        *options,
        "--precision",
        "f32",
        "--json",
        str(path),
    ]
    runs = [(run["dtype"], run["threads"]) for run in report["runs"]]
    assert runs == [("f32", 1), ("f32", 2), ("bf16", 1), ("bf16", 2)]
    assert all(row["dtype"] == run["dtype"] for run in report["runs"] for row in run["rows"])
    assert {(r["k"], r["n"], r["m"]) for run in report["runs"] for r in run["rows"]} == {
        (64, 37, 1),
        (64, 37, 5),
    }
    headings = [line.split() for line in out.splitlines() if line.startswith("threads ")]
    shown = [["threads", "K,", "N", "M", "f32", "µs", "read"]] * 2
    assert [words[:7] for words in headings] == shown
    assert re.findall(r"^(.*) arrays$", out, re.MULTILINE)[-2:] == ["Q4_0, f32", "Q4_0, bf16"]
    table = re.findall(r"^ +([12])  64, 37  ([15]) ", out, re.MULTILINE)
    assert table == [("1", "1"), ("1", "5"), ("2", "1"), ("2", "5")] * 2
    assert main(["bench", "--from", str(path), "--markdown"]) == 0
    out, _ = capfd.readouterr()
    assert re.findall(r"^\| ([12]) \| 64, 37 \| ([15]) \| ", out, re.MULTILINE) == table
    assert re.findall(r", Q4_0, (.*) arrays$", out, re.MULTILINE) == ["f32", "bf16"]
    for threads in ("1 thread", "2 threads"):
        assert re.search(rf"^- {threads}: read [\d.]+ GB/s, FMA peak \d", out, re.MULTILINE)


def test_a_wrong_child_makes_the_command_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = QUICK + "from q4jit.precision import BOUNDS\nBOUNDS['f32'] = 0.0\n"
    begin_with(wrong, tmp_path, monkeypatch)
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "1,2", "--quick"]
    assert main(["bench", *options, "--precision", "f32"]) == 1
    assert capfd.readouterr().out.count("wrong: error") >= 2


def test_a_killed_child_is_an_error_and_earlier_runs_are_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(QUICK + KILLED, tmp_path, monkeypatch)
    path = tmp_path / "t.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "1,2", "--quick"]
    assert main(["bench", *options, "--json", str(path)]) == 1
    assert "the child process with 2 threads ended by signal 9" in capfd.readouterr().err
    report = json.loads(path.read_text("utf-8"))
    assert report["ended_by"] == "ChildProcessError"
    assert [run["threads"] for run in report["runs"]] == [1]


def test_a_child_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both processes: the child may write its report; one that hangs is killed."""

    def interrupted_wait(process: Any, timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        started.append(process)
        raise KeyboardInterrupt

    started: list[Any] = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(child, "_END_S", 0.1)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        child._wait_for([sys.executable, "-c", "import time; time.sleep(60)"])
    assert started[0].returncode == -signal.SIGKILL


REQUEST = BenchRequest("Q8_0", ((64, 37), (128, 5)), (1, 8), ("f32", "i8"), True, False, "bf16")


@pytest.mark.parametrize(
    "request_", [BenchRequest(), REQUEST, dataclasses.replace(REQUEST, quick=True)]
)
@pytest.mark.parametrize("ggml", [None, Path("a b/lib")])
def test_a_child_reads_its_request(
    request_: BenchRequest, ggml: Path | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.request"
    written = child.ChildRequest(2, request_, ggml, cached=True, report=tmp_path / "a.json")
    path.write_text(child.to_json(written), "utf-8")
    assert child.read_child_request(path) == written


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("threads",), 0, ".threads: expected a whole number from 1 to 1024, got 0"),
        (("threads",), True, "from 1 to 1024, got True"),
        (("cached",), 1, ".cached: expected true or false, got 1"),
        (("more",), 1, "expected the fields ['cached', 'ggml', 'report', 'request', 'threads']"),
        (("request", "format"), "Q9", ": request.format: expected one of F32, "),
        (
            ("request", "shapes"),
            [[64]],
            "a list that is not empty, each item [K, N], or null, got [[64]]",
        ),
        (("request", "rows"), [], "each item a whole number from 1, or null, got []"),
        (("request", "precisions"), ["f64"], "got ['f64']"),
        (("request", "dtype"), "f64", ": request.dtype: expected one of f32, f16, bf16, got 'f64'"),
    ],
)
def test_an_invalid_request_is_refused(
    field: tuple[str, ...], value: Any, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "a.request"
    valid = child.ChildRequest(1, REQUEST, None, False, tmp_path / "a.json")
    data = json.loads(child.to_json(valid))
    inner = data["request"] if len(field) > 1 else data
    inner[field[-1]] = value
    path.write_text(json.dumps(data))
    assert main(["bench", "--child", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"q4jit bench: {path}")
    assert message in err
