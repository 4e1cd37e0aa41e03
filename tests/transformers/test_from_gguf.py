"""`from_gguf`: tiny files of every architecture, held to the models that they were made of."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import nn

from q4jit.errors import ArgumentError
from q4jit.torch import Embedding, Weight
from q4jit.transformers import from_gguf
from q4jit.transformers.architectures import ARCHITECTURES
from q4jit.transformers.configs import rotary_factor
from tests.support.torch.tiny.architectures import RECIPES
from tests.support.torch.tiny.files import TinyModel, load, load_tokenizer, write
from tests.support.torch.tiny.tokenizers import TEXTS, VOCABULARY

Tiny = Callable[[str], TinyModel]
Packed = Callable[[str], tuple[Any, Any]]

LENGTHS: Final = (1, 7, 40)
BOUND: Final = 2e-5
BFLOAT16_BOUND: Final = 1.5  # times the error of the dequantised model in bfloat16
each_recipe = pytest.mark.parametrize("name", RECIPES)
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY - 20, (rows, length), generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits.float()
    return result


def error(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result - wanted).norm() / wanted.norm())


def test_every_architecture_has_a_recipe() -> None:
    assert {RECIPES[name]().architecture for name in RECIPES} == set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= set(RECIPES)


# --- transformers' own loader ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name]().ignored])
def test_transformers_reads_the_same_model(tiny: Tiny, name: str) -> None:
    model, ids = tiny(name), prompt(40)
    assert torch.equal(logits(load(model.path), ids), logits(model.reference, ids))


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]().ignored])
def test_transformers_reads_another_model(tiny: Tiny, name: str) -> None:
    """The docs list what it ignores, and q4jit's results are compared with the true model."""
    model, ids = tiny(name), prompt(40)
    try:
        other = load(model.path)
    except (RuntimeError, ValueError, NotImplementedError):
        return
    assert error(logits(other, ids), logits(model.reference, ids)) > 100 * BOUND


# --- results --------------------------------------------------------------------------------------


@each_recipe
@pytest.mark.parametrize("length", LENGTHS)
def test_logits(tiny: Tiny, packed: Packed, name: str, length: int) -> None:
    ids = prompt(length)
    result = logits(packed(name)[0], ids)
    assert result.shape == (1, length, VOCABULARY)
    assert error(result, logits(tiny(name).reference, ids)) < BOUND


@each_recipe
def test_greedy_texts_with_a_cache(tiny: Tiny, packed: Packed, name: str) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made, wanted = (
        model.generate(prompt(40), eos_token_id=VOCABULARY - 1, **options).tolist()
        for model in (packed(name)[0], tiny(name).reference)
    )
    assert made == wanted
    assert len(made[0]) == 48


@each_architecture
def test_several_texts_at_once(tiny: Tiny, packed: Packed, name: str) -> None:
    ids = prompt(20, rows=2)
    assert error(logits(packed(name)[0], ids), logits(tiny(name).reference, ids)) < BOUND


@pytest.mark.parametrize(
    "name", ["llama", "qwen2moe, other widths", "gemma3, narrow heads", "phi3", "starcoder2"]
)
def test_bfloat16(tiny: Tiny, name: str) -> None:
    """Compare errors: both models round activations and norms, and q4jit's keeps its blocks."""
    ids, wanted = prompt(7), logits(tiny(name).reference, prompt(7))
    model, _ = from_gguf(tiny(name).path, dtype="bfloat16")
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    own = error(logits(tiny(name).reference_in(torch.bfloat16), ids), wanted)
    assert BOUND < error(logits(model, ids), wanted) < BFLOAT16_BOUND * own


# --- the modules ----------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[Weight]:
    return [module for module in model.modules() if isinstance(module, Weight)]


def bytes_in_gguf(weight: Weight) -> int:
    column = weight.stored.block_format.column_bytes(weight.K)
    return max(1, weight.experts) * weight.N * column


