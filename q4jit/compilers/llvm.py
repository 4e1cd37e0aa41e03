"""Compile LLVM IR into an object (ELF), through llvmlite."""

import functools
from typing import Any, Final

import llvmlite
import llvmlite.binding as llvm

from q4jit.compilers.stack import on_large_stack
from q4jit.locks import BUILD
from q4jit.targets import Target

SOURCE_SUFFIX: Final = ".ll"
SUFFIX: Final = ".o"
_SOURCE: Final = "kernel.ll"
_OPTIMISATION: Final = 3


def fingerprint(target: Target) -> str:
    """Return the versions and ordered flags: with the text, they determine the bytes."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return f"llvmlite {llvmlite.__version__} llvm {version} {' '.join(_flags(target))}"


def _flags(target: Target) -> tuple[str, ...]:
    features = _feature_string(target)
    return (
        f"-O{_OPTIMISATION}",
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
            return on_large_stack(lambda: _emit_locked(text, _machine(target), method))
        except RuntimeError as error:
            log = str(error)
        from q4jit.compilers.programs import failure  # late: only errors need it

        flags = _flags(target)
        command = ("llc", *flags, "-filetype=obj", _SOURCE)  # the same compilation as a command
        raise failure("llvmlite", [command], flags, log, (_SOURCE, text))


def _emit_locked(text: str, machine: Any, method: str) -> Any:
    module = llvm.parse_assembly(text, llvm.create_context())
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=_OPTIMISATION)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return getattr(machine, method)(module)


@functools.cache
def _machine(target: Target) -> Any:  # llvmlite has no annotations
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu_name,
        features=_feature_string(target),
        opt=_OPTIMISATION,
        reloc="pic",
        codemodel="small",
    )
