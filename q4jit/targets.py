"""Targets: the back ends and architectures that kernels are compiled for, and facts about them."""

import difflib
import functools
import platform
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import TargetError, expected, short_name
from q4jit.locks import BUILD

# complete, as in the psABI: given a level's name, LLVM may use every feature of the level
_X86_V2: Final = frozenset("cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3".split())
_X86_V3: Final = _X86_V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe".split())
_X86_V4: Final = _X86_V3 | frozenset("avx512bw avx512cd avx512dq avx512f avx512vl".split())

# arch → features that generated code may use
CPU_ARCHS: Final[dict[str, frozenset[str]]] = {
    "x86-64": frozenset(),
    "x86-64-v3": _X86_V3,
    "x86-64-v4": _X86_V4,
    "aarch64": frozenset({"neon"}),
}
# additional features that a target may name (dot products of bytes) → their arch
CPU_EXTRAS: Final = {"avxvnni": "x86-64-v3", "avx512vnni": "x86-64-v4", "dotprod": "aarch64"}


@dataclass(frozen=True)
class HipArch:
    """The facts about a GPU's architecture that generated code depends on.

    Attributes:
        name: LLVM's or NVIDIA's name, for example `gfx1100` or `sm_90`.
        wave: threads of a wave.
        matrix: the bf16 matrix instructions, as `templates/unit/` names them; None: it has none.
        dot: the instruction that adds four int8 products.
        lds_bytes: shared memory that a thread block may use without asking for more at launch.
        max_block_size: threads of the largest thread block.
        cluster_blocks: thread blocks that may read each other's shared memory.
        overlaps: a kernel may start before the previous one of its stream has ended.
        warpgroups: whether four waves multiply together, with operands in shared memory (`wgmma`).
        flushes_halves: whether matrix units treat denormal f16 as 0.
        compute_units: those of the largest card on sale; rules divide the work for it.
    """

    name: str
    wave: int
    matrix: str | None
    dot: str
    lds_bytes: int = 64 << 10
    max_block_size: int = 1024
    cluster_blocks: int = 1
    overlaps: bool = False
    warpgroups: bool = False
    flushes_halves: bool = False
    compute_units: int = 64

    @property
    def is_nvidia(self) -> bool:
        """Whether NVIDIA made it."""
        return self.name.startswith("sm_")


def _archs(names: str, wave: int, matrix: str | None, dot: str, **more: Any) -> dict[str, HipArch]:
    return {name: HipArch(name, wave, matrix, dot, **more) for name in names.split()}


_FROM_SM_90: Final[dict[str, Any]] = {
    "wave": 32,
    "matrix": "mma_sync",
    "dot": "dp4a",
    "lds_bytes": 48 << 10,
    "cluster_blocks": 8,
    "overlaps": True,
    "compute_units": 132,
}

# AMD: LLVM's "User Guide for AMDGPU Backend" and the ISA guides; NVIDIA: "CUDA C++ Programming
# Guide", compute capabilities. gfx908's bf16 matrix instructions are not used: their shape differs.
HIP_ARCHS: Final[dict[str, HipArch]] = {
    **_archs("gfx906 gfx908", 64, None, "sdot4"),
    **_archs("gfx90a", 64, "mfma", "sdot4", flushes_halves=True, compute_units=104),
    **_archs("gfx942 gfx950", 64, "mfma", "sdot4", compute_units=304),
    **_archs("gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036", 32, None, "sdot4"),
    **_archs(
        "gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151", 32, "wmma", "sudot4", compute_units=96
    ),
    **_archs("gfx1200 gfx1201", 32, "wmma_gfx12", "sudot4"),
    **_archs("sm_80 sm_86 sm_89", 32, "mma_sync", "dp4a", lds_bytes=48 << 10, compute_units=108),
    "sm_90": HipArch("sm_90", **_FROM_SM_90, warpgroups=True),
    **_archs("sm_100 sm_120", **_FROM_SM_90),
}

_OTHER_NAMES: Final = {"gpu": "hip", "rocm": "hip", "amd": "hip", "nvidia": "cuda"}


