"""Compile LLVM IR into an object (ELF), through llvmlite."""

import itertools
from types import ModuleType
from typing import Any, Final

import llvmlite
import llvmlite.binding as llvm

from q4jit.compilers.llvm_child import OPTIMISATION, emit, make_machine
from q4jit.compilers.stack import on_large_stack
from q4jit.locks import BUILD
from q4jit.targets import Target

SOURCE_SUFFIX: Final = ".ll"
SUFFIX: Final = ".o"
_SOURCE: Final = "kernel.ll"
MOST_COMPILATIONS_HERE: Final = 500
"""Compilations in this process; the rest are made by others (see `llvm_process`)."""


def fingerprint(target: Target) -> str:
    """Return the versions and ordered flags: with the text, they determine the bytes."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return f"llvmlite {llvmlite.__version__} llvm {version} {' '.join(_flags(target))}"


def _flags(target: Target) -> tuple[str, ...]:
    features = _feature_string(target)
    return (
        f"-O{OPTIMISATION}",
        "-relocation-model=pic",
        f"-mtriple={target.triple}",
        f"-mcpu={target.cpu_name}",
        f"-mattr={features}",
    )


def _feature_string(target: Target) -> str:
    on = [f"+{name}" for name in sorted(target.features)]
    return ",".join(on + [f"-{name}" for name in sorted(target.lacks)])


def compile_object(text: str, target: Target) -> bytes:
    """Compile the LLVM IR of one kernel. Raises CompileError with LLVM's message."""
    return bytes(_emit(text, target, "emit_object"))


def compile_assembly(text: str, target: Target) -> str:
    """Return the assembly of the same compilation."""
    return str(_emit(text, target, "emit_assembly"))


def _emit(text: str, target: Target, method: str) -> Any:  # bytes or str, depending on `method`
    # Only one thread may be in LLVM. LLVM's objects must be freed before the lock is released: they
    # are, once the inner function has returned, or its exception (with its frames) is gone.
    with BUILD:
        try:
            if process := _other_process():
                made = process.emit(_machine(target), text, method)
                if made is not None:
                    return made if method == "emit_object" else made.decode()
            return on_large_stack(lambda: emit(text, make_machine(*_machine(target)), method))
        except RuntimeError as error:
            log = str(error)
        from q4jit.compilers.programs import failure  # late: only errors need it

        flags = _flags(target)
        command = ("llc", *flags, "-filetype=obj", _SOURCE)  # the same compilation as a command
        raise failure("llvmlite", [command], flags, log, (_SOURCE, text))


def _machine(target: Target) -> tuple[str, str, str]:
    return target.triple, target.cpu_name, _feature_string(target)


_made: Final = itertools.count(1)


def _other_process() -> ModuleType | None:
    """Return `llvm_process` if the next compilation is its own, else None."""
    if next(_made) <= MOST_COMPILATIONS_HERE:
        return None
    from q4jit.compilers import llvm_process  # late: few programs compile as often

    return llvm_process
