"""PyTorch's products: in halves, with 4-bit weights, and with weights that it decodes."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jit.tools.compare.arena import AbsentError
from q4jit.tools.compare.work import TimedCall
from q4jit.weights.formats import decode
from q4jit.weights.reference import rotated_copies
from q4jit.weights.tensor import QuantizedTensor


def load_torch() -> Any:
    """Import PyTorch. Raises AbsentError."""
    if importlib.util.find_spec("torch") is None:
        raise AbsentError("torch cannot be imported: pip install torch")
    return importlib.import_module("torch")  # late: no package of ours


@dataclass(frozen=True)
class Quants:
    """Quants [N, K] from 0 to 15, of value d·(q − 8), and their d [N, K/32]."""

    q: NDArray[np.uint8]
    d: NDArray[np.float16]

    @classmethod
    def of(cls, w: QuantizedTensor) -> "Quants":
        """Return those of a weight. Raises AbsentError for another format than Q4_0."""
        if w.format != "Q4_0":
            raise AbsentError(f"takes Q4_0, found {w.format}")
        k, n = w.shape
        blocks = w.raw.reshape(n, k // 32, 18)
        d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        nibbles = blocks[..., 2:]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        return cls(q.reshape(n, k), d)


def int4_weight(torch: Any, w: QuantizedTensor) -> tuple[NDArray[np.uint8], Any]:
    """The quants, and scales with zeros [K/32, N, 2] in bf16 as torch's int4 products take them."""
    quants = Quants.of(w)
    d = torch.from_numpy(quants.d.astype(np.float32)).t()
    return quants.q, torch.stack([d, torch.zeros_like(d)], dim=-1).contiguous().bfloat16()


TorchProduct = Callable[[Any, str, TimedCall, int], list[Callable[[], Any]]]


def dense_fp16(
    torch: Any, place: str, work: TimedCall, total_bytes: int
) -> list[Callable[[], Any]]:
    """A product of halves, by the vendor's BLAS."""
    (w,) = work.weights
    half = torch.from_numpy(decode(w.block_format, w.raw)).to(place).half()
    x = torch.from_numpy(work.x).to(place).half()
    count = rotated_copies(total_bytes, half.numel() * half.element_size())
    copies = [half, *(half.clone() for _ in range(count - 1))]
    return [functools.partial(lambda w: x @ w.t(), w) for w in copies]


def int4(torch: Any, place: str, work: TimedCall, total_bytes: int) -> list[Callable[[], Any]]:
    """PyTorch's own product with 4-bit weights (tinygemm), x in bf16."""
    (w,) = work.weights
    q, scales = int4_weight(torch, w)
    pairs = torch.from_numpy(q[:, ::2] << 4 | q[:, 1::2]).to(place)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)  # tiles of K of an instruction
    scales, x = scales.to(place), torch.from_numpy(work.x).to(place).bfloat16()
    copies = [
        (packed.clone(), scales.clone()) for _ in range(rotated_copies(total_bytes, w.nbytes))
    ]
    multiply = torch.ops.aten._weight_int4pack_mm
    return [functools.partial(multiply, x, packed, 32, scales) for packed, scales in copies]


def dequantise(
    torch: Any, place: str, work: TimedCall, total_bytes: int
) -> list[Callable[[], Any]]:
    """The weight's values in f32 from its blocks, then a product."""
    (w,) = work.weights
    if w.format != "Q4_0":
        raise AbsentError(f"takes Q4_0, found {w.format}")
    k, n = w.shape
    blocks = torch.from_numpy(w.raw.reshape(n, k // 32, 18).copy()).to(place)
    x = torch.from_numpy(work.x).to(place)

    def call(blocks: Any) -> Any:
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        nibbles = blocks[..., 2:]
        q = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        return x @ ((q.float() - 8) * d).view(n, k).t()

    copies = [blocks.clone() for _ in range(rotated_copies(total_bytes, w.nbytes))]
    return [functools.partial(call, blocks) for blocks in copies]
