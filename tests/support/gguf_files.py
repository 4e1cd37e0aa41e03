"""GGUF files that are written byte by byte."""

import struct
from pathlib import Path
from typing import Final

from q4jit.weights.gguf.part import read_part

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
"""Types of values."""
SIZES: Final = {
    U8: 1,
    I8: 1,
    U16: 2,
    I16: 2,
    U32: 4,
    I32: 4,
    F32: 4,
    BOOL: 1,
    U64: 8,
    I64: 8,
    F64: 8,
}
"""Bytes of a number, by its type."""


def u32(value: int) -> bytes:
    """Return a number of 4 bytes."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Return a number of 8 bytes."""
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    """Return a string: its length and its bytes."""
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """Return a key with its value."""
    return text(name) + u32(kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    """Return the value of an array."""
    return u32(kind) + u64(count) + data


def tensor(
    name: str | bytes,
    dims: tuple[int, ...],
    kind: int = 0,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    """Return an entry of the table of tensors."""
    sizes = b"".join(u64(size) for size in dims)
    return text(name) + u32(len(dims) if rank is None else rank) + sizes + u32(kind) + u64(offset)


def build(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a file. tensor_count, key_count: other numbers than the true ones."""
    head = magic + version
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(keys) if key_count is None else key_count)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head


def header_bytes(path: Path) -> int:
    """Return where the data of a file's tensors begin."""
    return min(info.start for info in read_part(str(path)).infos.values())
