"""Keeps PyTorch's idle threads from taking the cores of kernels.

PyTorch's threads are those of libgomp. After an operation they spin for milliseconds, in case that
another one follows, while a kernel waits for their cores: a small model then decodes at a seventh
of its speed. libgomp spins for some microseconds only if there are more OpenMP threads than CPUs,
as its manual says under `GOMP_SPINCOUNT`. So a thread that sleeps gets OpenMP threads of its own,
which sleep as well.
"""

import os
import threading
from typing import Final

import torch

from q4jit.locks import BUILD

NAME: Final = "q4jit: more OpenMP threads than CPUs"
_CHOICES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # users who set these have decided
_PARALLEL: Final = 1 << 20  # elements, enough for PyTorch to divide the work

_threads: Final[list[threading.Thread]] = []


def shorten_waiting() -> None:
    """Make idle threads of PyTorch sleep soon, unless a variable of OpenMP says how they wait."""
    if _threads or any(name in os.environ for name in _CHOICES) or torch.get_num_threads() < 2:
        return
    with BUILD:
        if not _threads:
            _threads.append(threading.Thread(target=_sleep, name=NAME, daemon=True))
            _threads[0].start()


def _sleep() -> None:
    torch.zeros(_PARALLEL, device="cpu").add_(1)
    threading.Event().wait()  # libgomp keeps the threads for as long as this one lives
