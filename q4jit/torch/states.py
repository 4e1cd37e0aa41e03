"""The entry of a weight in the state of a module: its blocks in GGUF's order."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from q4jit.conversions import tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.torch.memory import TO_GET_VALUES, AnyWeight
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import FORMATS
from q4jit.weights.tensor import QuantizedTensor


class Described(Protocol):
    """A `Weight`, whose module imports this one."""

    format: str
    blocks: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), or (E, K, N) for experts."""
        ...


def check_keys(
    weight: Described,
    state: Mapping[str, Any],
    prefix: str,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Add the wrong names below `prefix` to the lists, as PyTorch's modules do."""
    names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    others = [name for name in names if name != weight.format]
    formats = [name for name in others if name in FORMATS]
    if weight.format not in names and formats:
        what, where = f"{weight.format} {list(weight.shape)}", prefix.removesuffix(".")
        cure = "make the module with the format of the state"
        errors.append(expected(what, formats[0], where=where, cure=cure))
    elif strict:
        unexpected += [prefix + name for name in others]
        if weight.format not in names:
            missing.append(prefix + weight.format)


def checked_entry(weight: Described, blocks: Any, name: str, assign: bool) -> torch.Tensor:
    """Return an entry of a state, called `name`. Raises ArgumentError for a wrong one.

    assign: the blocks take the place of the weight's, whatever those are.
    """
    *experts, k, n = weight.shape
    shape = (*experts, n, FORMATS[weight.format].column_bytes(k))
    what = f"uint8 {list(shape)} for {weight.format} {list(weight.shape)}"
    if not isinstance(blocks, torch.Tensor):
        raise ArgumentError(expected(what, type(blocks).__name__, where=name))
    if blocks.dtype is not torch.uint8 or blocks.shape != shape:
        got = f"{tensor_dtype(blocks)} {list(blocks.shape)}"
        raise ArgumentError(expected(what, got, where=name))
    if not assign and blocks.device.type == "meta":
        raise ArgumentError(expected("a tensor with values", "one on meta", where=name))
    if not assign and weight.blocks.device.type == "meta":
        what, got = "a weight that can be written to", "one on meta"
        raise ArgumentError(expected(what, got, where=name, cure=TO_GET_VALUES))
    return blocks


def weight_of_bytes(raw: Any, shape: tuple[int, ...], name: str) -> AnyWeight:
    """Return the weight of GGUF blocks, which are copied unless nobody can write to them.

    shape: (K, N), or (E, K, N) for experts. name: of the format.
    """
    if len(shape) == 3:
        return ExpertTensor.from_bytes(raw, shape=shape, format=name)
    k, n = shape
    return QuantizedTensor.from_bytes(raw, shape=(k, n), format=name)
