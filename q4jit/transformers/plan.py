"""Which tensors of a file become which modules of a model. Nothing is read yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import gguf
import torch
from torch import nn

from q4jit.errors import GGUFError, expected, short_name
from q4jit.transformers.architectures import Architecture
from q4jit.weights.gguf.file import GGUFFile

LINEAR: Final = "linear"
EMBEDDING: Final = "embedding"
EXPERTS: Final = "experts"
FLOATS: Final = "floats"

ROPE_FACTORS: Final = "rope_freqs.weight"
# by architecture: what becomes no parameter
_READ_APART: Final = {
    "llama": (ROPE_FACTORS,),
    "phi3": ("rope_factors_short.weight", "rope_factors_long.weight"),
}


@dataclass(frozen=True)
class ModulePart:
    """A module of the model, and the tensors that it is made of.

    Attributes:
        module: its name in the model.
        kind: what becomes of it: `LINEAR`, `EMBEDDING` and `EXPERTS` get packed weights, `FLOATS`
            keeps its class.
        tensors: names of tensors by that of the parameter; of experts, by "gate", "up", "down".
    """

    module: str
    kind: str
    tensors: dict[str, str]


def plan_parts(model: nn.Module, file: GGUFFile, architecture: Architecture) -> list[ModulePart]:
    """Return the parts of a model on "meta", except a head that shares the embedding's weight.

    Raises GGUFError for missing and superfluous tensors, for wrong shapes, and for formats that
    are not multiplied.
    """
    parts = list(_Planner(model, file, architecture).parts())
    used = {name for part in parts for name in part.tensors.values()}
    used.update(_READ_APART.get(architecture.name, ()))
    unknown = [name for name in file.tensors if name not in used]
    if unknown:
        what, where = f"tensors of a {architecture.name} model", file.paths[0]
        raise GGUFError(expected(what, short_name(unknown[0]), where=where))
    order = {name: i for i, name in enumerate(file.tensors)}
    return sorted(parts, key=lambda part: min(order[name] for name in part.tensors.values()))


class _Planner:
    """Finds the tensors of each module."""

    def __init__(self, model: nn.Module, file: GGUFFile, architecture: Architecture) -> None:
        self._model, self._file = model, file
        config: Any = model.config
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(numbers[architecture.name], config.num_hidden_layers)
        self._has_own_head = not config.tie_word_embeddings
        self._may_lack_biases = bool(architecture.biases)

    def parts(self) -> Iterator[ModulePart]:
        """Yield the parts in the order of the modules."""
        head: Any = self._model
        tied = None if self._has_own_head else head.get_output_embeddings()
        for name, module in self._model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not own or module is tied:
                continue
            if "gate_up_proj" in own:
                yield self._experts(name, own)
            else:
                yield self._module(name, module, own)

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> ModulePart:
        tensors = {}
        for parameter, value in own.items():
            tensor = self._tensor(f"{name}.{parameter}")
            is_linear_bias = parameter == "bias" and isinstance(module, nn.Linear)
            if is_linear_bias and self._may_lack_biases and tensor not in self._file.tensors:
                continue
            self._check(tensor, tuple(reversed(value.shape)), f"{name}.{parameter}")
            tensors[parameter] = tensor
        kind = FLOATS
        if "weight" in tensors and self._file.tensors[tensors["weight"]].rank == 2:
            if type(module) is nn.Linear:
                kind = LINEAR
            elif isinstance(module, nn.Embedding):
                kind = EMBEDDING
        return ModulePart(name, kind, tensors)

    def _experts(self, name: str, own: dict[str, nn.Parameter]) -> ModulePart:
        count, width, hidden = own["down_proj"].shape
        down = self._tensor(f"{name}.down_proj")
        tensors = {which: down.replace("_down_", f"_{which}_") for which in ("gate", "up", "down")}
        for which, tensor in tensors.items():
            shape = (hidden, width, count) if which == "down" else (width, hidden, count)
            self._check(tensor, shape, f"{name} ({which})")
        return ModulePart(name, EXPERTS, tensors)

    def _tensor(self, parameter: str) -> str:
        """Return the name of a parameter's tensor."""
        module, _, leaf = parameter.rpartition(".")
        tensor = self._names.get_name(module)
        if tensor is not None:
            return f"{tensor}.{leaf}"
        tensor = self._names.get_name(parameter)
        assert tensor is not None, f"{parameter} has no name in GGUF files"
        return f"{tensor}.weight"

    def _check(self, tensor: str, shape: tuple[int, ...], parameter: str) -> None:
        """Raise GGUFError unless the file has a tensor, of this shape, that can be used."""
        where = f"{self._file.paths[0]}: tensor {tensor}"
        entry = self._file.tensors.get(tensor)
        if entry is None:
            what = f"a tensor of shape {list(shape)} for {parameter}"
            raise GGUFError(expected(what, "none", where=where))
        if entry.problem:
            raise GGUFError(f"{where}: {entry.problem}")
        # one row of a matrix may be stored as a vector
        if entry.shape[: entry.rank] not in {shape, tuple(size for size in shape if size != 1)}:
            what, got = f"shape {list(shape)} for {parameter}", str(list(entry.shape))
            raise GGUFError(expected(what, got, where=where))


def needed_bytes(file: GGUFFile, parts: list[ModulePart], dtype: torch.dtype) -> int:
    """Return the bytes that the weights of a model take."""
    total = 0
    for part in parts:
        for name in part.tensors.values():
            entry, count = file.tensors[name], 1
            for size in entry.shape:
                count *= size
            total += count * dtype.itemsize if part.kind == FLOATS else entry.nbytes
    return total
