"""What type checkers and `help` say about the public functions."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import q4jit
from q4jit.dispatch.options import Options
from q4jit.version import version
from tests.support.paths import ROOT

PROGRAM = """
from typing import NamedTuple
import numpy as np
from numpy.typing import NDArray
from q4jit import QuantizedTensor, specialize

Array = NDArray[np.float32]

@specialize
def swiglu(x: Array, gate: QuantizedTensor, up: QuantizedTensor) -> Array:
    g: Array = x @ gate
    y: Array = g / (1 + np.exp(-g)) * (x @ up)
    return y

@specialize(K=64)
def product(x: Array, w: QuantizedTensor) -> Array:
    y: Array = x @ w
    return y

@specialize
def untyped(x, w):  # type: ignore[no-untyped-def]
    return x @ w

class Layer(NamedTuple):
    w: QuantizedTensor
    bias: Array

@specialize
def layered(x: Array, layer: Layer, more: dict[str, QuantizedTensor]) -> dict[str, Array]:
    return {"y": x @ layer.w + layer.bias, "z": x @ more["w"]}

@specialize
def nested(x: Array, layer: Layer) -> Array:
    return layered(x, layer, {"w": layer.w})["y"]

def use(x: Array, w: QuantizedTensor) -> None:
    reveal_type(swiglu(x, w, up=w))
    reveal_type(product(x, w, out=x))
    reveal_type(product.bind(x, w, out=x)())
    untyped(x, w)
    layered(x, Layer(w, x), {"w": w}, out={"y": x, "z": x})["y"] @ w
    swiglu(1, 2, 3, 4)  # line 41
    product(x)  # line 42
    product(x, "w")  # line 43
    untyped(x)  # line 44
    layered(x, w, {"w": w})  # line 45
"""


@pytest.mark.process
def test_types_survive_the_decorator(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.lstrip("\n"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    revealed = [line for line in lines if "Revealed type" in line]
    assert len(revealed) == 3, done.stdout
    assert all("ndarray" in line and "_32Bit" in line for line in revealed), done.stdout
    wrong = {int(line.split(":")[1]) for line in lines if ": error: " in line}
    assert wrong == {41, 42, 43, 44, 45}, done.stdout


def test_help_shows_the_options_with_their_defaults() -> None:
    parameters = inspect.signature(q4jit.specialize).parameters
    shown = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert shown == {name: f.default for name, f in Options.__dataclass_fields__.items()}
    assert list(shown) == list(Options.__dataclass_fields__)


def test_the_version_is_an_attribute() -> None:
    assert q4jit.__version__ == version()
    with pytest.raises(AttributeError, match="'q4jit' has no attribute 'versions'"):
        q4jit.versions  # noqa: B018 - the access raises
