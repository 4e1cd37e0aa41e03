"""The metadata keys of a file: the position of each value, decoded on first access."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4jit.errors import MissingNameError
from q4jit.weights.gguf.reader import Reader, key_name

MetadataValue: TypeAlias = bool | int | float | str | tuple[str, ...] | NDArray[Any]

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


class Value(NamedTuple):
    """The position of a value: `length` items of type `kind` at byte `at` (None: a scalar)."""

    kind: int
    length: int | None
    at: int


class Metadata(Mapping[str, MetadataValue]):
    """The metadata of a GGUF file by key, decoded on first access.

    Scalars are Python bool, int, float and str. An array of numbers is a read-only ndarray, an
    array of strings is a tuple. An unknown key raises MissingNameError; damaged text, and a bool
    that is neither 0 nor 1, raise GGUFError on access.
    """

    def __init__(self, reader: Reader, values: dict[str, Value]) -> None:
        self._reader = reader
        self._values = values
        self._decoded: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._values:
            raise MissingNameError(self._reader.path, "key", key, self._values.keys())
        if key not in self._decoded:
            self._decoded[key] = self._decode(key_name(key), self._values[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Metadata of {self._reader.path}: {len(self)} keys>"

    def _decode(self, subject: str, value: Value) -> MetadataValue:
        if value.kind == _STRING:
            return self._strings(subject, value)
        dtype = _NUMBERS[value.kind]
        count = 1 if value.length is None else value.length
        stored = self._reader.view[value.at : value.at + count * dtype.itemsize]
        numbers: NDArray[Any] = np.frombuffer(bytes(stored), dtype)
        if value.kind == _BOOL:
            self._check_bools(subject, value.at, numbers)
            numbers = numbers.view(np.bool_)
        if value.length is not None:
            return numbers
        scalar: bool | int | float = numbers[0].item()
        return scalar

    def _strings(self, subject: str, value: Value) -> str | tuple[str, ...]:
        cursor = Reader(self._reader.path, self._reader.view)
        cursor.at = value.at
        if value.length is None:
            return cursor.string(subject)
        return tuple([cursor.string(subject) for _ in range(value.length)])

    def _check_bools(self, subject: str, at: int, stored: NDArray[np.uint8]) -> None:
        wrong = np.flatnonzero(stored > 1)
        if wrong.size:
            first = int(wrong[0])
            raise self._reader.error(at + first, subject, "0 or 1 as a bool", str(stored[first]))


def read_keys(reader: Reader, count: int) -> dict[str, Value]:
    """Read the position of each key's value without decoding it."""
    values: dict[str, Value] = {}
    for i in range(count):
        at = reader.at
        key = reader.name(f"name of key {i}").text
        if key in values:
            raise reader.error(at, key_name(key), "every key once", "a second key of this name")
        values[key] = _read_value(reader, key_name(key))
    return values


def _read_value(reader: Reader, subject: str) -> Value:
    at = reader.at
    kind = reader.u32(subject)
    if kind != _ARRAY:
        return Value(kind, None, _skip_items(reader, at, kind, 1, subject))
    at = reader.at
    item_kind = reader.u32(subject)
    if item_kind == _ARRAY:
        raise reader.error(at, subject, "an array of numbers or strings", "an array of arrays")
    item = _NUMBERS.get(item_kind)
    count = reader.count(item.itemsize if item else 8, subject)
    return Value(item_kind, count, _skip_items(reader, at, item_kind, count, subject))


def _skip_items(reader: Reader, at: int, kind: int, count: int, subject: str) -> int:
    """Skip `count` items and return where they start. at: the position of their type."""
    start = reader.at
    if kind == _STRING:
        reader.skip_strings(count, subject)
    elif kind in _NUMBERS:
        reader.skip(count * _NUMBERS[kind].itemsize, subject)
    else:
        raise reader.error(at, subject, "a type from 0 to 12", str(kind))
    return start


def alignment_of(reader: Reader, metadata: Metadata) -> int:
    """Return the alignment of the tensors' data. Raises GGUFError unless it is a power of two."""
    value = metadata._values.get(_ALIGNMENT_KEY)
    if value is None:
        return _DEFAULT_ALIGNMENT
    subject = key_name(_ALIGNMENT_KEY)
    if value.kind != _UINT32 or value.length is not None:
        got = f"a value of type {value.kind}" if value.length is None else "an array"
        raise reader.error(value.at, subject, "one u32 (type 4)", got)
    alignment = metadata[_ALIGNMENT_KEY]
    assert isinstance(alignment, int)
    if alignment.bit_count() != 1:
        raise reader.error(value.at, subject, "a power of two", str(alignment))
    return alignment
