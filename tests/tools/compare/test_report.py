"""Output of `q4jit bench`: tables, Markdown, a plot."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from q4jit.errors import FormatError, TargetError
from q4jit.tools.cli.main import main
from q4jit.tools.compare import report as reports
from q4jit.tools.compare import roofline
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.request import GPU, BenchRequest
from q4jit.tools.compare.tables import table_lines
from tests.support.fake_arena import FakeArena, K, N, fault_of, measured, one_wrong
from tests.support.tools import lack


def test_the_table_is_aligned_and_shows_how_many_times_faster_q4jit_is() -> None:
    arena = FakeArena(fault_of("q4jit f16", one_wrong))
    heading, title, read, f32, f16, peer = table_lines(measured(arena), heading=True)
    assert title == f"Q4_0 [{K}, {N}], M = 3, f32 arrays"
    assert heading.split() == "µs GB/s of read TFLOP/s error × f32 × f16".split()
    assert read.split() == ["read", "2.00", "1", "100%", "-", "-"]
    assert f32.split()[:4] == ["q4jit", "f32", "(how)", "4.00"]
    assert "wrong: error" in f16
    assert peer.split()[-2:] == ["2.00", "-"]  # f16 has no time to compare with
    assert len(heading) == len(peer)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    new = reports.new_report(["q4jit", "bench"])
    request = BenchRequest(shapes=((K, N), (K, 2 * N)), rows=(1, 8), precisions=("f32", "f16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("q4jit.tools.compare.measurements._QUICK_ROUNDS", 1)
        arena = FakeArena()
        assert reports.run(new, arena, dataclasses.replace(request, fused=True), GPU)
    path = tmp_path / "report.json"
    path.write_text(reports.to_json(new), encoding="utf-8")
    return path


def test_a_report_becomes_markdown(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["bench", "--from", str(report), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "Fake (`hip:fake`), Q4_0, f32 arrays\n" in out
    assert "compiler fake 1.0\n" in out
    assert "- torch int4: not available: not today\n" in out
    lines = [line for line in out.splitlines() if line.startswith(f"| {K}, {N} | 8 ")]
    product, *fused = lines
    assert re.fullmatch(
        r"\| 64, 37 \| 8 \| 2 \| 4 \(50%; \d.\de.\d\d\) \| 2.5 \(80%; \d.\de.\d\d\) "
        r"\| 8 \(2.00, 3.20\) \|",
        product,
    )
    assert [line.split(" | ")[4] for line in fused] == ["+50.0%"] * 2
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {7}


@pytest.mark.parametrize("text", ["{", "[]", '{"bench_version": 2}', "\xff"])
def test_a_file_that_is_not_a_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"x\.json"):
        reports.read_report(path)


def test_a_plot_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert main(["bench", "--from", str(report), "--plot", "a.png"]) == 1
    assert "pip install 'q4jit[plot]'" in capsys.readouterr().err
    with pytest.raises(TargetError):
        roofline.check()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn(report: Path, tmp_path: Path, suffix: str) -> None:
    try:
        roofline.check()
    except TargetError as error:
        lack(str(error))
    path = tmp_path / f"roof{suffix}"
    assert main(["bench", "--from", str(report), "--plot", str(path)]) == 0
    data = path.read_bytes()
    assert len(data) > 5000
    if suffix == ".svg":
        labels = {"f32, M = 1", "f32, M = 8", "f16, M = 1", "f16, M = 8"}
        labels.add("Fake, f32 arrays: read at 1 GB/s")
        assert labels <= set(re.findall(r"<!-- (.*?) -->", data.decode()))


def test_the_roof_and_the_intensity_of_a_product() -> None:
    stored = {"weight_bytes": 1000, "m": 10, "k": 64, "n": 32, "us": 1.0, "name": READ}
    assert roofline.intensity(stored) == 2 * 10 * 64 * 32 / (1000 + 4 * 10 * 96)
    bf16 = roofline.intensity({**stored, "dtype": "bf16"})
    assert bf16 == 2 * 10 * 64 * 32 / (1000 + 2 * 10 * 96)
    reads = [{**stored, "gb_per_s": 2.0}, {**stored, "gb_per_s": 3.0}, {**stored, "us": None}]
    assert roofline.roof(reads) == 3e9
    assert roofline.roof(reads[2:]) is None
