"""Fixtures of every test: golden files, an environment of its own, tools that may be missing."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support import builds
from tests.support.golden import check_golden
from tests.support.paths import GOLDEN
from tests.support.tools import in_ci, require_tool

if "PYTEST_XDIST_WORKER" in os.environ:
    # NumPy's BLAS is to have one thread as well, and asks for their number when it is imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

# No deadline: the first example of a test compiles. In CI the same examples every time.
settings.register_profile("q4jit", deadline=None, derandomize=in_ci())
settings.load_profile("q4jit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files instead of comparing with them",
    )
    parser.addoption(
        "--reuse",
        action="store_true",
        help=f"keep kernels and programs in {builds.REUSED.name}/ and take those of earlier runs",
    )
    parser.addoption(
        "--part",
        choices=("parallel", "serial"),
        help="only the tests that may share the machine, or only those that may not",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Name the folder in which this run and its workers keep what they build."""
    if config.getoption("--reuse"):  # the same random functions every time, which are compiled then
        settings.register_profile("reuse", settings.get_profile("q4jit"), derandomize=True)
        settings.load_profile("reuse")
    if worker := _worker(config):
        builds.use(Path(worker["builds"]))
    elif config.getoption("--reuse"):
        builds.use(builds.REUSED)
        builds.remove_unused()
    else:
        folder = Path(tempfile.mkdtemp(prefix="q4jit-tests-"))
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        builds.use(folder)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node: Any) -> None:
    node.workerinput["builds"] = str(builds.kernels().parent)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `--part` does not name."""
    part = config.getoption("--part")
    if part is None:
        return
    serial = part == "serial"
    chosen = [item for item in items if (item.get_closest_marker("serial") is not None) == serial]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _worker(config: pytest.Config) -> dict[str, Any]:
    """What pytest-xdist's main process tells this one, if it is a worker."""
    return getattr(config, "workerinput", {})


@pytest.fixture(scope="session", autouse=True)
def _own_environment(pytestconfig: pytest.Config) -> Iterator[None]:
    """Kernels of a test session never come from, nor reach, the user's cache.

    Workers share the machine: a kernel has one thread there, where no test sets another number.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("Q4JIT_")]:
            patch.delenv(name)
        patch.setenv("Q4JIT_CACHE_DIR", str(builds.kernels()))
        if _worker(pytestconfig):
            patch.setenv("Q4JIT_NUM_THREADS", "1")
        yield


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
