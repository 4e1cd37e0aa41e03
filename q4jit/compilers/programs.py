"""Run compilers as programs, each in a temporary folder of its own and with a time limit.

At the limit a program is killed with every process that it started. File names are fixed and
relative, so no path and no process number can get into the output. Every failure, a crash included,
is a CompileError with a saved repro.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from q4jit import config
from q4jit.errors import CompileError, TargetError

TIME_LIMIT_S: Final = 300.0
_PINNED: Final = ("HIP_PLATFORM", "HIP_COMPILER", "HIP_RUNTIME")  # a repro must set them too


_unpacked = contextlib.ExitStack()  # the files of a package in a zip, until the process ends
atexit.register(_unpacked.close)


def is_frozen() -> bool:
    """Return whether `sys.executable` is a bundle (PyInstaller, …) that cannot run a program."""
    return bool(getattr(sys, "frozen", False))


def python_program(name: str) -> tuple[str, ...]:
    """Return the command that runs a program of this package in another Python process.

    Raises TargetError in a bundle, whose executable would start the whole application again.
    """
    if is_frozen():
        raise TargetError(
            f"cannot start Python for {name}: {sys.executable} is a bundle without an "
            "interpreter; compile kernels before bundling, or install q4jit as a package"
        )
    # -P keeps q4jit/compilers out of sys.path
    return (sys.executable, "-P", str(_program_file(name)))


@functools.cache
def _program_file(name: str) -> Path:
    return _unpacked.enter_context(resources.as_file(resources.files("q4jit.compilers") / name))


@dataclass(frozen=True)
class Build:
    """The commands that turn one text into one file.

    Attributes:
        compiler: the name in messages.
        commands: the commands, in order.
        flags: the flags that determine the code.
        source: the name of the file that the text is written to.
        output: the name of the file that the commands write.
        time_limit_s: the seconds that each command may take.
        variables: environment variables for the commands.
    """

    compiler: str
    commands: tuple[tuple[str, ...], ...]
    flags: tuple[str, ...]
    source: str
    output: str
    time_limit_s: float = TIME_LIMIT_S
    variables: Mapping[str, str] | None = None

    def run(self, text: str) -> bytes:
        """Run the commands and return the bytes of `output`. Raises CompileError."""
        with tempfile.TemporaryDirectory(prefix="q4jit-") as name:
            folder = Path(name)
            (folder / self.source).write_text(text, encoding="utf-8", newline="\n")
            for i, command in enumerate(self.commands):
                log = execute(command, folder, self.time_limit_s, self.variables or {})
                if log.problem:
                    raise self._failure(log.text(), text, i)
            output = folder / self.output
            if not output.exists():
                raise self._failure(f"wrote no {self.output}", text, len(self.commands) - 1)
            return output.read_bytes()

    def _failure(self, log: str, text: str, failed: int) -> CompileError:
        commands = self.commands[: failed + 1]
        source = (self.source, text)
        return failure(self.compiler, commands, self.flags, log, source, self.variables)


@dataclass(frozen=True)
class Log:
    """The output of a finished program.

    Attributes:
        problem: why it failed; empty if it succeeded.
        output: its standard output.
        errors: its standard error.
    """

    problem: str
    output: str
    errors: str

    def text(self) -> str:
        """Return the whole log, the problem last."""
        return "\n".join(part.strip() for part in (self.output, self.errors, self.problem) if part)


def execute(
    command: Sequence[str],
    folder: Path,
    time_limit_s: float = TIME_LIMIT_S,
    variables: Mapping[str, str] | None = None,
) -> Log:
    """Run `command` in `folder`; at the limit, kill it and every process that it started."""
    environment = config.compiler_environment(folder) | dict(variables or {})
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # hipcc is a script; the programs that it runs must die with it
        )
    except OSError as error:
        return Log(f"cannot start: {error}", "", "")
    with process:
        try:
            output, errors = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return Log(f"stopped after {time_limit_s:g} s", *process.communicate())
        except BaseException:  # Ctrl-C does not reach the other session
            _kill(process)
            process.wait()
            raise
    return Log(_problem(process.returncode), output, errors)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have just ended
        os.killpg(process.pid, signal.SIGKILL)


def _problem(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else -status
        return f"crashed: signal {name}"
    return f"exit status {status}" if status else ""


def failure(
    compiler: str,
    commands: Sequence[tuple[str, ...]],
    flags: tuple[str, ...],
    log: str,
    source: tuple[str, str],
    variables: Mapping[str, str] | None = None,
) -> CompileError:
    """Return the error of the last command on `source` (file name and text), with a saved repro."""
    name, text = source
    try:
        repro, reason = _save_repro(commands, name, text, dict(variables or {})), None
    except OSError as error:  # a full or read-only disk must not hide the compiler's message
        repro, reason = None, error
    failed = CompileError(compiler, flags, log, text, command=tuple(commands[-1]), repro=repro)
    if reason:
        failed.add_note(f"cannot save a repro: {reason}")
    return failed


@functools.cache
def _repros(parent: str, process: int) -> Path:
    return Path(tempfile.mkdtemp(prefix="q4jit-repros-", dir=parent))


def _save_repro(
    commands: Sequence[tuple[str, ...]], name: str, text: str, variables: dict[str, str]
) -> Path:
    lines = [shlex.join(command) for command in commands]
    digest = hashlib.sha256("\n".join([*lines, text]).encode())  # one folder for equal failures
    folder = _repros(tempfile.gettempdir(), os.getpid()) / digest.hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    environment = config.compiler_environment(folder)
    needed = {key: environment[key] for key in _PINNED} | variables
    exports = [f"export {key}={shlex.quote(value)}" for key, value in needed.items()]
    script = ["#!/bin/sh", 'set -e; cd "$(dirname "$0")"', *exports, *lines, ""]
    (folder / name).write_text(text, encoding="utf-8", newline="\n")
    (folder / "repro.sh").write_text("\n".join(script), encoding="utf-8")
    return folder
