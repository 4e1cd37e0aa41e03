"""Keep the programs and libraries that tests build, under a hash of everything they depend on.

The workers of a run share its folder; with --reuse all runs do. A file is built under another name
and renamed when it is complete. A file that was damaged later is built again.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.support.paths import ROOT

REUSED: Final = ROOT / ".cache"
_UNUSED_S: Final = 14 * 24 * 3600

_folders: Final[dict[str, Path]] = {}


def use(folder: Path) -> None:
    """Keep everything in `folder` from now on."""
    for name in ("kernels", "programs", "inductor"):
        _folders[name] = folder / name
        _folders[name].mkdir(mode=0o700, parents=True, exist_ok=True)


def kernels() -> Path:
    """Return the folder of q4jit's cache of compiled kernels."""
    return _folders["kernels"]


def programs() -> Path:
    """Return the folder of the files that `built` keeps."""
    return _folders["programs"]


def inductor() -> Path:
    """Return the folder of what PyTorch's compiler writes."""
    return _folders["inductor"]


def built(name: str, *key: str | bytes, build: Callable[[Path], None]) -> Path:
    """Return the file that `build` writes to a path, in this run or an earlier one.

    key: everything that the file's bytes depend on.
    """
    digest = hashlib.sha256()
    for part in (name, *key):
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data) + data)
    path = programs() / f"{digest.hexdigest()[:40]}-{name}"
    checksum = Path(f"{path}.sha256")
    if not _is_complete(path, checksum):
        with tempfile.TemporaryDirectory(prefix=".new-", dir=programs()) as folder:
            new, new_checksum = Path(folder, name), Path(folder, "checksum")
            build(new)
            new_checksum.write_bytes(_sum(new))
            new.replace(path)
            new_checksum.replace(checksum)
    return path


def remove_unused() -> None:
    """Remove the files that no run has used for two weeks, and Inductor's of that age."""
    old = time.time() - _UNUSED_S
    of_inductor = [path for path in inductor().rglob("*") if path.is_file()]
    for path in (*programs().iterdir(), *of_inductor):
        with suppress(FileNotFoundError):  # of another run, which renamed it
            if path.stat().st_mtime >= old:
                continue
            if path.is_dir():  # left by a run that was killed
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _is_complete(path: Path, checksum: Path) -> bool:
    try:
        if checksum.read_bytes() != _sum(path):
            return False
        os.utime(path)
        os.utime(checksum)
    except FileNotFoundError:
        return False
    return True


def _sum(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()
