"""A folder of files that are written together: all of them, or none."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.errors import expected
from q4jit.files import read_regular

_MOST_BYTES: Final = 64 << 20  # of a manifest
_SHOWN_NAMES: Final = 3


class OutputFolder:
    """A folder that receives a set of files, and last the JSON file that lists them.

    The folder is created if it does not exist, and removed again if nothing is written. All files
    go to a temporary folder inside it first, so that a failure leaves the earlier files untouched.
    """

    def __init__(self, path: Path, manifest: str, requested: Path) -> None:
        """Take the folder's path and the name of the JSON file.

        requested: the path that the user gave, which errors name.
        """
        self._path = path
        self._manifest = manifest
        self._requested = requested
        self._created = [p for p in (path, *path.parents) if not p.exists()]

    def __enter__(self) -> "OutputFolder":
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            # fails before the long work if files cannot be written: permission bits may not show it
            self._staging = tempfile.TemporaryDirectory(prefix=".q4jit-", dir=self._path)
        except OSError as error:
            self._remove_created()
            reason = error.strerror
            if self._path.exists() and not self._path.is_dir():
                reason = expected("a folder", "a file")
            where = "" if self._requested == self._path else f"its folder {self._path}: "
            raise OSError(f"cannot write {self._requested}: {where}{reason}") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._staging.cleanup()
        self._remove_created()

    def _remove_created(self) -> None:
        for folder in self._created:
            if not folder.is_dir():  # creating it failed
                continue
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def check(self, names: Sequence[str], *, force: bool) -> None:
        """Raise FileExistsError if writing would replace a folder or another program's file."""
        for path in (self._path / name for name in (*names, self._manifest)):
            if path.is_dir():
                raise FileExistsError(expected("a path for a file", "a folder", where=str(path)))
            if path.exists() and not path.is_file():  # also behind a link: it may be /dev/null
                got = "a device, pipe or socket"
                raise FileExistsError(expected("a path for a file", got, where=str(path)))
        own = self._own_files()
        foreign = [
            name
            for name in (*names, self._manifest)
            if os.path.lexists(self._path / name) and name not in own
        ]
        if foreign and not force:
            more = len(foreign) - _SHOWN_NAMES
            shown = ", ".join(foreign[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
            raise FileExistsError(
                f"{self._path} contains files that q4jit did not write, or that were changed: "
                f"{shown}; choose another name, or replace them with --force"
            )

    def write(self, files: Mapping[str, bytes | memoryview], manifest: Mapping[str, Any]) -> None:
        """Write the files and the manifest, and remove files that only the old manifest lists."""
        staging = Path(self._staging.name)
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        contents = {**files, self._manifest: text.encode()}
        for name, data in contents.items():
            try:
                (staging / name).write_bytes(data)
            except OSError as error:  # a full disk; name the final path, not the temporary one
                raise OSError(error.errno, error.strerror, str(self._path / name)) from error
        stale = self._own_files() - contents.keys()
        # no manifest is better than one that lists an incomplete set
        (self._path / self._manifest).unlink(missing_ok=True)
        for name in stale:
            (self._path / name).unlink()
        missing = list(contents)
        try:
            for name in contents:
                (staging / name).replace(self._path / name)
                missing.remove(name)
        except OSError as error:
            raise OSError(
                f"{self._path} is incomplete; missing: {', '.join(missing)} ({error})"
            ) from error

    def _own_files(self) -> set[str]:
        """Return the files that an earlier manifest lists and that have not changed since."""
        path = self._path / self._manifest
        try:
            manifest = json.loads(read_regular(path, _MOST_BYTES))
            sums = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
            manifest["q4jit"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return set()  # q4jit did not write it
        own = {name for name, digest in sums.items() if self._is_unchanged(name, digest)}
        return own | {self._manifest}

    def _is_unchanged(self, name: str, digest: str) -> bool:
        path = self._path / name
        if "\0" in name:
            return False
        if path.parent != self._path or path.is_symlink() or not path.is_file():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest


def checksums(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size and the SHA-256 of each file, by name."""
    return {
        name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }
