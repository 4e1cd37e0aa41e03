"""`from_gguf` refuses what it cannot run, before it reads a single tensor."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from q4jit.errors import ArgumentError, DeviceError, GGUFError, Q4JitError
from q4jit.transformers import from_gguf, installed, room
from q4jit.transformers.architectures import ARCHITECTURES, PACKED_BY_TRANSFORMERS
from q4jit.weights.gguf.file import GGUFFile
from tests.support.child import environment
from tests.support.paths import ROOT
from tests.support.torch.tiny.architectures import (
    llama,
    phi3,
    qwen2,
    qwen2_moe,
    qwen2_with_yarn,
)
from tests.support.torch.tiny.files import write
from tests.support.torch.tiny.recipe import Recipe, Stored, Tensors

QUERIES = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, name: str) -> Any:
        pytest.fail(f"tensor {name} was read")

    monkeypatch.setattr(GGUFFile, "__getitem__", fail)


@pytest.fixture
def message(tmp_path: Path) -> Callable[..., str]:
    """Return `message(recipe)`: the error of its file, without the folder."""

    def text(recipe: Recipe, kind: type[Q4JitError] = GGUFError, **options: Any) -> str:
        path = write(recipe, tmp_path / "tiny.gguf").path
        with pytest.raises(kind) as caught:
            from_gguf(path, **options)
        found = str(caught.value)
        assert found.startswith(str(path)) or kind is not GGUFError
        return found.replace(f"{tmp_path}/", "")

    return text


def with_keys(**keys: Any) -> Recipe:
    recipe = llama()
    changes = {name.replace("__", "."): value for name, value in keys.items()}
    return replace(recipe, keys=recipe.keys | changes)


def with_tensors(change: Callable[[Tensors], Any]) -> Recipe:
    recipe = llama()

    def convert(tensors: Tensors, config: Any) -> Tensors:
        converted = recipe.convert(tensors, config)
        change(converted)
        return converted

    return replace(recipe, convert=convert)


# --- the model ------------------------------------------------------------------------------------


def test_another_architecture(tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "tiny.gguf").path
    path.write_bytes(path.read_bytes().replace(b"llama", b"other", 1))
    with pytest.raises(GGUFError) as caught:
        from_gguf(path)
    known = ", ".join((*ARCHITECTURES, *PACKED_BY_TRANSFORMERS))
    problem = f"general.architecture: expected one of {known}, got 'other'"
    assert str(caught.value) == f"{path}: {problem}"


def test_experts_in_a_llama_model(message: Callable[..., str]) -> None:
    text = message(with_keys(expert_count=8, expert_used_count=2))
    assert text == "tiny.gguf: llama.expert_count: expected no experts in a llama model, got 8"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"attention__head_count": 0},
            "attention.head_count: expected a positive whole number, got 0",
        ),
        (
            {"context_length": "long"},
            "context_length: expected a positive whole number, got 'long'",
        ),
        (
            {"rope__freq_base": float("nan")},
            "rope.freq_base: expected a positive number, got nan",
        ),
        (
            {"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0},
            "rope.scaling.type: expected 'none', 'linear' or 'yarn', got 'dynamic'",
        ),
        (
            {"rope__dimension_count": 32},
            "rope.dimension_count: expected 64, the width of a head, got 32",
        ),
        ({"block_count": 3}, "block_count: expected the number of layers in the file, got 3"),
        ({"block_count": 1}, "block_count: expected the number of layers in the file, got 1"),
        (
            {"feed_forward_length": 2**62},
            f"feed_forward_length: expected at most {2**31 - 1}, got {2**62}",
        ),
        (
            {"attention__layer_norm_rms_epsilon": True},
            "attention.layer_norm_rms_epsilon: expected a positive number, got True",
        ),
        (
            {"attention__head_count_kv": [2, 2]},
            "attention.head_count_kv: expected a positive whole number, got an array of 2 values",
        ),
        (
            {"expert_count": [2, 2]},
            "expert_count: expected no experts in a llama model, got an array of 2 values",
        ),
        (
            {"attention__key_length": 33, "rope__dimension_count": 33},
            "rope.dimension_count: expected an even number, got 33",
        ),
        (
            {"rope__scaling__type": "longrope"},
            "rope.scaling.type: expected 'none', 'linear' or 'yarn', got 'longrope'",
        ),
    ],
)
def test_wrong_keys(message: Callable[..., str], keys: dict[str, Any], problem: str) -> None:
    assert message(with_keys(**keys)) == f"tiny.gguf: llama.{problem}"


@pytest.mark.parametrize(
    ("recipe", "keys", "problem"),
    [
        (
            qwen2_moe(inner=256, shared=512),
            {"expert_used_count": 5},
            "qwen2moe.expert_used_count: expected at most 4, the number of experts, got 5",
        ),
        (
            qwen2_moe(inner=256, shared=512),
            {"expert_count": 1},
            "qwen2moe.expert_count: expected at least 2 experts, got 1",
        ),
        (
            phi3(),
            {"rope.dimension_count": 66},
            "phi3.rope.dimension_count: expected at most 64, the width of a head, got 66",
        ),
        (
            phi3(),
            {"rope.dimension_count": 63},
            "phi3.rope.dimension_count: expected an even number, got 63",
        ),
        (
            phi3(),
            {"attention.sliding_window": [1, 2]},
            "phi3.attention.sliding_window: expected a positive whole number, got an array",
        ),
        (
            qwen2_with_yarn(),
            {"rope.scaling.yarn_ext_factor": 0.5},
            "qwen2.rope.scaling.yarn_ext_factor: expected 1.0, got 0.5",
        ),
    ],
)
def test_wrong_keys_of_other_models(
    message: Callable[..., str], recipe: Recipe, keys: dict[str, Any], problem: str
) -> None:
    text = message(replace(recipe, keys=recipe.keys | keys))
    assert text.startswith(f"tiny.gguf: {problem}")


def test_more_layers_than_the_file_has(message: Callable[..., str]) -> None:
    """A small file could claim a million, which would take an hour to make without values."""
    last = {"blk.299.attn_norm.weight": np.zeros(256, np.float32)}
    problem = "block_count: expected the number of layers in the file, got 300"
    assert message(replace(with_keys(block_count=300), extra=last)) == f"tiny.gguf: llama.{problem}"


def test_a_model_that_transformers_cannot_configure(message: Callable[..., str]) -> None:
    recipe = phi3(rotary=0.5)
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    text = message(replace(recipe, keys=recipe.keys | scaling))
    assert text.startswith("tiny.gguf: transformers cannot configure a phi3 model: ")


def test_heads_that_cannot_share_keys(message: Callable[..., str]) -> None:
    problem = "attention.head_count_kv: expected a divisor of 4 heads, got 3"
    assert message(llama(heads=3)) == f"tiny.gguf: llama.{problem}"


def test_a_missing_key(message: Callable[..., str]) -> None:
    recipe, name = llama(), "attention.layer_norm_rms_epsilon"
    keys = {key: value for key, value in recipe.keys.items() if key != name}
    problem = "expected a positive number, got no such key"
    assert message(replace(recipe, keys=keys)) == f"tiny.gguf: llama.{name}: {problem}"


# --- tensors --------------------------------------------------------------------------------------


def test_a_missing_tensor(message: Callable[..., str]) -> None:
    assert message(with_tensors(lambda tensors: tensors.pop(QUERIES))) == (
        f"tiny.gguf: tensor blk.1.attn_q.weight: expected a tensor of shape [256, 256] for "
        f"{QUERIES}, got none"
    )


def test_a_tensor_of_another_shape(message: Callable[..., str]) -> None:
    def change(tensors: Tensors) -> None:
        tensors[QUERIES] = tensors[QUERIES].map(lambda rows: rows[:128])

    assert message(with_tensors(change)) == (
        f"tiny.gguf: tensor blk.1.attn_q.weight: expected shape [256, 256] for {QUERIES}, "
        "got [256, 128]"
    )


def test_a_format_that_is_not_multiplied(message: Callable[..., str]) -> None:
    blocks = Stored(np.zeros((256, 66), np.uint8), GGMLQuantizationType.IQ2_XXS)
    text = message(with_tensors(lambda tensors: tensors.update({QUERIES: blocks})))
    assert text.startswith("tiny.gguf: tensor blk.1.attn_q.weight: expected a format that q4jit")
    assert "got IQ2_XXS (ggml type 16)" in text


def test_a_tensor_that_the_model_does_not_have(message: Callable[..., str]) -> None:
    extra = {"blk.1.strange.weight": np.zeros(3, np.float32)}
    text = message(replace(llama(), extra=extra))
    assert text == "tiny.gguf: expected tensors of a llama model, got 'blk.1.strange.weight'"


def test_a_matrix_in_another_rank(message: Callable[..., str]) -> None:
    """It would not be packed, and its rows would not be put into the model's order."""

    def change(tensors: Tensors) -> None:
        tensors[QUERIES] = tensors[QUERIES].map(lambda rows: rows[:, None])

    assert message(with_tensors(change)) == (
        f"tiny.gguf: tensor blk.1.attn_q.weight: expected shape [256, 256] for {QUERIES}, "
        "got [256, 1, 256]"
    )


