"""Tokenizers of files: the tokens of llama.cpp, and kinds that are not known."""

import json
from pathlib import Path
from typing import Any

import pytest

from q4jit.transformers import from_gguf
from tests.support.paths import TESTS
from tests.support.tools import model_file
from tests.support.torch.tiny.architectures import RECIPES
from tests.support.torch.tiny.files import write

REFERENCE: dict[str, Any] = json.loads(
    (TESTS / "data" / "smollm2_reference.json").read_text(encoding="utf-8")
)


@pytest.mark.model
def test_tokens_are_llama_cpps() -> None:
    tokenizer = from_gguf(model_file())[1]
    assert tokenizer.encode(REFERENCE["text"]) == REFERENCE["tokens"]
    # single digits, as llama.cpp splits the texts of this model
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 1234 days")) == [
        *("in", "Ġ", "1", "2", "3", "4", "Ġdays")
    ]
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 8192


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    model = write(RECIPES["llama"](), tmp_path / "model.gguf")
    raw = model.path.read_bytes()
    assert raw.count(b"default") == 1  # tokenizer.ggml.pre
    model.path.write_bytes(raw.replace(b"default", b"unknown"))
    with pytest.warns(UserWarning, match="the kind 'unknown' of tokenizer.ggml.pre is unknown"):
        from_gguf(model.path)
