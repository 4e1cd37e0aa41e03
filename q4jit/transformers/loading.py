"""`from_gguf`: load a GGUF file as a model of transformers, with packed weights."""

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from q4jit.errors import ArgumentError, GGUFError, Q4JitError, expected, short_name
from q4jit.floats import FLOAT_TYPES
from q4jit.precision import BOUNDS
from q4jit.progress import progress
from q4jit.torch import Experts, Linear, Weight
from q4jit.torch.inputs import check_one_of
from q4jit.torch.modules import Embedding
from q4jit.torch.weight import indexed
from q4jit.transformers.architectures import ARCHITECTURES, PACKED_BY_TRANSFORMERS, Architecture
from q4jit.transformers.configs import config_of
from q4jit.transformers.embedding import ScaledEmbedding
from q4jit.transformers.installation import installed
from q4jit.transformers.plan import (
    EMBEDDING,
    EXPERTS,
    LINEAR,
    ROPE_FACTORS,
    ModulePart,
    needed_bytes,
    plan_parts,
)
from q4jit.transformers.room import check_room
from q4jit.transformers.ties import forget_ties
from q4jit.transformers.tokenizing import set_ends, tokenizer_of
from q4jit.weights.gguf.file import GGUFFile, load_gguf
from q4jit.weights.tensor import QuantizedTensor


