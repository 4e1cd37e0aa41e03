"""The project's own fixtures."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from q4jit import config
from tests.conftest import check_golden
from tests.support.paths import GOLDEN
from tests.support.tools import require_tool


def test_a_missing_golden_fails_and_is_written_only_on_demand(tmp_path: Path) -> None:
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


def test_the_cache_is_the_sessions_own(tmp_path: Path) -> None:
    directory = config.cache_dir()
    assert directory is not None
    assert directory.parent == tmp_path.parent
    assert {name for name in os.environ if name.startswith("Q4JIT_")} == {"Q4JIT_CACHE_DIR"}


def test_a_missing_tool_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(require_tool("sh", "dash")).name == "sh"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install some-package"):
        require_tool("no-such-tool", "some-package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is missing"):
        require_tool("no-such-tool", "some-package")
