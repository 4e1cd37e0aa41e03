"""The compiler for a GPU: the one that is asked for, else the first here that knows the GPU."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from q4jit import config
from q4jit.compilers.clang import Clang
from q4jit.compilers.hiprtc import HipRtc
from q4jit.compilers.nvrtc import NvRtc
from q4jit.errors import CompileError, TargetError
from q4jit.targets import Target

_CROSS: Final = "pip install q4jit[cross] (clang and its linker, no ROCm needed)"
_CLANG: Final = re.compile(r"clang-(\d+)")

HipCompiler = Clang | HipRtc | NvRtc


def find_compiler(target: Target) -> HipCompiler:
    """The compiler for a GPU.

    For AMD's: Q4JIT_HIP_COMPILER, else the first of hipcc, clang, ziglang and hiprtc that is here
    and knows the arch. For NVIDIA's: NVRTC. Raises TargetError where there is none, with what was
    looked for, where, and what each knows; and where ROCM_PATH names a place without ROCm.
    """
    if target.hip.is_nvidia:
        return NvRtc()  # its own error says what to install
    asked = config.hip_compiler()
    if asked != "ziglang":  # which needs no ROCm
        _check_rocm_path()
    seen = []
    for name in (asked,) if asked else _CANDIDATES:
        candidates = list(_CANDIDATES[name]())
        for place, compiler in candidates:
            if problem := _problem(compiler, target):
                seen.append(f"{place}: {problem}")
            else:
                return compiler
        if not candidates:
            seen.append(f"{name}: not found in {_LOOKED_IN[name]}")
    by = f" by Q4JIT_HIP_COMPILER={asked}" if asked else ""
    looked = "\n  ".join(seen)
    raise TargetError(f"no compiler for {target}{by}. Looked at:\n  {looked}\nWhat helps: {_CROSS}")


def _problem(compiler: Clang | HipRtc, target: Target) -> str:
    """Why a compiler cannot serve a target; empty where it can."""
    try:
        known = compiler.archs()
        return "" if target.arch in known else f"knows {', '.join(known) or 'no AMD GPU'}"
    except CompileError as error:
        return f"cannot be used: {'; '.join(error.log.splitlines()[-2:])}"


def _rocm_path() -> Path | None:
    root = config.rocm_path()
    return root.resolve() if root else None  # compilers run in folders of their own


def _check_rocm_path() -> None:
    root = _rocm_path()
    if root is None:
        return
    parts = ("bin/hipcc", "llvm/bin/clang", "lib/llvm/bin/clang", "lib/libhiprtc.so")
    if not any((root / part).exists() for part in parts):
        problem = "has none of" if root.is_dir() else "is no directory; looked there for"
        raise TargetError(
            f"ROCM_PATH={str(root)!r} {problem} {', '.join(parts)}: accepted is the folder of a "
            "ROCm installation, such as /opt/rocm, or no ROCM_PATH at all"
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
    """clang-19, clang-15, …: as distributions call them, the newest first."""
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
        # started without Python between: `python -m ziglang` costs as much as a small compilation
        zig = str(Path(folder) / "zig")
        yield f"ziglang ({zig})", Clang("ziglang", (zig, "clang"), linker=(zig, "ld.lld"))


def _hiprtcs() -> Iterator[tuple[str, HipRtc]]:
    if importlib.util.find_spec("rocm") and importlib.util.find_spec("rocm.bindings.hiprtc"):
        root = _rocm_path()
        library = root / "lib" / "libhiprtc.so" if root else None
        root = root if library and library.exists() else None
        yield f"hiprtc (by rocm-bindings-hip, of {root or 'the system'})", HipRtc(root)


def _unique(paths: list[str | None]) -> list[str]:
    return list(dict.fromkeys(path for path in paths if path))


_CANDIDATES: Final[dict[str, Callable[[], Iterator[tuple[str, Clang | HipRtc]]]]] = {
    "hipcc": _hipccs,
    "clang": _clangs,
    "ziglang": _ziglangs,
    "hiprtc": _hiprtcs,
}
_LOOKED_IN: Final = {
    "hipcc": "ROCM_PATH/bin and PATH",
    "clang": "ROCM_PATH/llvm/bin, PATH",
    "ziglang": "the Python package of that name: pip install q4jit[cross]",
    "hiprtc": "AMD's Python binding: pip install q4jit[rocm]",
}
