"""`q4jit tune` without a GPU: the search, its output, and refused options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from q4jit.hip import tunings
from q4jit.hip.search import key_for
from q4jit.hip.tunings import Key
from q4jit.targets import Target
from q4jit.tools.cli.main import main
from q4jit.tools.cli.tune import _DEFAULT_ROWS, _DEFAULT_SHAPES
from q4jit.weights.formats import FORMATS
from q4jit.weights.reference import random_weight
from tests.support.fake_bench import DEVICE, MACHINE, SearchBench
from tests.support.tuning_files import KEY, SLOW, TUNINGS

Tune = Callable[..., str]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's file of tunings, in the test's own cache directory."""
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tunings, "_kept", {})
    return tmp_path / "cache" / "tunings.json"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the devices that the command opens; they run nothing."""
    names: list[str] = []

    def find(name: str, without: str) -> Any:
        names.append(name)
        return DEVICE

    monkeypatch.setattr("q4jit.tools.cli.arguments.find_device", find)
    monkeypatch.setattr("q4jit.tools.cli.tune.Bench", SearchBench)
    return names


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str]) -> Tune:
    """Return a function that runs the command, checks its status and returns its output."""

    def run(*arguments: str | Path, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["tune", *map(str, arguments)]) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Tune:
    """Return a function that runs an invalid command line and returns its error line."""

    def run(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as end:
            main(["tune", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
        return err

    return run


def test_a_search_is_printed_and_stored(opened: list[str], tune: Tune, file: Path) -> None:
    out = tune("--shape", "64x5", "--m", "1", "--m", "3", "--m", "4", "--precision", "f32")
    assert opened == ["hip"]
    assert f"{DEVICE}, fake 1.0: 2 products\n" in out
    assert "\nQ4_0 [64, 5], M class 1, f32\n" in out
    assert "\nQ4_0 [64, 5], M class 4, f32\n" in out
    assert out.count("\n*") == 2
    assert out.endswith(f"stored in {file}\n")
    keys = [key for _, key in tunings.load(file)]
    assert keys == [Key(64, 5, "Q4_0", m, "f32") for m in (1, 4)]
    assert tune("--shape", "64x5", "--m", "1") != ""


@pytest.mark.parametrize(("given", "name"), [("gfx1100", "hip:gfx1100"), ("cuda:0", "cuda:0")])
def test_a_device_is_given_by_arch_or_name(
    given: str, name: str, opened: list[str], tune: Tune
) -> None:
    tune("--device", given, "--shape", "64x5", "--m", "1")
    assert opened == [name]


def test_the_weights_of_a_file(opened: list[str], tune: Tune, file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(model, "test")
    for name, n in (("a.weight", 3), ("b.weight", 7), ("c.weight", 7)):
        blocks = random_weight("Q8_0", 64, n).raw
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tune("--gguf", model, "--m", "1,2", "--m", "1", "--precision", "f32", "--precision", "i8")
    searched = {(key.format, key.k, key.n, key.precision) for _, key in tunings.load(file)}
    assert searched == {("Q8_0", 64, n, p) for n in (3, 7) for p in ("f32", "i8")}
    assert {key.m for _, key in tunings.load(file)} == {1, 2}


def test_the_default_shapes_are_those_of_large_models() -> None:
    assert all(size >= 4096 for shape in _DEFAULT_SHAPES for size in shape)
    for k, _ in _DEFAULT_SHAPES:
        FORMATS["Q4_0"].column_bytes(k)
    target = Target("hip", "gfx1100")
    classes = {key_for(target, 64, 5, ("Q4_0",), m, "f32").m for m in _DEFAULT_ROWS}
    assert classes == {1, 2, 4, 8, 16, 32, 64, 512, 1024}


def test_the_command_fails_if_every_kernel_is_wrong(
    opened: list[str], tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SearchBench, "fault", staticmethod(lambda kernel, y: y.fill(0)))
    out = tune("--shape", "64x5", "--m", "1", status=1)
    assert "candidates were rejected" in out
    assert "\n*" not in out


# --- exchange -------------------------------------------------------------------------------------


def test_export_and_merge(opened: list[str], tune: Tune, file: Path, tmp_path: Path) -> None:
    tune("--shape", "64x5", "--m", "1", "--format", "f16")
    trials = tunings.load(file)[MACHINE, Key(64, 5, "F16", 1, "f32")]
    everything, winners = tmp_path / "all.json", tmp_path / "winners.json"
    out = tune("--export", everything)
    assert out == f"{everything}: 1 product, {len(trials)} trials\n"
    assert tunings.load(everything) == tunings.load(file)
    assert tune("--export", winners, "--winners") == f"{winners}: 1 product, 1 trial\n"
    assert list(tunings.load(winners).values()) == [(tunings.best(trials),)]
    other = tmp_path / "other.json"
    other.write_text(tunings.to_text(TUNINGS))
    assert tune("--merge", other) == f"{file}: added 1 product, 3 trials from {other}\n"
    assert len(tunings.load(file)) == 2
    assert opened == ["hip"]


def test_merged_then_exported(tune: Tune, file: Path, tmp_path: Path) -> None:
    other, both = tmp_path / "other.json", tmp_path / "both.json"
    other.write_text(tunings.to_text(TUNINGS))
    tunings.keep(MACHINE, KEY, (SLOW,))
    tune("--merge", other, "--export", both)
    assert set(tunings.load(both)) == {(MACHINE, KEY), *TUNINGS}


def test_a_merged_file_is_checked(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    data = json.loads(tunings.to_text(TUNINGS))
    data["tunings"][0]["k"] = "\x1b[2J"
    other.write_text(json.dumps(data))
    assert main(["tune", "--merge", str(other)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"q4jit tune: {other}: tunings[0].k: expected a whole number from 1, got '\\x1b[2J'\n"
    )
    assert not file.exists()
    assert main(["tune", "--merge", str(tmp_path / "none.json")]) == 1
    assert "none.json: No such file" in capsys.readouterr().err


# --- refused options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "expected K and N, for example 4096x14336, got '4096'"),
        (["--shape", "0x5"], "got '0x5'"),
        (["--shape", "64x5x6"], "got '64x5x6'"),
        (["--m", "1,0"], "argument --m: expected a whole number from 1, got '0'"),
        (["--format", "q9"], "unknown format 'q9'"),
        (["--precision", "f64"], "'f64'"),
        (["--winners"], "--winners requires --export"),
        (["--export", "no/a"], "--export: expected a file in a writable folder, got no/a"),
        (["--merge", "a", "--winners"], "--winners requires --export"),
        (["--export", "a", "--m", "1"], "--m cannot be combined with --export or --merge"),
        (["--merge", "a", "--shape", "64x5", "--device", "hip"], "--device, --shape cannot be"),
    ],
)
def test_an_invalid_command_line(arguments: list[str], message: str, refused: Tune) -> None:
    assert message in refused(*arguments)


def test_invalid_weights_are_refused_before_a_device_is_opened(refused: Tune) -> None:
    assert "Q4_0" in refused("--shape", "65x5")
    assert "expected either --gguf, or --shape and --format, got options of both" in refused(
        "--gguf", "a", "--shape", "64x5"
    )


def test_without_a_gpu_the_reason_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("q4jit.runtime.devices._NODES", {"amd": (), "nvidia": ()})
    assert main(["tune"]) == 1
    assert capsys.readouterr().err.startswith("q4jit tune: ")
