"""PyTorch's idle threads do not spin on the cores of kernels.

SmolLM2 decoded 6 tokens/s where they spun, and 40 where they slept; here only the cause is tested,
because the effect depends on the load of the machine.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pytest

from tests.support.paths import ROOT

PROGRAM: Final = """
import threading
import numpy as np
import torch
from q4jit import quantize
from q4jit.torch import Linear
from q4jit.torch.waiting import NAME

torch.set_num_threads(THREADS)
assert not any(thread.name == NAME for thread in threading.enumerate())
for _ in range(2):
    Linear(quantize(np.ones((32, 16)), "Q4_0"))(torch.ones(1, 32))
print(sum(thread.name == NAME for thread in threading.enumerate()))
"""


def helpers(threads: int = 2, environment: Mapping[str, str] = MappingProxyType({})) -> int:
    """Return the threads that hold OpenMP's in a fresh process with a layer on the CPU."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("THREADS", str(threads))],
        env=variables | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(done.stdout)


def test_a_layer_on_the_cpu_lets_them_sleep() -> None:
    assert helpers() == 1
    assert helpers(threads=1) == 0  # nobody waits


@pytest.mark.parametrize("variable", [("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "1000")])
def test_users_may_decide(variable: tuple[str, str]) -> None:
    assert helpers(environment=dict([variable])) == 0
