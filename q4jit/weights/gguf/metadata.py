"""The keys of a file: where each value lies, and its value when it is asked for."""

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
    """Where a metadata value lies: `length` items of `kind` from byte `at` on (None: a scalar)."""

    kind: int
    length: int | None
    at: int


class Metadata(Mapping[str, MetadataValue]):
    """A GGUF file's keys; a value is decoded when it is first asked for.

    Scalars are Python bool, int, float and str; an array of numbers is a read-only ndarray, an
    array of strings a tuple. Asking for damaged text or a bool that is neither 0 nor 1 raises
    GGUFError, asking for an unknown key MissingNameError.
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

    def _decode(self, what: str, value: Value) -> MetadataValue:
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

    def _strings(self, what: str, value: Value) -> str | tuple[str, ...]:
        cursor = Reader(self._reader.path, self._reader.view)
        cursor.at = value.at
        if value.length is None:
            return cursor.string(what)
        return tuple([cursor.string(what) for _ in range(value.length)])

    def _check_bools(self, what: str, at: int, stored: NDArray[np.uint8]) -> None:
        wrong = np.flatnonzero(stored > 1)
        if wrong.size:
            first = int(wrong[0])
            raise self._reader.error(at + first, what, f"a bool of {stored[first]}", "0 or 1")


def read_keys(reader: Reader, count: int) -> dict[str, Value]:
    """Read where the value of each key lies, without decoding any."""
    values: dict[str, Value] = {}
    for i in range(count):
        at = reader.at
        key = reader.name(f"name of key {i}")
        if key in values:
            raise reader.error(at, key_name(key), "the key a second time", "every key once")
        values[key] = _read_value(reader, key_name(key))
    return values


def _read_value(reader: Reader, what: str) -> Value:
    at = reader.at
    kind = reader.u32(what)
    if kind != _ARRAY:
        return Value(kind, None, _skip_items(reader, at, kind, 1, what))
    at = reader.at
    item_kind = reader.u32(what)
    if item_kind == _ARRAY:
        raise reader.error(at, what, "an array of arrays", "an array of numbers or strings")
    item = _NUMBERS.get(item_kind)
    count = reader.count(item.itemsize if item else 8, what)
    return Value(item_kind, count, _skip_items(reader, at, item_kind, count, what))


def _skip_items(reader: Reader, at: int, kind: int, count: int, what: str) -> int:
    """Pass over `count` items and return where they start; `at` is where their type stands."""
    start = reader.at
    if kind == _STRING:
        reader.skip_strings(count, what)
    elif kind in _NUMBERS:
        reader.skip(count * _NUMBERS[kind].itemsize, what)
    else:
        raise reader.error(at, what, f"a value of type {kind}", "a type from 0 to 12")
    return start


def alignment_of(reader: Reader, metadata: Metadata) -> int:
    """Return the alignment of the tensors' data. Raises GGUFError unless it is a power of two."""
    value = metadata._values.get(_ALIGNMENT_KEY)
    if value is None:
        return _DEFAULT_ALIGNMENT
    what = key_name(_ALIGNMENT_KEY)
    if value.kind != _UINT32 or value.length is not None:
        raise reader.error(value.at, what, f"a value of type {value.kind}", "one u32 (type 4)")
    alignment = metadata[_ALIGNMENT_KEY]
    assert isinstance(alignment, int)
    if alignment.bit_count() != 1:
        raise reader.error(value.at, what, str(alignment), "a power of two")
    return alignment
