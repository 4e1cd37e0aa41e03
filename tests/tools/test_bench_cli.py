"""The command `q4jit bench`: invalid options, exit statuses, documentation."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from q4jit.tools.cli.main import main, make_parser
from q4jit.tools.compare import gpu_read, roofline
from q4jit.tools.compare.arena import LIMITS, READ
from q4jit.tools.compare.speed_targets import read_speed_targets
from tests.support.fake_arena import FakeArena, K, N, fault_of, one_wrong
from tests.support.paths import ROOT
from tests.support.tools import require_tool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "63x5"], "63"),
        (["--precision", "f64"], "expected f32, f16, i8, separated by commas, got 'f64'"),
        (["--format", "q4_0,q9_9"], "--format: unknown format 'q9_9'; known formats: F32, F16,"),
        (["--format", "q8_0,q4_k", "--shape", "288x5"], "expected a positive multiple of 256"),
        (["--dtype", "f16,f64"], "--dtype: expected f32, f16, bf16, separated by commas, got"),
        (["--m", "1,,2"], "--m: expected a whole number from 1, got ''"),
        (["--threads", "1025"], "--threads: expected 1 to 1024 threads, got '1025'"),
        (["--threads", "1,0"], "expected a whole number from 1, got '0'"),
        (
            ["--cached", "--target", "cpu", "--target", "hip:0"],
            "--target: expected only cpu together with --cached, got cpu, hip:0",
        ),
        (
            ["--target", "cpu:x86-64"],
            "--target: expected cpu (this machine's) or a GPU, got cpu:x86-64",
        ),
        (["--json", "no/a.json"], "--json: expected a file in a writable folder, got no/a.json"),
        (["--json", "."], "--json: expected a file in a writable folder, got ."),
        (["--plot", "no/a.png"], "--plot: expected a file in a writable folder, got no/a.png"),
        (["--plot", "a.txt"], "--plot: expected a name that ends in .png, .svg, .pdf, got a.txt"),
        (["--from", "x", "--shape", "64x5", "--fused"], "--shape, --fused cannot be combined"),
        (["--from", "x", "--dtype", "f16"], "--dtype cannot be combined with --from, which"),
        (["--from", "x", "--cached"], "--cached cannot be combined with --from, which"),
        (["--from", "x"], "--from requires --markdown or --plot"),
    ],
)
def test_an_invalid_command_line_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(roofline, "check", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["bench", *options])
    out, err = capsys.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_bf16_needs_ml_dtypes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["bench", "--dtype", "f16,bf16"])
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "--dtype: NumPy has no bfloat16 without ml_dtypes; run pip install ml_dtypes" in err


def test_a_wrong_kernel_changes_the_exit_status_and_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena = FakeArena(fault_of("q4jit f32", one_wrong))
    monkeypatch.setattr("q4jit.tools.cli.bench.CpuArena", lambda *given: arena)
    path = tmp_path / "b.json"
    options = ["bench", "--target", "cpu", "--shape", f"{K}x{N}", "--m", "1", "--json", str(path)]
    assert main([*options, "--precision", "f32"]) == 1
    report = json.loads(path.read_text("utf-8"))
    assert report["command"] == ["q4jit", *options, "--precision", "f32"]
    assert [stored["wrong"] for stored in report["runs"][0]["rows"]] == [False, True, False]
    arena.fault = None
    assert main([*options, "--precision", "f32"]) == 0


def test_an_interrupted_run_saves_its_measurements(
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
    report = json.loads(path.read_text("utf-8"))
    assert report["ended_by"] == "KeyboardInterrupt"
    assert [stored["m"] for stored in report["runs"][0]["rows"]] == [1] * 3


def test_a_library_other_than_ggml_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "--target", "cpu", "--shape", "64x37", "--m", "1", "--ggml"]
    base, cpu = tmp_path / "libggml-base.so", tmp_path / "libggml-cpu.so"

    def refusal(path: Path) -> str:
        with pytest.raises(SystemExit) as end:
            main([*options, str(path)])
        out, err = capsys.readouterr()
        assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
        assert f"--ggml {path}: " in err
        return err

    accepted = "expected libggml-base.so and libggml-cpu.so, or their folder, got"
    assert f"{accepted} a path that does not exist" in refusal(tmp_path / "no" / "folder")
    assert f"{accepted} a path that does not exist" in refusal(cpu)
    without_both = f"{accepted} a folder without libggml-base.so and libggml-cpu.so"
    assert without_both in refusal(tmp_path)
    base.write_text("no library")
    assert f"{accepted} a folder without libggml-cpu.so" in refusal(tmp_path)
    assert f"{accepted} a file without libggml-cpu.so beside it" in refusal(base)
    cpu.write_text("no library")
    assert "cannot load the libraries: " in refusal(cpu)


def test_the_documentation_names_every_peer_limit_and_target() -> None:
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
            for each in read_speed_targets(ROOT / "docs" / "targets.json")
            if (each.precision, each.against, each.cached) == (precision, "ggml", False)
        ]
        assert [each.m for each in targets] == [1, 4, 8, 512]
        shown = " | ".join(f"{each.least[1]} / {each.least[2]}" for each in targets)
        assert f"| `{precision}` | {shown} |" in aims
    assert len(gpu_read._READ_TEXTS) * len(gpu_read._READ_BLOCKS) == 35  # as the page says


def test_make_bench_runs_a_valid_command() -> None:
    lines = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    (words,) = re.findall(r"-m q4jit (bench .*?) \$\$RUN_ARGS", lines)
    options = make_parser().parse_args(words.replace('"$$1"', "lib").split())
    assert (options.target, options.threads, options.ggml) == (["cpu"], (1, 2), Path("lib"))
    assert read_speed_targets(ROOT / options.targets)
    done = subprocess.run(
        [require_tool("make", "make"), "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r"^bench +compare with ggml", done.stdout, re.MULTILINE)
