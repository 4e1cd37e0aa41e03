"""A folder of files that belong together: all of them are written, or none."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class OutputFolder:
    """A folder that files are put into all together, the JSON that names them last.

    It is made where it does not exist, and removed again where nothing was written. Everything is
    first written beside its place, so that what fails half-way leaves what was there before.
    asked: what the user wrote, which messages name.
    """

    def __init__(self, path: Path, manifest: str, asked: Path) -> None:
        self._path = path
        self._manifest = manifest
        self._asked = asked
        self._made = [p for p in (path, *path.parents) if not p.exists()]

    def __enter__(self) -> "OutputFolder":
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            # found out before the long work, also where permission bits do not say it
            self._staging = tempfile.TemporaryDirectory(prefix=".q4jit-", dir=self._path)
        except OSError as error:
            self._remove_made()
            reason = error.strerror
            if self._path.exists() and not self._path.is_dir():
                reason = "it is a file, accepted is a folder"
            where = "" if self._asked == self._path else f"its folder {self._path}: "
            raise OSError(f"cannot write {self._asked}: {where}{reason}") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._staging.cleanup()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            if not folder.is_dir():  # it could not be made
                continue
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def check(self, names: Sequence[str], *, force: bool) -> None:
        """Raise FileExistsError if writing would replace files of somebody else, or folders."""
        for place in (self._path / name for name in (*names, self._manifest)):
            if place.is_dir():
                raise FileExistsError(f"{place} is a folder: accepted is a place for a file")
        own = self._own_files()
        foreign = [
            name
            for name in (*names, self._manifest)
            if os.path.lexists(self._path / name) and name not in own
        ]
        if foreign and not force:
            some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if foreign[3:] else "")
            raise FileExistsError(
                f"{self._path} holds files that q4jit did not write, or that were changed: {some}; "
                "accepted are another place, or --force to replace them"
            )

    def write(self, files: Mapping[str, bytes | memoryview], manifest: Mapping[str, Any]) -> None:
        """Put files and manifest in their places, and remove what only the last one named."""
        staging = Path(self._staging.name)
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        everything = {**files, self._manifest: text.encode()}
        for name, data in everything.items():
            try:
                (staging / name).write_bytes(data)
            except OSError as error:  # a full disk; the name in it is of a file that goes away
                raise OSError(error.errno, error.strerror, str(self._path / name)) from error
        stale = self._own_files() - everything.keys()
        (self._path / self._manifest).unlink(missing_ok=True)  # it names a whole set, or is not
        for name in stale:
            (self._path / name).unlink()
        missing = list(everything)
        try:
            for name in everything:
                (staging / name).replace(self._path / name)
                missing.remove(name)
        except OSError as error:
            raise OSError(
                f"{self._path} is incomplete, missing: {', '.join(missing)} ({error})"
            ) from error

    def _own_files(self) -> set[str]:
        """The files that an earlier manifest here names and that are still as it says."""
        path = self._path / self._manifest
        try:
            found = json.loads(path.read_bytes())
            sums = {name: str(entry["sha256"]) for name, entry in found["files"].items()}
            found["q4jit"]
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return set()  # not written by q4jit
        own = {name for name, digest in sums.items() if self._holds(name, digest)}
        return own | {self._manifest}

    def _holds(self, name: str, digest: str) -> bool:
        path = self._path / name
        if path.parent != self._path or path.is_symlink() or not path.is_file():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest


def checksums(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size and the SHA-256 of each file, by its name."""
    return {
        name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }
