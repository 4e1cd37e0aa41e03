"""The command `q4jit`: what it writes, and one line and an exit status for every error."""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from q4jit.compilers.clang import Clang
from q4jit.compilers.find import find_compiler
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target
from q4jit.tools.aot.layout import LAYOUTS, describe_layout
from q4jit.tools.cli.build import _with_progress
from q4jit.tools.cli.main import main, make_parser
from q4jit.version import version
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR, pack
from tests.support.gguf_files import build, tensor
from tests.support.kernels import weight
from tests.support.tools import lack

ONE = ["--k", "64", "--n", "5", "--format", "q4_0", "--arch", "gfx1100", "--m", "1"]
Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _pinned_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "ziglang")


@pytest.fixture
def ziglang() -> None:
    try:
        find_compiler(Target("hip", "gfx1100"))
    except TargetError as error:
        lack(str(error))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(status, *arguments)` runs a failing command and returns its line of standard error."""

    def run(status: int, *arguments: str | Path) -> str:
        try:
            actual = main([str(argument) for argument in arguments])
        except SystemExit as end:
            actual = int(end.code or 0)
        out, err = capsys.readouterr()
        assert (actual, out) == (status, "")
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1, err
        return err.strip()

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a file with four matrices (two of one shape and format, one in F32) and a vector."""
    path = tmp_path / "model.gguf"
    write_gguf(
        path, {"a": ("Q4_0", 64, 5), "b": ("Q4_0", 64, 5), "c": ("Q8_0", 32, 3), "f": ("F32", 8, 4)}
    )
    return path


def write_gguf(path: Path, tensors: dict[str, tuple[str, int, int]]) -> None:
    writer = gguf.GGUFWriter(path, "test")
    for i, (name, (fmt, k, n)) in enumerate(tensors.items()):
        rows = weight(fmt, k, n, seed=i).tensor.raw
        kind = gguf.GGMLQuantizationType[fmt]
        if fmt == "F32":
            writer.add_tensor(name, rows.view(np.float32))
        else:
            writer.add_tensor(name, rows, raw_dtype=kind)
    writer.add_tensor("vector", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- success --------------------------------------------------------------------------------------


COMMANDS = ("build", "pack", "inspect", "tune", "bench", "selftest", "doctor", "cache")


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, wanted in (
        (["--help"], "q4jit build --k 4096"),
        *(([command, "--help"], "exit status:\n  0    ") for command in COMMANDS),
        (["--version"], f"q4jit {version()}\n"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert wanted in capsys.readouterr().out


def test_every_option_has_a_help_text() -> None:
    parsers = subparsers()
    assert tuple(parsers) == COMMANDS
    for name, parser in parsers.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, (name, action.option_strings)


def test_the_examples_of_the_help_are_valid() -> None:
    parser = make_parser()
    for text in (parser.epilog, *(each.epilog for each in subparsers().values())):
        lines = re.findall(r"^  q4jit (.*)$", text or "", re.MULTILINE)
        assert lines
        for line in lines:
            assert parser.parse_args(line.split()).run


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "q4jit"]
    for arguments, status, out in (
        (["--version"], 0, f"q4jit {version()}\n"),
        (["--unknown"], 2, ""),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, out)


@pytest.mark.usefixtures("ziglang")
def test_a_build_of_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    arguments = ["build", "--gguf", str(model), "--arch", "gfx1030", "--m", "1,2", "--m", "2"]
    assert main([*arguments, "--out", str(out)]) == 3
    shown = capsys.readouterr()
    assert shown.out == f"{out}: 4 kernels for gfx1030, manifest.json, q4jit_kernels.h\n"
    assert shown.err == "q4jit build: left out 1 matrix: f: F32 is not a block format\n"
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert [
        (p["format"], p["K"], p["N"], p["M"]["max"], p["tensors"]) for p in manifest["products"]
    ] == [
        ("Q4_0", 64, 5, 1, ["a", "b"]),
        ("Q4_0", 64, 5, 2, ["a", "b"]),
        ("Q8_0", 32, 3, 1, ["c"]),
        ("Q8_0", 32, 3, 2, ["c"]),
    ]
    assert manifest["left_out"] == {"f": "F32 is not a block format"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_writes_the_packed_bytes_and_their_description(
    model: Path, layout: str, tmp_path: Path
) -> None:
    out = tmp_path / "b.bin"
    tensor = ["--gguf", str(model), "--tensor", "b"]
    arguments = ["pack", *tensor, "--layout", layout, "--out", str(out)]
    assert main(arguments) == 0
    raw = weight("Q4_0", 64, 5, seed=1).tensor.raw
    wanted = raw.tobytes() if layout == GGUF else pack(FORMATS["Q4_0"], layout, raw).tobytes()
    assert out.read_bytes() == wanted
    about = json.loads((tmp_path / "b.bin.json").read_bytes())
    assert (about["tensor"], about["format"], about["K"], about["N"]) == ("b", "Q4_0", 64, 5)
    assert about["weight"] == describe_layout(FORMATS["Q4_0"], layout, (64, 5))
    assert about["files"]["b.bin"]["sha256"] == hashlib.sha256(wanted).hexdigest()
    assert main(arguments) == 0  # replaces its own files


def write_odd_gguf(path: Path) -> None:
    """Write a file with experts, a matrix and a vector that are not read, and an empty tensor."""
    raw = weight("Q4_0", 64, 6).tensor.raw.tobytes() + bytes(8)
    size = len(raw)
    entries = (
        tensor("experts", (64, 3, 2), 2),
        tensor("old", (256, 2), 16, size),  # IQ2_XXS
        tensor("numbers", (4,), 26, size + 160),  # I32
        tensor("empty", (0, 7), 0, size + 160),
    )
    path.write_bytes(build(tensors=entries, data=raw + bytes(160 + 32)))


@pytest.mark.usefixtures("ziglang")
def test_a_build_says_which_matrices_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "odd.gguf", tmp_path / "out"
    write_odd_gguf(path)
    arguments = ["build", "--gguf", str(path), "--arch", "gfx1030", "--m", "1"]
    assert main([*arguments, "--out", str(out)]) == 3
    assert capsys.readouterr().err == (
        "q4jit build: left out 2 matrices: old: expected a format that q4jit reads, got IQ2_XXS "
        "(ggml type 16); empty: expected dimensions of at least 1, got (0, 7)\n"
    )
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert set(manifest["left_out"]) == {"old", "empty"}
    (product,) = manifest["products"]
    assert (product["K"], product["N"], product["tensors"]) == (64, 3, ["experts"])


def test_pack_writes_the_matrices_of_experts_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "odd.gguf", tmp_path / "w"
    write_odd_gguf(path)
    assert main(["pack", "--gguf", str(path), "--tensor", "experts", "--out", str(out)]) == 0
    matrices = weight("Q4_0", 64, 6).tensor.raw.reshape(2, 3, -1)
    wanted = b"".join(pack(FORMATS["Q4_0"], PLANAR, w).tobytes() for w in matrices)
    assert out.read_bytes() == wanted
    about = json.loads((tmp_path / "w.json").read_bytes())
    assert (about["K"], about["N"], about["experts"]) == (64, 3, 2)
    assert 2 * about["weight"]["size_bytes"] == len(wanted)
    line = f"w: experts, 2 × Q4_0 [64, 3], layout planar, {len(wanted)} bytes"
    assert line in capsys.readouterr().out


# --- existing files -------------------------------------------------------------------------------


@pytest.mark.usefixtures("ziglang")
def test_foreign_files_are_kept(
    fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "manifest.json").write_text('{"mine": 1}')
    error = fails(1, "build", *ONE, "--out", out)
    assert (
        "contains files that q4jit did not write, or that were changed: manifest.json; choose"
        in error
    )
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        "notes.txt": "mine",
        "manifest.json": '{"mine": 1}',
    }
    assert main(["build", *ONE, "--out", str(out), "--force"]) == 0
    assert f"{out}: 1 kernel for gfx1100, " in capsys.readouterr().out
    first = {p.name for p in out.iterdir()}
    assert main(["build", *ONE[:-1], "2", "--out", str(out)]) == 0  # replaces its own files
    second = {p.name for p in out.iterdir()}
    assert "notes.txt" in second
    assert first - second == {f"q4_0_k64_n5_f32_planar_m1_gfx1100{s}" for s in (".hip", ".hsaco")}
    (out / "q4jit_kernels.h").write_text("edited")
    capsys.readouterr()
    assert "were changed: q4jit_kernels.h" in fails(1, "build", *ONE, "--out", out)


@pytest.mark.usefixtures("ziglang")
def test_a_failed_build_leaves_nothing(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(Clang, "compile_object", refuse)
    out = tmp_path / "deep" / "out"
    assert "No space left" in fails(1, "build", *ONE, "--out", out)
    assert not (tmp_path / "deep").exists()


@pytest.mark.usefixtures("ziglang")
def test_a_missing_msgpack_is_reported_before_the_work(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "msgpack", None)
    monkeypatch.setattr(Clang, "compile_object", refuse)
    error = fails(1, "build", *ONE, "--out", tmp_path / "out")
    assert "pip install 'q4jit[cross]'" in error


def test_the_command_of_a_repro_can_be_pasted(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CompileError("clang", (), "error: no", "", repro=tmp_path / "a b")

    monkeypatch.setattr("q4jit.tools.cli.pack.pack_tensor", fail)
    error = fails(1, "pack", "--gguf", model, "--tensor", "a", "--out", tmp_path / "w")
    assert f"sh '{tmp_path}/a b/repro.sh'" in error


def test_names_of_a_file_cannot_steer_the_terminal(
    fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, steering = tmp_path / "model.gguf", "a\x1b[2J\u202e"
    write_gguf(path, {steering: ("F32", 8, 4)})
    pack_it = ["pack", "--gguf", str(path), "--out", str(tmp_path / "w"), "--layout", GGUF]
    assert r"(2 tensors: 'a\x1b[2J\u202e', 'vector')" in fails(1, *pack_it, "--tensor", "z")
    assert main([*pack_it, "--tensor", steering]) == 0
    assert r"w: a\x1b[2J\u202e, F32" in capsys.readouterr().out
    write_gguf(path, {steering: ("F32", 8, 4), "b": ("Q4_0", 32, 2)})
    build_it = ["build", "--gguf", str(path), "--arch", "gfx1100", "--out", str(tmp_path / "o")]
    main(build_it)  # with a compiler or not
    assert r"left out 1 matrix: a\x1b[2J\u202e: F32" in capsys.readouterr().err


def refuse(*_: Any) -> bytes:
    raise OSError(28, "No space left on device", "kernel.hip")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--arch", "gfx9"], "argument --arch: expected one of gfx906, "),
        (["--arch", "sm_90"], "got NVIDIA's sm_90; call the function from Python"),
        (["--arch", "sm_91"], "got 'sm_91'"),
        (["--arch", "gfx1100; rm"], "got 'gfx1100; rm'"),
        (["--format", "q9_0"], "unknown format 'q9_0'; known formats: F32"),
        (["--k", "65"], "K: expected a positive multiple of 32 (a block of Q4_0), got 65"),
        (["--k", "0"], "argument --k: expected a whole number from 1, got '0'"),
        (["--n", "-3"], "argument --n: expected a whole number from 1, got '-3'"),
        (
            ["--n", str(1 << 31)],
            "expected K and N from 1 to 2147483647, got K = 64, N = 2147483648",
        ),
        (["--m", "x"], "argument --m: expected a whole number from 1, got 'x'"),
        (["--block-size", "100"], "a multiple of 32 (the threads of a wave)"),
        (["--gguf", "f"], "--gguf cannot be combined with --k, --n, --format"),
        (["--precision", "f64"], "invalid choice: 'f64'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_an_invalid_command_line(
    fails: Fails, change: list[str], message: str, tmp_path: Path
) -> None:
    error = fails(2, "build", *ONE, *change, "--out", tmp_path / "out")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "64"], "--k cannot be combined with --entry generic: its kernels take M, N and"),
        (["--n", "64"], "--n cannot be combined"),
        (["--m", "1"], "--m cannot be combined"),
        (
            ["--precision", "i8"],
            "--precision cannot be combined with --entry generic: its kernels multiply in f32",
        ),
        (["--layout", "planar"], "--layout: expected gguf for --entry generic, got planar"),
    ],
)
def test_options_that_generic_kernels_would_ignore_are_refused(
    fails: Fails, more: list[str], message: str, tmp_path: Path
) -> None:
    generic = ["build", "--entry", "generic", "--format", "q4_0", "--arch", "gfx1100"]
    assert message in fails(2, *generic, *more, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_options_are_named(fails: Fails, tmp_path: Path) -> None:
    arch = ["--arch", "gfx1100", "--out", tmp_path / "out"]
    assert "N --format NAME, got no --n, --format" in fails(2, "build", "--k", "64", *arch)
    error = fails(2, "build", "--entry", "generic", *arch)
    assert "build: expected --gguf FILE or --format NAME, got no --format" in error
    assert "--arch" in fails(2, "build", *ONE[:6], "--out", tmp_path / "out")
    assert "COMMAND" in fails(2)


def test_a_file_that_is_not_a_model(fails: Fails, model: Path, tmp_path: Path) -> None:
    arch, broken = ["--arch", "gfx1100", "--out", tmp_path / "out"], tmp_path / "broken.gguf"
    assert fails(1, "build", "--gguf", tmp_path / "none", *arch).endswith(
        "No such file or directory"
    )
    broken.write_bytes(model.read_bytes()[:200])
    assert "broken.gguf" in fails(1, "build", "--gguf", broken, *arch)
    write_gguf(broken, {"f": ("F32", 8, 4)})
    error = fails(1, "build", "--gguf", broken, *arch)
    assert "broken.gguf: expected a matrix in Q4_0, Q4_1, " in error
    assert "got 1 matrix in other formats" in error
    pack_it = ["pack", "--gguf", model, "--out", tmp_path / "w.bin", "--tensor"]
    error = fails(1, *pack_it, "z")
    assert "no tensor named 'z' (5 tensors: 'a', 'b', 'c', 'f', 'vector')" in error
    assert "expected a matrix, got a vector of 8 elements" in fails(1, *pack_it, "vector")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "w.bin").exists()


def test_an_output_path_that_is_not_a_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file, below = tmp_path / "file", tmp_path / "file" / "below"
    for out, problem in ((file, "expected a folder, got a file"), (below, "Not a directory")):
        error = fails(1, "build", *ONE, "--out", out)
        assert error == f"q4jit build: cannot write {out}: {problem}"


def test_an_output_that_cannot_be_written_is_named_as_given(
    fails: Fails, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = ["pack", "--gguf", model, "--tensor", "a", "--out"]
    error = fails(1, "build", *ONE, "--out", "/proc")  # not even root can create files there
    assert error == "q4jit build: cannot write /proc: No such file or directory"
    error = fails(1, *packs, "/proc/w.bin")
    assert error == (
        "q4jit pack: cannot write /proc/w.bin: its folder /proc: No such file or directory"
    )
    (tmp_path / "w").mkdir()
    for force in ([], ["--force"]):
        error = fails(1, *packs, tmp_path / "w", *force)
        assert f"{tmp_path}/w: expected a path for a file, got a folder" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "w"]
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert fails(1, *packs, tmp_path / "v") == f"q4jit pack: {tmp_path}/v: No space left on device"


@pytest.mark.parametrize("kind", ["same", "symlink", "hardlink", "manifest"])
def test_pack_does_not_overwrite_its_input(
    fails: Fails, model: Path, tmp_path: Path, kind: str
) -> None:
    before, out = model.read_bytes(), tmp_path / "w"
    target = {"same": model, "manifest": tmp_path / "w.json"}.get(kind, out)
    if kind == "symlink":
        target.symlink_to(model)
    if kind in {"hardlink", "manifest"}:
        target.hardlink_to(model)
    given = out if kind == "manifest" else target
    error = fails(1, "pack", "--gguf", model, "--tensor", "a", "--out", given, "--force")
    assert f"{target} is the input file {model}; choose another output file" in error
    assert model.read_bytes() == target.read_bytes() == before


def test_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("Q4JIT_HIP_COMPILER", "hipcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ROCM_PATH", raising=False)
    assert main(["build", *ONE, "--out", str(tmp_path / "out")]) == 1
    first, tried, last = capsys.readouterr().err.splitlines()
    assert "q4jit build: no compiler for hip:gfx1100 (Q4JIT_HIP_COMPILER=hipcc)" in first
    assert tried.startswith("  hipcc: not found in ")
    assert "pip install 'q4jit[cross]'" in last
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pack", "--gguf", str(model), "--tensor", "z", "--out", str(tmp_path / "w")]
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("Q4JIT_DEBUG", "1")
    assert main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("Q4JIT_DEBUG", "maybe")
    assert main(arguments) == 1
    assert "Q4JIT_DEBUG: expected 1 (on) or 0 (off), got 'maybe'" in capsys.readouterr().err


def test_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, fails: Fails, model: Path, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("q4jit.tools.cli.pack.pack_tensor", interrupted)
    assert (
        fails(130, "pack", "--gguf", model, "--tensor", "a", "--out", tmp_path / "w")
        == "q4jit pack: interrupted"
    )


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launches = list("ab")
    assert list(_with_progress(launches)) == launches  # nothing without a terminal
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(_with_progress(launches)) == launches
    assert "compiling" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # without tqdm
    assert list(_with_progress(list("abcdefgh"))) == list("abcdefgh")
    lines = [f"compiling {i} of 8" for i in (1, 3, 5, 7)]
    assert capsys.readouterr().err.splitlines() == lines


# --- odd paths ------------------------------------------------------------------------------------


def special_files(folder: Path) -> list[Path]:
    """Return a pipe, a socket, a link to a device, and a link to the pipe."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    (folder / "null").symlink_to("/dev/null")
    (folder / "link").symlink_to(folder / "pipe")
    return [folder / name for name in ("pipe", "socket", "null", "link")]


def test_a_file_that_is_not_regular_is_never_replaced(
    model: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        monkeypatch.chdir(short)
        for path in special_files(Path(short)):
            before = path.lstat()
            pack_it = ["pack", "--gguf", str(model), "--tensor", "b", "--force", "--out"]
            wanted = "expected a path for a file, got a device, pipe or socket"
            assert wanted in fails(1, *pack_it, path)
            path.with_name("w.json").symlink_to(path)  # where the description would be
            assert wanted in fails(1, *pack_it, path.with_name("w"))
            path.with_name("w.json").unlink()
            for command in (
                ["tune", "--export", path],
                ["bench", "--target", "cpu", "--json", path],
                ["bench", "--target", "cpu", "--plot", path],
            ):
                assert "expected a file in a writable folder" in fails(2, *command)
            after = path.lstat()
            assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


def test_an_input_that_is_not_a_regular_file_is_refused_at_once(
    tmp_path: Path, fails: Fails
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        for command in (
            ["bench", "--markdown", "--from", path],
            ["bench", "--target", "cpu", "--targets", path],
            ["bench", "--child", path],
            ["tune", "--merge", path],
            ["tune", "--gguf", path],
            ["build", "--arch", "gfx1030", "--out", tmp_path / "o", "--gguf", path],
            ["pack", "--tensor", "t", "--out", tmp_path / "o", "--gguf", path],
        ):
            assert "regular file" in fails(1, *command)


@pytest.mark.parametrize("out", [".", "/", "..", "./", "a/.."])
def test_pack_needs_the_name_of_a_file(out: str, model: Path, fails: Fails) -> None:
    line = fails(1, "pack", "--gguf", model, "--tensor", "b", "--force", "--out", out)
    assert "output: expected a path for a file, got '" in line


def test_an_empty_path_is_refused(model: Path, fails: Fails) -> None:
    for command in (
        ["pack", "--gguf", model, "--tensor", "b", "--out", ""],
        ["build", "--gguf", model, "--arch", "gfx1030", "--out", ""],
        ["tune", "--export", ""],
        ["bench", "--json", ""],
        ["bench", "--plot", ""],
        ["selftest", "--out", ""],
    ):
        assert "expected a path, got ''" in fails(2, *command)


@pytest.mark.parametrize(
    "manifest",
    [
        '{"q4jit": "1", "files": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"q4jit": "1", "files": {"w": 5}}',
        '{"q4jit": "1", "files": {"a\\u0000": {"sha256": "x"}}}',
        "[]",
    ],
    ids=["nested", "numbers", "null byte", "a list"],
)
def test_a_strange_manifest_is_another_programs_file(
    manifest: str, model: Path, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "w.json").write_text(manifest)
    (tmp_path / "w").write_text("mine")
    pack_it = ["pack", "--gguf", str(model), "--tensor", "b", "--out", str(tmp_path / "w")]
    assert "contains files that q4jit did not write" in fails(1, *pack_it)
    assert (tmp_path / "w").read_text() == "mine"
    assert main([*pack_it, "--force"]) == 0


def test_nested_json_is_refused(tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "nested.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    for command in (["bench", "--markdown", "--from"], ["tune", "--merge"], ["bench", "--targets"]):
        fails(1, *command, path)


def test_a_reader_that_has_seen_enough_ends_a_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "q4jit", "doctor", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
