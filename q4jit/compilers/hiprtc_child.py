"""The process in which hiprtc runs: it may crash here. A program; nothing imports it.

`describe` prints, as JSON, the version and the archs that AMD's code object manager knows;
`compile SOURCE OUTPUT FLAG…` writes a code object, or the log to standard error. It imports nothing
of q4jit: it is started by its path, and Python and AMD's binding are all that it needs.
"""

import contextlib
import ctypes
import ctypes.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    """Do what `arguments` say; the exit status."""
    with _libraries():
        if arguments == ["describe"]:
            sys.stdout.write(json.dumps(_describe()))
            return 0
        _, source, output, *flags = arguments
        return _compile(Path(source), Path(output), flags)


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """Let the binding find hiprtc where a Linux distribution keeps it.

    The binding wants `libhiprtc.so` without a version, which only development packages bring, and
    older releases (5.2) keep hiprtc inside libamdhip64.
    """
    if not os.environ.get("ROCM_PATH"):
        found = ctypes.util.find_library("hiprtc") or ctypes.util.find_library("amdhip64")
        if found and not Path("/opt/rocm/lib/libhiprtc.so").exists():
            ctypes.CDLL(found)
            with tempfile.TemporaryDirectory(prefix="q4jit-rocm-") as folder:
                (Path(folder) / "lib").mkdir()
                link = Path(folder) / "lib" / "libhiprtc.so"
                link.symlink_to(_loaded(found.split(".so")[0]))
                os.environ["ROCM_PATH"] = folder
                yield
                return
    yield


def _loaded(name: str) -> str:
    """The path of the loaded library whose file name begins with `name`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(name):
            return path
    raise FileNotFoundError(f"{name} is not among the loaded libraries")


def _check(result: Any, *values: Any) -> Any:  # as the binding's functions return them
    if result.value:
        raise RuntimeError(result.name)
    return values[0] if values else None


def _binding() -> Any:  # its annotations leave arguments and results out
    from rocm.bindings import hiprtc

    return hiprtc


def _describe() -> dict[str, Any]:
    hiprtc = _binding()
    status, major, minor = hiprtc.hiprtcVersion()
    _check(status)
    # The library that compiles is loaded when it is first needed; an arch that every release knows.
    program = _check(*hiprtc.hiprtcCreateProgram(b"//\n", b"empty.hip", 0, None, None))
    _check(*hiprtc.hiprtcCompileProgram(program, 1, [b"--offload-arch=gfx90a"]))
    path = Path(_loaded("libamd_comgr"))
    return {
        "version": f"hiprtc {major}.{minor} {path.resolve().name} {path.stat().st_size} bytes",
        "archs": _archs(ctypes.CDLL(str(path))),
    }


def _archs(comgr: ctypes.CDLL) -> list[str]:
    """hiprtc itself cannot be asked, but the library that compiles for it can."""
    count = ctypes.c_size_t()
    if comgr.amd_comgr_get_isa_count(ctypes.byref(count)):
        raise RuntimeError("amd_comgr_get_isa_count failed")
    names = []
    for i in range(count.value):
        name = ctypes.c_char_p()
        if comgr.amd_comgr_get_isa_name(ctypes.c_size_t(i), ctypes.byref(name)):
            raise RuntimeError("amd_comgr_get_isa_name failed")
        names.append((name.value or b"").decode().rpartition("--")[2])
    return names


def _compile(source: Path, output: Path, flags: list[str]) -> int:
    hiprtc = _binding()
    text, name = source.read_bytes(), source.name.encode()
    program = _check(*hiprtc.hiprtcCreateProgram(text, name, 0, None, None))
    (status,) = hiprtc.hiprtcCompileProgram(program, len(flags), [f.encode() for f in flags])
    log = bytearray(_check(*hiprtc.hiprtcGetProgramLogSize(program)))
    if log:
        _check(*hiprtc.hiprtcGetProgramLog(program, log))
    # the compiler names a file of its own in a random folder
    words = log.rstrip(b"\0").decode(errors="replace")
    sys.stderr.write(re.sub(r"\S*/CompileSource\b", source.name, words))
    if status.value:
        sys.stderr.write(f"\n{status.name}\n")
        return 1
    code = bytearray(_check(*hiprtc.hiprtcGetCodeSize(program)))
    _check(*hiprtc.hiprtcGetCode(program, code))
    output.write_bytes(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
