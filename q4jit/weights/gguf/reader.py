"""A cursor over a mapped file that checks every count before using it."""

import struct
from typing import Final, NamedTuple

from q4jit.errors import GGUFError, expected, short_name

_MAX_NAME_BYTES: Final = 65535

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class Name(NamedTuple):
    """The name of a key or tensor; bytes that are not UTF-8 are escaped as in Python."""

    text: str
    is_utf8: bool


class Reader:
    """A cursor over a mapped file that never reads past its end.

    Every method that reads raises GGUFError, which names the file, the byte, and as `subject` what
    was read.
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
            raise GGUFError(f"{self.path}: the file is closed")
        return self._view

    def close(self) -> None:
        """Release the map."""
        self._view = None

    def error(self, at: int, subject: str, what: str, got: str) -> GGUFError:
        """Return the error for `subject` at byte `at`: expected `what`, got `got`."""
        return GGUFError(expected(what, got, where=f"{self.path}: {subject} at byte {at}"))

    def skip(self, count: int, subject: str) -> int:
        """Skip `count` bytes and return where they start."""
        start, left = self.at, self.size - self.at
        if count > left:
            raise self.error(start, subject, f"at most the {left} bytes that are left", f"{count}")
        self.at = start + count
        return start

    def u32(self, subject: str) -> int:
        """Read an unsigned number of 4 bytes."""
        start = self.skip(4, subject)
        return int(_U32.unpack_from(self.view, start)[0])

    def u64(self, subject: str) -> int:
        """Read an unsigned number of 8 bytes."""
        start = self.skip(8, subject)
        return int(_U64.unpack_from(self.view, start)[0])

    def count(self, item_bytes: int, subject: str) -> int:
        """Read the u64 count of items that follow, each at least `item_bytes` long."""
        count = self.u64(subject)
        left = self.size - self.at
        if count > left // item_bytes:
            most = f"at most {left // item_bytes} items in the {left} bytes that are left"
            raise self.error(self.at - 8, subject, most, str(count))
        return count

    def name(self, subject: str) -> Name:
        """Read the name of a key or tensor, which has a bounded length."""
        at = self.at
        size = self.u64(subject)
        if size > _MAX_NAME_BYTES:
            raise self.error(at, subject, f"at most {_MAX_NAME_BYTES} bytes", f"{size} bytes")
        start = self.skip(size, subject)
        stored = self.view[start : start + size]
        try:
            return Name(str(stored, "utf-8"), True)
        except UnicodeDecodeError:  # one bad name must not make the file unusable
            return Name(str(stored, "utf-8", "backslashreplace"), False)

    def text(self, start: int, size: int, subject: str) -> str:
        """Decode `size` bytes of UTF-8 at byte `start`."""
        try:
            return str(self.view[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(start + error.start, subject, "UTF-8", error.reason) from None

    def string(self, subject: str) -> str:
        """Read a string: its length, then UTF-8 bytes."""
        size = self.u64(subject)
        start = self.skip(size, subject)
        return self.text(start, size, subject)

    def skip_strings(self, count: int, subject: str) -> None:
        """Skip `count` strings."""
        # This loop runs once per word of a vocabulary, so it makes no method calls.
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
        for _ in range(count):  # slowly, to raise the error with its position
            self.skip(self.u64(subject), subject)


def key_name(name: str) -> str:
    """Return what messages call a key."""
    return f"key {short_name(name)}"


def tensor_name(name: str) -> str:
    """Return what messages call a tensor."""
    return f"tensor {short_name(name)}"
