"""Compile HIP text (for HIP's NVIDIA platform) into a cubin with NVRTC, through NVIDIA's binding.

NVRTC compiles in a child process: a crash or a time limit does not affect the user's process.
"""

import functools
from dataclasses import dataclass
from typing import Any, Final

from q4jit.compilers.clang import refuse_unknown
from q4jit.compilers.programs import TIME_LIMIT_S, Build, python_program
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target

_NAME: Final = "nvrtc"
_SOURCE: Final = "kernel.hip"
_CHILD: Final = "nvrtc_child.py"
_FLAGS: Final = (
    "--std=c++17",
    "--fmad=false",  # the text spells out every fma
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)


@dataclass(frozen=True)
class NvRtc:
    """NVRTC, from a CUDA installation or from the PyPI package nvidia-cuda-nvrtc."""

    time_limit_s: float = TIME_LIMIT_S

    SOURCE_SUFFIX = ".hip"
    SUFFIX = ".cubin"

    def archs(self) -> tuple[str, ...]:
        """Return the NVIDIA GPUs that NVRTC knows. Raises TargetError if it cannot be loaded."""
        (numbers,) = _call("nvrtcGetSupportedArchs")
        return tuple(f"sm_{number}" for number in numbers)

    def fingerprint(self, target: Target) -> str:
        """Return the version and the ordered flags."""
        major, minor = _call("nvrtcVersion")
        return f"{_NAME} {major}.{minor} {' '.join(_flags(target))}"

    def compile_object(self, text: str, target: Target) -> bytes:
        """Compile a translation unit to a cubin (ELF). Raises TargetError and CompileError."""
        return self._build("kernel.cubin", text, target)

    def compile_assembly(self, text: str, target: Target) -> str:
        """Return the PTX of the same compilation; ptxas turns it into the GPU's instructions."""
        return self._build("kernel.ptx", text, target).rstrip(b"\0").decode()

    def _build(self, output: str, text: str, target: Target) -> bytes:
        refuse_unknown(_NAME, target, self.archs())
        flags = _flags(target)
        command = (*python_program(_CHILD), _SOURCE, output, *flags)
        return Build(_NAME, (command,), flags, _SOURCE, output, self.time_limit_s).run(text)


def _flags(target: Target) -> tuple[str, ...]:
    own = "a" if target.hip.warpgroups else ""  # sm_90a has instructions that no later arch runs
    return (f"--gpu-architecture={target.arch}{own}", *_FLAGS)


@functools.cache
def _nvrtc() -> Any:  # a module of Cython without annotations
    install = "pip install 'q4jit[nvidia]'"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except ImportError as error:
        raise TargetError(
            f"cannot compile for NVIDIA GPUs: the Python package cuda-bindings is not installed "
            f"({error}); {install}"
        ) from error
    except RuntimeError as error:  # the binding is installed, the library is not
        raise TargetError(
            f"cannot compile for NVIDIA GPUs: the library libnvrtc cannot be loaded ({error}); "
            f"{install}"
        ) from error
    return nvrtc


def _call(name: str) -> tuple[Any, ...]:
    """Call a function of NVRTC and return its results. Raises CompileError if it fails."""
    status, *values = getattr(_nvrtc(), name)()
    if int(status):
        raise CompileError(_NAME, (), f"{name}: {status.name}", "")
    return tuple(values)
