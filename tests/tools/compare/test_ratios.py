"""Ratios of speeds, and which speed targets of a file q4jit meets."""

import json
from pathlib import Path
from typing import Any

import pytest

from q4jit.errors import FormatError
from q4jit.tools.cli.main import main
from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.report import grouped_cpu_runs
from q4jit.tools.compare.speed_targets import SpeedTarget, read_speed_targets, verdicts
from q4jit.tools.compare.tables import ratio_lines
from tests.support.paths import ROOT

FILE = ROOT / "docs" / "targets.json"
TARGETS = read_speed_targets(FILE)


def run_of(threads: int, cached: bool = False, **speeds: Any) -> ratios.Run:
    """Return a run of q4jit i8 and f32 at M = 1 with a large and a small weight."""
    base = {"kind": "product", "m": 1, "own": True, "us": 10.0, "wrong": False, "of_peak": None}
    measurements = [
        {**base, "name": f"q4jit {p}", "precision": p, "k": k, "n": k, **speeds}
        for k in (4096, 576)
        for p in ("f32", "i8")
    ]
    return {"threads": threads, "format": "Q4_0", "cached": cached, "rows": measurements}


def test_targets_are_met_by_all_weights_or_missed() -> None:
    runs = [run_of(t, ratios={"ggml": 1.3}, of_read=0.95) for t in (1, 2, 3)]
    _, *lines = verdicts(runs, TARGETS)
    by_target = {(p, against, threads): line for p, _, against, threads, *line in lines}
    assert by_target["f32", "ggml", "1"] == ["1.50", "1.30 1.30", "missed"]
    assert by_target["f32", "ggml", "2"] == ["1.10", "1.30 1.30", "met"]
    assert by_target["i8", "read", "1"] == ["0.92", "0.95", "met"]  # the large weight only
    assert {threads for _, _, threads in by_target} == {"1", "2"}
    runs[1]["rows"][0]["ratios"] = {}
    _, *lines = verdicts(runs[1:2], TARGETS)
    assert ["f32", "1", "ggml", "2", "1.10", "- 1.30", "not measured"] in lines
    assert len(verdicts([{**runs[0], "dtype": "bf16"}], TARGETS)) == 1  # targets are for f32
    _, *lines = verdicts([run_of(1, cached=True, ratios={"ggml": 3.1}, of_read=0.5)], TARGETS)
    assert lines == [["i8", "1", "ggml", "1", "3.00", "3.10 3.10", "met"]]


def test_the_table_of_ratios() -> None:
    run = run_of(2, ratios={"ggml": 1.3}, of_read=0.954)
    run["rows"][1] |= {"us": None, "wrong": True, "ratios": {}, "of_read": None}
    peer = {**run["rows"][0], "name": "ggml", "own": False}
    read = {**peer, "name": READ, "gb_per_s": 20.0}
    run["rows"][2:] = [peer, read, {**read, "gb_per_s": 30.0}]
    run["rows"].append({**peer, "name": "dot peak", "tflops": 0.5})
    headings, line = ratios.table([run])
    assert headings == "threads|K, N|M|f32 µs|read|peak|i8 µs|read|peak|ggml".split("|")
    assert line == "2|4096, 4096|1|10|95%|-|wrong|-|-|1.30 / -".split("|")
    assert ratios.limits(run) == "2 threads: read 30 GB/s, dot peak 500 GOP/s"


def test_runs_of_one_format_and_dtype_share_a_table() -> None:
    runs = [run_of(t) | {"format": f} for f in ("Q4_K", "Q6_K") for t in (1, 2)]
    runs.append(run_of(1) | {"format": "Q6_K", "dtype": "bf16"})
    groups = grouped_cpu_runs({"runs": runs})
    assert [[run["threads"] for run in group] for group in groups] == [[1, 2], [1, 2], [1]]
    shown = [ratios.weights_and_arrays(group[0]) for group in groups]
    assert shown == ["Q4_K, f32 arrays", "Q6_K, f32 arrays", "Q6_K, bf16 arrays"]


def test_without_targets_there_are_no_verdicts() -> None:
    run = run_of(1, ratios={"ggml": 1.3}, of_read=0.95)
    headings = "precision M against threads target result verdict".split()
    assert verdicts([run], ()) == [headings]
    lines = list(ratio_lines([run], ()))
    assert lines[0] == "Q4_0, f32 arrays"
    assert not any("verdict" in line for line in lines)
    assert lines == list(ratio_lines([run], TARGETS))[: len(lines)]


def test_targets_are_read(tmp_path: Path) -> None:
    assert len(TARGETS) == 14
    assert TARGETS[0] == SpeedTarget("i8", 1, "ggml", {1: 1.5, 2: 1.1})
    assert {t.min_size for t in TARGETS if t.against == READ} == {4096}
    assert [t.least for t in TARGETS if t.cached] == [{1: 3.0, 2: 3.0}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_version": 2}, ".targets_version: expected 1, got 2"),
        ({"targets": {}}, ".targets: expected a list, got {}"),
        ({"more": 1}, ", got ['machine', 'more', 'targets', 'targets_version']"),
        ({"precision": "f64"}, ": targets[0].precision: expected one of f32, f16, i8, got 'f64'"),
        ({"m": 0}, ": targets[0].m: expected a whole number from 1, got 0"),
        ({"least": {"one": 1}}, ": targets[0].least: expected ratios above 0"),
        ({"least": {"1": 0}}, "got {'1': 0}"),
        ({"cached": 1}, ": targets[0].cached: expected true or false, got 1"),
        ({"at_least": 1}, " and perhaps ['cached', 'min_size'], got ["),
    ],
)
def test_an_invalid_targets_file_is_refused_before_measuring(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(FILE.read_text("utf-8"))
    data["targets"] = data["targets"][:1]
    whole = change.keys() & {"targets_version", "targets", "more"}
    (data if whole else data["targets"][0]).update(change)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    assert main(["bench", "--target", "cpu", "--targets", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"q4jit bench: {path}")
    assert message in err


def test_a_file_without_targets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("{")
    with pytest.raises(FormatError, match=r"expected a targets file such as docs/targets\.json"):
        read_speed_targets(path)


@pytest.mark.parametrize("others", [["--from", "cpu.json", "--plot", "p.png"], ["--target", "hip"]])
def test_targets_that_no_table_would_show_are_refused(
    others: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("q4jit.tools.cli.bench.open_device", lambda name, without: None)
    Path("cpu.json").write_text(
        json.dumps({"bench_version": 1, "runs": [{"threads": 1, "rows": [{}]}]})
    )
    with pytest.raises(SystemExit):
        main(["bench", "--targets", str(ROOT / "docs" / "targets.json"), *others])
    assert (
        "--targets requires runs on the CPU and, together with --from, --markdown"
        in capsys.readouterr().err
    )
