"""PyTorch's products: in f16 or bf16, with 4-bit weights, and with weights decoded first."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.host_tensors import host_tensor
from q4jit.errors import expected
from q4jit.floats import FLOAT_TYPES
from q4jit.tools.compare.arena import AbsentError
from q4jit.tools.compare.work import TimedCall
from q4jit.weights.decode import decode
from q4jit.weights.reference import rotated_copies
from q4jit.weights.tensor import QuantizedTensor


def load_torch() -> Any:
    """Import PyTorch. Raises AbsentError."""
    if importlib.util.find_spec("torch") is None:
        raise AbsentError("torch is not installed; use pip install torch")
    return importlib.import_module("torch")  # late: not a dependency


@dataclass(frozen=True)
class Quants:
    """The contents of a Q4_0 weight, whose values are d · (q − 8).

    Attributes:
        q: codes from 0 to 15 [N, K].
        d: scales [N, K/32].
    """

    q: NDArray[np.uint8]
    d: NDArray[np.float16]

    @classmethod
    def of(cls, w: QuantizedTensor) -> "Quants":
        """Return the codes and scales of a weight. Raises AbsentError unless it is Q4_0."""
        if w.format != "Q4_0":
            raise AbsentError(expected("Q4_0", w.format))
        k, n = w.shape
        blocks = w.raw.reshape(n, k // 32, 18)
        d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        nibbles = blocks[..., 2:]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        return cls(q.reshape(n, k), d)


def int4_weight(torch: Any, w: QuantizedTensor, dtype: Any) -> tuple[NDArray[np.uint8], Any]:
    """Return the codes, and scales with zeros [K/32, N, 2] in x's dtype, as PyTorch takes them."""
    quants = Quants.of(w)
    d = torch.from_numpy(quants.d.astype(np.float32)).t()
    return quants.q, torch.stack([d, torch.zeros_like(d)], dim=-1).contiguous().to(dtype)


def tensor_error(work: TimedCall, result: Any) -> float | None:
    """Return the error of a tensor; None if it contains NaN or Inf."""
    dtype = FLOAT_TYPES[str(result.dtype).removeprefix("torch.")]
    # NumPy has bf16 with ml_dtypes only
    return work.error([result.float().cpu().numpy()], dtype)


TorchProduct = Callable[[Any, str, TimedCall, int], list[Callable[[], Any]]]


def dense(torch: Any, device: str, work: TimedCall, total_bytes: int) -> list[Callable[[], Any]]:
    """Return calls of the product of the vendor's BLAS in x's dtype, for f32 in f16."""
    (w,) = work.weights
    dtype = torch.bfloat16 if work.dtype == "bf16" else torch.float16
    values = torch.from_numpy(decode(w.block_format, w.raw)).to(device).to(dtype)
    x = host_tensor(work.x).to(device).to(dtype)
    count = rotated_copies(total_bytes, values.numel() * values.element_size())
    copies = [values, *(values.clone() for _ in range(count - 1))]
    return [functools.partial(lambda w: x @ w.t(), w) for w in copies]


def int4(torch: Any, device: str, work: TimedCall, total_bytes: int) -> list[Callable[[], Any]]:
    """Return calls of PyTorch's product with 4-bit weights (tinygemm), which takes x in bf16."""
    (w,) = work.weights
    q, scales = int4_weight(torch, w, torch.bfloat16)
    pairs = torch.from_numpy(q[:, ::2] << 4 | q[:, 1::2]).to(device)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)  # PyTorch's innerKTiles
    scales, x = scales.to(device), host_tensor(work.x).to(device).bfloat16()
    copies = [
        (packed.clone(), scales.clone()) for _ in range(rotated_copies(total_bytes, w.nbytes))
    ]
    multiply = torch.ops.aten._weight_int4pack_mm
    return [functools.partial(multiply, x, packed, 32, scales) for packed, scales in copies]


def dequantise(
    torch: Any, device: str, work: TimedCall, total_bytes: int
) -> list[Callable[[], Any]]:
    """Return calls that decode the weight to x's dtype and multiply."""
    (w,) = work.weights
    if w.format != "Q4_0":
        raise AbsentError(expected("Q4_0", w.format))
    k, n = w.shape
    blocks = torch.from_numpy(w.raw.reshape(n, k // 32, 18).copy()).to(device)
    x = host_tensor(work.x).to(device)

    def call(blocks: Any) -> Any:
        d = blocks[..., :2].contiguous().view(torch.float16).to(x.dtype)
        nibbles = blocks[..., 2:]
        q = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        return x @ ((q.to(x.dtype) - 8) * d).view(n, k).t()

    copies = [blocks.clone() for _ in range(rotated_copies(total_bytes, w.nbytes))]
    return [functools.partial(call, blocks) for blocks in copies]
