"""Run a Python program that uses q4jit in a separate process."""

import os
import signal
import subprocess
import sys
import textwrap
from typing import Final

from tests.support.paths import ROOT

TIMEOUT_S: Final = 60  # only a hang takes longer

PRELUDE: Final = """
import os, sys, threading, time
import numpy as np
from q4jit import quantize, specialize

rng = np.random.default_rng(7)
small = quantize(rng.standard_normal((32, 16)).astype(np.float32), "Q4_0")
wide = quantize(rng.standard_normal((256, 4096)).astype(np.float32), "Q4_0")  # work for threads
x_small = rng.standard_normal((1, 32)).astype(np.float32)
x_wide = rng.standard_normal((2, 256)).astype(np.float32)
expected_small = x_small @ small
expected_wide = x_wide @ wide

@specialize
def product(x, w):
    return x @ w

def check(function=product):
    np.testing.assert_allclose(function(x_small, small), expected_small, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(function(x_wide, wide), expected_wide, rtol=1e-4, atol=1e-4)

def reap(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def in_child(work):
    # Run `work` in a forked child; an exception there becomes exit status 1.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid
"""
"""The start of most programs: two products with known results, and helpers for forks."""


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with changes; None removes a variable."""
    changed: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return {name: value for name, value in changed.items() if value is not None}


def command(program: str, *, prelude: str = PRELUDE) -> list[str]:
    """Return the command that runs `prelude` followed by a program."""
    return [sys.executable, "-c", prelude + textwrap.dedent(program)]


def finish(words: list[str], env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, or kill it with everything it forked after a minute and fail."""
    with subprocess.Popen(
        words,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:  # whatever happens, no process may outlive the test
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def run(program: str, *, prelude: str = PRELUDE, **changes: str | None) -> str:
    """Return a program's standard output followed by its standard error.

    Fails unless the program ends in time with exit status 0.
    """
    done = finish(command(program, prelude=prelude), environment(**changes))
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
