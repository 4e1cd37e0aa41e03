"""Make PyTorch usable without the CUDA libraries that it links; the Makefile runs this program.

PyTorch from PyPI links 3 GB of CUDA libraries, but calls none of their functions on a CPU. Others
with the same names and functions, which do nothing, take their place in PyTorch's own folder.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_NAMES: Final = r"lib(?:cu|nccl|nv)[\w-]*\.so[.\d]*"
_FUNCTIONS: Final = r"(?:cu|nccl|nvshmem)\w+"
_ALWAYS_LOADED: Final = "libcudart.so"
_NO_DEVICE: Final = 100  # cudaErrorNoDevice, which every other function returns
_TEXTS: Final = r"(?!cuGet)\w+Get(?:ErrorString|ErrorName|StatusString)"  # these return a text


def main() -> None:
    """Write the libraries. Needs gcc and binutils."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    linking = sorted(folder.glob("lib*.so"))
    versions = _versions(linking)
    functions, others = _functions(linking)
    for name, of_library in versions.items():
        named = {version: functions.get(version, set()) for version in of_library}
        extra = others if name.startswith(_ALWAYS_LOADED) else set()
        _write(folder / name, named, extra)
    print(f"{len(versions)} CUDA libraries that do nothing are in {folder}")  # noqa: T201 - a program


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _versions(linking: Iterable[Path]) -> dict[str, set[str]]:
    """Return the names of the CUDA libraries, each with the symbol versions that are needed."""
    versions: dict[str, set[str]] = {}
    for path in linking:
        text = _run("readelf", "--dynamic", "--version-info", "--wide", path)
        for name in re.findall(rf"\(NEEDED\).*\[({_NAMES})\]", text):
            versions.setdefault(name, set())
        library = ""
        for kind, name in re.findall(r"\b(File|Name): (\S+)", text):
            if kind == "File":
                library = name
            elif library in versions:
                versions[library].add(name)
    return versions


def _functions(linking: Iterable[Path]) -> tuple[dict[str, set[str]], set[str]]:
    """Return the missing functions by symbol version, and those of CUDA without a version."""
    functions: dict[str, set[str]] = {}
    others = set()
    for path in linking:
        for line in _run("nm", "--dynamic", "--undefined-only", path).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if version:
                functions.setdefault(version, set()).add(name)
            elif re.fullmatch(_FUNCTIONS, name):
                others.add(name)
    return functions, others


def _write(path: Path, versions: dict[str, set[str]], others: set[str]) -> None:
    """Write a library with functions by symbol version, and with others that have none."""
    every = others.union(*versions.values())
    source = "".join(map(_definition, sorted(every)))
    script = "".join(
        f"{version} {{ global: {' '.join(f'{name};' for name in sorted(names))} }};\n"
        for version, names in versions.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        c, symbols = Path(folder) / "functions.c", Path(folder) / "versions.map"
        c.write_text(source)
        symbols.write_text(script)
        options = [f"-Wl,--version-script={symbols}"] if versions else []
        # -fno-builtin: no function is one of C's, whatever its name
        _run("gcc", "-fno-builtin", "-shared", *options, f"-Wl,-soname,{path.name}", "-o", path, c)


def _definition(name: str) -> str:
    if re.fullmatch(_TEXTS, name):
        return f'const char *{name}(void) {{ return "no CUDA device"; }}\n'
    return f"int {name}(void) {{ return {_NO_DEVICE}; }}\n"


if __name__ == "__main__":
    main()
