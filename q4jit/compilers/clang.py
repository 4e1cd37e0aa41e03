"""Compile HIP text into an AMD code object with hipcc, clang or ziglang's clang.

All three are the same driver under different names. hipcc adds flags of its own; q4jit passes the
same flags to all of them, so hipcc and the clang that it calls produce the same bytes. Code object
version 5 needs clang 15.
"""

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from q4jit.compilers.programs import TIME_LIMIT_S, Build, execute, failure
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target

_SOURCE: Final = "kernel.hip"
_OBJECT: Final = "kernel.hsaco"
_ASSEMBLY: Final = "kernel.s"
_CPU: Final = re.compile(r"^\s+(gfx\w+)\s*$", re.MULTILINE)

_DEVICE_ONLY: Final = tuple(
    "-x hip --cuda-device-only --no-gpu-bundle-output -nogpulib -nogpuinc".split()
)
_FLAGS: Final = (
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",  # the text spells out every fma
    "-mcode-object-version=5",  # hiprtc before 5.3 ignores this and writes version 4
    "-fuse-cuid=none",  # otherwise a hash of path and command becomes a symbol
    *"-mllvm -amdgpu-early-inline-all=true".split(),  # hipcc adds these two
    *"-mllvm -amdgpu-function-calls=false".split(),
)
_WAVE_FLAGS: Final = {32: "-mno-wavefrontsize64", 64: "-mwavefrontsize64"}
_NO_CONFIG: Final = ("--no-default-config",)
_LINES_WITH_PATHS: Final = ("InstalledDir:", "Configuration file:")


def pinned_flags(target: Target) -> tuple[str, ...]:
    """Return the flags that determine the code; hiprtc gets the same."""
    flags = (*_FLAGS, f"--offload-arch={target.arch}", _WAVE_FLAGS[target.hip.wave])
    # RDNA in CU mode: the waves of a thread block share the L0 cache of one compute unit. In WGP
    # mode they may run on two units, and a barrier has to empty both caches. gfx9 has no modes.
    return flags if target.arch.startswith("gfx9") else (*flags, "-mcumode")


@dataclass(frozen=True)
class Clang:
    """One program of the clang family.

    Attributes:
        name: the name in messages.
        program: the command with its first arguments.
        linker: the command that links the program's object; empty if the program finds a linker.
        time_limit_s: the seconds after which a compilation is stopped.
    """

    name: str
    program: tuple[str, ...]
    linker: tuple[str, ...] = ()
    time_limit_s: float = TIME_LIMIT_S

    SOURCE_SUFFIX = ".hip"
    SUFFIX = ".hsaco"

    def archs(self) -> tuple[str, ...]:
        """Return the AMD GPUs that the program knows. Raises CompileError if it cannot run."""
        return _archs(self.name, self.program)

    def fingerprint(self, target: Target) -> str:
        """Return the version that the program prints, without paths, and the ordered flags."""
        version = " ".join(_version(self.name, self.program))
        return f"{self.name} {version} {' '.join(self._flags(target))}"

    def compile_object(self, text: str, target: Target) -> bytes:
        """Compile a translation unit to a code object (ELF). Raises TargetError, CompileError."""
        compile_ = (*self.program, *self._flags(target))
        if not self.linker:
            return self._build([(*compile_, "-c", _SOURCE, "-o", _OBJECT)], _OBJECT, text, target)
        cpu = ("--target=amdgcn-amd-amdhsa", f"-mcpu={target.arch}", "-mcode-object-version=5")
        assemble = (*self.program, *_no_config(self.name, self.program), *cpu)
        commands = [
            (*compile_, "-S", _SOURCE, "-o", _ASSEMBLY),
            (*assemble, "-c", _ASSEMBLY, "-o", "kernel.o"),
            (*self.linker, "--no-undefined", "-shared", "kernel.o", "-o", _OBJECT),
        ]
        return self._build(commands, _OBJECT, text, target)

    def problem(self, target: Target) -> str:
        """Return why the program cannot make a code object for an arch that it knows, or "".

        Debian's clang, for example, comes without lld. A compiler with a linker of its own needs no
        other part.
        """
        return "" if self.linker else _problem(self, target)

    def compile_assembly(self, text: str, target: Target) -> str:
        """Return the assembly of the same compilation."""
        command = (*self.program, *self._flags(target), "-S", _SOURCE, "-o", _ASSEMBLY)
        return self._build([command], _ASSEMBLY, text, target).decode()

    def _build(
        self, commands: list[tuple[str, ...]], output: str, text: str, target: Target
    ) -> bytes:
        refuse_unknown(self.name, target, self.archs())
        flags = self._flags(target)
        build = Build(self.name, tuple(commands), flags, _SOURCE, output, self.time_limit_s)
        return build.run(text)

    def _flags(self, target: Target) -> tuple[str, ...]:
        own = _no_config(self.name, self.program)
        return (*own, *_DEVICE_ONLY, *pinned_flags(target))


def refuse_unknown(name: str, target: Target, known: tuple[str, ...]) -> None:
    """Raise TargetError unless the compiler `name` knows the arch of `target`."""
    if target.arch not in known:
        raise TargetError(f"{name} cannot compile for {target.arch}; it knows {', '.join(known)}")


@functools.cache
def _problem(compiler: Clang, target: Target) -> str:
    try:
        compiler.compile_object("", target)
    except CompileError as error:
        return "; ".join(error.log.splitlines()[-2:])
    return ""


@functools.cache
def _version(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    """Return the lines about version and target. A program's path does not change its code."""
    # hipcc writes to standard error about this machine's GPUs, not about itself
    output, _ = _ask(name, (*program, *_no_config(name, program), "--version"))
    lines = (line.strip() for line in output.splitlines())
    return tuple(line for line in lines if line and not line.startswith(_LINES_WITH_PATHS))


@functools.cache
def _no_config(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flag that keeps a user's configuration file from adding flags, if there is one.

    Clang before version 16 has no such flag. It reads a configuration file only if it is called by
    the name of a target, and `find` does not look for those names.
    """
    with tempfile.TemporaryDirectory(prefix="q4jit-") as folder:
        log = execute((*program, *_NO_CONFIG, "--version"), Path(folder), time_limit_s=60)
    return () if log.problem else _NO_CONFIG


@functools.cache
def _archs(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    # hipcc needs an arch and a file; without them it looks for a GPU and refuses to start
    question = "--target=amdgcn-amd-amdhsa -mcpu=gfx900 -print-supported-cpus -nogpulib -x c -c"
    # old clangs answer on standard error, newer ones on standard output
    command = (*program, *_no_config(name, program), *question.split(), _SOURCE)
    listed = "\n".join(_ask(name, command))
    return tuple(sorted(_CPU.findall(listed), key=lambda arch: (len(arch), arch)))


def _ask(name: str, command: tuple[str, ...]) -> tuple[str, str]:
    """Run a program; return what it wrote to standard output and to standard error."""
    with tempfile.TemporaryDirectory(prefix="q4jit-") as folder:
        (Path(folder) / _SOURCE).touch()
        log = execute(command, Path(folder), time_limit_s=60)
    if log.problem:
        raise failure(name, [command], (), log.text(), (_SOURCE, ""))
    return log.output, log.errors
