"""`q4jit inspect`: what a file holds, which kernels would serve it, and what cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q4jit.errors import TargetError
from q4jit.runtime.driver import Device
from q4jit.tools import inspect
from q4jit.tools.cli import inspect as command
from q4jit.tools.cli.main import main
from q4jit.weights.formats import FORMATS
from tests.support.gguf_files import STRING, U16, U64, build, key, tensor, text, u64

ON_CPU = ["--target", "cpu:x86-64"]  # it has no kernels of integers
PRODUCTS = "x @ w, and of np.vecmat(x, w[ids]) with experts,"
REPORT = f"""\
  9 tensors, 2 keys, 43.8 KiB in 1 file

  format   tensors      bytes   bits  use
  Q6_K           1   26.2 KiB   6.56  1 expert tensor
  Q4_0           3   15.8 KiB   4.50  3 matrices
  F32            2    1.0 KiB  32.00  1 vector, 1 not usable
  IQ2_XXS        2  198 bytes   2.06  2 not usable
  type 99        1   32 bytes      ?  1 not usable

kernels of {PRODUCTS} on cpu:x86-64, precision f32
  M  format  kernels                            tensors  K × N
  1  Q4_0    columns, M = 1                           3  256 × 32, 256 × 48
  1  Q6_K    columns, M = 1, grouped by expert        1  256 × 32 × 4

kernels of {PRODUCTS} on cpu:x86-64, precision i8
  M  format  kernels                                                   tensors  K × N
  1  Q4_0    columns, M = 1; more exact than asked                           3  256 × 32, 256 × 48
  1  Q6_K    columns, M = 1, grouped by expert; more exact than asked        1  256 × 32 × 4

not usable: 4 tensors
  old, older: expected a format that q4jit reads, got IQ2_XXS (ggml type 16)
  future: expected a format that q4jit reads, got unknown (ggml type 99)
  none: expected dimensions of at least 1, got (0,)