def from_gguf(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str = "f32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a GGUF file as a model of transformers with packed weights, and its tokenizer.

    The model is frozen, and in evaluation mode. Its linear layers, experts and embedding are those
    of `q4jit.torch`; each weight is held once, in the layout that kernels of the device read.
    Progress is shown on standard error.

    Args:
        path: the file, or one part of a split model. Nothing is downloaded.
        device: a CPU or GPU of PyTorch. None: PyTorch's default device.
        dtype: of activations, norms and results: float32, float16 or bfloat16. None: float32.
        precision: of the products, as in `specialize`.

    Raises:
        GGUFError: the file is damaged, has another architecture, has no tokenizer, lacks tensors,
            or has tensors that q4jit does not multiply.
        ArgumentError: another device, dtype or precision.
        DeviceError: the device has too little memory.
        OSError: the file cannot be opened.
    """
    check_one_of(precision, tuple(BOUNDS), "precision")
    place, floats = _checked_device(device), _checked_dtype(dtype)
    # parameters that are made in inference mode could never take part in learning
    with load_gguf(_checked_path(path)) as file, torch.inference_mode(mode=False):
        name = _architecture(file)
        tokenizer = tokenizer_of(file)
        if name in ARCHITECTURES:
            model = _loaded(file, ARCHITECTURES[name], place, floats, precision)
        else:
            model = _loaded_by_transformers(file, place, floats, precision)
    set_ends(model, tokenizer)
    tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    return model, tokenizer


def _checked_path(path: object) -> Path:
    """Return the path of a file, with the home folder for ~. Raises ArgumentError, GGUFError."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        got = repr(path) if path == "" else type(path).__name__
        raise ArgumentError(expected("the path of a GGUF file", got, where="path"))
    given = Path(path).expanduser()
    if given.is_dir():
        raise GGUFError(
            expected("a GGUF file", "a folder", where=str(given), cure="name a file in it")
        )
    return given


def _checked_dtype(dtype: object) -> torch.dtype:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    check_one_of(name, tuple(FLOAT_TYPES), "dtype")
    known: torch.dtype = getattr(torch, name)
    return known


def _checked_device(device: Any) -> torch.device:
    try:
        given = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        what = 'a device of PyTorch, such as "cpu" or "cuda"'
        raise ArgumentError(expected(what, short_name(str(device)), where="device")) from error
    if given.type not in {"cpu", "cuda"}:  # AMD's GPUs are "cuda" as well
        what = "a CPU, or a GPU of CUDA or ROCm"
        raise ArgumentError(expected(what, str(given), where="device"))
    if given.type == "cuda" and not torch.cuda.is_available():
        what, got = "a GPU that PyTorch can use", f"none, for device={str(device)!r}"
        raise ArgumentError(expected(what, got, where="device"))
    return indexed(given)


def _architecture(file: GGUFFile) -> str:
    name = file.metadata.get("general.architecture")
    known = (*ARCHITECTURES, *PACKED_BY_TRANSFORMERS)
    if isinstance(name, str) and name in known:
        return name
    got = short_name(name) if isinstance(name, str) else "none"
    where = f"{file.paths[0]}: general.architecture"
    raise GGUFError(expected(f"one of {', '.join(known)}", got, where=where))


def _loaded(
    file: GGUFFile,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
) -> PreTrainedModel:
    """Return the model in a file. Everything that can be refused is checked before it is read."""
    model = _empty(file, architecture, dtype)
    parts = plan_parts(model, file, architecture)
    check_room(needed_bytes(file, parts, dtype), device, f"the weights of {file.paths[0]}")
    loader = _ModelLoader(model, file, architecture, device, dtype, precision)
    for part in progress(parts, "loading"):
        loader.load(part)
    loader.finish()
    own: Any = model
    own.save_pretrained = _refuse_to_save  # it would save blocks that nothing can read
    own.resize_token_embeddings = _refuse_to_resize
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    what, where = "a model whose weights are floats", "save_pretrained"
    raise ArgumentError(expected(what, "packed ones", where=where, cure="keep the GGUF file"))


def _refuse_to_resize(*_: Any, **__: Any) -> None:
    what, where = "an embedding whose weight is floats", "resize_token_embeddings"
    raise ArgumentError(expected(what, "a packed one", where=where))


def _loaded_by_transformers(
    file: GGUFFile, device: torch.device, dtype: torch.dtype, precision: str
) -> PreTrainedModel:
    """Return the model in a file that transformers' own loader keeps packed."""
    path, classes = Path(file.paths[0]), cast("Any", transformers.AutoModelForCausalLM)
    if len(file.paths) > 1:
        got = f"one of {len(file.paths)} parts"
        raise GGUFError(expected("a whole file for this architecture", got, where=str(path)))
    check_room(sum(entry.nbytes for entry in file.tensors.values()), device, str(path))
    options = {"dtype": dtype, "device_map": {"": device}, "local_files_only": True}
    try:
        with installed():
            model: PreTrainedModel = classes.from_pretrained(
                str(path.parent), gguf_file=path.name, **options
            )
    except Q4JitError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # of keys that contradict each other
        problem = f"{type(error).__name__}: {error}"
        raise GGUFError(f"{path}: transformers cannot make the model: {problem}") from error
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.precision = precision
    model.requires_grad_(False)
    return model


def _empty(file: GGUFFile, architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a file without values, on "meta"."""
    config = config_of(file, architecture)
    classes = cast("Any", transformers.AutoModelForCausalLM)  # without types
    with torch.device("meta"):
        try:
            model: PreTrainedModel = classes.from_config(config, dtype=dtype)
        except Exception as error:  # sizes whose product overflows, for example
            what = f"transformers cannot make a {architecture.name} model: {error}"
            raise GGUFError(f"{file.paths[0]}: {what}") from error
    model.requires_grad_(False)
    model.train(False)
    return model


class _ModelLoader:
    """Replaces the modules of a model on "meta" by those with the weights of a file."""

    def __init__(
        self,
        model: PreTrainedModel,
        file: GGUFFile,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        precision: str,
    ) -> None:
        self._model, self._file, self._architecture = model, file, architecture
        self._device, self._dtype, self._precision = device, dtype, precision

    def load(self, part: ModulePart) -> None:
        """Replace the module of a part, or fill its parameters."""
        old: Any = self._model.get_submodule(part.module)
        if part.kind == LINEAR:
            self._model.set_submodule(part.module, self._linear(part))
        elif part.kind == EMBEDDING:
            self._model.set_submodule(part.module, self._embedding(part, old))
        elif part.kind == EXPERTS:
            self._model.set_submodule(part.module, self._experts(part))
        else:
            for name, tensor in part.tensors.items():
                old._parameters[name] = self._floats(tensor, old._parameters[name].shape)

    def finish(self) -> None:
        """Tie the head to the embedding, and compute what files do not hold."""
        model: Any = self._model
        if model.config.tie_word_embeddings:
            head = Linear(model.get_input_embeddings().weight, precision=self._precision)
            model.set_output_embeddings(head)
        packed = [
            n for n, module in model.named_modules() if isinstance(module, Linear | Embedding)
        ]
        forget_ties(model, packed)
        for name, module in list(model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                model.set_submodule(name, self._rotary(module))
        left = [name for name, value in _values(model) if value.is_meta]
        assert not left, f"{left[0]} has no values"

    def _linear(self, part: ModulePart) -> Linear:
        weight = Weight(self._matrix(part), device=self._device)
        tensor = part.tensors.get("bias")
        bias = None if tensor is None else self._floats(tensor, (weight.N,))
        if bias is not None and (order := self._row_order(part)) is not None:
            bias = nn.Parameter(bias[torch.from_numpy(order).to(bias.device)], requires_grad=False)
        return Linear(weight, bias, precision=self._precision)

    def _embedding(self, part: ModulePart, old: Any) -> Embedding:
        tied = self._model.config.tie_word_embeddings  # then the head reads the weight as well
        weight = Weight(self._matrix(part), device=self._device, lookup=not tied)
        if hasattr(old, "scalar_embed_scale"):
            return ScaledEmbedding(weight, old.scalar_embed_scale, dtype=self._dtype)
        return Embedding(weight, dtype=self._dtype)

    def _experts(self, part: ModulePart) -> Experts:
        gate, up, down = (
            Weight(self._file[part.tensors[which]], device=self._device)  # type: ignore[arg-type]  # the plan checked the rank
            for which in ("gate", "up", "down")
        )
        activation = self._model.config.hidden_act
        return Experts(gate, up, down, activation=activation, precision=self._precision)

    def _matrix(self, part: ModulePart) -> QuantizedTensor:
        """Return a weight with its columns in the model's order."""
        weight = self._file[part.tensors["weight"]]
        assert isinstance(weight, QuantizedTensor)  # the plan checked the rank
        order = self._row_order(part)
        if order is None:
            return weight
        return QuantizedTensor.from_bytes(
            weight.raw[order], shape=weight.shape, format=weight.format
        )

    def _row_order(self, part: ModulePart) -> NDArray[np.int64] | None:
        """Return which rows of GGUF's tensor the rows of the model's weight are; None: the same."""
        config = self._model.config
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(part.module.rpartition(".")[2])
        if heads is None or not self._architecture.has_paired_rows:
            return None
        rows = np.arange(self._file.tensors[part.tensors["weight"]].shape[1])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _floats(self, tensor: str, shape: tuple[int, ...]) -> nn.Parameter:
        """Return the values of a small tensor as a parameter in the model's type."""
        stored = self._file[tensor]
        values = stored if isinstance(stored, np.ndarray) else stored.dequantize().T
        floats = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
        if tensor.endswith("norm.weight"):
            floats -= self._architecture.norm_offset
        return nn.Parameter(floats.to(self._device, self._dtype), requires_grad=False)

    def _rotary(self, module: Any) -> nn.Module:
        """Return a module that computes its buffers from the configuration."""
        with torch.device("cpu"):
            new: nn.Module = type(module)(config=self._model.config)
        if ROPE_FACTORS in self._file:
            factors = torch.from_numpy(np.array(self._file[ROPE_FACTORS]))
            for buffer in new.buffers():
                buffer.div_(factors)
        return new.to(self._device)


def _values(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