@pytest.mark.parametrize(
    ("recipe", "names", "problem"),
    [
        (llama(), ["long", "short"], "expected tensors of a llama model, got 'rope_factors_long"),
        (qwen2(), ["freqs"], "expected tensors of a qwen2 model, got 'rope_freqs.weight'"),
        (phi3(), ["long"], "tensor rope_factors_short.weight: expected shape [32], got none"),
        (phi3(), ["short"], "tensor rope_factors_long.weight: expected shape [32], got none"),
        (
            phi3(rotary=0.5),
            ["long", "short"],
            "tensor rope_factors_short.weight: expected shape [1",
        ),
    ],
)
def test_factors_that_the_model_does_not_have(
    message: Callable[..., str], recipe: Recipe, names: list[str], problem: str
) -> None:
    stems = ["rope_freqs" if name == "freqs" else f"rope_factors_{name}" for name in names]
    extra = {f"{stem}.weight": np.ones(32, np.float32) for stem in stems}
    assert message(replace(recipe, extra=extra)).startswith(f"tiny.gguf: {problem}")


def test_factors_of_another_number(message: Callable[..., str]) -> None:
    extra = {"rope_freqs.weight": np.ones(5, np.float32)}
    problem = "tensor rope_freqs.weight: expected shape [32], got [5]"
    assert message(replace(llama(), extra=extra)) == f"tiny.gguf: {problem}"


