"""The entries of a cache directory: list, remove, and keep below a limit."""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ENTRY_FILE: Final = re.compile(r"(?P<key>[0-9a-f]{64})\.(?P<kind>[a-z0-9]+)")
_SOURCES: Final = ("ll", "hip")
_CHECKSUM: Final = "sha256"


@dataclass(frozen=True)
class CacheEntry:
    """A compiled kernel on disk.

    Attributes:
        key: the cache key.
        size_bytes: of all its files.
        age_s: seconds since the object was written.
        title: the comment that opens its text: function, target, schedule.
        files: the object, then the other files.
    """

    key: str
    size_bytes: int
    age_s: float
    title: str
    files: tuple[Path, ...]

    @property
    def source(self) -> Path | None:
        """The file of its text."""
        return next((path for path in self.files if path.suffix[1:] in _SOURCES), None)

    def text(self) -> str:
        """Return its text; empty if it cannot be read."""
        with contextlib.suppress(OSError):
            if self.source is not None:
                return self.source.read_text(encoding="utf-8", errors="replace")
        return ""

    def remove(self) -> None:
        """Remove its files; a process that reads it meanwhile compiles again."""
        for path in self.files:
            with contextlib.suppress(OSError):
                path.unlink()


def entries(directory: Path, titles: bool = True) -> list[CacheEntry]:
    """Return the entries of a directory, the oldest first. Raises OSError if it cannot be listed.

    titles: read the first line of each text.
    """
    files: dict[str, list[Path]] = {}
    for path in directory.iterdir():
        match = _ENTRY_FILE.fullmatch(path.name)
        if match is not None:
            files.setdefault(match["key"], []).append(path)
    made = (_entry(key, paths, titles) for key, paths in files.items())
    return sorted((e for e in made if e is not None), key=lambda entry: -entry.age_s)


def _entry(key: str, paths: Sequence[Path], titles: bool) -> CacheEntry | None:
    ordered = sorted(paths, key=lambda p: (p.suffix[1:] in (*_SOURCES, _CHECKSUM), p.name))
    try:
        states = [path.lstat() for path in ordered]
    except OSError:  # another process removed it
        return None
    entry = CacheEntry(
        key,
        sum(state.st_size for state in states),
        max(0.0, time.time() - max(state.st_mtime for state in states)),
        "",
        tuple(ordered),
    )
    if not titles or entry.source is None:
        return entry
    title = ""
    with (
        contextlib.suppress(OSError),
        entry.source.open(encoding="utf-8", errors="replace") as file,
    ):
        title = file.readline(200).strip().lstrip(";/ ").removesuffix(", made by q4jit")
    return CacheEntry(key, entry.size_bytes, entry.age_s, title, entry.files)


def evict(directory: Path, limit_bytes: int, keep: str = "") -> list[CacheEntry]:
    """Remove the oldest entries until the others fit into a limit, and return the removed ones.

    keep: the key of an entry that stays. Raises OSError if the directory cannot be listed.
    """
    known = entries(directory, titles=False)
    total = sum(entry.size_bytes for entry in known)
    removed = []
    for entry in known:
        if total <= limit_bytes:
            break
        if entry.key != keep:
            entry.remove()
            removed.append(entry)
            total -= entry.size_bytes
    return removed
