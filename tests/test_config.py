"""Paths in environment variables never create folders where the process happens to run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from q4jit import ConfigError, config
from tests.support import child

VARIABLES: dict[str, Callable[[], Path | None]] = {
    "Q4JIT_CACHE_DIR": config.cache_dir,
    "Q4JIT_DUMP_DIR": config.dump_dir,
    "ROCM_PATH": config.rocm_path,
    "ROCM_HOME": config.rocm_path,
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a home directory, in an environment without path variables."""
    for name in (*VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", VARIABLES)
def test_a_tilde_is_the_home_directory(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "~/of mine")
    assert VARIABLES[name]() == home / "of mine"


@pytest.mark.parametrize("name", VARIABLES)
def test_a_home_that_does_not_exist_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "~no-such-user/kernels")
    with pytest.raises(ConfigError, match=f"{name}: expected a folder, got '~no-such-user"):
        VARIABLES[name]()


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_unset(
    name: str, value: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    default = home / ".cache" / "q4jit" if name == "Q4JIT_CACHE_DIR" else None
    assert VARIABLES[name]() == default


@pytest.mark.parametrize("value", ["relative", "./relative", "~no-such-user"])
def test_a_relative_xdg_directory_is_ignored(
    value: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    expected = None if value.startswith("~") else home / ".cache" / "q4jit"
    assert config.cache_dir() == expected


def test_a_tilde_in_the_xdg_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert config.cache_dir() == home / "xdg" / "q4jit"


def test_a_relative_home_holds_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "relative")
    assert config.cache_dir() is None


@pytest.mark.process
def test_nothing_appears_in_the_working_directory(home: Path, tmp_path: Path) -> None:
    program = """
    os.chdir(os.environ["HERE"])
    check()
    """
    here = tmp_path / "here"
    here.mkdir()
    home.mkdir()
    child.run(
        program,
        HERE=str(here),
        Q4JIT_CACHE_DIR=None,
        XDG_CACHE_HOME="relative",
        Q4JIT_DUMP_DIR="~/dump",
        Q4JIT_NUM_THREADS="1",
    )
    assert not list(here.iterdir())
    assert {path.name for path in home.iterdir()} == {".cache", "dump"}