@dataclass(frozen=True)
class Target:
    """A back end, an architecture, and the features that code for it may use.

    Attributes:
        backend: `cpu` or `hip`.
        arch: a key of `CPU_ARCHS` or `HIP_ARCHS`.
        features: LLVM's names of a CPU's features; empty for a GPU.
        cpu_name: the CPU model that LLVM schedules for.
        lacks: features that this machine does not have, although LLVM may assume them for the
            model (a virtual machine may hide some).
    """

    backend: str
    arch: str
    features: frozenset[str] = frozenset()
    cpu_name: str = "generic"
    lacks: frozenset[str] = frozenset()

    def __str__(self) -> str:
        extras = [e for e, arch in CPU_EXTRAS.items() if arch == self.arch and e in self.features]
        return "+".join([f"{self.backend}:{self.arch}", *extras])

    def key(self) -> str:
        """Return everything that compiled code depends on, as one line of text."""
        features = [f"+{name}" for name in sorted(self.features)]
        features += [f"-{name}" for name in sorted(self.lacks)]
        return f"{self} cpu_name={self.cpu_name} features={','.join(features)}"

    def has(self, feature: str) -> bool:
        """Return whether code for this target may use `feature`."""
        return feature in self.features

    @property
    def hip(self) -> HipArch:
        """The facts of a GPU's arch."""
        assert self.backend == "hip", self
        return HIP_ARCHS[self.arch]

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


def find_target(name: str | Target | None = None, *, calls: bool = False) -> Target:
    """Return the target called `name`: `cpu` (this machine), `cpu:x86-64-v3`, `hip:gfx1100`, ….

    None means `cpu`. A CPU's dot products of bytes follow its arch: `cpu:aarch64+dotprod`. calls:
    whether the name is for calls, which also accept the names of devices (`hip`, `cuda:0`), so that
    the error lists these. Raises TargetError for an unknown name.
    """
    if isinstance(name, Target):
        return name
    if name is None or name == "cpu":
        return host_target()
    backend, _, arch = str(name).partition(":")
    if backend == "hip" and arch in HIP_ARCHS:
        return Target("hip", arch)
    arch, *extras = arch.split("+")
    fits = all(CPU_EXTRAS.get(extra) == arch for extra in extras)
    if backend != "cpu" or arch not in CPU_ARCHS or not fits:
        raise _unknown_target(name, calls)
    features = CPU_ARCHS[arch] | frozenset(extras)
    return Target("cpu", arch, features, "generic" if arch == "aarch64" else arch)


def _unknown_target(name: object, calls: bool) -> TargetError:
    """Return the error for a name that is no target, with the names that are nearest to it."""
    backend, _, arch = str(name).partition(":")
    is_device = backend in {"hip", "cuda"} and (not arch or arch.isdigit())
    if is_device and not calls:
        return TargetError(
            f"{name!r} names a device of this machine, which only calls accept; name an arch, "
            "such as 'hip:gfx1100' or 'hip:sm_90'"
        )
    cpus = [f"cpu:{a}" for a in (*CPU_ARCHS, *(f"{a}+{e}" for e, a in CPU_EXTRAS.items()))]
    gpus = [f"hip:{a}" for a in HIP_ARCHS]
    devices = ["hip", "hip:NUMBER", "cuda", "cuda:NUMBER"] if calls else []
    known = {
        "cpu": ["cpu", *cpus],
        "hip": [*devices[:2], *gpus],
    }.get(backend, ["cpu", "cpu:ARCH", *devices, "hip:ARCH"])
    near = difflib.get_close_matches(str(name)[:80], [*cpus, *gpus], 1)
    near = [f"hip:{name}"] if name in HIP_ARCHS else near
    if calls and str(name) in _OTHER_NAMES:
        near = [_OTHER_NAMES[str(name)]]
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return TargetError(
        f"unknown target {short_name(name)}{hint}; known targets: {', '.join(known)}"
    )


def host_family() -> str:
    """Return this machine's instruction set. Raises TargetError if q4jit does not support it."""
    machine = platform.machine().lower()
    if machine in {"x86_64", "amd64"}:
        return "x86-64"
    if machine in {"aarch64", "arm64"}:
        return "aarch64"
    raise TargetError(expected("a CPU of x86_64 or aarch64", machine))


@functools.cache
def host_target() -> Target:
    """Return this machine's CPU as a target with all its features."""
    family = host_family()
    import llvmlite.binding as llvm  # late: `import q4jit` stays light

    with BUILD:  # one thread at a time may call LLVM
        cpu_name = llvm.get_host_cpu_name()
        known = llvm.get_host_cpu_features()
    have = frozenset(name for name, on in known.items() if on)
    lacks = frozenset(known) - have
    if family == "aarch64":
        return Target("cpu", "aarch64", have | {"neon"}, cpu_name, lacks - {"neon"})
    arch = "x86-64"
    for level in ("x86-64-v3", "x86-64-v4"):
        if CPU_ARCHS[level] <= have:
            arch = level
    return Target("cpu", arch, have, cpu_name, lacks)


def runs_here(target: Target) -> bool:
    """Return whether this CPU can execute code for `target`."""
    if target.backend != "cpu":
        return False
    try:
        host = host_target()
    except TargetError:
        return False
    return target.family == host.family and target.features <= host.features
