"""The functions of fused layers compile for AMD GPUs, without registers in memory."""

import re
from typing import Any, Final

import numpy as np
import pytest

from q4jit import QuantizedTensor, quantize, specialize
from q4jit.torch.fusion.functions import FINISH, PROJECT
from tests.support.tools import require_tool

ARCHS: Final = ("gfx90a", "gfx1030", "gfx1100")
WIDTH, KV_WIDTH, HIDDEN = 256, 64, 512


def weight(k: int, n: int, name: str) -> QuantizedTensor:
    return quantize(np.random.default_rng(k + n).standard_normal((k, n)) / k**0.5, name)


@pytest.fixture(scope="module")
def functions() -> dict[str, Any]:
    """Return the functions, called once on the CPU with the formats of Q4_K_M."""
    require_tool("hipcc", "hipcc libamdhip64-dev rocm-device-libs")
    x, gain = np.ones((1, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    q, k = weight(WIDTH, WIDTH, "Q4_K"), weight(WIDTH, KV_WIDTH, "Q4_K")
    v = weight(WIDTH, KV_WIDTH, "Q6_K")
    # apart from the functions of other tests, whose kernels would be shown as well
    project, finish = (specialize(each["f32"].py_func) for each in (PROJECT, FINISH))
    project(x, gain, 1e-5, False, q, None, k, None, v, None)
    gate, up = weight(WIDTH, HIDDEN, "Q4_K"), weight(WIDTH, HIDDEN, "Q4_K")
    matrices = gate, None, up, None, weight(HIDDEN, WIDTH, "Q6_K"), None
    finish(x, x, q, None, None, gain, None, 1e-5, False, "silu", *matrices)
    return {"project": project, "finish": finish}


@pytest.mark.parametrize("name", ["project", "finish"])
@pytest.mark.parametrize("arch", ARCHS)
def test_they_compile_without_spills(functions: dict[str, Any], arch: str, name: str) -> None:
    text = functions[name].inspect_asm(f"hip:{arch}")
    scratch = re.findall(r"\.private_segment_fixed_size: +(\d+)", text)
    assert len(scratch) >= 3  # kernels
    assert set(scratch) == {"0"}
