"""The one reader of environment variables: each is declared here, with its type and meaning."""

import os
from pathlib import Path

from q4jit.errors import ConfigError

__all__ = ["cache_dir", "debug", "dump_dir", "jit_disabled", "num_threads"]

_FALSE = {"", "0", "false", "no", "off"}
_TRUE = {"1", "true", "yes", "on"}


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _FALSE | _TRUE:
        return value in _TRUE
    raise ConfigError(f"{name}={value!r}: accepted are 1 (on) and 0 (off)")


def _count(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 1024:
        raise ConfigError(f"{name}={value!r}: accepted is a whole number from 1 to 1024")
    return int(value)


def cache_dir() -> Path | None:
    """Q4JIT_CACHE_DIR: where compiled kernels are kept (default: the user's cache directory).

    None where neither it nor a home directory is known.
    """
    if path := os.environ.get("Q4JIT_CACHE_DIR"):
        return Path(path)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "q4jit"
    try:
        return Path.home() / ".cache" / "q4jit"
    except RuntimeError:  # a user without an entry in the password database
        return None


def dump_dir() -> Path | None:
    """Q4JIT_DUMP_DIR: a directory that receives every stage of every compiled kernel."""
    path = os.environ.get("Q4JIT_DUMP_DIR")
    return Path(path) if path else None


def debug() -> bool:
    """Q4JIT_DEBUG=1: print each plan, compile and cache decision to standard error."""
    return _flag("Q4JIT_DEBUG")


def jit_disabled() -> bool:
    """Q4JIT_DISABLE_JIT=1: decorated functions run as plain NumPy."""
    return _flag("Q4JIT_DISABLE_JIT")


def num_threads() -> int:
    """Threads a kernel may use: Q4JIT_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs allowed."""
    asked = _count("Q4JIT_NUM_THREADS")
    if asked is not None:
        return asked
    omp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list means nesting levels
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if omp.isascii() and omp.isdigit() and int(omp) > 0:
        return min(int(omp), allowed)
    return allowed
