"""What q4jit finds on this machine, what is missing, and the command that installs it."""

import ctypes.util
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.compilers.entries import entries
from q4jit.compilers.find import survey
from q4jit.errors import ConfigError, Q4JitError
from q4jit.runtime.devices import device_files, find_devices, why_none
from q4jit.targets import find_target
from q4jit.threads import get_num_threads
from q4jit.tools.provenance import about_code, about_system, cpu_name
from q4jit.tools.text import counted, in_bytes

# package → what needs it, and the command that installs it
_PACKAGES: Final = {
    "numpy": ("arrays", "pip install 'numpy>=2'"),
    "llvmlite": ("kernels on the CPU", "pip install 'llvmlite>=0.50'"),
    "jinja2": ("kernels on GPUs", "pip install 'jinja2>=3.1'"),
    "rocm-bindings-hip": ("AMD GPUs", "pip install 'q4jit[rocm]'"),
    "cuda-bindings": ("NVIDIA GPUs", "pip install 'q4jit[nvidia]'"),
    "nvidia-cuda-nvrtc": ("NVIDIA GPUs, without a CUDA toolkit", "pip install 'q4jit[nvidia]'"),
    "ziglang": ("compiling for AMD GPUs without ROCm", "pip install 'q4jit[cross]'"),
    "msgpack": ("q4jit build", "pip install 'q4jit[cross]'"),
    "matplotlib": ("q4jit bench --plot", "pip install 'q4jit[plot]'"),
}
_LIBRARIES: Final = {
    "rocm": ("amdhip64", "lib/libamdhip64.so"),
    "cuda": ("cuda", ""),
}
_PLATFORM: Final = {"rocm": "amd", "cuda": "nvidia"}
_VARIABLES: Final = ("ROCM_PATH", "ROCM_HOME", "OMP_NUM_THREADS", "HIP_VISIBLE_DEVICES")


def examine() -> dict[str, Any]:
    """Return everything that `q4jit doctor` reports, as JSON can hold it."""
    packages = [_package(name) for name in _PACKAGES]
    compilers = [vars(compiler) for compiler in _attempted(survey, [])]
    report: dict[str, Any] = {
        **about_code(),
        **about_system(),
        "executable": sys.executable,
        "packages": packages,
        "cpu": _cpu(),
        **{name: _library(name) for name in _LIBRARIES},
        "compilers": compilers,
        "devices": [str(device) for device in find_devices()],
        "why_no_device": why_none(),
        "cache": _cache(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("Q4JIT_") or name in _VARIABLES
        },
    }
    return report | {"missing": list(_missing(report))}


def _attempted(action: Any, otherwise: Any) -> Any:
    """Return the result of an action, or `otherwise` if q4jit raises an error of its own."""
    try:
        return action()
    except Q4JitError:
        return otherwise


