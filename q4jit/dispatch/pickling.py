"""How decorated functions are pickled: as plain functions are, by name or by value.

`pickle` finds a function by its module and name. cloudpickle, which joblib, loky and Dask use,
sends a function of `__main__`, a lambda or a closure by value. An object does not learn which of
them pickles it, but each has its own way with functions. So a decorated function is pickled as two
plain functions: `pickle` finds them as its attributes, and cloudpickle sends their code.
"""

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, Self

_DOTTED_NAMES: Final = 4  # the first protocol of `pickle` that finds attributes of objects by name
_CURE: Final = "pickle finds functions only by name: define it in a module, or use cloudpickle"


class PickledAsFunction:
    """Base of a decorated function. It is started with `_start(function, options)`.

    Compiled kernels, locks and counts do not travel; a worker compiles, or reads the disk cache.

    Attributes:
        py_func: the undecorated function.
        options: the options of its kernels.
    """

    py_func: Any
    options: Any
    _marker: Callable[[], None]  # finds this object by name, when it is unpickled
    _holder: Callable[[], Any]  # returns the undecorated function

    def _start(self, function: Any, options: Any) -> None:
        raise NotImplementedError

    def _make_picklable(self) -> None:
        """Make the two functions; called when the object is made."""
        self._marker, self._holder = _marker(), _holder(self.py_func)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        function = self.py_func
        module = getattr(self, "__module__", None)
        name = getattr(self, "__qualname__", "")
        if _at(module, name) is self:
            if protocol < _DOTTED_NAMES:
                return str(name)
            self._name_functions(f"{name}._marker", f"{name}._holder")
            return _restored, (type(self), self._marker, self.options), self._holder
        if isinstance(function, FunctionType) and _at(module, name) is not function:
            # only cloudpickle can send it; the error of `pickle` shows this name
            self._name_functions("", f"{name} ({_CURE})")
            return _restored, (type(self), None, self.options), self._holder
        return _restored, (type(self), None, self.options), functools.partial(_same, function)

    def __setstate__(self, holder: Callable[[], Any]) -> None:
        if not hasattr(self, "py_func"):  # else it was found by name
            self._start(holder(), self.options)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def _name_functions(self, marker: str, holder: str) -> None:
        for function, name in ((self._marker, marker), (self._holder, holder)):
            function.__module__ = getattr(self, "__module__", None) or "__main__"
            function.__qualname__ = name


def _marker() -> Callable[[], None]:
    def marker() -> None:
        pass

    return marker


def _holder(function: Any) -> Callable[[], Any]:
    def holder() -> Any:
        return function

    return holder


def _same(function: Any) -> Any:
    return function


def _at(module: str | None, name: str) -> Any:
    """Return the object that a module has under a dotted name, or None."""
    value: Any = sys.modules.get(module or "")
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _restored(kind: type[PickledAsFunction], marker: Any, options: Any) -> PickledAsFunction:
    """Return the decorated function that has `marker`, or one that is still to be started."""
    if marker is not None:
        owner = _at(marker.__module__, marker.__qualname__.rpartition(".")[0])
        if isinstance(owner, kind) and owner._marker is marker:
            return owner
    made = kind.__new__(kind)
    made.options = options
    return made
