"""The version of q4jit."""

import functools
import importlib.metadata
import tomllib
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parents[1]  # above the package; a git clone or site-packages


@functools.cache
def version() -> str:
    """Return the version of q4jit: of its checkout, else as installed, else "unknown" (a zip)."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return importlib.metadata.version("q4jit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
