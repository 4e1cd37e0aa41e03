"""HIP text to an AMD code object through the clang family: hipcc, clang, and ziglang's clang.

They are one driver with another program name. hipcc adds flags of its own; here all get the same,
so hipcc and the clang that it calls make the same bytes. Code object version 5 wants clang 15.
"""

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from q4jit.compilers.steps import TIME_LIMIT_S, Build, execute, failure
from q4jit.errors import TargetError
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
    "-ffp-contract=off",  # the text says fma where it means it
    "-mcode-object-version=5",  # hiprtc before 5.3 makes version 4 all the same
    "-fuse-cuid=none",  # else a hash of path and command becomes a symbol
    *"-mllvm -amdgpu-early-inline-all=true".split(),  # hipcc adds these two
    *"-mllvm -amdgpu-function-calls=false".split(),
)
_WAVE_FLAGS: Final = {32: "-mno-wavefrontsize64", 64: "-mwavefrontsize64"}
_NO_CONFIG: Final = ("--no-default-config",)
_PLACES: Final = ("InstalledDir:", "Configuration file:")


def pinned_flags(target: Target) -> tuple[str, ...]:
    """The flags that decide what code is made, the same for hiprtc."""
    flags = (*_FLAGS, f"--offload-arch={target.arch}", _WAVE_FLAGS[target.hip.wave])
    # RDNA in CU mode: a block's waves share one compute unit's L0 cache. In WGP mode they may run
    # on two units, and a barrier has to empty both caches. Older GPUs have no such modes.
    return flags if target.arch.startswith("gfx9") else (*flags, "-mcumode")


@dataclass(frozen=True)
class Clang:
    """One program of the family.

    name: for messages. program: the command with its leading arguments. linker: the command that
    links what the program assembles, where the program's own driver finds none.
    """

    name: str
    program: tuple[str, ...]
    linker: tuple[str, ...] = ()
    time_limit_s: float = TIME_LIMIT_S

    SOURCE_SUFFIX = ".hip"
    SUFFIX = ".hsaco"

    def archs(self) -> tuple[str, ...]:
        """The AMD GPUs that the program knows. Raises CompileError where it cannot be run."""
        return _archs(self.name, self.program)

    def fingerprint(self, target: Target) -> str:
        """The program's own words about its version, and the ordered flags; no path is in it."""
        version = " ".join(_version(self.name, self.program))
        return f"{self.name} {version} {' '.join(self._flags(target))}"

    def compile_object(self, text: str, target: Target) -> bytes:
        """The code object (ELF) of a translation unit. Raises TargetError and CompileError."""
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

    def compile_assembly(self, text: str, target: Target) -> str:
        """The assembly of the same compilation."""
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
    """Raises TargetError where `target` is not among the archs that compiler `name` knows."""
    if target.arch not in known:
        raise TargetError(f"{name} does not know {target.arch}; it knows {', '.join(known)}")


@functools.cache
def _version(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    """The lines about version and target: where a program lies makes no other code."""
    # what hipcc writes to standard error is about this machine's GPUs, not about itself
    output, _ = _ask(name, (*program, *_no_config(name, program), "--version"))
    lines = (line.strip() for line in output.splitlines())
    return tuple(line for line in lines if line and not line.startswith(_PLACES))


@functools.cache
def _no_config(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    """What keeps a user's configuration file from adding flags; nothing where it is unknown.

    The drivers before clang 16 have no such flag, and read such a file only where they are called
    by the name of a target, which `find` does not look for.
    """
    with tempfile.TemporaryDirectory(prefix="q4jit-") as folder:
        log = execute((*program, *_NO_CONFIG, "--version"), Path(folder), time_limit_s=60)
    return () if log.problem else _NO_CONFIG


@functools.cache
def _archs(name: str, program: tuple[str, ...]) -> tuple[str, ...]:
    # an arch and a file are named for hipcc, which else looks for a GPU and for something to do
    question = "--target=amdgcn-amd-amdhsa -mcpu=gfx900 -print-supported-cpus -nogpulib -x c -c"
    # clang answers this on one, newer ones on the other
    command = (*program, *_no_config(name, program), *question.split(), _SOURCE)
    listed = "\n".join(_ask(name, command))
    return tuple(sorted(_CPU.findall(listed), key=lambda arch: (len(arch), arch)))


def _ask(name: str, command: tuple[str, ...]) -> tuple[str, str]:
    """What a program writes to standard output and to standard error."""
    with tempfile.TemporaryDirectory(prefix="q4jit-") as folder:
        (Path(folder) / _SOURCE).touch()
        log = execute(command, Path(folder), time_limit_s=60)
    if log.problem:
        raise failure(name, [command], (), log.text(), (_SOURCE, ""))
    return log.output, log.errors