# --- the tokenizer --------------------------------------------------------------------------------


def test_no_tokenizer(message: Callable[..., str]) -> None:
    problem = "expected a file with a tokenizer, got one without the key tokenizer.ggml.model"
    assert message(replace(llama(), tokenizer="")) == f"tiny.gguf: {problem}"


def test_special_tokens_that_are_no_tokens(
    message: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    add = GGUFWriter.add_pad_token_id
    monkeypatch.setattr(GGUFWriter, "add_pad_token_id", lambda self, _: add(self, 2**32 - 1))
    assert message(llama()) == (
        "tiny.gguf: tokenizer.ggml.padding_token_id: expected the id of one of 320 tokens, "
        "got 4294967295"
    )


def test_more_tokens_than_vectors(message: Callable[..., str]) -> None:
    assert message(llama(vocab_size=288)) == (
        "tiny.gguf: tokenizer.ggml.tokens: expected at most 288 tokens, the rows of "
        "token_embd.weight, got 320"
    )


@pytest.mark.parametrize(
    ("kind", "problem"), [("bert", "stating tokenizer 'bert'"), ("gpt2", "PyMerges")]
)
def test_a_tokenizer_that_transformers_cannot_read(
    message: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str, problem: str
) -> None:
    from gguf import GGUFWriter

    add_model, add_merges = GGUFWriter.add_tokenizer_model, GGUFWriter.add_token_merges
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_model", lambda self, _: add_model(self, kind))
    monkeypatch.setattr(GGUFWriter, "add_token_merges", lambda self, _: add_merges(self, ["he"]))
    text = message(llama())
    assert text.startswith("tiny.gguf: transformers cannot read the tokenizer: ")
    assert problem in text


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "header at byte 0: expected at least 24 bytes, got a file of 0 bytes"),
        (b"This is a text, not a model.", "magic at byte 0: expected b'GGUF', got b'This'"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError) as caught:
        from_gguf(path)
    assert str(caught.value) == f"{path}: {problem}"


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "tiny.gguf").path
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(GGUFError, match=r"tiny\.gguf: tensor '.*: expected data in the file's"):
        from_gguf(path)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError) as caught:
        from_gguf(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected a GGUF file, got a folder; name a file in it"
    )
    for given, got in ((None, "NoneType"), (3, "int"), ("", "''")):
        with pytest.raises(
            ArgumentError, match=f"path: expected the path of a GGUF file, got {got}"
        ):
            from_gguf(given)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"No such file .*nothing\.gguf"):
        from_gguf(tmp_path / "nothing.gguf")


