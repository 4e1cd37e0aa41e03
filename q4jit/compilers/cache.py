"""The cache of compiled kernels: on disk, shared by all processes of a user, never stale.

The key is a hash of everything that the bytes depend on: the schema, the target with its features,
the compiler's fingerprint (versions and ordered flags) and the text itself, each labelled and
prefixed with its length. An entry is three files beside each other: the source, the raw object, and
a checksum over key and object that is written before the object; whatever does not fit is a miss.
Entries are code that will run: the directory is made 0700, and one that others own or can write to
is left alone. A cache that cannot be used costs one warning and nothing else.
"""

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from q4jit import config
from q4jit.errors import CacheWarning
from q4jit.locks import BUILD
from q4jit.targets import Target

SCHEMA: Final = "1"
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_TEMPORARY: Final = ".new-"  # begins the name of a file that is being written
_LEFTOVER_AGE_S: Final = 24 * 3600


class Compiler(Protocol):
    """What the cache asks of a compiler module."""

    SOURCE_SUFFIX: str
    SUFFIX: str

    def fingerprint(self, target: Target) -> str:
        """Versions and ordered flags."""
        ...

    def compile_object(self, text: str, target: Target) -> bytes:
        """Text to bytes."""
        ...

    def compile_assembly(self, text: str, target: Target) -> str:
        """The assembly of the same compilation."""
        ...


@dataclass(frozen=True)
class Entry:
    """Compiled bytes and where they came from; `seconds` is the time of a compilation, else 0."""

    key: str
    object_bytes: bytes
    origin: str
    seconds: float


def cache_key(target: Target, fingerprint: str, text: str) -> str:
    """The key of a compilation: a hash of labelled, length-prefixed fields."""
    digest = hashlib.sha256()
    fields = {"schema": SCHEMA, "target": target.key(), "compiler": fingerprint, "text": text}
    for label, value in fields.items():
        data = value.encode()
        digest.update(f"{label}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def fetch(target: Target, compiler: Compiler, name: str, text: str, use_disk: bool = True) -> Entry:
    """The compiled form of `text`: from disk, or compiled and saved. Raises CompileError."""
    key = cache_key(target, compiler.fingerprint(target), text)
    disk = _disk() if use_disk else None
    stored = disk.read(key, compiler.SUFFIX) if disk else None
    if stored is not None:
        _debug(f"{name} for {target}: from disk, {key[:12]}")
        return Entry(key, stored, "disk", 0.0)
    start = time.perf_counter()
    object_bytes = compiler.compile_object(text, target)
    seconds = time.perf_counter() - start
    _debug(f"{name} for {target}: compiled in {seconds:.3f} s, {key[:12]}")
    if disk:
        source = (compiler.SOURCE_SUFFIX, text.encode())
        disk.write(key, source, (compiler.SUFFIX, object_bytes))
    return Entry(key, object_bytes, "compiled", seconds)


def _debug(message: str) -> None:
    if config.debug():
        sys.stderr.write(f"q4jit: {message}\n")


class DiskCache:
    """Entries in one directory. Every failure is a miss and at most one warning."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, made 0700 where it does not exist."""
        self.directory = directory
        self._warned = False
        self._cleaned = False
        self._usable = self._open()

    def _open(self) -> bool:
        try:
            self.directory = self.directory.absolute()  # the process may move later
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.directory.stat()
        except OSError as error:
            return self._warn(f"cannot be made or read ({error})")
        if not stat.S_ISDIR(status.st_mode):
            return self._warn("is not a directory")
        if _is_foreign(status):
            return self._warn(f"belongs to user {status.st_uid}, who could change the code in it")
        if status.st_mode & _WRITABLE_BY_OTHERS:
            return self._warn(
                f"can be written by others (mode {status.st_mode & 0o777:o}); accepted is 0700"
            )
        return True

    def read(self, key: str, suffix: str) -> bytes | None:
        """The object of an entry, or None where there is none that is whole."""
        if not self._usable:
            return None
        path = self.directory / f"{key}{suffix}"
        try:
            checksum = path.with_suffix(".sha256").read_bytes()
            object_bytes = _read_own(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read ({error})")
            return None
        if checksum != _checksum(key, object_bytes).encode():
            _debug(f"entry {key[:12]} is damaged: compiling again")
            return None
        return object_bytes

    def write(self, key: str, source: tuple[str, bytes], object_: tuple[str, bytes]) -> None:
        """Save an entry (suffix and bytes of both files), each whole or not at all, object last."""
        if not self._usable:
            return
        try:
            self._remove_leftovers()
            for ending, data in (
                source,
                (".sha256", _checksum(key, object_[1]).encode()),
                object_,
            ):
                write_atomically(self.directory / f"{key}{ending}", data)
        except OSError as error:
            self._warn(f"cannot be written ({error})")

    def _remove_leftovers(self) -> None:
        """Remove what killed writers left behind, once per process; others may be writing now."""
        if self._cleaned:
            return
        self._cleaned = True
        old = time.time() - _LEFTOVER_AGE_S
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < old:
                    path.unlink()

    def _warn(self, problem: str) -> bool:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the kernel cache {self.directory} {problem}: kernels are kept in memory. "
                "Q4JIT_CACHE_DIR names another directory",
                CacheWarning,
                stacklevel=2,
            )
        return False


def _checksum(key: str, object_bytes: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\n" + object_bytes).hexdigest()


def _read_own(path: Path) -> bytes:
    """The bytes of a file that nobody else can have written.

    The directory may have been open to others before its mode was put right.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if _is_foreign(status) or status.st_mode & _WRITABLE_BY_OTHERS:
            raise PermissionError(f"{path.name} could have been changed by another user")
        return file.read()


def _is_foreign(status: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and status.st_uid != os.geteuid()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


_caches: dict[Path, DiskCache] = {}


@functools.cache
def _warn_of_no_home() -> None:
    warnings.warn(
        "no home directory, so no kernel cache: kernels are kept in memory. Q4JIT_CACHE_DIR names "
        "a directory",
        CacheWarning,
        stacklevel=2,
    )


def _disk() -> DiskCache | None:
    directory = config.cache_dir()
    with BUILD:
        if directory is None:
            _warn_of_no_home()
            return None
        if directory not in _caches:
            _caches[directory] = DiskCache(directory)
        return _caches[directory]
