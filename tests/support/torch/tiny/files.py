"""Write GGUF files of tiny random models as llama.cpp's converter would, and load them again."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFWriter,
    get_tensor_name_map,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from q4jit import quantize
from tests.support.torch.tiny.recipe import Recipe, Stored, Tensors
from tests.support.torch.tiny.tokenizers import add_tokenizer

_ARCHITECTURES: Final = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
_SUPER_BLOCK: Final = 256
_OWN_ROWS: Final = 4096  # of a matrix; larger ones repeat them


@dataclass(frozen=True)
class TinyModel:
    """A file, and the model that it was made of.

    Attributes:
        recipe: how it was made.
        path: of the GGUF file.
        tensors: what it holds, under the names and in the order of the Hugging Face model.
    """

    recipe: Recipe
    path: Path
    tensors: Tensors

    @cached_property
    def reference(self) -> Any:
        """The Hugging Face model, with the values that the blocks of the file have."""
        return self.reference_in(torch.float32)

    def reference_in(self, dtype: torch.dtype) -> Any:
        """Return it in another type."""
        model = AutoModelForCausalLM.from_config(self.recipe.config, dtype=dtype)
        values = {name: torch.from_numpy(each.values()) for name, each in self.tensors.items()}
        missing, unexpected = model.load_state_dict(values, strict=False)
        assert not unexpected
        # a tied head, and biases, which are zeros in a new model
        lacked = [name for name in missing if name.endswith(self.recipe.lacks)]
        assert set(missing) <= {"lm_head.weight", *lacked}
        return model.eval()


def write(recipe: Recipe, path: Path) -> TinyModel:
    """Write the file of a random model."""
    tensors = _tensors(recipe)
    converted = recipe.convert(tensors, recipe.config)
    writer = GGUFWriter(path, recipe.architecture, endianess=GGUFEndian.LITTLE)
    writer.add_name(recipe.name)
    _add_keys(writer, recipe)
    if recipe.tokenizer:
        add_tokenizer(writer, recipe.tokenizer)
    architecture = _ARCHITECTURES[recipe.architecture]
    names = get_tensor_name_map(architecture, recipe.config.num_hidden_layers)
    for name, tensor in converted.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, tensor.data, raw_dtype=tensor.kind)
    for name, values in recipe.extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(recipe, path, tensors)


def _add_keys(writer: GGUFWriter, recipe: Recipe) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: lambda key, value: (writer.add_uint32, writer.add_uint64)[value >= 2**32](key, value),
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in recipe.keys.items():
        add[type(value)](f"{recipe.architecture}.{name}", value)


def _tensors(recipe: Recipe) -> Tensors:
    """Return random values for the parameters of a model, as a file stores them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(recipe.config)
    rng = np.random.default_rng(0)
    made: Tensors = {}
    matrices = 0
    for name, parameter in model.named_parameters():
        if name.endswith(recipe.lacks):
            continue
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            middle = recipe.gain if name.endswith("norm.weight") else 0.0
            made[name] = Stored(np.float32(middle) + _random(rng, shape, 0.1))
        elif ".mlp.gate." in name or "shared_expert_gate" in name:  # llama.cpp quantises no router
            made[name] = Stored(_random(rng, shape, shape[-1] ** -0.5))
        else:
            made[name] = _packed(rng, shape, _format(recipe, name, matrices, shape[-1]))
            matrices += 1
    return made


def _format(recipe: Recipe, name: str, index: int, columns: int) -> str:
    """Return the format of a matrix."""
    if columns % _SUPER_BLOCK:  # as llama.cpp does
        return "Q8_0"
    if recipe.formats:
        return recipe.formats[index % len(recipe.formats)]
    fine = ("v_proj", "down_proj", "c_proj", "embed_tokens", "lm_head")
    return "Q6_K" if any(part in name for part in fine) else "Q4_K"


def _packed(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> Stored:
    rows = int(np.prod(shape[:-1]))
    values = _random(rng, (min(rows, _OWN_ROWS), shape[-1]), shape[-1] ** -0.5)
    blocks = quantize(values.T, name).raw
    if rows > _OWN_ROWS:
        blocks = np.resize(blocks, (rows, blocks.shape[1]))
    return Stored(blocks.reshape(*shape[:-1], -1), GGMLQuantizationType[name])


def _random(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Any:
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


# --- transformers' own loader ---------------------------------------------------------------------


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a file with transformers' own loader, which dequantises it.

    Raises AssertionError unless the file fills every parameter.
    """
    classes: Any = AutoModelForCausalLM  # its types know no pair of results
    model, report = classes.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
    )
    problems = {kind: found for kind, found in report.items() if found}
    assert not problems, problems
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a file with transformers."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
