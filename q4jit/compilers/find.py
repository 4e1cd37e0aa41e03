"""Find the compiler for a GPU: the one that the user names, or the first that knows the GPU."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from q4jit import config
from q4jit.compilers.clang import Clang
from q4jit.compilers.hiprtc import HipRtc
from q4jit.compilers.nvrtc import NvRtc
from q4jit.compilers.programs import is_frozen
from q4jit.errors import CompileError, TargetError, expected
from q4jit.targets import Target

_CROSS: Final = "pip install 'q4jit[cross]' (clang with its linker; it works without ROCm)"
_CLANG: Final = re.compile(r"clang-(\d+)")

HipCompiler = Clang | HipRtc | NvRtc


def find_compiler(target: Target) -> HipCompiler:
    """Return the compiler for a GPU.

    For AMD GPUs it is the compiler that Q4JIT_HIP_COMPILER names, or the first of hipcc, clang,
    ziglang and hiprtc that is installed and knows the arch. For NVIDIA GPUs it is NVRTC.

    Raises TargetError if there is no compiler, or if ROCM_PATH names a folder without ROCm. The
    message lists each compiler, where q4jit looked for it, and the archs that it knows.
    """
    if target.hip.is_nvidia:
        return NvRtc()  # if it is missing, its own error says what to install
    asked = config.hip_compiler()
    if asked != "ziglang":  # it works without ROCm
        _check_rocm_path()
    refused = []
    for name in (asked,) if asked else _INSTALLED:
        installed = list(_INSTALLED[name]())
        for description, compiler in installed:
            if problem := _problem(compiler, target):
                refused.append(f"{description}: {problem}")
            else:
                return compiler
        if not installed:
            refused.append(f"{name}: not found in {_LOOKED_IN[name]}")
    by = f" (Q4JIT_HIP_COMPILER={asked})" if asked else ""
    tried = "\n  ".join(refused)
    raise TargetError(f"no compiler for {target}{by}. Tried:\n  {tried}\nTo get one: {_CROSS}")


@dataclass(frozen=True)
class Surveyed:
    """A compiler for GPUs: where it is and what it knows, or why it cannot be used.

    Attributes:
        description: its name and path.
        archs: the archs that it knows.
        problem: why it cannot be used; empty if it can.
    """

    description: str
    archs: tuple[str, ...]
    problem: str


def survey() -> list[Surveyed]:
    """Return every compiler for GPUs, also those that are missing."""
    surveyed = []
    for name, installed in _INSTALLED.items():
        known = list(installed())
        surveyed += [_survey(description, compiler) for description, compiler in known]
        if not known:
            surveyed.append(Surveyed(name, (), f"not found in {_LOOKED_IN[name]}"))
    return [*surveyed, _survey("NVRTC", NvRtc())]


def _survey(description: str, compiler: HipCompiler) -> Surveyed:
    try:
        return Surveyed(description, tuple(compiler.archs()), "")
    except CompileError as error:
        return Surveyed(description, (), f"does not run: {'; '.join(error.log.splitlines()[-2:])}")
    except TargetError as error:
        return Surveyed(description, (), str(error))


def _problem(compiler: Clang | HipRtc, target: Target) -> str:
    """Return why a compiler cannot serve a target; empty if it can."""
    try:
        known = compiler.archs()
    except CompileError as error:
        return f"does not run: {'; '.join(error.log.splitlines()[-2:])}"
    if target.arch not in known:
        return f"does not know {target.arch}; it knows {', '.join(known) or 'no AMD GPU'}"
    if isinstance(compiler, Clang) and (problem := compiler.problem(target)):
        return f"does not compile an empty text for {target.arch}: {problem}"
    return ""


def _rocm_path() -> Path | None:
    root = config.rocm_path()
    return root.resolve() if root else None  # compilers run in folders of their own


def _check_rocm_path() -> None:
    root = _rocm_path()
    if root is None:
        return
    parts = ("bin/hipcc", "llvm/bin/clang", "lib/llvm/bin/clang", "lib/libhiprtc.so")
    if not any((root / part).exists() for part in parts):
        actual = "a folder without them" if root.is_dir() else "no folder"
        raise TargetError(
            expected(
                f"a ROCm installation with one of {', '.join(parts)}",
                actual,
                where=f"ROCM_PATH={str(root)!r}",
                cure="set it to the folder of ROCm (for example /opt/rocm), or unset it",
            )
        )


def _below_rocm(*parts: str) -> Iterator[str]:
    root = _rocm_path()
    if root:
        yield from filter(None, (shutil.which(str(root / part)) for part in parts))


def _hipccs() -> Iterator[tuple[str, Clang]]:
    for path in _unique([*_below_rocm("bin/hipcc"), shutil.which("hipcc")]):
        yield f"hipcc ({path})", Clang("hipcc", (path,))


def _clangs() -> Iterator[tuple[str, Clang]]:
    rocm = _below_rocm("llvm/bin/clang", "lib/llvm/bin/clang")
    for path in _unique([*rocm, shutil.which("clang"), *_numbered_clangs()]):
        yield f"clang ({path})", Clang("clang", (path,))


def _numbered_clangs() -> list[str | None]:
    """Return clang-19, clang-15, …, as Linux distributions name them; the newest first."""
    names = {
        match[0]: int(match[1])
        for folder in os.get_exec_path()
        for path in Path(folder).glob("clang-*")
        if (match := _CLANG.fullmatch(path.name))
    }
    return [shutil.which(name) for name in sorted(names, key=lambda n: -names[n])]


def _ziglangs() -> Iterator[tuple[str, Clang]]:
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        # called directly: `python -m ziglang` takes as long as a small compilation
        zig = str(Path(folder) / "zig")
        yield f"ziglang ({zig})", Clang("ziglang", (zig, "clang"), linker=(zig, "ld.lld"))


def _hiprtcs() -> Iterator[tuple[str, HipRtc]]:
    if is_frozen():  # hiprtc runs in a Python process of its own
        return
    if importlib.util.find_spec("rocm") and importlib.util.find_spec("rocm.bindings.hiprtc"):
        root = _rocm_path()
        library = root / "lib" / "libhiprtc.so" if root else None
        root = root if library and library.exists() else None
        yield f"hiprtc (rocm-bindings-hip, library of {root or 'the system'})", HipRtc(root)


def _unique(paths: list[str | None]) -> list[str]:
    return list(dict.fromkeys(path for path in paths if path))


_INSTALLED: Final[dict[str, Callable[[], Iterator[tuple[str, Clang | HipRtc]]]]] = {
    "hipcc": _hipccs,
    "clang": _clangs,
    "ziglang": _ziglangs,
    "hiprtc": _hiprtcs,
}
_LOOKED_IN: Final = {
    "hipcc": "ROCM_PATH/bin and PATH",
    "clang": "ROCM_PATH/llvm/bin, ROCM_PATH/lib/llvm/bin and PATH",
    "ziglang": "Python's packages (ziglang); pip install 'q4jit[cross]'",
    "hiprtc": "Python's packages (rocm.bindings); pip install 'q4jit[rocm]'",
}
