"""Fixtures of all tests: golden files, a separate environment, and tools that may be missing."""

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
from tests.support.tools import in_ci, require_tool, require_torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for NumPy's BLAS as well, which reads this when it is imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

# No deadline, because the first example of a test compiles. CI always runs the same examples.
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
        help=f"keep kernels and programs in {builds.REUSED.name}/ and reuse those of earlier runs",
    )
    parser.addoption(
        "--part",
        choices=("parallel", "serial"),
        help="run only the tests that may run in parallel, or only those that may not",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the folder for everything that this run and its workers build."""
    if config.getoption("--reuse"):  # the same random functions, so their kernels can be reused
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


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist
def pytest_configure_node(node: Any) -> None:
    node.workerinput["builds"] = str(builds.kernels().parent)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the other `--part`."""
    part = config.getoption("--part")
    if part is None:
        return
    serial = part == "serial"
    chosen = [item for item in items if (item.get_closest_marker("serial") is not None) == serial]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _worker(config: pytest.Config) -> dict[str, Any]:
    """Return the input of a pytest-xdist worker; empty in the main process."""
    return getattr(config, "workerinput", {})


@pytest.fixture(scope="session", autouse=True)
def _own_environment(pytestconfig: pytest.Config) -> Iterator[None]:
    """Keep the user's settings and cache out of the tests.

    Kernels of xdist's workers have one thread, unless a test sets another number.
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
    """Return `golden(text, suffix)`, which checks tests/golden/<test file>/<test name><suffix>."""
    name = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    stem = GOLDEN / request.path.stem / name
    update = bool(request.config.getoption("--update-golden"))

    def check(text: str, suffix: str) -> None:
        check_golden(stem.with_name(stem.name + suffix), text, update=update)

    return check


@pytest.fixture(name="require_tool", scope="session")
def _require_tool() -> Callable[[str, str], str]:
    """Return `require_tool(name, package)` of `tests.support.tools`."""
    return require_tool


@pytest.fixture(name="torch", scope="session")
def _torch() -> Any:
    """Return the module torch."""
    return require_torch()
