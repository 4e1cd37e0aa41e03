"""Compile LLVM IR in a process of its own, after many compilations in this one.

llvmlite 0.50 never frees what a run of its pass manager leaves behind: 540 KiB for a small kernel,
probably kept by the pass builder's callbacks. A process that compiles again and again would grow
for ever. So after some compilations, the next ones are made by another process, which is replaced
when it has made as many.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from q4jit.compilers.programs import is_frozen, python_program

MOST_COMPILATIONS: Final = 500  # of one process, which then has lost 270 MiB


class _Worker:
    """The other process. Callers hold the lock BUILD."""

    def __init__(self) -> None:
        """Start the process. Raises OSError."""
        path = os.pathsep.join(filter(None, sys.path))  # where this process finds llvmlite
        self.made = 0
        self._process = subprocess.Popen(
            python_program("llvm_child.py"),
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._results = self._process.stdin, self._process.stdout

    def emit(self, machine: Sequence[str], text: str, method: str) -> bytes:
        """Return what `llvm_child.emit` returns, as bytes.

        Raises RuntimeError with LLVM's message, and OSError or ValueError if the process has ended.
        """
        request = json.dumps({"machine": machine, "text": text, "method": method})
        self._requests.write(request.encode() + b"\n")
        self._requests.flush()
        answer: dict[str, Any] = json.loads(self._results.readline())
        self.made += 1
        if "error" in answer:
            raise RuntimeError(answer["error"])
        data = self._results.read(answer["size"])
        if len(data) != answer["size"]:
            raise ValueError("the compiling process has ended")
        return data

    def kill(self) -> int:
        """End the process at once; return its exit status."""
        self._process.kill()
        self._close()
        return self._process.wait()

    def stop(self) -> None:
        """Let the process end."""
        self._close()
        self._process.wait()

    def forget(self) -> None:
        """Leave the process to the parent of this forked child."""
        self._process.returncode = 0  # else its finaliser would wait for it
        self._close()

    def _close(self) -> None:
        for pipe in (self._requests, self._results):
            with contextlib.suppress(OSError):
                pipe.close()


class _State:
    """What this process has done; `usable` is False if it cannot start another process."""

    usable = not is_frozen()
    worker: _Worker | None = None


_state = _State()


def emit(machine: Sequence[str], text: str, method: str) -> bytes | None:
    """Return what `llvm_child.emit` returns, as bytes; None if no process can be started.

    Raises RuntimeError with LLVM's message, or if the process crashed.
    """
    if not _state.usable:
        return None
    worker = _state.worker
    if worker is not None and worker.made >= MOST_COMPILATIONS:
        _state.worker = None
        worker.stop()
        worker = None
    if worker is None:
        try:
            worker = _state.worker = _Worker()
        except OSError:
            _state.usable = False
            return None
    try:
        return worker.emit(machine, text, method)
    except RuntimeError:
        raise
    except (OSError, ValueError):
        _state.worker = None
        if worker.made:
            raise RuntimeError(f"LLVM's process crashed: exit status {worker.kill()}") from None
        worker.kill()  # it cannot work at all: no llvmlite, no memory
        _state.usable = False
        return None
    except BaseException:  # an interrupt: the next result would be that of this request
        _state.worker = None
        worker.kill()
        raise


def _forget_in_child() -> None:
    worker, _state.worker = _state.worker, None
    if worker is not None:
        worker.forget()


def _stop_at_exit() -> None:
    worker, _state.worker, _state.usable = _state.worker, None, False
    if worker is not None:
        worker.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_stop_at_exit)
