"""Checks that transformers has the private interface that `install` extends."""

import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final

from q4jit.errors import expected

WORKING: Final = ("5.24",)  # versions that the tests run with
_WHERE: Final = "q4jit.transformers.install"
_FUNCTIONS: Final[
    dict[str, dict[str, tuple[str, ...]]]
] = {  # modules, and the parameters of their functions, methods, classes
    "kernels": {
        "GgufKernel": ("module",),
        "get_gguf_kernel": (),
        "kernelize_ggml_layers": ("model",),
    },
    "utils": {
        "GgufLinear": ("in_features", "out_features", "ggml_type", "bias"),
        "GgufEmbedding": ("num_embeddings", "embedding_dim", "ggml_type", "dtype"),
        "GgufExperts": (
            "num_experts",
            "hidden_dim",
            "intermediate_dim",
            "gate_up_type",
            "down_type",
            "act_fn",
        ),
    },
    "dequant": {"dequantize": ("data", "ggml_type", "dtype")},
    "core_model_loading": {
        "rename_source_key": (
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
            "reverse",
        )
    },
    "quantizer_gguf": {
        "GgufHfQuantizer._process_model_before_weight_loading": ("self", "model", "kwargs"),
        "GgufHfQuantizer._process_model_after_weight_loading": ("self", "model", "kwargs"),
    },
}
_TABLES: Final = ("GGML_BLOCK", "GGML_NAME", "_DEQUANT")
_ATTRIBUTES: Final = {
    "GgufLinear": ("weight", "bias", "ggml_type", "input_permutation"),
    "GgufEmbedding": ("weight", "ggml_type", "compute_dtype"),
    "GgufExperts": ("gate_up_proj", "down_proj", "act_fn"),
    "GgufHfQuantizer": (
        "supported",
        "packed_modules",
        "attn_requested",
        "mapping",
        "header",
        "dtype",
    ),
}


def check_interface() -> None:
    """Raise ImportError without transformers or accelerate, and for another version than tested."""
    for package in ("transformers", "accelerate"):  # its GGUF loader refuses to run without
        if find_spec(package) is None:
            cure = "run pip install 'q4jit[transformers]'"
            raise ImportError(expected(package, "none", where=_WHERE, cure=cure))
    installed = version("transformers")
    numbers = re.match(r"\d+\.\d+", installed)
    what = f"transformers {' or '.join(f'{working}.x' for working in WORKING)}"
    cure = f"run pip install 'transformers=={WORKING[-1]}.*'"
    if numbers is None or numbers[0] not in WORKING:
        raise ImportError(expected(what, installed, where=_WHERE, cure=cure))
    missing = next(_missing(), None)
    if missing is not None:
        got = f"{installed}, where {missing}"
        raise ImportError(expected(f"{what} as published", got, where=_WHERE, cure=cure))


def _missing() -> Iterator[str]:
    """Yield what this transformers lacks of the interface."""
    try:
        modules = _modules()
    except ImportError as error:
        yield f"an import fails: {error}"
        return
    for module, functions in _FUNCTIONS.items():
        for name, parameters in functions.items():
            value = _named(modules[module], name)
            if value is None:
                yield f"{module} has no {name}"
            elif tuple(inspect.signature(value).parameters) != parameters:
                yield f"{name} has the parameters {inspect.signature(value)}"
    if not hasattr(modules["kernels"], "_gguf_kernel"):
        yield "kernels has no _gguf_kernel"
    for name in _TABLES:
        if not isinstance(_named(modules["dequant"], name), dict):
            yield f"dequant has no {name}"
    for made in _samples(modules):
        for attribute in _ATTRIBUTES[type(made).__name__]:
            if not hasattr(made, attribute):
                yield f"{type(made).__name__} has no {attribute}"


def _modules() -> dict[str, Any]:
    from transformers import core_model_loading
    from transformers.integrations.gguf import dequant, kernels, utils
    from transformers.quantizers import quantizer_gguf

    modules = core_model_loading, dequant, kernels, utils, quantizer_gguf
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def _samples(modules: dict[str, Any]) -> Iterator[Any]:
    """Yield an object of each class whose attributes are used."""
    from transformers import GgufConfig

    utils, q4_0 = modules["utils"], 2
    yield utils.GgufLinear(32, 1, q4_0)
    yield utils.GgufEmbedding(1, 32, q4_0)
    yield utils.GgufExperts(1, 32, 32, q4_0, q4_0, None)
    yield modules["quantizer_gguf"].GgufHfQuantizer(GgufConfig())


def _named(module: Any, name: str) -> Any:
    """Return what a dotted name stands for in a module, or None."""
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
