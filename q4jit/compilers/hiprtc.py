"""Compile HIP text into an AMD code object with hiprtc, through AMD's binding in a child process.

hiprtc 5.2 ends its process if it does not know the arch, so it never runs in the user's process.
"""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.clang import pinned_flags, refuse_unknown
from q4jit.compilers.codeobject import disassemble
from q4jit.compilers.programs import TIME_LIMIT_S, Build, execute, failure, python_program
from q4jit.targets import Target

_NAME: Final = "hiprtc"
_SOURCE: Final = "kernel.hip"
_OBJECT: Final = "kernel.hsaco"
_CHILD: Final = "hiprtc_child.py"


@dataclass(frozen=True)
class HipRtc:
    """hiprtc, from the ROCm in `rocm_path` or from the system's libraries."""

    rocm_path: Path | None = None
    time_limit_s: float = TIME_LIMIT_S

    SOURCE_SUFFIX = ".hip"
    SUFFIX = ".hsaco"

    def archs(self) -> tuple[str, ...]:
        """Return the AMD GPUs that hiprtc knows. Raises CompileError if it cannot be loaded."""
        return tuple(_describe(self.rocm_path)["archs"])

    def fingerprint(self, target: Target) -> str:
        """Return the versions of hiprtc and of the library that compiles for it, and the flags."""
        return f"{_describe(self.rocm_path)['version']} {' '.join(pinned_flags(target))}"

    def compile_object(self, text: str, target: Target) -> bytes:
        """Compile a translation unit to a code object (ELF). Raises TargetError, CompileError."""
        refuse_unknown(_NAME, target, self.archs())
        flags = pinned_flags(target)
        command = (*python_program(_CHILD), "compile", _SOURCE, _OBJECT, *flags)
        variables = _variables(self.rocm_path)
        build = Build(_NAME, (command,), flags, _SOURCE, _OBJECT, self.time_limit_s, variables)
        return build.run(text)

    def compile_assembly(self, text: str, target: Target) -> str:
        """Disassemble the compiled object; hiprtc itself writes no assembly."""
        return disassemble(self.compile_object(text, target))


def _variables(rocm_path: Path | None) -> dict[str, str]:
    return {"ROCM_PATH": str(rocm_path)} if rocm_path else {}


@functools.cache
def _describe(rocm_path: Path | None) -> Any:  # JSON
    command, variables = (*python_program(_CHILD), "describe"), _variables(rocm_path)
    with tempfile.TemporaryDirectory(prefix="q4jit-") as folder:
        log = execute(command, Path(folder), 60, variables)
    if log.problem:
        raise failure(_NAME, [command], (), log.text(), (_SOURCE, ""), variables)
    return json.loads(log.output)
