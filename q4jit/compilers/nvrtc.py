"""HIP text for HIP's NVIDIA platform to a cubin, through NVRTC by NVIDIA's own binding.

It compiles in a child process, which may crash or be stopped without harm to the user's.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.clang import refuse_unknown
from q4jit.compilers.steps import TIME_LIMIT_S, Build
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target

_NAME: Final = "nvrtc"
_SOURCE: Final = "kernel.hip"
_CHILD: Final = Path(__file__).with_name("nvrtc_child.py")
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

    time_limit_s: float = TIME_LIMIT_S

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
        return self._build("kernel.cubin", text, target)

    def compile_assembly(self, text: str, target: Target) -> str:
        """The PTX of the same compilation: what becomes of it in the end only ptxas knows."""
        return self._build("kernel.ptx", text, target).rstrip(b"\0").decode()

    def _build(self, output: str, text: str, target: Target) -> bytes:
        refuse_unknown(_NAME, target, self.archs())
        flags = _flags(target)
        # -P: the folder of compilers is no place to import from
        command = (sys.executable, "-P", str(_CHILD), _SOURCE, output, *flags)
        return Build(_NAME, (command,), flags, _SOURCE, output, self.time_limit_s).run(text)


def _flags(target: Target) -> tuple[str, ...]:
    own = "a" if target.hip.warpgroups else ""  # instructions of this arch alone
    return (f"--gpu-architecture={target.arch}{own}", *_FLAGS)


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


def _call(name: str) -> tuple[Any, ...]:
    """What a function of NVRTC returns beside its status."""
    status, *values = getattr(_nvrtc(), name)()
    if int(status):
        raise CompileError(_NAME, (), f"{name}: {status.name}", "")
    return tuple(values)
