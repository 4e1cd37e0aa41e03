"""Read environment variables: all of them are declared here, with their types and meanings."""

import os
import sys
from pathlib import Path

from q4jit.errors import ConfigError, expected

__all__ = [
    "MOST_THREADS",
    "cache_dir",
    "cache_limit",
    "choose_threads",
    "chosen_threads",
    "compiler_environment",
    "debug",
    "dump_dir",
    "hip_compiler",
    "jit_disabled",
    "log",
    "num_threads",
    "rocm_path",
    "thread_variables",
]

MOST_THREADS = 1024  # per process; a larger number is probably a mistake
_MOST_CACHE_MIB = 1 << 24
_FALSE = {"", "0", "false", "no", "off"}
_TRUE = {"1", "true", "yes", "on"}
_HIP_COMPILERS = ("hipcc", "clang", "ziglang", "hiprtc")
# Variables that change the output of hipcc or clang for the same command, or make hipcc use another
# ROCm installation than its own. A compiler that is called by its path needs none of them.
_COMPILER_VARIABLES = frozenset(
    "CCC_OVERRIDE_OPTIONS DEVICE_LIB_PATH HCC_AMDGPU_TARGET HIPCC_COMPILE_FLAGS_APPEND "
    "HIPCC_LINK_FLAGS_APPEND HIPCC_VERBOSE HIP_CLANG_HCC_COMPAT_MODE HIP_COMPILE_CXX_AS_HIP "
    "HIP_LIB_PATH HIP_PATH HIP_ROCCLR_HOME HSA_PATH ROCM_HOME ROCM_PATH".split()
)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _FALSE | _TRUE:
        return value in _TRUE
    raise ConfigError(expected("1 (on) or 0 (off)", repr(value), where=name))


def _count(name: str, most: int) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9 or not 1 <= int(value) <= most:
        raise ConfigError(expected(f"a whole number from 1 to {most}", repr(value), where=name))
    return int(value)


def _folder(name: str) -> Path | None:
    """Return the path in a variable, `~` expanded: no shell has done that in a service's file."""
    value = os.environ.get(name, "")
    if not value.strip():
        return None
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        got = f"{value!r}: {str(error).rstrip('.')}"
        raise ConfigError(
            expected("a folder", got, where=name, cure="write the path without ~")
        ) from None


def cache_dir() -> Path | None:
    """Return Q4JIT_CACHE_DIR, the directory of compiled kernels; default: the user's cache.

    Returns None if the variable is not set and the user has no home directory. A relative
    XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    """
    if path := _folder("Q4JIT_CACHE_DIR"):
        return path
    try:
        for base in (_folder("XDG_CACHE_HOME"), Path.home() / ".cache"):
            if base is not None and base.is_absolute():  # else it depends on the working directory
                return base / "q4jit"
    except (RuntimeError, ConfigError):  # a user without an entry in the password database
        pass
    return None


def cache_limit() -> int | None:
    """Return Q4JIT_CACHE_MIB in bytes, the most that compiled kernels may take; None: no limit."""
    mib = _count("Q4JIT_CACHE_MIB", _MOST_CACHE_MIB)
    return None if mib is None else mib << 20


def dump_dir() -> Path | None:
    """Return Q4JIT_DUMP_DIR, the directory to which every stage of each kernel is written."""
    return _folder("Q4JIT_DUMP_DIR")


def hip_compiler() -> str | None:
    """Return Q4JIT_HIP_COMPILER, the compiler for AMD GPUs; None: the first that knows the GPU."""
    value = os.environ.get("Q4JIT_HIP_COMPILER", "").strip().lower()
    if value and value not in _HIP_COMPILERS:
        names = ", ".join(_HIP_COMPILERS)
        raise ConfigError(expected(f"one of {names}", repr(value), where="Q4JIT_HIP_COMPILER"))
    return value or None


def rocm_path() -> Path | None:
    """Return ROCM_PATH or ROCM_HOME, where ROCm is installed; None if neither is set."""
    return _folder("ROCM_PATH") or _folder("ROCM_HOME")


def compiler_environment(folder: Path) -> dict[str, str]:
    """Return the environment variables for a compiler process, with `folder` for its files.

    HIP_PLATFORM is set because hipcc compiles for NVIDIA's GPUs on a machine with CUDA.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _COMPILER_VARIABLES}
    pinned = {"HIP_PLATFORM": "amd", "HIP_COMPILER": "clang", "HIP_RUNTIME": "rocclr"}
    return environment | pinned | {"TMPDIR": str(folder), "LC_ALL": "C"}


def debug() -> bool:
    """Return whether Q4JIT_DEBUG=1 asks for traces, plans and compilations on standard error."""
    return _flag("Q4JIT_DEBUG")


def log(message: str) -> None:
    """Write a line to standard error if Q4JIT_DEBUG=1 asks for it."""
    if debug():
        sys.stderr.write(f"q4jit: {message}\n")


def jit_disabled() -> bool:
    """Return whether Q4JIT_DISABLE_JIT=1 makes decorated functions run as plain NumPy."""
    return _flag("Q4JIT_DISABLE_JIT")


_chosen_threads: int | None = None


def choose_threads(number: int | None) -> None:
    """Let `num_threads` return this number; None: the environment decides again."""
    global _chosen_threads  # noqa: PLW0603 - the process has one number
    _chosen_threads = number


def chosen_threads() -> int | None:
    """Return the number given to `choose_threads`."""
    return _chosen_threads


def thread_variables() -> dict[str, str | None]:
    """Return the values of the environment variables that `num_threads` reads."""
    return {name: os.environ.get(name) for name in ("Q4JIT_NUM_THREADS", "OMP_NUM_THREADS")}


def num_threads() -> int:
    """Return the number of threads of a kernel.

    It is the chosen number, else Q4JIT_NUM_THREADS, else OMP_NUM_THREADS (at most the CPUs that the
    process may use), else the number of these CPUs.
    """
    if _chosen_threads is not None:
        return _chosen_threads
    own = _count("Q4JIT_NUM_THREADS", MOST_THREADS)
    if own is not None:
        return own
    omp = (
        os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    )  # a list: one per nesting level
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if omp.isascii() and omp.isdigit() and int(omp) > 0:
        return min(int(omp), allowed)
    return allowed
