"""Tools outside Python that some tests need."""

import os
import shutil

import pytest


def in_ci() -> bool:
    """Whether a missing tool is a fault of the set-up, not of the machine."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def require_tool(name: str, package: str) -> str:
    """The path of program `name`; without it the test is skipped, or fails where CI is set."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"{name} is missing: apt-get install {package}"
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)
