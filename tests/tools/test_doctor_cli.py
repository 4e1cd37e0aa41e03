"""`q4jit doctor` and `q4jit cache`: reports on the machine, and the kernels on disk."""

import ctypes.util
import importlib.metadata
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from q4jit import quantize, specialize
from q4jit.compilers import find
from q4jit.compilers.entries import entries, evict
from q4jit.errors import ConfigError
from q4jit.tools import doctor
from q4jit.tools.cli.main import main

KIB = 1024


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache directory of this process."""
    directory = tmp_path / "kernels"
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(directory))
    return directory


def add_entry(directory: Path, digit: str, age_s: float, text: str, size: int = 100) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    when = time.time() - age_s
    for suffix, data in (("ll", text.encode()), ("sha256", b"x" * 64), ("o", bytes(size))):
        path = directory / f"{digit * 64}.{suffix}"
        path.write_bytes(data)
        os.utime(path, (when, when))


# --- doctor ---------------------------------------------------------------------------------------


def test_the_report_of_this_machine(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    add_entry(cache, "a", 5, "; swiglu for cpu, made by q4jit\n")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    packages = {package["name"]: package["version"] for package in report["packages"]}
    assert packages["numpy"] == np.__version__
    assert report["cpu"]["threads"] >= 1
    assert report["cpu"]["features"]
    assert (report["cache"]["directory"], report["cache"]["entries"]) == (str(cache), 1)
    assert {name.split()[0] for name in (c["description"] for c in report["compilers"])} >= {
        "hipcc",
        "clang",
        "ziglang",
        "hiprtc",
        "NVRTC",
    }
    assert "/dev/kfd" in report["rocm"]["device_files"]
    assert report["rocm"]["looked_in"]
    assert report["cuda"]["looked_in"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"cache: {cache} (usable), 1 kernel, " in text
    assert "thread" in text
    assert "GPUs: " in text


def test_each_missing_piece_has_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(find, "_INSTALLED", dict.fromkeys(find._INSTALLED, lambda: iter(())))
    files = {"amd": (os.devnull,), "nvidia": (os.devnull,)}
    monkeypatch.setattr(doctor, "device_files", lambda: files)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    monkeypatch.setenv("ROCM_PATH", "/nowhere")
    monkeypatch.setattr(doctor, "get_num_threads", lambda: 3)
    report = doctor.examine()
    commands = {piece["what"].split(" (")[0]: piece["command"] for piece in report["missing"]}
    assert commands["ziglang"] == "pip install 'q4jit[cross]'"
    assert commands["cuda-bindings"] == "pip install 'q4jit[nvidia]'"
    assert commands["a compiler for AMD GPUs"] == "pip install 'q4jit[cross]'"
    assert commands["ROCm's runtime, libamdhip64.so"] == "apt-get install libamdhip64-dev"
    assert commands["NVIDIA's driver, libcuda.so.1"] == "apt-get install libcuda1"
    assert "/nowhere/lib/libamdhip64.so" in report["rocm"]["looked_in"]
    text = "\n".join(doctor.report_lines(report))
    assert "hipcc: not found in ROCM_PATH/bin and PATH" in text
    assert "does not exist yet; the first compilation creates it" in text
    assert "ziglang (compiling for AMD GPUs without ROCm): pip install" in text


def test_a_bad_variable_does_not_stop_the_report(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def refused() -> int:
        raise ConfigError("Q4JIT_NUM_THREADS: expected a number")

    monkeypatch.setattr(doctor, "get_num_threads", refused)
    monkeypatch.setenv("Q4JIT_CACHE_MIB", "many")
    report = doctor.examine()
    assert report["environment"]["Q4JIT_CACHE_MIB"] == "many"
    assert any("Q4JIT_NUM_THREADS" in piece["what"] for piece in report["missing"])
    assert ", ?\n" in "\n".join(doctor.report_lines(report))


# --- cache ----------------------------------------------------------------------------------------


def test_the_kernels_are_listed_and_cleared(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{cache}\n"
    assert main(["cache", "ls"]) == main(["cache", "clear"]) == 0
    assert "removed 0 kernels, 0 bytes" in capsys.readouterr().out
    add_entry(cache, "b", 3 * 86400 + 5, "; old for cpu, made by q4jit\n", 2000)
    add_entry(cache, "a", 65, "; new\x1b[2J for cpu\n")
    (cache / "tunings.json").write_text("{}")
    assert main(["cache", "ls"]) == 0
    old, new, total = capsys.readouterr().out.splitlines()
    assert old.split() == ["b" * 12, "2.0", "KiB", "3", "days", "old", "for", "cpu"]
    assert new.startswith("a" * 12)
    assert "1 min" in new
    assert "\x1b" not in new
    assert total.startswith(f"{cache}: 2 kernels, 2.2 KiB")
    assert main(["cache", "clear", "--limit", "1"]) == 0
    assert len(entries(cache)) == 2
    assert main(["cache", "clear"]) == 0
    assert [path.name for path in cache.iterdir()] == ["tunings.json"]


def test_why_a_kernel_was_compiled(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "why", "swiglu"]) == 1
    assert "no kernel contains 'swiglu'" in capsys.readouterr().out
    add_entry(cache, "a", 30, "; swiglu for cpu\nx = 1\n")
    assert main(["cache", "why", "swiglu"]) == 0
    assert "was compiled because no other kernel contains this" in capsys.readouterr().out
    add_entry(cache, "b", 20, "; swiglu for cpu\nx = 2\n")
    assert main(["cache", "why", "swiglu"]) == 0
    shown = capsys.readouterr().out
    assert f"{'b' * 12} was compiled beside {'a' * 12} because their texts differ:" in shown
    assert shown.splitlines()[-2:] == ["  -x = 1", "  +x = 2"]
    add_entry(cache, "c", 10, "; swiglu for cpu\nx = 2\n")
    assert main(["cache", "why", "x = 2"]) == 0
    assert "the target's features, the compiler or its flags differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["why"], ["ls", "x"], ["ls", "--limit", "3"], ["clear", "--limit", "0"], ["rm"]]
)
def test_an_invalid_cache_command(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["cache", *arguments])
    assert end.value.code == 2


def test_the_oldest_kernels_are_evicted(cache: Path) -> None:
    for i, digit in enumerate("abcd"):
        add_entry(cache, digit, 100 - i, "; text\n", 10 * KIB)
    removed = evict(cache, 25 * KIB, keep="a" * 64)
    assert [entry.key[0] for entry in removed] == ["b", "c"]
    assert {entry.key[0] for entry in entries(cache)} == {"a", "d"}


def test_a_limit_evicts_when_a_kernel_is_stored(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_entry(cache, "a", 100, "; text\n", 2 << 20)
    add_entry(cache, "b", 50, "; text\n", 100)
    w, x = quantize(np.ones((64, 3), np.float32), "Q4_0"), np.ones((1, 64), np.float32)

    specialize(lambda x, w: 3.5 * (x @ w))(x, w)
    before = len(entries(cache))
    assert before >= 3
    monkeypatch.setenv("Q4JIT_CACHE_MIB", "1")
    specialize(lambda x, w: 4.5 * (x @ w))(x, w)
    assert not (cache / f"{'a' * 64}.o").exists()
    assert (cache / f"{'b' * 64}.o").exists()
    assert len(entries(cache)) == before
