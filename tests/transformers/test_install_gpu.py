"""`install` on a real GPU: logits, the kernel's names, and a captured graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from q4jit import quantize
from q4jit.torch import Weight
from q4jit.transformers import install, kernel, uninstall
from q4jit.weights.formats import FORMATS
from tests.support.torch.hybrid_models import ARCHITECTURES, VOCABULARY, write

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    install()
    yield
    uninstall()


def prompt(length: int) -> Tensor:
    return torch.arange(length, device="cuda")[None] * 7 % VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", architecture, tied=tied)
    options: dict[str, Any] = {"gguf_file": "model.gguf", "device_map": "cuda"}
    read = AutoModelForCausalLM.from_pretrained
    model = read(tmp_path, **options)
    floats = read(tmp_path, quantization_config=GgufConfig(dequantize=True), **options)
    assert {m.blocks.device.type for m in model.modules() if isinstance(m, Weight)} == {"cuda"}
    with torch.no_grad():
        for length in (1, 5, 33):
            made, wanted = model(prompt(length)).logits, floats(prompt(length)).logits
            assert float((made - wanted).norm() / wanted.norm()) < 1e-3  # TF32 in `floats`
    tokens = model.generate(prompt(5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 13)


def test_the_kernel_reads_blocks_of_the_device() -> None:
    weight = quantize(torch.randn(256, 64).numpy(), "Q4_K")
    values = torch.from_numpy(weight.dequantize()).cuda()
    blocks, kind = torch.from_numpy(weight.raw.copy()).cuda(), FORMATS["Q4_K"].ggml_type
    x, ids = torch.randn(3, 256, device="cuda"), torch.tensor([5, 0, 63], device="cuda")
    made = kernel.mul_mat_vec(blocks, x, kind, 64)
    torch.testing.assert_close(made.double(), x.double() @ values.double(), rtol=1e-4, atol=1e-4)
    rows = kernel.get_rows(blocks, ids, kind, 256, torch.float32)
    assert torch.equal(rows, values.T[ids])
    assert torch.equal(kernel.dequantize(blocks, kind, 64, 256, torch.float32), values.T)
