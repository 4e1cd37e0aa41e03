"""Fixtures and hooks of the folders whose tests need PyTorch; their conftest.py import them."""

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

# Inductor reads these when it is imported. A pool of processes would be started by every worker;
# precompiled headers (160 MB) would stay in the folder of temporary files.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"


def skip_without(*packages: str) -> None:
    """Skip a folder instead of importing modules that import a missing package."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: run make test-torch")


def mark_torch(items: list[pytest.Item], folder: Path) -> None:
    """Mark every test in a folder."""
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker("torch")


@pytest.fixture(scope="session", autouse=True)
def pytorch_of_the_run() -> Iterator[None]:
    """Keep what Inductor compiles where this run keeps its kernels; give a worker one thread."""
    import torch  # late: the folders are also collected without PyTorch

    # pytest would print hundreds of its records below each failure.
    logging.getLogger("torch.__trace").disabled = True
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(builds.inductor()))
        yield


@pytest.fixture(autouse=True)
def forget_compiled_functions() -> Iterator[None]:
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
