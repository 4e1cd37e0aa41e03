"""A program that runs hiprtc in a process of its own, where it may crash.

`describe` prints the version of hiprtc and the archs that AMD's code object manager knows, as JSON.
`compile SOURCE OUTPUT FLAG…` writes a code object, and the log to standard error.

q4jit starts the program by its path and never imports it. The program imports nothing from q4jit:
it needs only Python and AMD's binding.
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
    """Run the command in `arguments`; return the exit status."""
    with _libraries():
        if arguments == ["describe"]:
            sys.stdout.write(json.dumps(_describe()))
            return 0
        _, source, output, *flags = arguments
        return _compile(Path(source), Path(output), flags)


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """Let the binding find the hiprtc of a Linux distribution.

    The binding loads `libhiprtc.so` without a version, which only development packages install, and
    older releases (5.2) contain hiprtc in libamdhip64.
    """
    if not os.environ.get("ROCM_PATH"):
        library = ctypes.util.find_library("hiprtc") or ctypes.util.find_library("amdhip64")
        if library and not Path("/opt/rocm/lib/libhiprtc.so").exists():
            ctypes.CDLL(library)
            with tempfile.TemporaryDirectory(prefix="q4jit-rocm-") as folder:
                (Path(folder) / "lib").mkdir()
                link = Path(folder) / "lib" / "libhiprtc.so"
                link.symlink_to(_loaded(library.split(".so")[0]))
                os.environ["ROCM_PATH"] = folder
                yield
                return
    yield


def _loaded(name: str) -> str:
    """Return the path of the loaded library whose file name begins with `name`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(name):
            return path
    raise FileNotFoundError(f"no library {name}* is loaded")


def _check(result: Any, *values: Any) -> Any:  # the result of a function of the binding
    if result.value:
        raise RuntimeError(result.name)
    return values[0] if values else None


def _binding() -> Any:  # its annotations omit arguments and results
    from rocm.bindings import hiprtc

    return hiprtc


def _describe() -> dict[str, Any]:
    hiprtc = _binding()
    status, major, minor = hiprtc.hiprtcVersion()
    _check(status)
    # hiprtc loads the library that compiles at its first use; every release knows gfx90a
    program = _check(*hiprtc.hiprtcCreateProgram(b"//\n", b"empty.hip", 0, None, None))
    _check(*hiprtc.hiprtcCompileProgram(program, 1, [b"--offload-arch=gfx90a"]))
    path = Path(_loaded("libamd_comgr"))
    return {
        "version": f"hiprtc {major}.{minor} {path.resolve().name} {path.stat().st_size} bytes",
        "archs": _archs(ctypes.CDLL(str(path))),
    }


def _archs(comgr: ctypes.CDLL) -> list[str]:
    """Return the archs of the library that compiles for hiprtc; hiprtc has no function for it."""
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
    # the log names the compiler's own copy of the text, in a folder with a random name
    messages = log.rstrip(b"\0").decode(errors="replace")
    sys.stderr.write(re.sub(r"\S*/CompileSource\b", source.name, messages))
    if status.value:
        sys.stderr.write(f"\n{status.name}\n")
        return 1
    code = bytearray(_check(*hiprtc.hiprtcGetCodeSize(program)))
    _check(*hiprtc.hiprtcGetCode(program, code))
    output.write_bytes(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
