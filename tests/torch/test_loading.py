"""Memory of a fresh process that loads a model file into `Weight`s, tensor by tensor."""

import sys
from pathlib import Path

import numpy as np
import pytest

from q4jit.weights.formats import FORMATS
from tests.support import child
from tests.support.gguf_files import build, tensor
from tests.support.memory import MB

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.process,
]

MEASURE = """
import torch
from q4jit import load_gguf
from q4jit.torch import Weight

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))

Weight(load_gguf(PATH)["small"])  # what is imported and kept by the first one
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 200 MB, half of it one tensor, the last."""
    path, rng = tmp_path_factory.mktemp("model") / "model.gguf", np.random.default_rng(0)
    shapes = {"small": ("Q4_0", 256, 64)}
    shapes |= {f"q4_k.{i}": ("Q4_K", 2048, 8192) for i in range(5)}
    shapes |= {f"q6_k.{i}": ("Q6_K", 2048, 8192) for i in range(3)}
    shapes |= {f"q8_0.{i}": ("Q8_0", 1024, 1024) for i in range(10)}
    shapes["table"] = ("Q8_0", 768, 131072)
    at, entries = 0, []
    for name, (fmt, k, n) in shapes.items():
        entries.append(tensor(name, (k, n), FORMATS[fmt].ggml_type, at))
        at += n * FORMATS[fmt].column_bytes(k)
    path.write_bytes(build((), tuple(entries), rng.bytes(at)))
    return path


@pytest.mark.parametrize("lookup", [False, True], ids=["packed", "as in the file"])
def test_a_model_is_loaded_within_its_own_size(model: Path, lookup: bool) -> None:
    program = f"""
    before = status("VmRSS")
    file = load_gguf(PATH)
    weights = {{name: Weight(w, lookup={lookup}) for name, w in file.items()}}
    print(status("VmHWM") - before, sum(w.nbytes for w in weights.values()))
    """
    prelude, size = f"PATH = {str(model)!r}\n{MEASURE}", model.stat().st_size
    assert 180 * MB < size < 260 * MB
    peak, held = map(int, child.run(program, prelude=prelude).split())
    assert 0.95 * held < peak, "the measurement misses the blocks"
    assert peak < 1.15 * size, f"{peak / MB:.0f} MB for a file of {size / MB:.0f} MB"
