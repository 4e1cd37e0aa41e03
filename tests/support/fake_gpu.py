"""Run programs with q4jit's drivers and the makers' Python bindings on the runtime fake_gpu.c."""

import functools
import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support import child
from tests.support.builds import built
from tests.support.fake_runtime import LIBRARIES
from tests.support.tools import lack, require_tool

SOURCE: Final = Path(__file__).with_suffix(".c")
BINDINGS: Final = {"amd": "rocm.bindings.hip", "nvidia": "cuda.bindings.driver"}

PRELUDE: Final = """
import ctypes, gc, os, struct, sys, threading
import numpy as np
from q4jit.errors import ArgumentError, DeviceError
from q4jit.runtime.devices import driver_of, drivers, find_device, find_devices, why_none
from q4jit.runtime.driver import Driver
from tests.support.fake_runtime import Fake, refused

platform, folder = os.environ["FAKE_PLATFORM"], os.environ["FAKE_FOLDER"]
fake = Fake(folder, platform)

def start():
    first, second = find_devices()
    return driver_of(first), first, second

def on_host(array):
    return array.ctypes.data
"""
"""The start of programs on a fake platform: its counters and devices, and `refused`."""

Run = Callable[[str], str]


def build(folder: Path, platform: str) -> Path:
    """Put the fake runtime into `folder`/lib, and return the folder for ROCM_PATH.

    Without compiler or binding the test is skipped.
    """
    compiler = require_tool("cc", "gcc")
    if importlib.util.find_spec(BINDINGS[platform].split(".")[0]) is None:
        lack(f"the binding is missing: pip install {BINDINGS[platform]}")
    library = folder / "lib" / LIBRARIES[platform]
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_library(compiler, library.name), library)
    return folder


@functools.cache
def _library(compiler: str, name: str) -> Path:
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags.append(f"-Wl,-soname,{name}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)

    def link(path: Path) -> None:
        command = [compiler, *flags, str(SOURCE), "-o", str(path), "-ldl"]
        subprocess.run(command, check=True)

    return built(name, version.stdout, *flags, SOURCE.read_bytes(), build=link)


def runner(folder: Path, platform: str, *, prelude: str = PRELUDE) -> Run:
    """Return a function that runs a program on a fake platform, and checks that it succeeds."""
    root = str(build(folder, platform))
    variables = {"FAKE_PLATFORM": platform, "FAKE_FOLDER": root, "ROCM_PATH": root}
    return lambda program: child.run(program, prelude=prelude, **variables)
