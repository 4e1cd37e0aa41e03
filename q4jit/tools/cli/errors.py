"""How a command prints an error."""

import shlex

from q4jit.errors import CompileError, TargetError


def error_lines(error: Exception) -> list[str]:
    """Return an error as a command prints it.

    That is one line; a TargetError keeps its lines, because it lists the compilers that were tried.
    """
    if isinstance(error, TargetError):
        return str(error).splitlines()
    return [_one_line(error)]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, CompileError):
        log = error.log.splitlines() or [""]
        first_error = next((line for line in log if "error" in line.lower()), log[-1]).strip()
        rerun = f"; to rerun: sh {shlex.quote(f'{error.repro}/repro.sh')}" if error.repro else ""
        return f"{error.compiler} failed: {first_error} (--debug shows the whole log{rerun})"
    return " ".join(str(error).split())
