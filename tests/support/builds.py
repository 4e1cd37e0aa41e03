"""Keep the programs and libraries that tests build, each under a hash of all that it depends on.

The folder is of one run, shared by its workers, or with --reuse the one of all runs. A file is
built under another name and renamed when it is whole; one that was damaged since is built again.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support.paths import ROOT

REUSED: Final = ROOT / ".cache"
_UNUSED_S: Final = 14 * 24 * 3600

_places: Final[dict[str, Path]] = {}


def use(folder: Path) -> None:
    """Keep everything below `folder` from now on."""
    for name in ("kernels", "programs"):
        _places[name] = folder / name
        _places[name].mkdir(mode=0o700, parents=True, exist_ok=True)


def kernels() -> Path:
    """Return the folder of q4jit's own cache of compiled kernels."""
    return _places["kernels"]


def programs() -> Path:
    """Return the folder of what `built` keeps."""
    return _places["programs"]


def built(name: str, *key: str | bytes, build: Callable[[Path], None]) -> Path:
    """Return the file that `build` writes to a path, from this run or an earlier one.

    `key` is everything that its bytes depend on.
    """
    digest = hashlib.sha256()
    for part in (name, *key):
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data) + data)
    path = programs() / f"{digest.hexdigest()[:40]}-{name}"
    checksum = Path(f"{path}.sha256")
    if not _is_whole(path, checksum):
        with tempfile.TemporaryDirectory(prefix=".new-", dir=programs()) as folder:
            made, made_checksum = Path(folder, name), Path(folder, "checksum")
            build(made)
            made_checksum.write_bytes(_sum(made))
            made.replace(path)
            made_checksum.replace(checksum)
    return path


def remove_unused() -> None:
    """Remove what no run has used for two weeks: programs of older texts."""
    old = time.time() - _UNUSED_S
    for path in programs().iterdir():
        if path.stat().st_mtime < old:
            if path.is_dir():  # of a run that was killed while it built
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_whole(path: Path, checksum: Path) -> bool:
    try:
        if checksum.read_bytes() != _sum(path):
            return False
        os.utime(path)
        os.utime(checksum)
    except FileNotFoundError:
        return False
    return True


def _sum(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()
