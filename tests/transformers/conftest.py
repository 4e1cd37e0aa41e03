"""Every test in this folder is marked `torch`. Without transformers the folder is skipped."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.torch.fixtures import (
    forget_compiled_functions,
    inductor,
    mark_torch,
    pytorch_of_the_run,
    skip_without,
)

if TYPE_CHECKING:
    from tests.support.torch.tiny.files import TinyModel

__all__ = ["forget_compiled_functions", "inductor", "pytorch_of_the_run"]

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


def pytest_pycollect_makemodule() -> None:
    skip_without("torch", "transformers", "gguf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_torch(items, Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings about tiny configurations out of the tests' output."""
    import transformers  # late: the folder is also collected without it

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], "TinyModel"]:
    """Return `tiny(name)`, which writes the file of a recipe once."""
    from tests.support.torch.tiny.architectures import RECIPES
    from tests.support.torch.tiny.files import write

    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def written(name: str) -> "TinyModel":
        return write(RECIPES[name](), folder / f"{name}.gguf")

    return written


@pytest.fixture(scope="session")
def packed(tiny: Callable[[str], "TinyModel"]) -> Callable[[str], tuple[Any, Any]]:
    """Return `packed(name)`: the model and the tokenizer of `from_gguf`, in float32."""
    from q4jit.transformers import from_gguf

    return cache(lambda name: from_gguf(tiny(name).path))
