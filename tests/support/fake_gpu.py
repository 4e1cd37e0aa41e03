"""Run programs in which q4jit's real drivers and the makers' real bindings meet fake_gpu.c."""

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
"""What programs on a fake platform begin with: its counters, its devices, the errors it gives."""

Run = Callable[[str], str]


def build(folder: Path, platform: str) -> Path:
    """Put the fake runtime into `folder`/lib; the test is skipped without compiler or binding.

    The folder is what ROCM_PATH names.
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
    """Return what runs a program on a fake platform below `folder`; it must end well."""
    place = str(build(folder, platform))
    places = {"FAKE_PLATFORM": platform, "FAKE_FOLDER": place, "ROCM_PATH": place}
    return lambda program: child.run(program, prelude=prelude, **places)
