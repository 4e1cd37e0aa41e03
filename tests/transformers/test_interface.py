"""Which transformers `install` accepts."""

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from transformers.integrations.gguf import dequant, kernels, utils
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from q4jit.transformers import install, interface
from q4jit.transformers.interface import check_interface
from tests.support.child import environment

START = "q4jit.transformers.install: expected transformers 5.24.x"
CURE = "run pip install 'transformers==5.24.*'"


def refused() -> str:
    with pytest.raises(ImportError) as caught:
        install()
    assert kernels._gguf_kernel is None  # nothing was installed
    return str(caught.value)


def test_the_tested_version_is_accepted() -> None:
    check_interface()


@pytest.mark.parametrize("other", ["5.23.1", "5.25.0", "5.240.0", "6.0.0.dev0", "unknown"])
def test_other_versions_are_refused(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "version", lambda _: other)
    assert refused() == f"{START}, got {other}; {CURE}"


def changed(*_: Any, **__: Any) -> None:
    """Stand for a function that a later version might have."""


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (kernels, "get_gguf_kernel", changed, "get_gguf_kernel has the parameters (*_: Any"),
        (kernels, "kernelize_ggml_layers", None, "kernels has no kernelize_g"),
        (dequant, "_DEQUANT", [], "dequant has no _DEQUANT"),
        (
            GgufHfQuantizer,
            "_process_model_after_weight_loading",
            changed,
            "GgufHfQuantizer._process_model_after_weight_loading has the parameters (*_: Any",
        ),
    ],
)
def test_a_changed_interface_is_refused(
    owner: Any, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, value)
    text = refused()
    assert text.startswith(f"{START} as published, got {version('transformers')}, where {message}")
    assert text.endswith(CURE)


def test_a_lost_attribute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = utils.GgufLinear.__init__

    def without(self: Any, in_features: int, out_features: int, ggml_type: int, bias: bool) -> None:
        original(self, in_features, out_features, ggml_type, bias)
        del self.input_permutation

    without.__defaults__ = (False,)
    monkeypatch.setattr(utils.GgufLinear, "__init__", without)
    assert "where GgufLinear has no input_permutation; " in refused()


def test_a_lost_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, utils.__name__, None)
    monkeypatch.delattr(sys.modules[utils.__package__], "utils")
    assert "where an import fails: " in refused()


def test_a_lost_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "_gguf_kernel")
    with pytest.raises(ImportError, match=r"where kernels has no _gguf_kernel"):
        check_interface()


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "find_spec", lambda name: None if name == package else name)
    cure = "run pip install 'q4jit[transformers]'"
    assert refused() == f"q4jit.transformers.install: expected {package}, got none; {cure}"


def test_installing_imports_what_it_changes() -> None:
    program = "from q4jit.transformers import install, uninstall; install(); uninstall()"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert (run.returncode, run.stderr) == (0, "")
