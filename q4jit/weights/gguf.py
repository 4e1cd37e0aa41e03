"""A small GGUF reader for files that nobody vouches for.

Layout (ggml's `docs/gguf.md`, versions 2 and 3, little-endian): magic, version u32, tensor count
u64, key count u64; per key: name, type u32, value; per tensor: name, number of dimensions u32,
dimensions u64 each (the contiguous one first), ggml type u32, offset u64; then, aligned to
`general.alignment`, the data that the offsets count from. A string is a u64 length and UTF-8 bytes.

Every count is held against the bytes left before it is used, so a damaged file costs neither
memory nor time. Opening checks the whole header: sizes, alignment, bounds and overlap of every
tensor. A tensor of a format or rank that q4jit cannot read does not keep the others from being
used: it raises when it is asked for. So does text that is not UTF-8.
"""

import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import GGUFError, MissingNameError
from q4jit.weights.formats import FORMATS, Format, decode
from q4jit.weights.tensor import QuantizedTensor

__all__ = ["GGUFFile", "Metadata", "MetadataValue", "load_gguf"]

MetadataValue: TypeAlias = bool | int | float | str | tuple[str, ...] | NDArray[Any]
Tensor: TypeAlias = QuantizedTensor | NDArray[np.float32]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER_BYTES: Final = 24
_MIN_KEY_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8
_MAX_NAME_BYTES: Final = 65535
_MAX_DIMENSIONS: Final = 4
_ALIGNMENT_KEY: Final = "general.alignment"
_DEFAULT_ALIGNMENT: Final = 32