# --- arguments and the machine --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"device": "gpu"},
            'device: expected a device of PyTorch, such as "cpu" or "cuda", got \'gpu\'',
        ),
        ({"device": "mps"}, "device: expected a CPU, or a GPU of CUDA or ROCm, got mps"),
        ({"device": "meta"}, "device: expected a CPU, or a GPU of CUDA or ROCm, got meta"),
        ({"dtype": "float8"}, "dtype: expected 'float32' or 'float16' or 'bfloat16', got 'float8'"),
        (
            {"dtype": torch.float64},
            "dtype: expected 'float32' or 'float16' or 'bfloat16', got 'float64'",
        ),
        ({"precision": "f64"}, "precision: expected 'f32' or 'f16' or 'i8', got 'f64'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    """They are refused before the file is opened."""
    with pytest.raises(ArgumentError) as caught:
        from_gguf(tmp_path / "nothing.gguf", **options)
    assert str(caught.value) == problem


def test_a_gpu_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError) as caught:
        from_gguf(tmp_path / "nothing.gguf", device="cuda")
    problem = "device: expected a GPU that PyTorch can use, got none, for device='cuda'"
    assert str(caught.value) == problem


def test_too_little_memory(message: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda _: 100_000)
    assert message(llama(), DeviceError) == (
        "memory for the weights of tiny.gguf on cpu: expected 0.00 GB, got 0.00 GB that are "
        "available; free memory, or take a smaller file"
    )


def test_memory_that_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the size of the file: with it, loading goes on until a tensor is read."""
    path = write(llama(), tmp_path / "tiny.gguf").path
    monkeypatch.setattr(room, "available_bytes", lambda _: path.stat().st_size)
    with pytest.raises(pytest.fail.Exception, match=r"tensor .* was read"):
        from_gguf(path)


# --- packages -------------------------------------------------------------------------------------


def test_the_oldest_version_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extra = project["optional-dependencies"]["transformers"]
    (required,) = [each for each in extra if each.startswith("transformers")]
    assert required == f"transformers>={installed.OLDEST[0]}.{installed.OLDEST[1]}"


_MISSING = (
    "util.find_spec = lambda name, *_, old=util.find_spec: None if name == {!r} else old(name)"
)
_OLD = (
    "metadata.version = lambda name, old=metadata.version: "
    "'5.23.1' if name == 'transformers' else old(name)"
)
_NONE = "got none; run pip install 'q4jit[transformers]'"
_UPGRADE = "run pip install 'q4jit[transformers]', or pip install --upgrade transformers"


@pytest.mark.parametrize(
    ("prelude", "problem"),
    [
        (
            _MISSING.format("torch"),
            "transformers: expected PyTorch, got none; run pip install 'q4jit[transformers]'",
        ),
        (
            _MISSING.format("transformers"),
            f"transformers: expected transformers 5.24 or newer, {_NONE}",
        ),
        (_MISSING.format("gguf"), f"transformers: expected the package gguf, {_NONE}"),
        (_OLD, f"transformers: expected transformers 5.24 or newer, got 5.23.1; {_UPGRADE}"),
    ],
)
def test_importing_without_a_suitable_package(prelude: str, problem: str) -> None:
    program = f"import sys; from importlib import metadata, util; {prelude}; "
    command = [sys.executable, "-c", program + "import q4jit.transformers"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert run.returncode == 1
    assert run.stderr.strip().endswith(f"ImportError: q4jit.{problem}")
