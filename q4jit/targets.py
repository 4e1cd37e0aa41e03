"""Targets: what machine code is made for. A target is a small frozen value."""

import functools
import platform
from dataclasses import dataclass
from typing import Final

from q4jit.errors import TargetError
from q4jit.locks import BUILD

# the psABI's levels in full: LLVM may use all of a level where it is told the level's name
_X86_V2: Final = frozenset("cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3".split())
_X86_V3: Final = _X86_V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe".split())
_X86_V4: Final = _X86_V3 | frozenset("avx512bw avx512cd avx512dq avx512f avx512vl".split())

# arch → features that generated code may rely on
CPU_ARCHS: Final[dict[str, frozenset[str]]] = {
    "x86-64": frozenset(),
    "x86-64-v3": _X86_V3,
    "x86-64-v4": _X86_V4,
    "aarch64": frozenset({"neon"}),
}


@dataclass(frozen=True)
class Target:
    """A back end, an architecture, and the features that code for it may use.

    For the back end `cpu`, `arch` is a key of `CPU_ARCHS` and `features` are LLVM's names; `tuning`
    is the CPU model that LLVM schedules for. `lacks` are features that this machine does not have,
    though LLVM may take them for granted in that model (a virtual machine may hide some).
    """

    backend: str
    arch: str
    features: frozenset[str] = frozenset()
    tuning: str = "generic"
    lacks: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"

    def key(self) -> str:
        """Everything that compiled code depends on, as one line of text."""
        features = [f"+{name}" for name in sorted(self.features)]
        features += [f"-{name}" for name in sorted(self.lacks)]
        return f"{self} tuning={self.tuning} features={','.join(features)}"

    def has(self, feature: str) -> bool:
        """Whether code for this target may use `feature`."""
        return feature in self.features

    @property
    def family(self) -> str:
        """The instruction set of a CPU: `x86-64` or `aarch64`."""
        assert self.backend == "cpu", self
        return "aarch64" if self.arch == "aarch64" else "x86-64"

    @property
    def triple(self) -> str:
        """LLVM's name of a CPU's platform; objects are ELF everywhere."""
        return f"{self.family.replace('-', '_')}-unknown-linux-gnu"

    @property
    def vector_registers(self) -> int:
        """Architectural vector registers of a CPU."""
        return 32 if self.family == "aarch64" or self.has("avx512f") else 16

    @property
    def vector_bytes(self) -> int:
        """Bytes of a CPU's vector register."""
        assert self.backend == "cpu", self
        if self.has("avx512f"):
            return 64
        return 32 if self.has("avx2") else 16


def find_target(name: str | Target | None = None) -> Target:
    """The target called `name`: `cpu` (this machine), `cpu:x86-64-v3`, … ; None means `cpu`.

    Raises TargetError for an unknown name, listing the known ones.
    """
    if isinstance(name, Target):
        return name
    if name is None or name == "cpu":
        return host_target()
    backend, _, arch = str(name).partition(":")
    if backend != "cpu" or arch not in CPU_ARCHS:
        known = ", ".join(["cpu", *(f"cpu:{a}" for a in CPU_ARCHS)])
        raise TargetError(f"unknown target {name!r}: known are {known}")
    return Target("cpu", arch, CPU_ARCHS[arch], "generic" if arch == "aarch64" else arch)


def host_family() -> str:
    """This machine's instruction set; raises TargetError where q4jit has no code for it."""
    machine = platform.machine().lower()
    if machine in {"x86_64", "amd64"}:
        return "x86-64"
    if machine in {"aarch64", "arm64"}:
        return "aarch64"
    raise TargetError(f"no CPU back end for {machine!r}: there is one for x86_64 and aarch64")


@functools.cache
def host_target() -> Target:
    """This machine's CPU with the features it really has."""
    family = host_family()
    import llvmlite.binding as llvm  # late: `import q4jit` stays light

    with BUILD:  # LLVM is entered by one thread at a time
        tuning = llvm.get_host_cpu_name()
        known = llvm.get_host_cpu_features()
    have = frozenset(name for name, on in known.items() if on)
    lacks = frozenset(known) - have
    if family == "aarch64":
        return Target("cpu", "aarch64", have | {"neon"}, tuning, lacks - {"neon"})
    arch = "x86-64"
    for level in ("x86-64-v3", "x86-64-v4"):
        if CPU_ARCHS[level] <= have:
            arch = level
    return Target("cpu", arch, have, tuning, lacks)


def runs_here(target: Target) -> bool:
    """Whether this machine can execute code for `target`."""
    if target.backend != "cpu":
        return False
    try:
        host = host_target()
    except TargetError:
        return False
    return target.family == host.family and target.features <= host.features
