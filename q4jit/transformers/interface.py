"""Checks that transformers has the private interface that `install` extends."""

import importlib
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
] = {  # parameters, by the name of a function, method or class
    "integrations.gguf.kernels": {
        "GgufKernel": ("module",),
        "get_gguf_kernel": (),
        "kernelize_ggml_layers": ("model",),
    },
    "integrations.gguf.utils": {
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
    "integrations.gguf.dequant": {"dequantize": ("data", "ggml_type", "dtype")},
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
    "quantizers.quantizer_gguf": {
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
    found = version("transformers")
    numbers = re.match(r"\d+\.\d+", found)
    what = f"transformers {' or '.join(f'{working}.x' for working in WORKING)}"
    cure = f"run pip install 'transformers=={WORKING[-1]}.*'"
    if numbers is None or numbers[0] not in WORKING:
        raise ImportError(expected(what, found, where=_WHERE, cure=cure))
    missing = next(_missing(), None)
    if missing is not None:
        got = f"{found}, where {missing}"
        raise ImportError(expected(f"{what} as published", got, where=_WHERE, cure=cure))


def _missing() -> Iterator[str]:
    """Yield what this transformers lacks of the interface."""
    for module_name, functions in _FUNCTIONS.items():
        for name, parameters in functions.items():
            found = _found(module_name, name)
            if found is None:
                yield f"{module_name} has no {name}"
            elif tuple(inspect.signature(found).parameters) != parameters:
                yield f"{name} has the parameters {inspect.signature(found)}"
    if not hasattr(_module("integrations.gguf.kernels"), "_gguf_kernel"):
        yield "integrations.gguf.kernels has no _gguf_kernel"
    for name in _TABLES:
        if not isinstance(_found("integrations.gguf.dequant", name), dict):
            yield f"integrations.gguf.dequant has no {name}"
    for made in _samples():
        for attribute in _ATTRIBUTES[type(made).__name__]:
            if not hasattr(made, attribute):
                yield f"{type(made).__name__} has no {attribute}"


def _samples() -> Iterator[Any]:
    """Yield an object of each class whose attributes are used."""
    utils, q4_0 = _module("integrations.gguf.utils"), 2
    yield utils.GgufLinear(32, 1, q4_0)
    yield utils.GgufEmbedding(1, 32, q4_0)
    yield utils.GgufExperts(1, 32, 32, q4_0, q4_0, None)
    config = _module("utils.quantization_config").GgufConfig()
    yield _module("quantizers.quantizer_gguf").GgufHfQuantizer(config)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"transformers.{name}")
    except ImportError:
        return None


def _found(module: str, name: str) -> Any:
    """Return what a dotted name stands for in a module of transformers, or None."""
    found = _module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
