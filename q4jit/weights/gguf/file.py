"""`load_gguf` and `GGUFFile`, a mapping of the tensors in a GGUF file."""

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from q4jit.errors import GGUFError, MissingNameError, expected
from q4jit.files import UnsuitableError, opened_regular
from q4jit.weights.gguf.metadata import Metadata, alignment_of, read_keys
from q4jit.weights.gguf.reader import Reader
from q4jit.weights.gguf.split import refuse_part
from q4jit.weights.gguf.table import table
from q4jit.weights.gguf.tensors import Tensor, TensorEntry, entry_of, read_tensor, read_tensors

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER_BYTES: Final = 24
_MIN_KEY_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8


class GGUFFile(Mapping[str, Tensor]):
    """The tensors of a GGUF file by name, read in place from a read-only memory map.

    A tensor of two dimensions is a `QuantizedTensor` (also in the formats F16 and F32), a tensor of
    one dimension is a read-only f32 array. The same name always gives the same object. Tensors keep
    the map alive, so the file may be closed or deleted while they are in use, but not truncated or
    overwritten. An unknown name raises MissingNameError.

    The mapping has every tensor that q4jit can read, so `dict(model)` and `model.items()` work for
    any file. `model.tensors` and `print(model)` list the others as well; `model[name]` of one of
    them raises GGUFError with the reason.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        self._absolute = str(Path(name).absolute())  # now: the working directory may change
        self._reader = reader = Reader(name, _map_file(name))
        tensor_count, key_count = _read_header(reader)
        self._metadata = Metadata(reader, read_keys(reader, key_count))
        refuse_part(reader, self._metadata)
        alignment = alignment_of(reader, self._metadata)
        self._infos = read_tensors(reader, tensor_count, alignment)
        self._entries = {name: entry_of(info) for name, info in self._infos.items()}
        self._readable = {name: None for name, entry in self._entries.items() if entry.readable}
        self._tensors: dict[str, Tensor] = {}

    @property
    def metadata(self) -> Metadata:
        """The file's keys and values."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Name, shape and format of every tensor, also of those that q4jit cannot read."""
        return MappingProxyType(self._entries)

    def close(self) -> None:
        """Release the map. Tensors that were read before stay valid."""
        self._reader.close()
        self._tensors.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's path: a worker on this machine maps the same file."""
        return load_gguf, (self._absolute,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._infos:
            raise MissingNameError(self._reader.path, "tensor", name, self._readable)
        tensor = self._tensors.get(name)
        if tensor is None:
            new = read_tensor(self._reader, self._infos[name])
            tensor = self._tensors.setdefault(name, new)  # two threads get the same object
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._readable

    def __iter__(self) -> Iterator[str]:
        return iter(self._readable)

    def __len__(self) -> int:
        return len(self._readable)

    def __repr__(self) -> str:
        others = len(self._entries) - len(self)
        more = f" (and {others} that cannot be read)" if others else ""
        keys = len(self.metadata)
        return f"<GGUFFile {self._reader.path}: {len(self)} tensors{more}, {keys} keys>"

    def __str__(self) -> str:
        return "\n".join([repr(self)[1:-1], *table(tuple(self._entries.values()))])


def load_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file (version 2 or 3, little-endian) read-only and check its whole header.

    Raises GGUFError, which names the file, the key or tensor, and the byte, and for one part of a
    model that is split into several files; raises OSError if the file cannot be opened.
    """
    return GGUFFile(path)


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
