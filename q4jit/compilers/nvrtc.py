"""HIP text for HIP's NVIDIA platform to a cubin, through NVRTC by NVIDIA's own binding.

`python -m q4jit.compilers.nvrtc SOURCE OUTPUT FLAG…` compiles one file: what a saved repro runs.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.clang import refuse_unknown
from q4jit.compilers.steps import failure
from q4jit.errors import TargetError
from q4jit.targets import Target

_NAME: Final = "nvrtc"
_SOURCE: Final = "kernel.hip"
_FLAGS: Final = (
    "--std=c++17",
    "--fmad=false",  # the text says fma where it means it
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)


@dataclass(frozen=True)
class NvRtc:
    """NVRTC, from a CUDA installation or PyPI's nvidia-cuda-nvrtc."""

    SOURCE_SUFFIX = ".hip"
    SUFFIX = ".cubin"

    def archs(self) -> tuple[str, ...]:
        """The NVIDIA GPUs that NVRTC knows. Raises TargetError where it cannot be loaded."""
        (numbers,) = _call("nvrtcGetSupportedArchs")
        return tuple(f"sm_{number}" for number in numbers)

    def fingerprint(self, target: Target) -> str:
        """The version and the ordered flags."""
        major, minor = _call("nvrtcVersion")
        return f"{_NAME} {major}.{minor} {' '.join(_flags(target))}"

    def compile_object(self, text: str, target: Target) -> bytes:
        """The cubin (ELF) of a translation unit. Raises TargetError and CompileError."""
        return self._compile(text, target, "CUBIN")

    def compile_assembly(self, text: str, target: Target) -> str:
        """The PTX of the same compilation: what becomes of it in the end only ptxas knows."""
        return self._compile(text, target, "PTX").rstrip(b"\0").decode()

    def _compile(self, text: str, target: Target, form: str) -> bytes:
        refuse_unknown(_NAME, target, self.archs())
        flags = _flags(target)
        code, log = _compile(text, flags, form)
        if code is None:
            command = (sys.executable, "-m", __name__, _SOURCE, "kernel.cubin", *flags)
            raise failure(_NAME, [command], flags, log, (_SOURCE, text))
        return code


def _flags(target: Target) -> tuple[str, ...]:
    return (f"--gpu-architecture={target.arch}", *_FLAGS)


@functools.cache
def _nvrtc() -> Any:  # a module of Cython without annotations
    install = "pip install q4jit[nvidia]"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except ImportError as error:
        raise TargetError(f"{_NAME} needs NVIDIA's binding ({error}): {install}") from error
    except RuntimeError as error:  # the binding is here, the library is not
        raise TargetError(f"{_NAME}'s library cannot be loaded ({error}): {install}") from error
    return nvrtc


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    """What a function of NVRTC returns beside its status."""
    status, *values = getattr(_nvrtc(), name)(*arguments)
    if int(status):
        raise RuntimeError(f"{name}: {status.name}")
    return tuple(values)


def _compile(text: str, flags: tuple[str, ...], form: str) -> tuple[bytes | None, str]:
    """The code in one of NVRTC's forms, None where it failed, and the log."""
    (program,) = _call("nvrtcCreateProgram", text.encode(), _SOURCE.encode(), 0, [], [])
    try:
        options = [flag.encode() for flag in flags]
        (status,) = _nvrtc().nvrtcCompileProgram(program, len(options), options)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if int(status):
            return None, f"{log}\n{status.name}"
        return _read(program, form), log
    finally:
        _call("nvrtcDestroyProgram", program)


def _read(program: Any, what: str) -> bytes:
    (size_bytes,) = _call(f"nvrtcGet{what}Size", program)
    data = bytes(size_bytes)  # the binding writes into it
    _call(f"nvrtcGet{what}", program, data)
    return data


def main(arguments: list[str]) -> int:
    """Compile a file; the log goes to standard error."""
    source, output, *flags = arguments
    code, log = _compile(Path(source).read_text(encoding="utf-8"), tuple(flags), "CUBIN")
    sys.stderr.write(log)
    if code is None:
        return 1
    Path(output).write_bytes(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