_UINT32: Final = 4
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_NUMBERS: Final[dict[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    _UINT32: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

_FORMAT_OF_TYPE: Final = {fmt.ggml_type: fmt for fmt in FORMATS.values()}
# Only names, for messages about what q4jit does not read.
_OTHER_TYPES: Final = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class _Value(NamedTuple):
    """Where a metadata value lies: `length` items of `kind` from byte `at` on (None: a scalar)."""

    kind: int
    length: int | None
    at: int


@dataclass(frozen=True)
class _TensorInfo:
    """One entry of the tensor table; `at` is where the entry lies, start and end where the data."""

    name: str
    at: int
    dims: tuple[int, ...]
    ggml_type: int
    start: int
    end: int


class _Reader:
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
        if self._view is None:
            raise GGUFError(f"{self.path}: found a closed file, accepted is one still open")
        return self._view

    def close(self) -> None:
        self._view = None

    def error(self, at: int, what: str, found: str, accepted: str) -> GGUFError:
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
        start = self.skip(4, what)
        return int(_U32.unpack_from(self.view, start)[0])

    def u64(self, what: str) -> int:
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
        at = self.at
        size = self.u64(what)
        if size > _MAX_NAME_BYTES:
            raise self.error(at, what, f"{size} bytes", f"at most {_MAX_NAME_BYTES}")
        start = self.skip(size, what)
        return self.text(start, size, what)

    def text(self, start: int, size: int, what: str) -> str:
        try:
            return str(self.view[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            bad = start + error.start
            raise self.error(bad, what, f"a string with {error.reason}", "UTF-8") from None

    def string(self, what: str) -> str:
        size = self.u64(what)
        start = self.skip(size, what)
        return self.text(start, size, what)

    def skip_strings(self, count: int, what: str) -> None:
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


class Metadata(Mapping[str, MetadataValue]):
    """A GGUF file's keys; a value is decoded when it is first asked for.

    Scalars are Python bool, int, float and str; an array of numbers is a read-only ndarray, an
    array of strings a tuple. Asking for damaged text or a bool that is neither 0 nor 1 raises
    GGUFError, asking for an unknown key MissingNameError.
    """

    def __init__(self, reader: _Reader, values: dict[str, _Value]) -> None:
        self._reader = reader
        self._values = values
        self._decoded: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._values:
            raise MissingNameError(self._reader.path, "key", key, self._values.keys())
        if key not in self._decoded:
            self._decoded[key] = self._decode(_key(key), self._values[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Metadata of {self._reader.path}: {len(self)} keys>"

    def _decode(self, what: str, value: _Value) -> MetadataValue:
        if value.kind == _STRING:
            return self._strings(what, value)
        dtype = _NUMBERS[value.kind]
        count = 1 if value.length is None else value.length
        stored = self._reader.view[value.at : value.at + count * dtype.itemsize]
        numbers: NDArray[Any] = np.frombuffer(bytes(stored), dtype)
        if value.kind == _BOOL:
            self._check_bools(what, value.at, numbers)
            numbers = numbers.view(np.bool_)
        if value.length is not None:
            return numbers
        scalar: bool | int | float = numbers[0].item()
        return scalar

    def _strings(self, what: str, value: _Value) -> str | tuple[str, ...]:
        cursor = _Reader(self._reader.path, self._reader.view)
        cursor.at = value.at
        if value.length is None:
            return cursor.string(what)
        return tuple([cursor.string(what) for _ in range(value.length)])

    def _check_bools(self, what: str, at: int, stored: NDArray[np.uint8]) -> None:
        wrong = np.flatnonzero(stored > 1)
        if wrong.size:
            first = int(wrong[0])
            raise self._reader.error(at + first, what, f"a bool of {stored[first]}", "0 or 1")


class GGUFFile(Mapping[str, Tensor]):
    """The tensors of a GGUF file by name, read where they lie in a read-only memory map.

    A tensor of two dimensions is a `QuantizedTensor` (formats F16 and F32 included), one of one
    dimension a read-only f32 array. The same name gives the same object every time. The map lives
    as long as anything made from it, so the file may be closed or deleted (but not truncated or
    overwritten) while its tensors are in use. An unknown name raises MissingNameError, a tensor
    that q4jit cannot read GGUFError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        self._reader = reader = _Reader(name, _map_file(name))
        tensor_count, key_count = _read_header(reader)
        self._metadata = Metadata(reader, _read_keys(reader, key_count))
        alignment = _alignment(reader, self._metadata)
        self._infos = _read_tensors(reader, tensor_count, alignment)
        self._tensors: dict[str, Tensor] = {}

    @property
    def metadata(self) -> Metadata:
        """The file's keys and values."""
        return self._metadata

    def close(self) -> None:
        """Let go of the map; tensors already taken from it stay valid."""
        self._reader.close()
        self._tensors.clear()

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
            raise MissingNameError(self._reader.path, "tensor", name, self._infos.keys())
        tensor = self._tensors.get(name)
        if tensor is None:
            made = _read_tensor(self._reader, self._infos[name])
            tensor = self._tensors.setdefault(name, made)  # two threads get one object
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"<GGUFFile {self._reader.path}: {len(self)} tensors, {len(self.metadata)} keys>"


def load_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file (version 2 or 3, little-endian) read-only and check its whole header.

    Raises GGUFError, naming the file, the key or tensor and the byte, and OSError where the file
    cannot be opened.
    """
    return GGUFFile(path)


def _map_file(path: str) -> memoryview:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise GGUFError(f"{path}: found something else than a regular file, accepted is a file")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _HEADER_BYTES:
            raise GGUFError(
                f"{path}: header at byte 0: found a file of {size} bytes, "
                f"accepted is at least the {_HEADER_BYTES} of a GGUF header"
            )
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _read_header(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; returns the numbers of tensors and of keys."""
    magic = bytes(reader.view[reader.skip(4, "magic") : reader.at])
    if magic != _MAGIC:
        raise reader.error(0, "magic", repr(magic), repr(_MAGIC))
    version = reader.u32("version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"{swapped} in a big-endian file" if 0 < swapped < 256 else str(version)
        raise reader.error(4, "version", found, "2 or 3, little-endian")
    tensors = reader.count(_MIN_TENSOR_BYTES, "tensor count")
    keys = reader.count(_MIN_KEY_BYTES, "key count")
    return tensors, keys


def _read_keys(reader: _Reader, count: int) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for i in range(count):
        at = reader.at
        key = reader.name(f"name of key {i}")
        if key in values:
            raise reader.error(at, _key(key), "the key a second time", "every key once")
        values[key] = _read_value(reader, _key(key))
    return values


def _read_value(reader: _Reader, what: str) -> _Value:
    at = reader.at
    kind = reader.u32(what)
    if kind != _ARRAY:
        return _Value(kind, None, _skip_items(reader, at, kind, 1, what))
    at = reader.at
    item_kind = reader.u32(what)
    if item_kind == _ARRAY:
        raise reader.error(at, what, "an array of arrays", "an array of numbers or strings")
    item = _NUMBERS.get(item_kind)
    count = reader.count(item.itemsize if item else 8, what)
    return _Value(item_kind, count, _skip_items(reader, at, item_kind, count, what))


def _skip_items(reader: _Reader, at: int, kind: int, count: int, what: str) -> int:
    """Pass over `count` items and return where they start; `at` is where their type stands."""
    start = reader.at
    if kind == _STRING:
        reader.skip_strings(count, what)
    elif kind in _NUMBERS:
        reader.skip(count * _NUMBERS[kind].itemsize, what)
    else:
        raise reader.error(at, what, f"a value of type {kind}", "a type from 0 to 12")
    return start


def _alignment(reader: _Reader, metadata: Metadata) -> int:
    value = metadata._values.get(_ALIGNMENT_KEY)
    if value is None:
        return _DEFAULT_ALIGNMENT
    what = _key(_ALIGNMENT_KEY)
    if value.kind != _UINT32 or value.length is not None:
        raise reader.error(value.at, what, f"a value of type {value.kind}", "one u32 (type 4)")
    alignment = metadata[_ALIGNMENT_KEY]
    assert isinstance(alignment, int)
    if alignment.bit_count() != 1:
        raise reader.error(value.at, what, str(alignment), "a power of two")
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, _TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    for i in range(count):
        at = reader.at
        name = reader.name(f"name of tensor {i}")
        if name in infos:
            raise reader.error(at, _tensor(name), "the tensor a second time", "every name once")
        infos[name] = _read_info(reader, name, at, alignment)
    if not infos:
        return infos
    data = -(-reader.at // alignment) * alignment
    placed = {name: _place(reader, info, data) for name, info in infos.items()}
    _check_overlap(reader, placed)
    return placed


def _read_info(reader: _Reader, name: str, at: int, alignment: int) -> _TensorInfo:
    """One entry of the tensor table; start and end count from the data's start as yet."""
    what = _tensor(name)
    rank = reader.u32(what)
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise reader.error(reader.at - 4, what, f"{rank} dimensions", f"1 to {_MAX_DIMENSIONS}")
    dims = tuple(reader.u64(what) for _ in range(rank))
    if 0 in dims:
        raise reader.error(at, what, f"dimensions {dims}", "none of size 0")
    ggml_type = reader.u32(what)
    offset = reader.u64(what)
    if offset % alignment:
        raise reader.error(
            reader.at - 8, what, f"offset {offset}", f"a multiple of the alignment, {alignment}"
        )
    fmt = _FORMAT_OF_TYPE.get(ggml_type)
    # Of a format without a known size at least one byte must lie inside the file.
    size = _data_bytes(reader, what, at, fmt, dims) if fmt else 1
    return _TensorInfo(name, at, dims, ggml_type, offset, offset + size)


def _data_bytes(reader: _Reader, what: str, at: int, fmt: Format, dims: tuple[int, ...]) -> int:
    if dims[0] % fmt.block_elements:
        raise reader.error(
            at,
            what,
            f"dimensions {dims} in {fmt.name}",
            f"a first dimension that is a multiple of {fmt.block_elements}",
        )
    return fmt.row_bytes(dims[0]) * prod(dims[1:])


def _place(reader: _Reader, info: _TensorInfo, data: int) -> _TensorInfo:
    """Make an entry's start and end absolute, and check that they lie inside the file."""
    start, end = data + info.start, data + info.end
    if end > reader.size:
        raise reader.error(
            info.at,
            _tensor(info.name),
            f"data from byte {start} to {end}",
            f"data inside the file's {reader.size} bytes",
        )
    return _TensorInfo(info.name, info.at, info.dims, info.ggml_type, start, end)


def _check_overlap(reader: _Reader, infos: dict[str, _TensorInfo]) -> None:
    previous: _TensorInfo | None = None
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if previous is not None and info.start < previous.end:
            raise reader.error(
                info.at,
                _tensor(info.name),
                f"data from byte {info.start} on, inside {_tensor(previous.name)} "
                f"({previous.start} to {previous.end})",
                "tensors that do not overlap",
            )
        previous = info


def _read_tensor(reader: _Reader, info: _TensorInfo) -> Tensor:
    what = _tensor(info.name)
    fmt = _FORMAT_OF_TYPE.get(info.ggml_type)
    if fmt is None:
        name = _OTHER_TYPES.get(info.ggml_type, "unknown")
        raise reader.error(
            info.at, what, f"format {name} (ggml type {info.ggml_type})", ", ".join(FORMATS)
        )
    if prod(info.dims[2:]) != 1:
        raise reader.error(info.at, what, f"dimensions {info.dims}", "one or two dimensions")
    data = reader.view[info.start : info.end]
    if len(info.dims) == 1:
        return _read_vector(fmt, data)
    k, n = info.dims[:2]
    return QuantizedTensor.from_bytes(data, shape=(k, n), format=fmt.name)


def _read_vector(fmt: Format, data: memoryview) -> NDArray[np.float32]:
    rows = np.frombuffer(data, np.uint8).reshape(1, -1)
    if fmt.name == "F32":
        in_place: NDArray[np.float32] = rows[0].view("<f4")
        if in_place.flags.aligned:
            return in_place
    vector: NDArray[np.float32] = decode(fmt, rows)[0]
    vector.flags.writeable = False
    return vector


def _key(name: str) -> str:
    return f"key {_short(name)}"


def _tensor(name: str) -> str:
    return f"tensor {_short(name)}"


def _short(name: str) -> str:
    """A name from the file for a message: quoted, escaped and at most about 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