def _package(name: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    purpose, command = _PACKAGES[name]
    return {"name": name, "version": version, "purpose": purpose, "command": command}


def _cpu() -> dict[str, Any]:
    try:
        target, name = find_target("cpu"), cpu_name()
        features = sorted(target.features)
        problem = ""
    except Q4JitError as error:
        name, features, problem = "", [], str(error)
    try:
        threads: int | None = get_num_threads()
    except ConfigError as error:
        threads, problem = None, str(error)
    return {"name": name, "features": features, "threads": threads, "problem": problem}


def _library(name: str) -> dict[str, Any]:
    """Return where the runtime of a platform is, and every place where it was looked for."""
    library, below = _LIBRARIES[name]
    roots = [config.rocm_path(), Path("/opt/rocm")] if below else []
    paths = [str(root / below) for root in roots if root is not None]
    existing = [path for path in paths if Path(path).exists()]
    system = ctypes.util.find_library(library)
    files = device_files()[_PLATFORM[name]]
    return {
        "library": existing[0] if existing else system,
        "looked_in": [*paths, f"the system's libraries (lib{library}.so)"],
        "device_files": {path: Path(path).exists() for path in files},
    }


def _cache() -> dict[str, Any]:
    directory = config.cache_dir()
    report: dict[str, Any] = {"directory": None if directory is None else str(directory)}
    report["limit_bytes"] = _attempted(config.cache_limit, None)
    known = []
    if directory is None:
        state = "there is no home directory; kernels are kept in memory"
    elif not directory.exists():
        state = "does not exist yet; the first compilation creates it"
    else:
        try:
            known = entries(directory, titles=False)
            state = "usable" if os.access(directory, os.W_OK) else "cannot be written"
        except OSError as error:
            state = f"cannot be read ({error.strerror})"
    size = sum(entry.size_bytes for entry in known)
    return report | {"state": state, "entries": len(known), "size_bytes": size}


def _missing(report: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield each missing piece with the one command that cures it."""
    for package in report["packages"]:
        if package["version"] is None:
            what = f"{package['name']} ({package['purpose']})"
            yield {"what": what, "command": package["command"]}
    has_driver = any(report["rocm"]["device_files"].values())
    if has_driver and report["rocm"]["library"] is None:
        what = "ROCm's runtime, libamdhip64.so"
        yield {"what": what, "command": "apt-get install libamdhip64-dev"}
    if any(report["cuda"]["device_files"].values()) and report["cuda"]["library"] is None:
        yield {"what": "NVIDIA's driver, libcuda.so.1", "command": "apt-get install libcuda1"}
    if not any("gfx" in arch for c in report["compilers"] for arch in c["archs"]):
        yield {"what": "a compiler for AMD GPUs", "command": "pip install 'q4jit[cross]'"}
    if report["cpu"]["problem"]:
        what = f"a usable CPU: {report['cpu']['problem']}"
        yield {"what": what, "command": "unset Q4JIT_NUM_THREADS"}
    cache = report["cache"]
    if cache["state"].startswith(("cannot", "there is no")):
        what = f"a kernel cache: {cache['directory'] or ''} {cache['state']}"
        yield {"what": what, "command": "export Q4JIT_CACHE_DIR=FOLDER"}


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    commit = report["commit"] or "unknown"
    yield f"q4jit {report['q4jit']}, commit {commit}"
    yield f"Python {report['python']} ({report['executable']}), {report['system']}"
    for package in report["packages"]:
        yield f"  {package['name']:20}{package['version'] or 'missing':16}{package['purpose']}"
    cpu = report["cpu"]
    threads = "?" if cpu["threads"] is None else counted(cpu["threads"], "thread")
    yield f"CPU: {cpu['name'] or cpu['problem']}, {threads}"
    yield f"  features: {' '.join(cpu['features']) or 'none'}"
    for name in _LIBRARIES:
        about = report[name]
        yield f"{name.upper()}: {about['library'] or 'not found'}"
        yield f"  looked in: {', '.join(about['looked_in'])}"
        states = (f"{p} {'exists' if s else 'missing'}" for p, s in about["device_files"].items())
        yield f"  device files: {', '.join(states)}"
    yield "compilers for GPUs:"
    for compiler in report["compilers"]:
        known = compiler["problem"] or " ".join(compiler["archs"])
        yield f"  {compiler['description']}: {' '.join(known.split())}"
    yield f"GPUs: {', '.join(report['devices']) or report['why_no_device']}"
    cache = report["cache"]
    most = cache["limit_bytes"]
    limit = "no limit" if most is None else f"limit {in_bytes(most)}"
    size = f"{counted(cache['entries'], 'kernel')}, {in_bytes(cache['size_bytes'])}, {limit}"
    yield f"cache: {cache['directory']} ({cache['state']}), {size}"
    for name, value in report["environment"].items():
        yield f"  {name}={value}"
    yield "missing:" if report["missing"] else "nothing is missing"
    for piece in report["missing"]:
        yield f"  {piece['what']}: {piece['command']}"
