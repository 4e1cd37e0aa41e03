"""The cache of compiled kernels: on disk, shared by all processes of a user, never stale.

The key is a hash of everything that the bytes depend on: the schema, the target with its features,
the compiler's fingerprint (versions and ordered flags) and the text. Each of them is labelled and
prefixed with its length. An entry is three files: the source, the object, and a checksum of key and
object, which is written before the object. An entry whose checksum differs is a miss.

Entries are code that will run. The directory is therefore created with mode 0700, and a directory
or file that another user owns or can write to is not used. Both are checked at every use, by their
descriptors (`files.py`). If the cache cannot be used, q4jit warns once and keeps kernels in memory.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from q4jit import config, files
from q4jit.compilers.entries import evict
from q4jit.errors import CacheWarning
from q4jit.locks import BUILD, warn, warnings_later
from q4jit.targets import Target

SCHEMA: Final = "1"
_MOST_BYTES: Final = 64 << 20  # of an object; larger files are not from q4jit
_CHECKSUM_BYTES: Final = 64
_LEFTOVER_AGE_S: Final = 24 * 3600


class Compiler(Protocol):
    """What the cache needs from a compiler."""

    SOURCE_SUFFIX: str
    SUFFIX: str

    def fingerprint(self, target: Target) -> str:
        """Return the compiler's versions and ordered flags."""
        ...

    def compile_object(self, text: str, target: Target) -> bytes:
        """Compile text into bytes."""
        ...

    def compile_assembly(self, text: str, target: Target) -> str:
        """Return the assembly of the same compilation."""
        ...


@dataclass(frozen=True)
class Entry:
    """A compiled kernel.

    Attributes:
        key: the cache key.
        object_bytes: the compiled code.
        origin: `disk` or `compiled`.
        seconds: the time that compiling took; 0 if the kernel came from disk.
    """

    key: str
    object_bytes: bytes
    origin: str
    seconds: float


def cache_key(target: Target, fingerprint: str, text: str) -> str:
    """Return the key of a compilation: a hash of labelled, length-prefixed fields."""
    digest = hashlib.sha256()
    fields = {"schema": SCHEMA, "target": target.key(), "compiler": fingerprint, "text": text}
    for label, value in fields.items():
        data = value.encode()
        digest.update(f"{label}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def fetch(
    target: Target,
    compiler: Compiler,
    name: str,
    text: str,
    use_disk: bool = True,
    cause: str = "",
) -> Entry:
    """Return compiled `text`: from disk, or compiled now and saved. Raises CompileError.

    cause: why it is needed, for the line that Q4JIT_DEBUG=1 writes.
    """
    start = time.perf_counter()
    key = cache_key(target, compiler.fingerprint(target), text)
    disk = _disk() if use_disk else None
    stored = disk.read(key, compiler.SUFFIX) if disk else None
    if stored is not None:
        _log(f"{name} for {target}: read from disk", start, key, cause)
        return Entry(key, stored, "disk", 0.0)
    start = time.perf_counter()
    object_bytes = compiler.compile_object(text, target)
    seconds = time.perf_counter() - start
    _log(f"{name} for {target}: compiled", start, key, cause)
    if disk:
        source = (compiler.SOURCE_SUFFIX, text.encode())
        disk.write(key, source, (compiler.SUFFIX, object_bytes))
    return Entry(key, object_bytes, "compiled", seconds)


def _log(event: str, start: float, key: str, cause: str) -> None:
    milliseconds = 1e3 * (time.perf_counter() - start)
    because = f", because {cause}" if cause else ""
    config.log(f"{event} in {milliseconds:.1f} ms, cache key {key[:12]}{because}")


class DiskCache:
    """The entries in one directory. A failure counts as a miss; only the first one warns."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`; create it with mode 0700 if it does not exist."""
        self.directory = directory
        self._warned = False
        self._cleaned = False
        with contextlib.suppress(OSError):  # no working directory; reported at the first use
            self.directory = directory.absolute()  # the process may change its folder later

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """Open the directory and check it, as at every use; None and a warning if it is unusable.

        Raises the errors of the body.
        """
        with contextlib.ExitStack() as stack:
            try:
                files.make_private(self.directory)
                folder = stack.enter_context(files.opened_folder(self.directory))
                problem = _directory_problem(os.fstat(folder))
            except OSError as error:
                problem = f"cannot be created or read ({error})"
            if problem:
                self._warn(problem)
                yield None
            else:
                yield folder

    def read(self, key: str, suffix: str) -> bytes | None:
        """Return the object of an entry; None if it is missing or damaged."""
        with self._opened() as folder:
            if folder is None:
                return None
            try:
                checksum = files.read_own(folder, f"{key}.sha256", _CHECKSUM_BYTES)
                object_bytes = files.read_own(folder, f"{key}{suffix}", _MOST_BYTES)
            except FileNotFoundError:
                return None
            except files.UnsuitableError as error:
                config.log(f"{error}: compiling again")
                return None
            except OSError as error:
                self._warn(f"cannot be read ({error})")
                return None
        if checksum != _checksum(key, object_bytes).encode():
            config.log(f"entry {key[:12]} is damaged: compiling again")
            return None
        return object_bytes

    def write(self, key: str, source: tuple[str, bytes], object_: tuple[str, bytes]) -> None:
        """Save an entry, given the suffix and bytes of its source and object.

        Each file is written completely or not at all, and the object comes last.
        """
        checksum = ".sha256", _checksum(key, object_[1]).encode()
        with self._opened() as folder:
            if folder is None:
                return
            try:
                if not self._cleaned:  # once per process; other processes may be writing now
                    self._cleaned = True
                    files.remove_leftovers(folder, time.time() - _LEFTOVER_AGE_S)
                for ending, data in (source, checksum, object_):
                    files.write_own(folder, f"{key}{ending}", data)
                limit = config.cache_limit()
                if limit is not None:
                    evict(self.directory, limit, keep=key)
            except OSError as error:
                self._warn(f"cannot be written ({error})")

    def _warn(self, problem: str) -> None:
        """Warn about the directory, once."""
        if not self._warned:
            self._warned = True
            warn(
                f"the kernel cache {self.directory} {problem}; kernels are kept in memory. "
                "Set Q4JIT_CACHE_DIR to use another directory",
                CacheWarning,
            )


def _directory_problem(status: os.stat_result) -> str:
    """Return why a directory cannot be used; empty if it can."""
    if files.is_foreign(status):
        return f"belongs to user {status.st_uid}, who could replace the code that runs from it"
    if files.is_writable_by_others(status):
        mode = f"{status.st_mode & 0o777:04o}"
        return f"can be written by other users (mode {mode}, expected 0700)"
    return ""


def _checksum(key: str, object_bytes: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\n" + object_bytes).hexdigest()


_caches: dict[Path, DiskCache] = {}


@functools.cache
def _warn_of_no_home() -> None:
    warn(
        "there is no home directory for the kernel cache; kernels are kept in memory. "
        "Set Q4JIT_CACHE_DIR to use a directory",
        CacheWarning,
    )


def _disk() -> DiskCache | None:
    directory = config.cache_dir()
    with warnings_later(), BUILD:
        if directory is None:
            _warn_of_no_home()
            return None
        if directory not in _caches:
            _caches[directory] = DiskCache(directory)
        return _caches[directory]
