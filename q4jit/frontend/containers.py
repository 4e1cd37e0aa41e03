"""Containers of arguments and results: take them apart into leaves, and put them together again.

A list, tuple, dict, dataclass or NamedTuple is an argument like others. Each of its leaves (an
array, a weight, a number, …) reaches kernels like an argument of its own. No code of the user's
runs: dataclasses are made without their `__init__`.
"""

import dataclasses
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from q4jit.errors import expected
from q4jit.frontend.refusals import show_value
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

LEAVES: Final = frozenset(
    {np.ndarray, QuantizedTensor, ExpertTensor, float, int, bool, str, type(None)}
)
"""The usual types of leaves. None of them is a container or on a device."""
_INDEXED: Final[frozenset[type]] = frozenset({list, tuple})
MAPPINGS: Final[frozenset[type]] = frozenset({dict, OrderedDict})
_ARRAY_PROTOCOLS: Final = ("__array__", "__cuda_array_interface__", "__dlpack_device__")
_MOST_VALUES: Final = 4096  # in the containers of a call: about the tensors of the largest models
_MOST_LEVELS: Final = 64
_SHOWN_LETTERS: Final = 40  # of a key
_SHOWN_PATH: Final = 200
_LARGEST_BITS: Final = 1 << 10  # of a number that is printed in decimal

Tree = tuple[type, tuple[str | int, ...], tuple["Tree", ...]] | None
"""The class of a container, its keys or names of fields, and its entries; None is a leaf."""


class Misfit(Exception):  # noqa: N818 - it becomes an error of ours, where names are known
    """A container that cannot be taken apart: what was expected, and at which path below it."""

    def __init__(self, what: str, got: str, cure: str = "") -> None:
        super().__init__(what, got, cure)
        self.what, self.got, self.cure, self.path = what, got, cure, ""

    def message(self, where: str) -> str:
        """Return the text of the error; where: the container and the path below it."""
        return expected(self.what, self.got, where=where, cure=self.cure)


class Apart:
    """Values without their containers.

    Attributes:
        leaves: the values in the containers that were taken apart, in order.
    """

    def __init__(self, whole: Callable[[object], bool] | None = None) -> None:
        """Start with no leaves. whole: returns whether a container counts as a leaf."""
        self.leaves: list[Any] = []
        self._whole = whole
        self._values_left = _MOST_VALUES

    def tree(self, value: Any, levels: int = _MOST_LEVELS) -> Tree:
        """Return the tree of a value, and append its leaves.

        Raises Misfit for keys that are neither str nor int, and for containers that hold too much
        or themselves.
        """
        kind = type(value)
        names = () if kind in _INDEXED or kind in MAPPINGS else fields_of(kind)
        if names is None or (self._whole is not None and self._whole(value)):
            self.leaves.append(value)
            return None
        keys, entries = _entries(kind, names, value)
        if not levels:
            what = f"containers nested at most {_MOST_LEVELS} levels deep"
            raise Misfit(what, "more levels, or one that contains itself")
        self._values_left -= 1 + len(entries)
        if self._values_left < 0:
            what = f"at most {_MOST_VALUES} values in containers"
            raise Misfit(what, "more", "use NumPy arrays instead of lists of numbers")
        trees: list[Tree] = []
        try:
            for entry in entries:
                if type(entry) in LEAVES:
                    self.leaves.append(entry)
                    trees.append(None)
                else:
                    trees.append(self.tree(entry, levels - 1))
        except Misfit as misfit:
            misfit.path = step(kind, (keys or range(len(entries)))[len(trees)]) + misfit.path
            raise
        return kind, keys, tuple(trees)


