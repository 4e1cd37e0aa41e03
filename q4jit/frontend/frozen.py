"""The values of globals and closures that a traced function reads, and whether they have changed.

Tracing freezes them. A call compares the very objects, so it sees an assignment but costs little.
"""

import dis
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np

from q4jit.frontend.containers import fields_of

_MOST_ENTRIES: Final = 64  # of a larger container, only the number of entries is compared
_MOST_OBJECTS: Final = 2_000  # so that a walk through a large program ends soon
_MOST_BYTES: Final = 1 << 12  # contents of larger arrays are not compared

_NUMBERS: Final = (bool, int, float, str, bytes, type(None), np.generic)
_MISSING: Final = object()
_STORES: Final = frozenset({"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"})


@dataclass
class Frozen:
    """The values that a function reads, as they are now.

    Attributes:
        values: numbers and strings by the expression that the function reads, with their types.
        others: the identities of all other objects, and the contents of arrays, in the same way.
        classes: those of arguments that were looked at.
        names: those of attributes that the code reads.
    """

    values: dict[str, tuple[type, Any]] = field(default_factory=dict)
    others: dict[str, object] = field(default_factory=dict)
    classes: frozenset[type] = frozenset()
    names: frozenset[str] = frozenset()
    _items: list[tuple[Any, Any, object]] = field(default_factory=list)
    _attributes: list[tuple[object, str, object]] = field(default_factory=list)
    _lengths: list[tuple[Any, int]] = field(default_factory=list)
    _sets: list[tuple[Any, frozenset[Any]]] = field(default_factory=list)
    _arrays: list[tuple[Any, bytes]] = field(default_factory=list)
    _codes: list[CodeType] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything that could change."""
        return bool(self._items or self._attributes)

    @functools.cached_property
    def unchanged(self) -> Callable[[], bool]:
        """A function that returns whether every name, entry and array has the value of then.

        It is one expression, because a loop over the values would take twice as long.
        """
        terms: list[str] = []
        known: dict[str, Any] = {"len": len}

        def compare(text: str, *objects: object) -> None:
            names = [f"o{len(known) + i}" for i in range(len(objects))]
            known.update(zip(names, objects, strict=True))
            terms.append(text.format(*names))

        for container, key, value in self._items:
            compare("{}[{}] is {}", container, key, value)
        for owner, name, value in self._attributes:
            compare(f"{{}}.{name} is {{}}", owner, value)
        for container, length in self._lengths:
            compare("len({}) == {}", container, length)
        for current, entries in self._sets:
            compare("{} == {}", current, entries)
        for array, contents in self._arrays:
            compare("{}.tobytes() == {}", array, contents)
        # the text has no part of the user's but names of attributes; a value may be deleted
        text = f"""
def unchanged():
    try:
        return {" and ".join(terms)}
    except (LookupError, AttributeError, ValueError):
        return False
"""
        exec(text, known)
        test: Callable[[], bool] = known["unchanged"]
        return test

    def same(self, other: "Frozen") -> bool:
        """Return whether the function reads the same values as at another time."""
        return self.values == other.values and self.others == other.others

    def lost(self, later: "Frozen") -> list[str]:
        """Return the expressions whose value is another one later, or is gone."""
        then = {**later.others, **later.values}
        now = {**self.others, **self.values}
        return sorted(name for name in now if name not in then or now[name] != then[name])

    def changed(self, later: "Frozen") -> list[str]:
        """Return the expressions whose value is another one later, or is there only once."""
        return sorted({*self.lost(later), *later.lost(self)})

    def numbers_changed(self, later: "Frozen") -> list[str]:
        """Return the expressions whose number or string is another one later."""
        both = self.values.keys() & later.values.keys()
        return sorted(name for name in both if self.values[name] != later.values[name])

    def numbers_set(self, later: "Frozen") -> list[str]:
        """Return those of `numbers_changed` that the function's code may have set itself."""
        changed = self.numbers_changed(later)
        if not changed:
            return []
        stores = {
            instruction.argval if instruction.opname in _STORES else "]"
            for code in later._codes
            for instruction in dis.get_instructions(code)
            if instruction.opname in _STORES or instruction.opname == "STORE_SUBSCR"
        }
        return [path for path in changed if _target(path) in stores]


def freeze(
    function: Callable[..., object],
    classes: Iterable[type] = (),
    names: frozenset[str] = frozenset(),
) -> Frozen:
    """Return the values of globals and closures that a function and its helpers read now.

    classes: of arguments, whose methods and attributes it may read too. names: of attributes that
    are known to be read, which saves walks.
    """
    classes = tuple(classes)
    while True:
        walk = _Walk(names, _package(getattr(function, "__module__", None)))
        walk.function_like(function, "")
        numbers: Counter[str] = Counter()
        for kind in classes:
            name, number = kind.__name__, numbers[kind.__name__]
            walk.class_of_argument(kind, f"{name} ({number})" if number else name)
            numbers[name] += 1
        if walk.names <= names:
            walk.frozen.classes, walk.frozen.names = frozenset(classes), names
            return walk.frozen
        names = names | walk.names  # a helper was found that reads other attributes


