"""The fixtures and helpers of the tests."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from q4jit import config
from tests.support import builds
from tests.support.golden import check_golden
from tests.support.paths import GOLDEN
from tests.support.tools import require_tool, require_torch


def test_a_missing_golden_fails_and_is_written_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "kernel.ll"
    with pytest.raises(pytest.fail.Exception, match=f"{re.escape(str(path))} does not exist"):
        check_golden(path, "text\n", update=False)
    assert not path.exists()
    check_golden(path, "text\n", update=True)
    assert path.read_bytes() == b"text\n"
    check_golden(path, "text\n", update=False)


def test_a_changed_golden_shows_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "kernel.ll"
    check_golden(path, "same\nold\n", update=True)
    with pytest.raises(pytest.fail.Exception, match="same\n-old\n\\+new"):
        check_golden(path, "same\nnew\n", update=False)
    with pytest.raises(pytest.fail.Exception, match="only the line ends"):
        check_golden(path, "same\nold", update=False)
    assert path.read_text() == "same\nold\n"


@pytest.mark.parametrize("shape", ["4096 x 64"])
def test_golden_path_comes_from_the_test(golden: Callable[[str, str], None], shape: str) -> None:
    golden(f"{shape}\n", ".txt")
    folder = GOLDEN / "test_conftest"
    assert (folder / "test_golden_path_comes_from_the_test_4096_x_64.txt").exists()


def test_the_cache_is_the_sessions_own() -> None:
    assert config.cache_dir() == builds.kernels()
    names = {name for name in os.environ if name.startswith("Q4JIT_")}
    assert names - {"Q4JIT_NUM_THREADS"} == {"Q4JIT_CACHE_DIR"}  # workers of xdist set both


def test_a_built_file_is_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds_of = []

    def build(path: Path) -> None:
        builds_of.append(path)
        path.write_text("program")

    monkeypatch.setattr(builds, "_folders", {})
    builds.use(tmp_path)
    first = builds.built("name", "text", build=build)
    assert first.read_text() == "program"
    assert builds.built("name", "text", build=build) == first
    assert len(builds_of) == 1
    keys = (("te",), ("te", "xt"), ("", "text"))
    assert len({builds.built("name", *key, build=build) for key in keys}) == 3
    assert not list(builds.programs().glob(".new-*"))


def test_a_damaged_file_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_text("program")

    monkeypatch.setattr(builds, "_folders", {})
    builds.use(tmp_path)
    path = builds.built("name", "text", build=build)
    checksum = Path(f"{path}.sha256")
    for damage in (
        lambda: path.write_text("prog"),
        lambda: path.write_text(""),
        lambda: checksum.write_text(""),
        checksum.unlink,
        path.unlink,
    ):
        damage()
        assert builds.built("name", "text", build=build).read_text() == "program"

    def fail(path: Path) -> None:
        path.write_text("incomplete")
        raise RuntimeError("the compiler was killed")

    path.unlink()
    with pytest.raises(RuntimeError):
        builds.built("name", "text", build=fail)
    assert not path.exists()
    assert builds.built("name", "text", build=build).read_text() == "program"


def test_old_programs_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builds, "_folders", {})
    builds.use(tmp_path)
    old, new = (builds.built(name, build=Path.touch) for name in ("old", "new"))
    old_kernel, new_kernel = (builds.inductor() / "aa" / name for name in ("old.so", "new.so"))
    for path in (old_kernel, new_kernel):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (old, old_kernel):
        os.utime(path, (0, 0))
    builds.remove_unused()
    assert not old.exists()
    assert not old_kernel.exists()
    assert new.exists()
    assert new_kernel.exists()


def test_a_missing_tool_skips_the_test_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(require_tool("sh", "dash")).name == "sh"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install some-package"):
        require_tool("no-such-tool", "some-package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is missing"):
        require_tool("no-such-tool", "some-package")


def test_a_missing_pytorch_skips_the_test_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="run make test-torch"):
        require_torch()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="PyTorch is not installed"):
        require_torch()
