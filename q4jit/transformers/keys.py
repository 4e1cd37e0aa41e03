"""Typed access to the metadata keys of a model file, which may hold anything."""

from dataclasses import dataclass
from math import isfinite
from typing import Final

import numpy as np

from q4jit.errors import GGUFError, expected
from q4jit.weights.gguf.file import GGUFFile
from q4jit.weights.gguf.metadata import MetadataValue

_MOST: Final = 2**31 - 1  # of what is counted: larger numbers overflow elsewhere


@dataclass(frozen=True)
class Keys:
    """The keys of a file that begin with the name of its architecture.

    Every method raises GGUFError, which names file and key, for a value of another kind.
    """

    file: GGUFFile
    prefix: str

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}.{name}" in self.file.metadata

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive whole number. default: of a missing key; None: it must exist."""
        value = self.value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, "a positive whole number", value)
        if value > _MOST:
            raise self.error(name, f"at most {_MOST}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive, finite number. default: as in `count`."""
        value = self.value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, "a positive number", value)
        if not isfinite(value) or value <= 0:
            raise self.error(name, "a positive number", value)
        return float(value)

    def says_none(self, name: str) -> bool:
        """Return whether a key is missing or 0, which converters write for nothing."""
        value = self.value(name, 0)
        return isinstance(value, int | float) and value == 0

    def text(self, name: str, default: str) -> str:
        """Return a string, or `default` if there is no such key."""
        value = self.value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string", value)
        return value

    def value(self, name: str, default: MetadataValue | None = None) -> MetadataValue | None:
        """Return the value of a key, or `default` if it is missing."""
        return self.file.metadata.get(f"{self.prefix}.{name}", default)

    def error(self, name: str, what: str, value: object) -> GGUFError:
        """Return the error of a key with a wrong value. value: None if it is missing."""
        got = "no such key" if value is None else _shown(value)
        return GGUFError(expected(what, got, where=f"{self.file.paths[0]}: {self.prefix}.{name}"))


def _shown(value: object) -> str:
    if isinstance(value, tuple | np.ndarray):
        return f"an array of {len(value)} values"
    return repr(value)[:80]
