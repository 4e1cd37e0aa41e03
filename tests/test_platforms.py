"""Other systems than Linux: q4jit can be imported and texts can be inspected; calls say why not."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import os
import sys

import numpy as np  # NumPy and LLVM look for this system's libraries, q4jit must not
import llvmlite.binding

UNIX = {"fcntl", "grp", "pwd", "resource", "termios"}


class NoUnix:
    def find_spec(self, name, path=None, target=None):
        if name in UNIX:
            raise ModuleNotFoundError(name)


sys.platform = SYSTEM
if SYSTEM == "win32":
    sys.meta_path.insert(0, NoUnix())
    for name in UNIX:
        sys.modules.pop(name, None)
    for name in ("fork", "geteuid", "getuid", "register_at_fork", "sched_getaffinity"):
        delattr(os, name)

from q4jit import TargetError, quantize, specialize

w = quantize(np.ones((64, 32), np.float32), "Q4_0")
f = specialize(lambda x, w: x @ w)
try:
    f(np.ones((1, 64), np.float32), w)
except TargetError as error:
    print(error)
f.warmup((8, 64), w)
for target in ("cpu:x86-64-v3", "cpu:aarch64", "hip:gfx1100", "hip:sm_90"):
    print(target, len(f.inspect_source(target)) > 1000)
"""


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_texts_can_be_inspected_on_other_systems(system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("SYSTEM", repr(system))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, *targets = done.stdout.splitlines()
    assert error.startswith(f"expected Linux to run kernels, got {system}; use f.warmup")
    assert len(targets) == 4
    assert all(line.endswith("True") for line in targets)
