"""`from_gguf` and `fuse` on a real GPU: logits, greedy texts with a static cache, one copy."""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch

from q4jit.torch import Weight, fuse
from q4jit.transformers import from_gguf
from q4jit.transformers.architectures import ARCHITECTURES
from tests.support.torch.tiny.files import TinyModel
from tests.support.torch.tiny.tokenizers import VOCABULARY

pytestmark = pytest.mark.gpu

Tiny = Callable[[str], TinyModel]
BOUND: Final = 5e-5
OPTIONS: Final = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")


def prompt(length: int) -> torch.Tensor:
    return torch.arange(length)[None] * 7 % (VOCABULARY - 20)


def error(model: Any, reference: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        made, wanted = model(ids.cuda()).logits.cpu(), reference(ids).logits
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_before_and_after_fusing(tiny: Tiny, name: str) -> None:
    model, _ = from_gguf(tiny(name).path, device="cuda")
    reference = tiny(name).reference
    for length in (1, 7, 40):
        assert error(model, reference, prompt(length)) < BOUND
    fuse(model)
    for length in (1, 7, 40):
        assert error(model, reference, prompt(length)) < BOUND


@pytest.mark.parametrize("name", ["llama, tied", "gemma3"])
def test_a_tied_weight_is_held_once(tiny: Tiny, name: str) -> None:
    model, _ = from_gguf(tiny(name).path, device="cuda")
    model(prompt(3).cuda())
    weights = {id(m): m for m in model.modules() if isinstance(m, Weight)}.values()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for weight in weights:
        assert len(weight.tensor()._resident.uploads) == 1, weight


@pytest.mark.filterwarnings(
    "ignore:TensorFloat32:UserWarning",  # Inductor's, with float32
    "ignore:The CUDA Graph is empty:UserWarning",  # that of PyTorch's first pool
)
def test_greedy_texts_of_a_captured_step(tiny: Tiny) -> None:
    """transformers compiles the step for a static cache, and captures it in a CUDA graph."""
    model: Any = from_gguf(tiny("llama").path, device="cuda")[0]
    fuse(model)
    eos: Any = VOCABULARY - 1
    wanted = tiny("llama").reference.generate(prompt(12), eos_token_id=eos, **OPTIONS)
    for _ in range(2):
        made = model.generate(
            prompt(12).cuda(), eos_token_id=eos, cache_implementation="static", **OPTIONS
        )
        assert made.tolist() == wanted.tolist()
