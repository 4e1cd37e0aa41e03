"""One mapped file: its keys and its table of tensors, checked."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from q4jit.errors import GGUFError, expected
from q4jit.files import UnsuitableError, opened_regular
from q4jit.weights.gguf.metadata import Metadata, alignment_of, read_keys
from q4jit.weights.gguf.reader import Reader
from q4jit.weights.gguf.tensors import TensorInfo, read_tensors

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER_BYTES: Final = 24
_MIN_KEY_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Part:
    """A file, which is a whole model or one part of a split one.

    Attributes:
        infos: its tensors by name.
    """

    reader: Reader
    metadata: Metadata
    infos: dict[str, TensorInfo]

    @property
    def path(self) -> str:
        """The file's path, as it was opened."""
        return self.reader.path


def read_part(path: str) -> Part:
    """Map a file and check its whole header. Raises GGUFError and OSError."""
    reader = Reader(path, _map_file(path))
    tensor_count, key_count = _read_header(reader)
    metadata = Metadata(reader, read_keys(reader, key_count))
    infos = read_tensors(reader, tensor_count, alignment_of(reader, metadata))
    return Part(reader, metadata, infos)


def _map_file(path: str) -> memoryview:
    try:
        with opened_regular(Path(path)) as (handle, size):
            if size < _HEADER_BYTES:
                header = f"at least {_HEADER_BYTES} bytes"
                where = f"{path}: header at byte 0"
                raise GGUFError(expected(header, f"a file of {size} bytes", where=where))
            return memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_READ))
    except UnsuitableError:
        raise GGUFError(f"{path} is not a regular file") from None


def _read_header(reader: Reader) -> tuple[int, int]:
    """Check magic and version, and return the numbers of tensors and of keys."""
    magic = bytes(reader.view[reader.skip(4, "magic") : reader.at])
    if magic != _MAGIC:
        raise reader.error(0, "magic", repr(_MAGIC), repr(magic))
    version = reader.u32("version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        got = f"{swapped} in a big-endian file" if 0 < swapped < 256 else str(version)
        raise reader.error(4, "version", "2 or 3 in a little-endian file", got)
    tensors = reader.count(_MIN_TENSOR_BYTES, "tensor count")
    keys = reader.count(_MIN_KEY_BYTES, "key count")
    return tensors, keys