def _entries(kind: type, names: tuple[str, ...], value: Any) -> tuple[Any, Sequence[Any]]:
    """Return the keys of a container (none of a list or tuple) and its entries."""
    if kind in _INDEXED:
        return (), value
    if kind in MAPPINGS:
        keys = tuple(value)
        for key in keys:
            if type(key) is not str and type(key) is not int:
                got = f"the {type(key).__name__} {show_value(key)}"
                raise Misfit("keys that are str or int", got)
        return keys, tuple(value.values())
    if issubclass(kind, tuple):
        if getattr(value, "__dict__", None) or len(names) != len(value):
            raise Misfit("a NamedTuple with its fields and nothing else", "one with other contents")
        return names, value
    held = _held(value)
    if tuple(held) == names:  # the usual case: everything is a field, in its place
        return names, tuple(held.values())
    pairs = {}
    for name in names:
        try:  # contextlib.suppress takes ten times as long
            pairs[name] = object.__getattribute__(value, name)
        except AttributeError:  # a field with init=False that was never set
            continue
    for name, entry in held.items():
        if not name.startswith("__"):
            pairs.setdefault(name, entry)
    return tuple(pairs), tuple(pairs.values())


def _held(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that are in no slot; the dict is the object's own."""
    if not type(value).__dictoffset__:
        return {}
    held: dict[str, Any] = object.__getattribute__(value, "__dict__")
    return held


def _fields_of(kind: type) -> tuple[str, ...] | None:
    """Return the names of fields of a NamedTuple's or dataclass's class; None for other classes.

    Classes whose objects cannot be copied field by field are other classes.
    """
    if issubclass(kind, tuple):
        names: tuple[str, ...] | None = getattr(kind, "_fields", None)
        usual = kind.__iter__ is tuple.__iter__ and kind.__getitem__ is tuple.__getitem__
        return names if usual else None
    if not dataclasses.is_dataclass(kind) or hasattr(kind, "__del__"):
        return None
    if any(hasattr(kind, protocol) for protocol in _ARRAY_PROTOCOLS):
        return None
    try:
        object.__new__(kind)
    except TypeError:  # a dict, an exception: it has contents that are no fields
        return None
    names = tuple(field.name for field in dataclasses.fields(kind))
    slots = [slot for base in kind.__mro__ for slot in _slots(base)]
    names = tuple(dict.fromkeys([*names, *slots]))
    for name in names:
        of_class = inspect.getattr_static(kind, name, None)
        if hasattr(type(of_class), "__set__") and not inspect.ismemberdescriptor(of_class):
            return None  # a property, whose code would run
    return names


fields_of: Final[Callable[[type], tuple[str, ...] | None]] = functools.lru_cache(1 << 9)(_fields_of)


def _slots(kind: type) -> list[str]:
    """Return the names of a class's own slots, as attributes of objects."""
    slots = kind.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    return [
        private + name if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in {"__dict__", "__weakref__"}
    ]


def together(tree: Tree, leaves: Iterator[Any]) -> Any:
    """Return the value that `Apart.tree` took apart, with other leaves."""
    if tree is None:
        return next(leaves)
    kind, keys, trees = tree
    values = [together(entry, leaves) for entry in trees]
    if kind is list:
        return values
    if kind in MAPPINGS:
        return kind(zip(keys, values, strict=True))
    if issubclass(kind, tuple):
        return tuple.__new__(kind, values)
    made, fields = object.__new__(kind), fields_of(kind) or ()
    for name, value in zip(map(str, keys), values, strict=True):
        if name in fields:
            object.__setattr__(made, name, value)  # also if the dataclass is frozen
        else:
            _held(made)[name] = value
    return made


def step(kind: type, key: str | int) -> str:
    """Return the end of an expression that leads to an entry of a container."""
    if kind not in _INDEXED and kind not in MAPPINGS:
        return f".{key}"
    return f"[{_short(key)}]"


def exact_text(value: object) -> str:
    """Return a key or a known result as text; Python refuses to print very large numbers."""
    large = type(value) is int and value.bit_length() > _LARGEST_BITS
    return hex(value) if large else repr(value)  # type: ignore[arg-type]  # just tested


def _short(value: object) -> str:
    """Return a key as text, shortened if it is long."""
    text = exact_text(value[: _SHOWN_LETTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_LETTERS + 2 else f"{text[:_SHOWN_LETTERS]}…"


def short_path(path: str) -> str:
    """Return an expression, shortened in the middle if it is long."""
    half = _SHOWN_PATH // 2
    return path if len(path) <= _SHOWN_PATH else f"{path[:half]}…{path[-half:]}"
