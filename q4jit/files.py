"""Read and write files that are checked by descriptor, and the files of a private folder.

Between a check of a path and its use, another process can put another file there. So each folder
and file is opened first, and what was opened is checked. Links in place of a file are not followed,
and nothing waits for the other end of a FIFO.
"""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from q4jit.errors import expected

TEMPORARY: Final = ".new-"
"""Prefix of files that are being written."""
_MOVED: Final = ".moved-"  # prefix of folders that were found in place of a file
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
# other systems than Linux may lack some of these
_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_FOLDER: Final = getattr(os, "O_DIRECTORY", 0)
_REGULAR: Final = "a regular file"
_NO_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO})  # a link; a socket or an absent device


class UnsuitableError(ValueError):
    """What is in a file's place is no regular file, or is too large."""


def make_private(path: Path) -> None:
    """Create a folder and missing parents with mode 0700, whatever the umask. Raises OSError."""
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir(0o700)
            folder.chmod(0o700)


@contextlib.contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Open a folder for the functions below. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | _FOLDER)
    try:
        yield handle
    finally:
        os.close(handle)


def is_foreign(status: os.stat_result) -> bool:
    """Return whether another user owns a file or folder."""
    return hasattr(os, "geteuid") and status.st_uid != os.geteuid()


def is_writable_by_others(status: os.stat_result) -> bool:
    """Return whether the mode of a file or folder lets other users write to it."""
    return bool(status.st_mode & _WRITABLE_BY_OTHERS)


def read_own(folder: int, name: str, most_bytes: int) -> bytes:
    """Return the bytes of a file in an opened folder.

    Raises PermissionError if another user can have written it: other users may have been able to
    write to the folder before its mode was corrected. Raises UnsuitableError and other OSErrors.
    """
    flags = os.O_RDONLY | _NO_WAIT | _NO_FOLLOW
    with _opened(name, flags, folder) as handle:
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and (is_foreign(status) or is_writable_by_others(status)):
            raise PermissionError(f"another user could have changed {name}")
        return _contents(handle, name, most_bytes)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file, links followed. Raises UnsuitableError and OSError."""
    with _opened(path, os.O_RDONLY | _NO_WAIT, None) as handle:
        return _contents(handle, str(path), most_bytes)


@contextlib.contextmanager
def opened_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open a file for reading, links followed, and return its descriptor and size in bytes.

    Raises UnsuitableError and OSError.
    """
    with _opened(path, os.O_RDONLY | _NO_WAIT, None) as handle:
        yield handle, _regular(handle, str(path)).st_size


@contextlib.contextmanager
def _opened(name: str | Path, flags: int, folder: int | None) -> Iterator[int]:
    try:
        handle = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise UnsuitableError(
                expected(_REGULAR, str(error.strerror), where=str(name))
            ) from error
        raise
    try:
        yield handle
    finally:
        os.close(handle)


def _regular(handle: int, name: str) -> os.stat_result:
    """Return the status of an opened file. Raises UnsuitableError unless it is a regular one."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        got = stat.filemode(status.st_mode)
        raise UnsuitableError(expected(_REGULAR, got, where=name))
    return status


def _contents(handle: int, name: str, most_bytes: int) -> bytes:
    status = _regular(handle, name)
    if status.st_size > most_bytes:
        most = f"at most {most_bytes:,} bytes"
        raise UnsuitableError(expected(most, f"{status.st_size:,}", where=name))
    with os.fdopen(os.dup(handle), "rb") as file:
        return file.read(most_bytes)  # no more, even if the file has grown since


def write_own(folder: int, name: str, data: bytes) -> None:
    """Write a file of an opened folder completely or not at all. Raises OSError.

    Whatever has the name is replaced; a folder that is not empty gets another name.
    """
    temporary = f"{TEMPORARY}{os.urandom(8).hex()}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)  # the umask may have taken bits away
            file.write(data)
        try:
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:
            moved = f"{_MOVED}{os.urandom(8).hex()}"
            os.rename(name, moved, src_dir_fd=folder, dst_dir_fd=folder)
            with contextlib.suppress(OSError):  # not empty: someone may miss its files
                os.rmdir(moved, dir_fd=folder)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def remove_leftovers(folder: int, before: float) -> None:
    """Remove temporary files of killed writers that are older than `before`. Raises OSError."""
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY):
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before:
                    os.unlink(name, dir_fd=folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file at any path completely or not at all. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
