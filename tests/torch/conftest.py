"""Every test in this folder is marked `torch`. Without PyTorch the folder is skipped."""

from pathlib import Path

import pytest

from tests.support.torch.fixtures import (
    forget_compiled_functions,
    inductor,
    mark_torch,
    pytorch_of_the_run,
    skip_without,
)

__all__ = ["forget_compiled_functions", "inductor", "pytorch_of_the_run"]


def pytest_pycollect_makemodule() -> None:
    skip_without("torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_torch(items, Path(__file__).parent)
