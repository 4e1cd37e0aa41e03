"""SmolLM2 and Gemma 3, packed and dequantised: logits, greedy texts and memory."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.support.child import environment
from tests.support.tools import gemma_file, model_file
from tests.support.torch.tiny.architectures import llama
from tests.support.torch.tiny.files import TinyModel, write

pytestmark = pytest.mark.model

BOUND: Final = 2e-5
MEMORY_BOUND: Final = 1.3  # times the bytes of the file
TIMEOUT_S: Final = 300
PROMPTS: Final = {
    "SmolLM2": (model_file, "What is the capital of France?"),  # becomes a chat
    "Gemma 3": (gemma_file, "The capital of France is"),
}
Run = Callable[[str, str], Any]
each_model = pytest.mark.parametrize("name", PROMPTS)


def run(kind: str, path: Path, tiny: Path, prompt: str, result: Path) -> Any:
    """Run a model in a process of its own, and return what it wrote."""
    command = [sys.executable, "-m", "tests.support.torch.run_model"]
    done = subprocess.run(
        [*command, kind, path, tiny, prompt, result],
        check=False,
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE="1"),
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return np.load(result)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], TinyModel]) -> Run:
    """Return `results(name, kind)`. kind: "packed" or "floats"."""
    folder = tmp_path_factory.mktemp("results")

    @cache
    def of(name: str, kind: str) -> Any:
        find, prompt = PROMPTS[name]
        path = find()
        result = run(kind, path, tiny("llama").path, prompt, folder / f"{name}-{kind}.npz")
        size = path.stat().st_size
        print(  # noqa: T201 - the figures of the documentation
            f"{name}, {kind}: {result['peak'] / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB, "
            f"{result['total'] / 1e6:.0f} MB with the tokenizer"
        )
        return result

    return of


@each_model
def test_logits_are_those_of_the_dequantised_model(results: Run, name: str) -> None:
    packed, floats = (results(name, kind)["logits"] for kind in ("packed", "floats"))
    assert packed.shape == floats.shape
    assert np.linalg.norm(packed - floats) < BOUND * np.linalg.norm(floats)


@each_model
def test_greedy_texts_are_equal(results: Run, name: str) -> None:
    packed, floats = (results(name, kind) for kind in ("packed", "floats"))
    assert packed["text"].tolist() == floats["text"].tolist()
    assert packed["text"].shape[1] > packed["ids"].shape[1] + 4


@each_model
def test_the_packed_model_takes_little_more_than_its_file(
    results: Run, name: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Its kernels were compiled by the first run: compiling takes 45 MB, whatever the model."""
    find, prompt = PROMPTS[name]
    size = find().stat().st_size
    assert results(name, "packed")["peak"] < MEMORY_BOUND * size + 60e6
    again = run("packed", find(), tiny("llama").path, prompt, tmp_path / "again.npz")
    assert again["peak"] < MEMORY_BOUND * size
    assert results(name, "floats")["peak"] > 4 * size


def test_a_large_tied_table_is_held_once(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    """Two thirds of the file are its embedding, which is the head as well."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 1 << 17}
    recipe = llama(tie_word_embeddings=True, num_attention_heads=32, heads=8, **sizes)
    path = write(recipe, tmp_path / "large.gguf").path
    size = path.stat().st_size
    assert size > 250e6
    result = run("packed", path, tiny("llama").path, "the", tmp_path / "result.npz")
    assert result["peak"] < MEMORY_BOUND * size
