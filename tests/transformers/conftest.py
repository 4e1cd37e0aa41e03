"""Every test in this folder is marked `torch`. Without PyTorch the folder is skipped."""

import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import builds
from tests.support.tools import lack, require_tool

FOLDER = Path(__file__).parent

# Inductor reads these when it is imported. A pool of processes would be started by every worker;
# precompiled headers (160 MB) would stay in the folder of temporary files.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"


def pytest_pycollect_makemodule() -> None:
    """Skip the folder instead of importing modules that import PyTorch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: run make test-torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker("torch")


@pytest.fixture(scope="session", autouse=True)
def _pytorch_of_the_run() -> Iterator[None]:
    """Keep what Inductor compiles where this run keeps its kernels; give a worker one thread."""
    import torch  # late: the folder is also collected without PyTorch

    # pytest would print hundreds of its records below each failure.
    logging.getLogger("torch.__trace").disabled = True
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(builds.inductor()))
        yield


@pytest.fixture(autouse=True)
def _forget_compiled_functions() -> Iterator[None]:
    """Let no test count graphs, or reach limits of recompiling, because of an earlier one."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture(scope="session")
def inductor() -> None:
    """Skip the test, or fail it in CI, where Inductor cannot compile for the CPU."""
    require_tool("g++", "g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lack("Python.h is missing: apt-get install python3-dev")
