"""Where a report comes from: q4jit's commit, the driver, the CPU, the system."""

import datetime
import platform
from pathlib import Path
from typing import Any, Final

import numpy as np

from q4jit.targets import find_target
from q4jit.version import CHECKOUT, version

_UNKNOWN_CACHE_BYTES: Final = 64 << 20


def commit(checkout: Path = CHECKOUT) -> str | None:
    """Return the commit of a git checkout, read from `.git`; None for any other folder."""
    git = checkout / ".git"
    head = git / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text(encoding="utf-8").strip()
    reference = text.removeprefix("ref: ")
    if reference == text:
        return text
    if (git / reference).is_file():
        return (git / reference).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)


def driver_version(name: str) -> str:
    """Return the version of the GPU driver of `amd` or `nvidia`; "none" for `cpu`.

    An amdgpu driver that is part of the Linux kernel has no version of its own; the kernel's
    release stands for it.
    """
    if name == "cpu":
        return "none"
    paths = {"amd": "/sys/module/amdgpu/version", "nvidia": "/proc/driver/nvidia/version"}
    path = Path(paths[name])
    if path.is_file():
        return path.read_text(encoding="utf-8").splitlines()[0].strip()
    return f"{name} driver of kernel {platform.release()}"


def cpu_name() -> str:
    """Return the name of this machine's CPU and its target."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a CPU'} ({find_target('cpu')})"


def cache_bytes() -> int:
    """Return the size of the CPU's last-level cache, from sysfs; 64 MiB if it is unknown."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [p.read_text(encoding="ascii").strip() for p in folder.glob("index*/size")]
    known = [int(size[:-1]) << 10 for size in sizes if size.endswith("K")]
    return max(known, default=_UNKNOWN_CACHE_BYTES)


def about_code() -> dict[str, Any]:
    """Return the fields of a report that identify q4jit's code and the time."""
    return {
        "q4jit": version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def about_system() -> dict[str, Any]:
    """Return the fields of a report that identify Python, NumPy and the operating system."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
    }
