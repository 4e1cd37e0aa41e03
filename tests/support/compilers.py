"""Find the compilers of HIP text; a missing one skips the test, or fails it in CI."""

import functools
import os
import shutil
import threading
from pathlib import Path
from typing import Final

import pytest

from q4jit.compilers.cache import Compiler
from q4jit.compilers.clang import Clang
from q4jit.compilers.find import find_compiler
from q4jit.compilers.nvrtc import NvRtc
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target
from tests.support.tools import lack, require_tool

_ENVIRONMENT: Final = threading.Lock()  # one thread at a time changes the environment


def chosen(name: str, target: Target) -> Compiler:
    """Return the compiler that Q4JIT_HIP_COMPILER=name gives; threads may call this."""
    with _ENVIRONMENT, pytest.MonkeyPatch.context() as patch:
        patch.setenv("Q4JIT_HIP_COMPILER", name)
        try:
            return find_compiler(target)
        except TargetError as error:
            lack(f"{name} is missing: {error}")


def the_nvrtc() -> Compiler:
    """Return NVRTC, or skip the test."""
    compiler = NvRtc()
    try:
        compiler.archs()
    except TargetError as error:
        lack(str(error))
    return compiler


@functools.cache
def compiler_for(arch: str) -> Compiler:
    """Return a compiler that pip installs: ziglang or NVRTC."""
    return the_nvrtc() if arch.startswith("sm_") else chosen("ziglang", Target("hip", arch))


def the_clang() -> Clang:
    """Return a clang that links for GPUs, or skip the test; Debian's clang has no lld."""
    names = [Path(folder, name) for name in ("clang-15", "clang") for folder in os.get_exec_path()]
    problems = {}
    for path in filter(None, map(shutil.which, names)):
        problems[str(path)] = problem = _linking_problem(str(path))
        if not problem:
            return Clang("clang", (str(path),))
    return lack(f"no clang that links for GPUs: apt-get install hipcc; tried {problems}")


@functools.cache
def _linking_problem(path: str) -> str:
    """Return why a clang cannot make a code object, or an empty text."""
    try:
        Clang("clang", (path,)).compile_object("", Target("hip", "gfx1100"))
    except CompileError as error:
        return "; ".join(error.log.splitlines()[-2:])
    except TargetError as error:
        return str(error)
    return ""


def the_hipcc() -> Clang:
    return Clang("hipcc", (require_tool("hipcc", "hipcc"),))


def the_compiler(name: str, arch: str) -> tuple[Compiler, Target]:
    target = Target("hip", arch)
    if name == "clang":
        return the_clang(), target
    return (the_nvrtc() if name == "nvrtc" else chosen(name, target)), target
