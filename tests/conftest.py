"""Fixtures of every test: golden files, an environment of its own, tools that may be missing."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.paths import GOLDEN
from tests.support.tools import in_ci, require_tool

# No deadline: the first example of a test compiles. In CI the same examples every time.
settings.register_profile("q4jit", deadline=None, derandomize=in_ci())
settings.load_profile("q4jit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files instead of comparing with them",
    )


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels of a test session never come from, nor reach, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("Q4JIT_")]:
            patch.delenv(name)
        patch.setenv("Q4JIT_CACHE_DIR", str(tmp_path_factory.mktemp("q4jit-cache")))
        yield


def check_golden(path: Path, text: str, *, update: bool) -> None:
    """Fails unless the file at `path` holds `text`; with `update` it is made to."""
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    if not path.exists():
        pytest.fail(f"{path} does not exist; after a look at the text: pytest --update-golden")
    wanted = path.read_text(encoding="utf-8")
    if wanted != text:
        diff = difflib.unified_diff(
            wanted.splitlines(), text.splitlines(), str(path), "generated", lineterm=""
        )
        lines = "\n".join(diff) or "(only the line ends at the end of the text differ)"
        pytest.fail(f"the generated text changed; if it should: pytest --update-golden\n{lines}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(text, suffix)` compares with tests/golden/<test file>/<test name><suffix>."""
    name = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    stem = GOLDEN / request.path.stem / name
    update = bool(request.config.getoption("--update-golden"))

    def check(text: str, suffix: str) -> None:
        check_golden(stem.with_name(stem.name + suffix), text, update=update)

    return check


@pytest.fixture(name="require_tool", scope="session")
def _require_tool() -> Callable[[str, str], str]:
    """`require_tool(name, package)`: see `tests.support.tools`."""
    return require_tool