"""


def model(*more: bytes) -> bytes:
    """Return a file with matrices of two formats, experts, vectors, and tensors of no use.

    more: further keys.
    """
    keys = (
        key("general.architecture", STRING, text("llama")),
        key("general.name", STRING, text("a tiny one")),
        *more,
    )
    sizes = {fmt: FORMATS[fmt].column_bytes(256) for fmt in ("Q4_0", "Q6_K")}
    at, entries = 0, []
    for name_, dims, kind, size in (
        ("up", (256, 32), 2, 32 * sizes["Q4_0"]),
        ("down", (256, 32), 2, 32 * sizes["Q4_0"]),
        ("wide", (256, 48), 2, 48 * sizes["Q4_0"]),
        ("experts", (256, 32, 4), 14, 4 * 32 * sizes["Q6_K"]),
        ("norm", (256,), 0, 1024),
        ("old", (256, 2), 16, 132),
        ("older", (256, 1), 16, 66),
        ("future", (5,), 99, 32),
        ("none", (0,), 0, 0),
    ):
        entries.append(tensor(name_, dims, kind, at))
        at += -(-size // 32) * 32
    return build(keys=keys, tensors=tuple(entries), data=bytes(at))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(model())
    return path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """`shown(*arguments)` runs the command and returns the lines that it prints."""

    def run(*arguments: str | Path) -> list[str]:
        assert main(["inspect", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    return run


def test_the_report_as_text(path: Path, shown: Callable[..., list[str]]) -> None:
    lines = shown(path, *ON_CPU, "--m", "1", "--precision", "f32,i8")
    assert lines[0] == f"{path}: llama (a tiny one)"
    assert "\n".join(lines[1:]) + "\n" == REPORT


def test_the_report_as_json(path: Path, shown: Callable[..., list[str]]) -> None:
    gpu = ["--target", "gfx1100", "--precision", "i8", "--m", "1", "--json"]
    report = json.loads("\n".join(shown(path, *gpu)))
    assert report["files"] == [{"path": str(path), "size_bytes": path.stat().st_size}]
    assert (report["architecture"], report["name"], report["keys"]) == ("llama", "a tiny one", 2)
    uses = {t["name"]: t["use"] for t in report["tensors"]}
    assert uses == {
        "up": "matrix",
        "down": "matrix",
        "wide": "matrix",
        "experts": "experts",
        "norm": "vector",
        "old": "unused",
        "older": "unused",
        "future": "unused",
        "none": "unused",
    }
    assert report["tensors"][5] == {
        "name": "old",
        "format": "IQ2_XXS",
        "ggml_type": 16,
        "shape": [256, 2],
        "size_bytes": 132,
        "use": "unused",
        "problem": "expected a format that q4jit reads, got IQ2_XXS (ggml type 16)",
    }
    formats = {row["format"]: (row["tensors"], row["matrix"]) for row in report["formats"]}
    assert formats["Q4_0"] == (3, 3)
    first = report["kernels"][0]
    assert {name: first[name] for name in ("target", "device", "M", "shape", "tensors")} == {
        "target": "hip:gfx1100",
        "device": None,
        "M": 1,
        "shape": [256, 32],
        "tensors": 2,
    }
    assert [(row["format"], row["shape"]) for row in report["kernels"]] == [
        ("Q4_0", [256, 32]),
        ("Q4_0", [256, 48]),
        ("Q6_K", [256, 32, 4]),
    ]
    assert any(kernel["multiplies"] for kernel in first["kernels"])
    assert "upper bound" in first["remarks"]["precision"][0]
    assert first["remarks"]["constants"]


def test_a_gpu_kernel_that_is_more_exact_says_so(
    path: Path, shown: Callable[..., list[str]]
) -> None:
    lines = shown(path, "--target", "gfx1100", "--precision", "i8", "--m", "1")
    (line,) = (line for line in lines if "256 × 48" in line)
    assert "  gemv_matrix, M = 1; more exact than asked  " in line


def test_experts_are_served_as_their_ids_choose(
    path: Path, shown: Callable[..., list[str]]
) -> None:
    lines = shown(path, "--target", "gfx1100", "--m", "1,40")
    one, many = (line for line in lines if "256 × 32 × 4" in line)
    assert " gemv, M = 1 " in one
    assert " gemv, 8 vectors of an expert a tile, " in many


def test_this_machine_is_the_default(path: Path, shown: Callable[..., list[str]]) -> None:
    lines = shown(path)
    headings = [line for line in lines if line.startswith("kernels of")]
    assert " with experts, on cpu:" in headings[-1]
    rows = [line.split()[0] for line in lines if " Q6_K " in line and " × " in line]
    assert rows == ["1", "8", "512"] * len(headings)


def test_each_model_of_gpu_is_a_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(index: int, name: str, arch: str) -> Device:
        sizes = (1 << 30, 60, 1 << 16, 1024, 32, 0, 0)
        return Device("amd", index, name, arch, str(index), *sizes, integrated=False)

    models = [("A", "gfx1100"), ("A", "gfx1100"), ("old", "gfx803"), ("B", "gfx942")]
    devices = tuple(device(i, *model) for i, model in enumerate(models))
    monkeypatch.setattr(command, "find_devices", lambda: devices)
    assert command._targets_here() == ["hip:0", "hip:3", "cpu"]


def test_a_weight_without_a_kernel_says_why(
    path: Path, shown: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise TargetError("no compiler:\n  it is missing")

    monkeypatch.setattr(inspect, "_planned", refuse)
    lines = shown(path, *ON_CPU, "--m", "1")
    assert "  1  Q4_0    none: no compiler: it is missing        3  256 × 32, 256 × 48" in lines


def test_a_split_model(tmp_path: Path, shown: Callable[..., list[str]]) -> None:
    counts = key("split.count", U16, b"\2\0"), key("split.tensors.count", U64, u64(10))
    first = model(key("split.no", U16, b"\0\0"), *counts)
    second = build(
        keys=(key("split.no", U16, b"\1\0"), *counts),
        tensors=(tensor("last", (8,)),),
        data=bytes(32),
    )
    for number, data in enumerate((first, second)):
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(data)
    lines = shown(tmp_path / "m-00002-of-00002.gguf", *ON_CPU)
    assert lines[0] == f"{tmp_path / 'm-00001-of-00002.gguf'}: llama (a tiny one)"
    assert lines[1].startswith("  10 tensors, 5 keys, ")
    assert lines[1].endswith(" in 2 files")
    assert any("2 vectors, 1 not usable" in line for line in lines)


def test_a_file_of_vectors_only(tmp_path: Path, shown: Callable[..., list[str]]) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(build(tensors=(tensor("v", (4,)),), data=bytes(32)))
    lines = shown(path, *ON_CPU)
    assert lines[0] == f"{path}: unknown architecture"
    assert lines[3:] == [
        "  format  tensors     bytes   bits  use",
        "  F32           1  16 bytes  32.00  1 vector",
        "",
        "every tensor can be used",
    ]


def test_a_hostile_file_gives_a_short_report(
    tmp_path: Path, shown: Callable[..., list[str]]
) -> None:
    path = tmp_path / "hostile.gguf"
    entries = tuple(tensor(f"\x1b[2J{'n' * 999}{i}", (0,) * (i % 50 + 1)) for i in range(500))
    keys = (
        key("general.architecture", STRING, text("\x1b[2J" + "a" * 10_000)),
        key("general.name", STRING, text(b"\xff")),
    )
    path.write_bytes(build(keys=keys, tensors=entries))
    lines = shown(path, *ON_CPU)
    assert len(lines) < 40
    assert max(map(len, lines)) < 600
    assert "\x1b" not in "".join(lines)
    assert lines[-1] == "  … and 30 more reasons"
    assert json.loads("\n".join(shown(path, "--json")))["name"] is None


def test_errors(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, message in (
        ([path, "--target", "gfx9"], 1, "unknown target 'gfx9'"),
        ([path, "--target", "hip:77"], 1, "no device 'hip:77'"),
        ([path, "--m", "0"], 2, "argument --m: expected a whole number from 1"),
        ([path, "--precision", "f64"], 2, "expected f32, f16, i8, separated by commas"),
        ([tmp_path / "nothing"], 1, "No such file or directory"),
        ([Path(__file__)], 1, "magic at byte 0: expected b'GGUF'"),
        ([], 2, "the following arguments are required: FILE"),
    ):
        try:
            actual = main(["inspect", *map(str, arguments)])
        except SystemExit as end:
            actual = int(end.code or 0)
        out, err = capsys.readouterr()
        assert (actual, out) == (status, "")
        assert message in err
        assert len(err.splitlines()) == 1
