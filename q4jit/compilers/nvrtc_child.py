"""A program that runs NVRTC in a process of its own, where it may crash or hang.

`SOURCE OUTPUT FLAG…` writes a cubin, or PTX if OUTPUT ends in `.ptx`; the log goes to standard
error. q4jit starts the program by its path and never imports it. The program imports nothing from
q4jit: it needs only Python and NVIDIA's binding.
"""

import sys
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc


def main(arguments: list[str]) -> int:
    """Compile a file; return the exit status."""
    source, output, *flags = arguments
    text, name = Path(source).read_bytes(), source.encode()
    program = _check(*nvrtc.nvrtcCreateProgram(text, name, 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
    sys.stderr.write(_read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
    if int(status):
        sys.stderr.write(f"\n{status.name}\n")
        return 1
    form = "PTX" if output.endswith(".ptx") else "CUBIN"
    Path(output).write_bytes(_read(program, form))
    return 0


def _check(status: Any, *values: Any) -> Any:  # Cython without annotations
    if int(status):
        raise RuntimeError(status.name)
    return values[0] if values else None


def _read(program: Any, what: str) -> bytes:
    size_bytes = _check(*getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    data = bytes(size_bytes)  # the binding writes into it
    _check(*getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
