"""The one reader of environment variables: each is declared here, with its type and meaning."""

import os
from pathlib import Path

from q4jit.errors import ConfigError

__all__ = [
    "MOST_THREADS",
    "cache_dir",
    "compiler_environment",
    "debug",
    "dump_dir",
    "hip_compiler",
    "jit_disabled",
    "num_threads",
    "rocm_path",
]

MOST_THREADS = 1024  # of a process: more is taken for a mistake
_FALSE = {"", "0", "false", "no", "off"}
_TRUE = {"1", "true", "yes", "on"}
_HIP_COMPILERS = ("hipcc", "clang", "ziglang", "hiprtc")
# Variables that change what hipcc or clang make of the same command, or point hipcc to a place
# other than its own: a compiler that was found by its path finds the rest by itself.
_COMPILER_VARIABLES = frozenset(
    "CCC_OVERRIDE_OPTIONS DEVICE_LIB_PATH HCC_AMDGPU_TARGET HIPCC_COMPILE_FLAGS_APPEND "
    "HIPCC_LINK_FLAGS_APPEND HIPCC_VERBOSE HIP_CLANG_HCC_COMPAT_MODE HIP_COMPILE_CXX_AS_HIP "
    "HIP_LIB_PATH HIP_PATH HIP_ROCCLR_HOME HSA_PATH ROCM_HOME ROCM_PATH".split()
)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _FALSE | _TRUE:
        return value in _TRUE
    raise ConfigError(f"{name}={value!r}: accepted are 1 (on) and 0 (off)")


def _count(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= MOST_THREADS:
        raise ConfigError(f"{name}={value!r}: accepted is a whole number from 1 to {MOST_THREADS}")
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


def hip_compiler() -> str | None:
    """Q4JIT_HIP_COMPILER: the compiler for AMD GPUs; None: the first that knows the GPU."""
    value = os.environ.get("Q4JIT_HIP_COMPILER", "").strip().lower()
    if value and value not in _HIP_COMPILERS:
        raise ConfigError(f"Q4JIT_HIP_COMPILER={value!r}: accepted are {', '.join(_HIP_COMPILERS)}")
    return value or None


def rocm_path() -> Path | None:
    """ROCM_PATH (or ROCM_HOME): where ROCm is installed; None where neither is set."""
    path = os.environ.get("ROCM_PATH") or os.environ.get("ROCM_HOME")
    return Path(path) if path else None


def compiler_environment(folder: Path) -> dict[str, str]:
    """The environment of a compiler that runs as a program, with `folder` for its own files.

    HIP_PLATFORM is set: hipcc takes a machine with CUDA for one of NVIDIA's.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _COMPILER_VARIABLES}
    pinned = {"HIP_PLATFORM": "amd", "HIP_COMPILER": "clang", "HIP_RUNTIME": "rocclr"}
    return environment | pinned | {"TMPDIR": str(folder), "LC_ALL": "C"}


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