@dataclass
class _Walk:
    """One walk from a function to the values that it can reach.

    Attributes:
        attributes: names of attributes that the code reads; others of an object do not matter.
        package: the function's own package, which is looked at even if it is installed.
        names: those of the code that was met on this walk.
    """

    attributes: frozenset[str]
    package: str
    names: set[str] = field(default_factory=set)
    frozen: Frozen = field(default_factory=Frozen)
    _seen: dict[int, object] = field(default_factory=dict)

    def function_like(self, value: Any, path: str) -> bool:
        """Walk through a function, a method or a partial; return False for other objects."""
        prefix = f"{path}." if path else ""
        if _is_specialised(value):
            value = value.py_func
        match value:
            case MethodType():
                self.function_like(value.__func__, path)
                self._child(value.__self__, f"{prefix}self")
            case functools.partial():
                self._child(value.func, f"{prefix}func")
                self._child(value.args, f"{prefix}args")
                self._child(value.keywords, f"{prefix}keywords")
            case FunctionType():
                self._function(value, prefix)
            case _:
                return False
        return True

    def class_of_argument(self, kind: type, path: str) -> None:
        """Walk through the methods and attributes of a container's class, without its fields."""
        if not self._is_library_class(kind):
            self.frozen.others[path] = id(kind)
            self._object(kind, path, self.attributes.difference(fields_of(kind) or ()))

    def _function(self, function: FunctionType, prefix: str) -> None:
        if prefix and self._is_library(function.__module__):
            return
        inside = f"{function.__name__}: " if prefix else ""
        for code in _codes(function.__code__):
            self.frozen._codes.append(code)
            self.names.update(code.co_names)
            self.names.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
            for name in code.co_names:
                if name in function.__globals__:
                    self._item(function.__globals__, name, name)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._attribute(cell, "cell_contents", f"{inside}{name}")
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name) and prefix:  # a call passes those of the function itself
                self._attribute(function, name, f"{prefix}{name}")

    def _item(self, container: Any, key: object, path: str) -> None:
        value = container[key]
        if not self._is_library_module(value):
            self.frozen._items.append((container, key, value))
            self._child(value, path)

    def _attribute(self, owner: object, name: str, path: str) -> None:
        value = getattr(owner, name, _MISSING)
        if value is not _MISSING and not self._is_library_module(value):
            self.frozen._attributes.append((owner, name, value))
            self._child(value, path)

    def _child(self, value: object, path: str) -> None:
        """Walk on through a value that the function can reach as `path`."""
        kind = type(value)  # not isinstance(), which a traced array answers like its value
        if issubclass(kind, _NUMBERS):
            self.frozen.values.setdefault(path, (kind, value))
            return
        self.frozen.others.setdefault(path, id(value))
        if id(value) in self._seen or len(self._seen) > _MOST_OBJECTS:
            return
        self._seen[id(value)] = value  # kept, so that its id stays its own
        if issubclass(kind, dict | list | tuple | set | frozenset):
            self._container(value, path)
        elif kind is np.ndarray:
            self._array(value, path)
        elif kind.__module__.partition(".")[0] == "q4jit":  # immutable, or a specialised helper
            self.function_like(value, path)
        elif not self.function_like(value, path) and not self._is_library_class(value):
            self._object(value, path, self.attributes)

    def _array(self, value: Any, path: str) -> None:
        if value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
            self.frozen._arrays.append((value, value.tobytes()))
            self.frozen.others[path] = value.tobytes()

    def _container(self, value: Any, path: str) -> None:
        self.frozen.others[f"len({path})"] = len(value)
        if isinstance(value, set | frozenset):
            self.frozen._sets.append((value, frozenset(value)))
            self.frozen.others[path] = frozenset(value)
            return
        if not isinstance(value, tuple):
            self.frozen._lengths.append((value, len(value)))
        if len(value) > _MOST_ENTRIES:
            return
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            entry = f"{path}[{key!r}]"
            if isinstance(value, tuple):  # its entries cannot be replaced
                self._child(value[key], entry)
            else:
                self._item(value, key, entry)

    def _object(self, value: object, path: str, attributes: Iterable[str]) -> None:
        for name in sorted(attributes):
            static = inspect.getattr_static(value, name, _MISSING)
            if isinstance(static, property):
                self._child(static.fget, f"{path}.{name}.fget")
            elif isinstance(static, staticmethod | classmethod):
                self._child(static.__func__, f"{path}.{name}")
            elif isinstance(static, FunctionType) or _is_specialised(static):
                self._child(static, f"{path}.{name}")
            elif static is not _MISSING and (
                inspect.ismemberdescriptor(static) or not hasattr(type(static), "__get__")
            ):
                self._attribute(value, name, f"{path}.{name}")

    def _is_library_module(self, value: object) -> bool:
        return isinstance(value, ModuleType) and self._is_library(value.__name__)

    def _is_library_class(self, value: object) -> bool:
        return isinstance(value, type) and self._is_library(value.__module__)

    def _is_library(self, module: str | None) -> bool:
        """Return whether a module belongs to Python, NumPy, q4jit or another installed package."""
        root = _package(module)
        if root in {"numpy", "q4jit"} or root in sys.stdlib_module_names:
            return True
        file = getattr(sys.modules.get(root), "__file__", None) or ""
        return root != self.package and ("site-packages" in file or "dist-packages" in file)


def _is_specialised(value: object) -> bool:
    """Return whether a value is a specialised function, whose class is above this layer."""
    known = type(value).__module__.startswith("q4jit.")
    return known and "py_func" in getattr(value, "__dict__", ())


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _target(path: str) -> str:
    """Return the last name of `STATE.scale` or `helper: count`, and "]" of `TABLE['n']`."""
    return "]" if path.endswith("]") else path.rpartition(": ")[2].rpartition(".")[2]


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]
