"""Write GGUF files of tiny random models as llama.cpp's converter would, and load them again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFWriter,
    get_tensor_name_map,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from q4jit import quantize
from tests.support.torch.gguf_recipes import Recipe, Stored
from tests.support.torch.gguf_tokenizers import add_tokenizer

_ARCHITECTURES: Final = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class TinyModel:
    """A file, and the model that it was made of.

    Attributes:
        recipe: how it was made.
        path: of the GGUF file.
        reference: the Hugging Face model with the values that the file's blocks have.
    """

    recipe: Recipe
    path: Path
    reference: Any


def write(recipe: Recipe, path: Path, seed: int = 0) -> TinyModel:
    """Write the file of a random model."""
    model = AutoModelForCausalLM.from_config(recipe.config).eval()
    stored = _stored(model, recipe, np.random.default_rng(seed))
    values = {name: torch.from_numpy(tensor.values()) for name, tensor in stored.items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    writer = GGUFWriter(path, recipe.architecture, endianess=GGUFEndian.LITTLE)
    _add_metadata(writer, recipe)
    names = get_tensor_name_map(architecture(recipe), recipe.config.num_hidden_layers)
    for name, tensor in recipe.convert(stored, recipe.config).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, tensor.data, raw_dtype=tensor.kind)
    for name, values_ in recipe.extra.items():
        writer.add_tensor(name, values_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(recipe, path, model)


def architecture(recipe: Recipe) -> MODEL_ARCH:
    """Return the gguf package's constant."""
    return _ARCHITECTURES[recipe.architecture]


def _stored(model: Any, recipe: Recipe, rng: np.random.Generator) -> dict[str, Stored]:
    """Return random values for the parameters, as the file stores them, under the model's names.

    Norms are near one and biases near zero, but none is either.
    """
    formats = 0
    made: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(parameter.shape).astype(np.float32)
        if parameter.ndim == 1:
            values *= 0.1
            made[name] = Stored(parameter.data.numpy() + values)
        elif ".mlp.gate." in name or "shared_expert_gate" in name:  # llama.cpp quantises no router
            made[name] = Stored(values / np.float32(np.sqrt(values.shape[-1])))
        else:
            matrices = values.reshape(-1, values.shape[-1]) / np.float32(np.sqrt(values.shape[-1]))
            format_ = recipe.formats[formats % len(recipe.formats)]
            if values.shape[-1] % 256:  # as llama.cpp does where no super-block fits
                format_ = "Q8_0"
            data = quantize(matrices.T, format_).raw
            made[name] = Stored(data.reshape(*values.shape[:-1], -1), GGMLQuantizationType[format_])
            formats += 1
    return made


def _add_metadata(writer: GGUFWriter, recipe: Recipe) -> None:
    writer.add_name(recipe.name)
    for name, value in recipe.keys.items():
        key = f"{recipe.architecture}.{name}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    if recipe.tokenizer:
        add_tokenizer(writer, recipe.tokenizer)


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a file with transformers' own loader, which dequantises it.

    Raises AssertionError unless the file fills every parameter.
    """
    # The loader demands accelerate for GGUF files, but uses it for none on one device.
    with mock.patch("transformers.modeling_utils.is_accelerate_available", return_value=True):
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    problems = {kind: found for kind, found in report.items() if found}
    assert not problems, problems
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a file with transformers."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
