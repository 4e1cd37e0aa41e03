"""What `install` changes in transformers. Import it only after `check_interface`."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, Final

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf import dequant, kernels
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from q4jit.errors import ArgumentError, GGUFError, expected
from q4jit.torch.inputs import FLOAT_DTYPES
from q4jit.transformers import kernel
from q4jit.transformers.packed import check_packed, replace_packed
from q4jit.transformers.room import check_room
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.gguf.types import type_name

_AFTER: Final = "_process_model_after_weight_loading"
_BEFORE: Final = "_process_model_before_weight_loading"


def put(changes: ExitStack) -> None:
    """Extend transformers, until the changes are undone."""
    for fmt in FORMATS.values():
        if fmt.ggml_type not in dequant.GGML_BLOCK and not fmt.float_type:
            _add_format(changes, fmt)
    _set(changes, kernels, "_gguf_kernel", kernels.GgufKernel(kernel))
    original = kernels.kernelize_ggml_layers
    _set(changes, kernels, "kernelize_ggml_layers", functools.partial(_kernelize, original))
    for name, wrapper in ((_BEFORE, _checked), (_AFTER, _replaced)):
        _set(changes, GgufHfQuantizer, name, wrapper(getattr(GgufHfQuantizer, name)))


def _set(changes: ExitStack, owner: Any, name: str, value: Any) -> None:
    changes.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _add_format(changes: ExitStack, fmt: Format) -> None:
    """Let transformers read and unpack a format that it lacks."""
    kind = fmt.ggml_type
    dequant.GGML_BLOCK[kind] = fmt.block_elements, fmt.block_bytes
    dequant.GGML_NAME[kind] = fmt.name
    dequant._DEQUANT[kind] = functools.partial(_unpacked, kind)
    for table in (dequant.GGML_BLOCK, dequant.GGML_NAME, dequant._DEQUANT):
        changes.callback(table.pop, kind, None)


def _unpacked(ggml_type: int, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return kernel.dequantized_blocks(blocks, ggml_type, dtype)


def _kernelize(original: Callable[[Any], None], model: Any) -> None:
    """Ask the hub for kernels of layers only on Metal: it has none for other devices."""
    if model.device.type == "mps":
        original(model)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook before weights are read, with checks of what would fail after that."""

    @functools.wraps(original)
    def before(self: Any, model: Any, **kwargs: Any) -> Any:
        result = original(self, model, **kwargs)
        if not self.supported or self.quantization_config.dequantize:
            return result
        _check_tensors(self, model)
        _check_dtype(self.dtype)
        for name, module in self.packed_modules.items():
            check_packed(name.rpartition(".")[0], module)
        needed_bytes = sum(info.nbytes for info in self.header.tensors)
        _check_devices(kwargs.get("device_map"), needed_bytes)
        return result

    return before


def _replaced(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook after weights are read, which replaces the packed modules."""

    @functools.wraps(original)
    def after(self: Any, model: Any, **kwargs: Any) -> Any:
        if not self.packed_modules:
            return original(self, model, **kwargs)
        self.attn_requested = True  # otherwise it asks the hub for Metal's attention
        result = original(self, model, **kwargs)
        replace_packed(model)
        return result

    return after


def _check_devices(device_map: object, needed_bytes: int) -> None:
    """Raise ArgumentError for a device without kernels, and DeviceError without memory enough."""
    if isinstance(device_map, str):
        return  # "auto" and the like: accelerate knows the memory
    places: list[Any] = (
        list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    )
    devices = [torch.device("cpu" if place is None else place) for place in places]
    for device in devices:
        if device.type not in {"cpu", "cuda"}:  # AMD's GPUs are "cuda" as well
            what, cure = "a CPU, or a GPU of CUDA or ROCm", 'give device_map="cpu"'
            raise ArgumentError(expected(what, str(device), where="device_map", cure=cure))
    if len(devices) == 1:
        check_room(needed_bytes, devices[0], "the weights")


def _check_dtype(dtype: object) -> None:
    if dtype not in FLOAT_DTYPES:
        what = " or ".join(map(str, FLOAT_DTYPES))
        raise ArgumentError(expected(what, str(dtype), where="dtype of from_pretrained"))


def _check_tensors(quantizer: Any, model: nn.Module) -> None:
    """Raise GGUFError if the file lacks a weight, or stores the parts of one in two formats.

    transformers would fill the first with noise, and read the second in one of the formats.
    """
    types: dict[str, int] = {}  # by the model's names
    for name, ggml_type in _renamed(quantizer):
        other = types.setdefault(name, ggml_type)
        if other != ggml_type and name in quantizer.packed_modules:
            what, got = f"one format for {name}", f"{type_name(other)} and {type_name(ggml_type)}"
            raise GGUFError(expected(what, got, where=quantizer.header.path))
    given = types.keys() | getattr(model, "all_tied_weights_keys", {}).keys()
    missing = [name for name, _ in model.named_parameters() if name not in given]
    if missing:
        more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
        what = f"a tensor for each weight of {type(model).__name__}"
        got = f"none for {missing[0]}{more}"
        # the names are those of models with a head: others lack the first part
        has_head = not any(name.endswith(f".{missing[0]}") for name in given)
        cure = "" if has_head else "load it with AutoModelForCausalLM"
        raise GGUFError(expected(what, got, where=quantizer.header.path, cure=cure))


def _renamed(quantizer: Any) -> Iterator[tuple[str, int]]:
    """Yield the model's names for the tensors of the file, and their types."""
    mapping = deepcopy(quantizer.mapping)  # renaming marks entries as used
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for name, ggml_type in quantizer.header.ggml_types.items():
        yield rename_source_key(name, renamings, converters)[0], ggml_type
