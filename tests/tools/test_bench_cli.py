"""`q4jit bench` as a command: what it refuses, its exit status, its documentation."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from q4jit.tools.cli.main import main, make_parser
from q4jit.tools.compare import gpu_read, roofline
from q4jit.tools.compare.arena import LIMITS, READ
from q4jit.tools.compare.targets import read_targets
from tests.support.fake_arena import FakeArena, K, N, at, one_wrong
from tests.support.paths import ROOT
from tests.support.tools import require_tool


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shape", "63x5"], "63"),
        (["--precision", "f64"], "accepted are f32, f16, i8"),
        (["--m", "1,,2"], "whole numbers from 1"),
        (["--threads", "1025"], "accepted are 1 to 1024 threads"),
        (["--threads", "1,0"], "whole numbers from 1"),
        (["--cached", "--target", "cpu", "--target", "hip:0"], "accepted with the CPU alone"),
        (["--json", "no/a.json"], "--json no/a.json: accepted is a file in a folder"),
        (["--json", "."], "--json .: accepted is a file in a folder"),
        (["--plot", "no/a.png"], "--plot no/a.png: accepted is a file in a folder"),
        (["--plot", "a.txt"], "accepted are .png, .svg, .pdf"),
        (["--from", "x", "--shape", "64x5", "--fused"], "--shape, --fused found with --from"),
        (["--from", "x", "--cached"], "--cached found with --from"),
        (["--from", "x"], "nothing to do"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(roofline, "check", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["bench", *options])
    out, err = capsys.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


def test_the_exit_status_and_the_report_tell_of_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena = FakeArena(at("q4jit f32", one_wrong))
    monkeypatch.setattr("q4jit.tools.cli.bench.CpuArena", lambda *given: arena)
    path = tmp_path / "b.json"
    options = ["bench", "--target", "cpu", "--shape", f"{K}x{N}", "--m", "1", "--json", str(path)]
    assert main([*options, "--precision", "f32"]) == 1
    found = json.loads(path.read_text("utf-8"))
    assert found["command"] == ["q4jit", *options, "--precision", "f32"]
    assert [row["wrong"] for row in found["runs"][0]["rows"]] == [False, True, False]
    arena.fault = None
    assert main([*options, "--precision", "f32"]) == 0


def test_what_was_measured_before_an_interrupt_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena = FakeArena()

    def fault(name: str, _: Any) -> None:
        if len(arena.turns) > 40:
            raise KeyboardInterrupt

    arena.fault = fault
    monkeypatch.setattr("q4jit.tools.cli.bench.CpuArena", lambda *given: arena)
    path = tmp_path / "b.json"
    options = ["--shape", f"{K}x{N}", "--m", "1,2,3", "--precision", "f32", "--json", str(path)]
    assert main(["bench", "--target", "cpu", *options]) == 130
    found = json.loads(path.read_text("utf-8"))
    assert found["ended_by"] == "KeyboardInterrupt"
    assert [row["m"] for row in found["runs"][0]["rows"]] == [1] * 3


def test_a_library_that_is_no_ggml_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "--target", "cpu", "--shape", "64x37", "--m", "1", "--ggml"]
    base, cpu = tmp_path / "libggml-base.so", tmp_path / "libggml-cpu.so"

    def told(path: Path) -> str:
        with pytest.raises(SystemExit) as end:
            main([*options, str(path)])
        out, err = capsys.readouterr()
        assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
        assert f"--ggml {path}: found " in err
        return err

    accepted = "accepted is a folder with libggml-base.so and libggml-cpu.so, or a file in it"
    assert f"found nothing, {accepted}" in told(tmp_path / "no" / "folder")
    assert f"found nothing, {accepted}" in told(cpu)
    wanted = f"found a folder without libggml-base.so and libggml-cpu.so, {accepted}"
    assert wanted in told(tmp_path)
    base.write_text("no library")
    assert f"found a folder without libggml-cpu.so, {accepted}" in told(tmp_path)
    assert f"found a file without libggml-cpu.so beside it, {accepted}" in told(base)
    cpu.write_text("no library")
    assert "found libraries that cannot be loaded: " in told(cpu)


def test_the_documentation_knows_every_peer_and_option() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    modules = (ROOT / "q4jit" / "tools" / "compare").glob("*.py")
    source = "".join(path.read_text("utf-8") for path in modules)
    named = set(re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)) - {"f32", "f16", "i8"}
    for name in named:
        assert f'"{name}"' in source
    assert len(named) == 6
    for name in LIMITS - {READ}:
        assert f"`{name}`" in text
    aims = text[text.index("| | M = 1 | M = 4 | M = 8 | M = 512 |") :]
    for precision in ("i8", "f32"):
        targets = [
            each
            for each in read_targets(ROOT / "docs" / "targets.json")
            if (each.precision, each.against, each.cached) == (precision, "ggml", False)
        ]
        assert [each.m for each in targets] == [1, 4, 8, 512]
        shown = " | ".join(f"{each.least[1]} / {each.least[2]}" for each in targets)
        assert f"| `{precision}` | {shown} |" in aims
    parser = make_parser()
    for line in re.findall(r"^\$ q4jit (.*)$", text, re.MULTILINE):
        assert parser.parse_args(line.split()).run
    assert len(gpu_read._READ_TEXTS) * len(gpu_read._READ_BLOCKS) == 35  # as it says


def test_make_bench_is_a_command() -> None:
    lines = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    (words,) = re.findall(r"-m q4jit (bench .*?) \$\$RUN_ARGS", lines)
    options = make_parser().parse_args(words.replace('"$$1"', "lib").split())
    assert (options.target, options.threads, options.ggml) == (["cpu"], (1, 2), Path("lib"))
    assert read_targets(ROOT / options.targets)
    done = subprocess.run(
        [require_tool("make", "make"), "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r"^bench +compare with ggml", done.stdout, re.MULTILINE)