@each_recipe
def test_every_matrix_is_packed_and_held_once(tiny: Tiny, packed: Packed, name: str) -> None:
    model = packed(name)[0]
    matrices = [
        tensor for tensor in tiny(name).tensors.values() if tensor.kind != GGMLQuantizationType.F32
    ]
    held = weights(model)
    assert sum(map(bytes_in_gguf, held)) == sum(tensor.data.nbytes for tensor in matrices)
    small = ("shared_expert_gate", "mlp.gate")  # routers are not quantised
    for module, parameter in model.named_parameters():
        assert parameter.ndim == 1 or module.removesuffix(".weight").endswith(small)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    logits(model, prompt(7))
    for weight in held:
        addresses = weight.tensor()._resident.addresses
        assert addresses == {weight.layout: weight.blocks.data_ptr()}


@pytest.mark.parametrize("name", ["llama, tied", "gemma3"])
def test_a_tied_head_shares_the_embedding(packed: Packed, name: str) -> None:
    model = packed(name)[0]
    assert isinstance(model.get_input_embeddings(), Embedding)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma"])
def test_tokenizers(tiny: Tiny, packed: Packed, name: str) -> None:
    made, wanted = packed(name)[1], load_tokenizer(tiny(name).path)
    for text in TEXTS:
        ids = made(text).input_ids
        assert ids == wanted(text).input_ids
        assert made.decode(ids, skip_special_tokens=True) == wanted.decode(
            ids, skip_special_tokens=True
        )
        assert max(ids) < VOCABULARY


@pytest.mark.parametrize(
    ("kind", "adds", "starts"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_the_token_that_starts_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, adds: bool | None, starts: bool
) -> None:
    """Files of Llama 3 do not say that it is added."""
    add_kind, add = GGUFWriter.add_tokenizer_pre, GGUFWriter.add_add_bos_token
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda self, _: add_kind(self, kind))
    monkeypatch.setattr(
        GGUFWriter, "add_add_bos_token", lambda self, _: None if adds is None else add(self, adds)
    )
    tokenizer = from_gguf(write(RECIPES["llama"](), tmp_path / "tiny.gguf").path)[1]
    ids = tokenizer("the").input_ids
    assert (ids[0] == tokenizer.bos_token_id) == starts
    assert ids[1:] == [258] if starts else ids == [258]


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_chat_templates(packed: Packed, name: str) -> None:
    tokenizer = packed(name)[1]
    chat = [{"role": "user", "content": TEXTS[0]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"<|user|>{TEXTS[0]}<|assistant|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>")]
    assert [ids[0], ids[-1]] == ends


@each_architecture
def test_generation_ends_at_the_end_of_the_text(packed: Packed, name: str) -> None:
    model, tokenizer = packed(name)
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in ends
    assert max(ends) < VOCABULARY
    assert "<|end|>" not in tokenizer.get_vocab() or tokenizer.vocab["<|end|>"] in ends


# --- what libraries do with models ----------------------------------------------------------------


def test_tied_weights_stay_tied(tiny: Tiny) -> None:
    model, _ = from_gguf(tiny("llama, tied").path)
    wanted = logits(model, prompt(7))
    model.tie_weights()  # what libraries for adapters call
    assert torch.equal(logits(model, prompt(7)), wanted)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_model_loaded_in_inference_mode_has_gradients(tiny: Tiny) -> None:
    with torch.inference_mode():
        model, _ = from_gguf(tiny("llama, tied").path)
    vectors = torch.ones(1, 7, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=vectors).logits.sum().backward()
    assert vectors.grad is not None


def test_saving_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """What transformers would write loads as a model of random weights."""
    model = copy.deepcopy(from_gguf(tiny("llama, tied").path)[0])
    message = "save_pretrained: expected a model whose weights are floats, got packed ones; keep"
    with pytest.raises(ArgumentError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_the_part_of_a_head_that_turns() -> None:
    for width in range(2, 300):
        for rotated in range(2, width + 1, 2):
            factor = rotary_factor(rotated, width)
            assert int(width * factor) == rotated
            assert factor <= 1
