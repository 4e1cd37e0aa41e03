"""Errors as a command tells them."""

import shlex

from q4jit.errors import CompileError, TargetError


def lines_of(error: Exception) -> list[str]:
    """Return what a command says of an error: one line, or a list of what was looked at."""
    if isinstance(error, TargetError):  # a list of what was looked at, by q4jit alone
        return str(error).splitlines()
    return [_one_line(error)]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, CompileError):
        log = error.log.splitlines() or [""]
        named = next((line for line in log if "error" in line.lower()), log[-1])
        again = (
            f"; to run it again: sh {shlex.quote(f'{error.repro}/repro.sh')}" if error.repro else ""
        )
        return f"{error.compiler} failed: {named.strip()} (--debug shows all{again})"
    return " ".join(str(error).split())
