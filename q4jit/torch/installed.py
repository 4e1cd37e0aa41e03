"""Checks that PyTorch is installed, and is new enough."""

import re
from typing import Final

from q4jit.errors import expected

OLDEST: Final = (2, 11)  # as in the extra `torch` of pyproject.toml
_INSTALL: Final = "run pip install 'q4jit[torch]'"


def check_installed() -> None:
    """Raise ImportError without PyTorch, and for one that is too old."""
    what = f"PyTorch {'.'.join(map(str, OLDEST))} or newer"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(expected(what, "none", where="q4jit.torch", cure=_INSTALL)) from error
    numbers = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST:
        got, cure = str(torch.__version__), f"{_INSTALL}, or pip install --upgrade torch"
        raise ImportError(expected(what, got, where="q4jit.torch", cure=cure))
