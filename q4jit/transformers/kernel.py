"""The five names that transformers' packed path asks of a kernel, for raw GGUF blocks.

They work on the memory of the tensors that they get. The copy that kernels for products read is
made in the first call, and kept until the tensor is freed or written to.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from q4jit.conversions import tensor_dtype
from q4jit.dispatcher import specialize
from q4jit.errors import ArgumentError, expected
from q4jit.torch.arithmetic import LOOKED_UP
from q4jit.torch.inputs import FLOAT_DTYPES
from q4jit.torch.memory import AnyWeight, Stored, forget, weight_in
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.gguf.types import format_of, type_name
from q4jit.weights.indexed import vecmat
from q4jit.weights.layouts import GGUF
from q4jit.weights.tensor import QuantizedTensor

GEMV_TYPES: Final = frozenset(fmt.ggml_type for fmt in FORMATS.values())


@specialize
def _product(x: Any, w: Any) -> Any:
    return x @ w


@specialize
def _chosen_products(x: Any, w: Any, ids: Any) -> Any:
    return vecmat(x[..., None, :], w[ids])


@torch.compiler.disable
def mul_mat_vec(weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """Return x times the transpose of a packed weight: [M, N] in x's dtype.

    weight: uint8 [N, bytes of a row], on a CPU or a GPU. x: [M, K] in float32, float16 or bfloat16.
    ggml_type: the number of the format. out_features: N. Raises ArgumentError for other dtypes,
    sizes and devices, and for an x that requires a gradient.
    """
    _check_input(x)
    y: Tensor = _product(x, _weight(weight, ggml_type, x.shape[-1], out_features))
    return y


@torch.compiler.disable
def mul_mat_id(blocks: Tensor, x: Tensor, ids: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """Return the products of each row of x with the experts that its ids choose: [M, A, N].

    blocks: uint8 [E, N, bytes of a row]. x: floats [M, K]. ids: int32 or int64 [M, A].
    out_features: N. Raises as `mul_mat_vec` does.
    """
    _check_input(x)
    if blocks.dim() != 3:
        what = "uint8 [experts, rows, bytes of a row]"
        raise ArgumentError(expected(what, str(list(blocks.shape)), where="blocks of mul_mat_id"))
    weight = _weight(blocks, ggml_type, x.shape[-1], out_features, len(blocks))
    y: Tensor = _chosen_products(x, weight, ids)
    return y


@torch.compiler.disable
def get_rows(
    weight: Tensor, indices: Tensor, ggml_type: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Return rows of a packed weight as floats: [M, K].

    weight: uint8 [N, bytes of a row]. indices: int32 or int64 [M]. cols: K. dtype: float32, float16
    or bfloat16. Raises as `mul_mat_vec` does.
    """
    if dtype not in FLOAT_DTYPES:
        raise ArgumentError(
            expected(" or ".join(map(str, FLOAT_DTYPES)), str(dtype), where="dtype")
        )
    table = _weight(weight, ggml_type, cols, len(weight))
    rows: Tensor = LOOKED_UP(indices, table, FLOAT_DTYPES[dtype])
    return rows


@torch.compiler.disable
def dequantize(weight: Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Return a packed weight as floats [N, K]. rows, cols: N and K. Raises as `get_rows` does.

    transformers unpacks the types that q4jit does not multiply.
    """
    if ggml_type not in GEMV_TYPES:
        from transformers.integrations.gguf.dequant import dequantize as unpacked

        return unpacked(weight, ggml_type, dtype).reshape(rows, cols)
    ids = torch.arange(rows, device=weight.device)
    made: Tensor = get_rows(weight.reshape(rows, -1), ids, ggml_type, cols, dtype)
    return made


def dequantized_blocks(blocks: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Return the values of blocks: [n, elements of a block], for uint8 [n, bytes of a block].

    It runs without a kernel: each number of blocks would need one of its own.
    """
    fmt = _format(ggml_type)
    shape = fmt.block_elements, len(blocks)
    weight = QuantizedTensor.from_bytes(blocks.cpu().numpy(), shape=shape, format=fmt.name)
    values = torch.from_numpy(np.ascontiguousarray(weight.dequantize().T))
    return values.to(blocks.device, dtype)


def _format(ggml_type: int) -> Format:
    fmt = format_of(ggml_type)
    if fmt is None:
        what, got = f"one of {', '.join(FORMATS)}", f"{type_name(ggml_type)} ({ggml_type})"
        raise ArgumentError(expected(what, got, where="ggml_type"))
    return fmt


def _weight(blocks: Tensor, ggml_type: int, k: int, n: int, experts: int = 0) -> AnyWeight:
    """Return the weight in a tensor's memory: the same one until the tensor is written to."""
    if blocks.is_inference():
        forget(blocks)  # such tensors do not count writes
    stored = Stored(_format(ggml_type).name, k, n, experts, GGUF)
    stored.block_format.column_bytes(k)  # raises unless K is whole blocks
    return weight_in(blocks.detach(), stored)  # raises unless it is contiguous


def _check_input(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        what, got = "an input without gradient", f"{tensor_dtype(x)} that requires one"
        cure = "call q4jit.transformers.packed.replace_packed(model), whose layers have gradients"
        raise ArgumentError(expected(what, got, where="x", cure=cure))
