"""The five names that transformers' packed path asks of a kernel."""

import gc
import weakref
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.gguf import dequant

from q4jit import quantize
from q4jit.errors import ArgumentError, FormatError
from q4jit.transformers import kernel
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16
from tests.support.kernels import random_blocks

K, N, E = 256, 40, 3
BLOCK_FORMATS: Final = [name for name, fmt in FORMATS.items() if fmt.scale_at is not None]
ROUNDING: Final = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BF16, F32 = torch.bfloat16, torch.float32


def made(name: str, *lead: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random blocks uint8 [*lead, N, bytes of a row], and their values in float64."""
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    rows = N * int(np.prod(lead, initial=1))
    blocks = torch.from_numpy(random_blocks(fmt, K, rows, "normal", rng).reshape(*lead, N, -1))
    flat = blocks.reshape(-1, fmt.block_bytes)
    values = kernel.dequantized_blocks(flat, fmt.ggml_type, F32).reshape(*lead, N, K)
    return blocks, values.double()


def floats(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_close(y: Tensor, wanted: Tensor, dtype: torch.dtype = F32) -> None:
    assert y.dtype is dtype
    assert y.shape == wanted.shape
    assert float((y.double() - wanted).norm() / wanted.norm()) < ROUNDING[dtype]


@pytest.mark.parametrize("name", sorted(set(BLOCK_FORMATS) - {"MXFP4", "Q5_0", "Q5_1"}))
def test_blocks_have_the_values_of_transformers(name: str) -> None:
    blocks, values = made(name)
    wanted = dequant.dequantize(blocks, FORMATS[name].ggml_type).reshape(N, K)
    assert torch.equal(values.float(), wanted)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, 9])
def test_products(rows: int, dtype: torch.dtype) -> None:
    blocks, values = made("Q4_K")
    x = floats(rows, K, dtype=dtype)
    y = kernel.mul_mat_vec(blocks, x, FORMATS["Q4_K"].ggml_type, N)
    assert_close(y, x.double() @ values.T, dtype)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_format_is_multiplied(name: str) -> None:
    kind = FORMATS[name].ggml_type
    assert kind in kernel.GEMV_TYPES
    blocks, values = made(name)
    x = floats(1, K)
    assert_close(kernel.mul_mat_vec(blocks, x, kind, N), x.double() @ values.T)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_products_with_chosen_experts(dtype: torch.dtype) -> None:
    blocks, values = made("Q6_K", E)
    x, ids = floats(4, K), torch.tensor([[2, 0], [1, 1], [0, 2], [2, 1]], dtype=dtype)
    y = kernel.mul_mat_id(blocks, x, ids, FORMATS["Q6_K"].ggml_type, N)
    assert_close(y, torch.einsum("mk,mank->man", x.double(), values[ids.long()]))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rows(dtype: torch.dtype) -> None:
    blocks, values = made("Q5_0")
    ids = torch.tensor([39, 0, 7, 7])
    rows = kernel.get_rows(blocks, ids, FORMATS["Q5_0"].ggml_type, K, dtype)
    assert torch.equal(rows, values[ids].to(dtype))


def test_whole_weights() -> None:
    blocks, values = made("Q4_K")
    whole = kernel.dequantize(blocks[3:], FORMATS["Q4_K"].ggml_type, N - 3, K, BF16)
    assert torch.equal(whole, values[3:].to(BF16))


def test_types_that_are_not_multiplied_are_left_to_transformers() -> None:
    iq2_xxs = 16
    assert iq2_xxs not in kernel.GEMV_TYPES
    blocks = torch.randint(0, 256, (N, 66), dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([0, 0x2C], dtype=torch.uint8)  # scales of 1/16
    whole = kernel.dequantize(blocks, iq2_xxs, N, K, F32)
    assert torch.equal(whole, dequant.dequantize(blocks, iq2_xxs).reshape(N, K))
    assert float(whole.abs().max()) > 0
    with pytest.raises(ArgumentError, match=r"ggml_type: expected one of .*Q4_0.* got IQ2_XXS"):
        kernel.mul_mat_vec(blocks, floats(1, K), iq2_xxs, N)


# --- what is kept between calls -------------------------------------------------------------------


def test_a_weight_is_repacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = made("Q4_0")
    x, kind = floats(1, K), FORMATS["Q4_0"].ggml_type
    first = kernel._weight(blocks, kind, K, N)
    kernel.mul_mat_vec(blocks, x, kind, N)
    packed = first._resident.blocks(INTERLEAVED16)
    kernel.mul_mat_vec(blocks[:], x, kind, N)  # another tensor in the same memory
    again = kernel._weight(blocks, kind, K, N)
    assert again is first
    assert again._resident.blocks(INTERLEAVED16) is packed


def test_a_tensor_that_was_written_to_gives_no_stale_result() -> None:
    (blocks, before), (other, after) = made("Q4_0"), made("Q4_0", seed=1)
    x, kind, ids = floats(2, K), FORMATS["Q4_0"].ggml_type, torch.arange(N)
    assert_close(kernel.mul_mat_vec(blocks, x, kind, N), x.double() @ before.T)
    assert torch.equal(kernel.get_rows(blocks, ids, kind, K, F32), before.float())
    blocks.copy_(other)
    assert_close(kernel.mul_mat_vec(blocks, x, kind, N), x.double() @ after.T)
    assert torch.equal(kernel.get_rows(blocks, ids, kind, K, F32), after.float())


def test_a_tensor_of_inference_mode_gives_no_stale_result() -> None:
    (blocks, before), (other, after) = made("Q4_0"), made("Q4_0", seed=1)
    x, kind = floats(2, K), FORMATS["Q4_0"].ggml_type
    with torch.inference_mode():
        mine = blocks.clone()
        assert_close(kernel.mul_mat_vec(mine, x, kind, N), x.double() @ before.T)
        mine.copy_(other)
        assert_close(kernel.mul_mat_vec(mine, x, kind, N), x.double() @ after.T)


def test_a_weight_is_forgotten_with_its_tensor() -> None:
    blocks = made("Q4_0")[0].clone()
    kind = FORMATS["Q4_0"].ggml_type
    kernel.mul_mat_vec(blocks, floats(1, K), kind, N)
    resident = kernel._weight(blocks, kind, K, N)._resident
    packed = weakref.ref(resident.blocks(INTERLEAVED16))
    del blocks, resident
    gc.collect()
    assert packed() is None


# --- bad input ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    blocks, _ = made("Q4_0")
    kind, x = FORMATS["Q4_0"].ggml_type, floats(1, K)
    with pytest.raises(ArgumentError, match=r"expected uint8, contiguous, .* Q4_0 \[256, 41\]"):
        kernel.mul_mat_vec(blocks, x, kind, N + 1)
    with pytest.raises(ArgumentError, match="strided"):
        kernel.mul_mat_vec(blocks.T.contiguous().T, x, kind, N)
    with pytest.raises(ArgumentError, match="expected an input without gradient"):
        kernel.mul_mat_vec(blocks, x.clone().requires_grad_(), kind, N)
    with pytest.raises(FormatError, match="33"):
        kernel.mul_mat_vec(blocks, floats(1, 33), kind, N)
    with pytest.raises(ArgumentError, match=r"blocks of mul_mat_id: expected uint8 \[experts"):
        kernel.mul_mat_id(blocks, x, torch.zeros(1, 1, dtype=torch.int64), kind, N)
    with pytest.raises(ArgumentError, match=r"dtype: expected torch.float32 or .* got torch.int8"):
        kernel.get_rows(blocks, torch.arange(2), kind, K, torch.int8)


def test_quantised_weights_are_read_as_files_store_them() -> None:
    weight = quantize(floats(K, N).numpy(), "Q5_1")
    blocks, kind = torch.from_numpy(weight.raw.copy()), FORMATS["Q5_1"].ggml_type
    x = floats(2, K)
    wanted = x.double() @ torch.from_numpy(weight.dequantize()).double()
    assert_close(kernel.mul_mat_vec(blocks, x, kind, N), wanted)
