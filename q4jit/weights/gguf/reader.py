"""A cursor over the mapped file that checks every count before it is used."""

import struct
from typing import Final

from q4jit.errors import GGUFError

_MAX_NAME_BYTES: Final = 65535

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class Reader:
    """A cursor over the mapped file that never reads past the end.

    Every method that reads raises GGUFError, naming the file, `what` and the byte.
    """

    def __init__(self, path: str, view: memoryview) -> None:
        self.path = path
        self.size = len(view)
        self.at = 0
        self._view: memoryview | None = view

    @property
    def view(self) -> memoryview:
        """The file's bytes. Raises GGUFError once the file is closed."""
        if self._view is None:
            raise GGUFError(f"{self.path}: found a closed file, accepted is one still open")
        return self._view

    def close(self) -> None:
        """Let go of the map."""
        self._view = None

    def error(self, at: int, what: str, found: str, accepted: str) -> GGUFError:
        """Make the error for `what` at byte `at`."""
        return GGUFError(f"{self.path}: {what} at byte {at}: found {found}, accepted is {accepted}")

    def skip(self, count: int, what: str) -> int:
        """Pass over `count` bytes and return where they start."""
        start, left = self.at, self.size - self.at
        if count > left:
            raise self.error(
                start, what, f"{count} bytes to read", f"at most the {left} left in the file"
            )
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        """Read an unsigned number of 4 bytes."""
        start = self.skip(4, what)
        return int(_U32.unpack_from(self.view, start)[0])

    def u64(self, what: str) -> int:
        """Read an unsigned number of 8 bytes."""
        start = self.skip(8, what)
        return int(_U64.unpack_from(self.view, start)[0])

    def count(self, item_bytes: int, what: str) -> int:
        """A u64 count of items that take at least `item_bytes` each, and so must fit."""
        count = self.u64(what)
        most = (self.size - self.at) // item_bytes
        if count > most:
            raise self.error(
                self.at - 8,
                what,
                f"a count of {count}",
                f"at most {most}, for {self.size - self.at} bytes are left in the file",
            )
        return count

    def name(self, what: str) -> str:
        """Read the name of a key or tensor, whose length is bounded."""
        at = self.at
        size = self.u64(what)
        if size > _MAX_NAME_BYTES:
            raise self.error(at, what, f"{size} bytes", f"at most {_MAX_NAME_BYTES}")
        start = self.skip(size, what)
        return self.text(start, size, what)

    def text(self, start: int, size: int, what: str) -> str:
        """Decode `size` bytes of UTF-8 from byte `start` on."""
        try:
            return str(self.view[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            bad = start + error.start
            raise self.error(bad, what, f"a string with {error.reason}", "UTF-8") from None

    def string(self, what: str) -> str:
        """Read a string: its length, then UTF-8 bytes."""
        size = self.u64(what)
        start = self.skip(size, what)
        return self.text(start, size, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over `count` strings."""
        # The one loop whose length is the vocabulary's: no method call per string.
        view, at, last = self.view, self.at, self.size - 8
        unpack = _U64.unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(view, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        for _ in range(count):  # once more, slowly, to say where
            self.skip(self.u64(what), what)


def key_name(name: str) -> str:
    """Name a key in a message."""
    return f"key {_short(name)}"


def tensor_name(name: str) -> str:
    """Name a tensor in a message."""
    return f"tensor {_short(name)}"


def _short(name: str) -> str:
    """A name from the file for a message: quoted, escaped and at most about 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
