"""Checks that transformers and gguf are installed, and are new enough."""

import importlib.util
import re
from importlib.metadata import version
from typing import Final

from q4jit.errors import expected

OLDEST: Final = (5, 24)  # as in the extra `transformers` of pyproject.toml
_INSTALL: Final = "run pip install 'q4jit[transformers]'"


def check_installed() -> None:
    """Raise ImportError without transformers or gguf, and for a transformers that is too old."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(expected("PyTorch", "none", where="q4jit.transformers", cure=_INSTALL))
    oldest = f"transformers {'.'.join(map(str, OLDEST))} or newer"
    for package, what in (("transformers", oldest), ("gguf", "the package gguf")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(expected(what, "none", where="q4jit.transformers", cure=_INSTALL))
    got = version("transformers")
    numbers = re.match(r"(\d+)\.(\d+)", got)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST:
        cure = f"{_INSTALL}, or pip install --upgrade transformers"
        raise ImportError(expected(oldest, got, where="q4jit.transformers", cure=cure))
