"""Why a function is specialised again: the arguments and globals that are new, and a warning.

Compilations that never end are hard to see: every call works, and takes milliseconds instead of
microseconds. So one argument that causes many of them is named.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Final

from q4jit.errors import SpecializationWarning
from q4jit.frontend.carets import user_level
from q4jit.frontend.refusals import show_value
from q4jit.frontend.specs import (
    ArraySpec,
    Signature,
    Spec,
    StaticSpec,
    WeightSpec,
    names_in,
    structure_in,
)
from q4jit.frontend.structures import Structure
from q4jit.locks import BUILD

MOST_VALUES: Final = 8  # specialisations that one argument may cause without a warning
_MOST_WEIGHTS: Final = 256  # sets of weights whose last signature is remembered

_SEE_ALSO: Final = "Q4JIT_DEBUG=1 lists them"


class Causes:
    """Tells what is new in the signatures of one function, and counts it per argument."""

    def __init__(self, name: str, parameters: Sequence[str]) -> None:
        self._name, self._parameters = name, parameters
        # by containers and the specs of the weights, because x changes with them
        self._last: dict[tuple[Structure | None, tuple[Spec, ...]], Signature] = {}
        self._values: dict[str, set[object]] = {}  # new ones of each argument, up to the limit
        self._changes: dict[str, int] = {}  # of each global
        self._changed = ""

    def of(self, signature: Signature) -> str:
        """Return what is new in a signature, and warn of arguments that are new too often."""
        names = names_in(signature, self._parameters)
        weights = tuple(spec for spec in signature if isinstance(spec, WeightSpec))
        kind = (structure_in(signature), weights)
        with BUILD:
            before = self._last.pop(kind, None)
            known = before or next(reversed(self._last.values()), None)
            if len(self._last) >= _MOST_WEIGHTS:
                del self._last[next(iter(self._last))]
            self._last[kind] = signature
            if known is None:
                return self._changed or "it is the first call"
            if structure_in(signature) != structure_in(known):
                return "the containers of its arguments are new"
            new = [i for i, spec in enumerate(signature) if spec != known[i]]
            often = [i for i in new if before and self._exceeds(names[i], signature[i], before[i])]
        for i in often:
            self._warn(_advice(names[i], signature[i]))
        changes = (
            f"argument {names[i]!r} is {_shown(signature[i])}, was {_shown(known[i])}" for i in new
        )
        return "; ".join(changes) or "it was forgotten"

    def globals_changed(self, names: Iterable[str]) -> None:
        """Note that globals or closure values have changed, and warn if one does so too often."""
        with BUILD:
            names = sorted(names)
            self._last.clear()
            self._changed = f"{', '.join(names)} changed"
            for name in names:
                self._changes[name] = self._changes.get(name, 0) + 1
            often = [name for name in names if self._changes[name] == MOST_VALUES + 1]
        if often:
            self._warn(
                f"{' and '.join(often)} changed more than {MOST_VALUES} times, and each change "
                "traces the function again; pass it as an argument: kernels read a float or an "
                "array when they run"
            )

    def _exceeds(self, name: str, spec: Spec, before: Spec) -> bool:
        """Count a new spec of an argument; return whether this is the first beyond the limit."""
        value, values = _variable_part(spec), self._values.setdefault(name, set())
        if value in {None, _variable_part(before)} or len(values) > MOST_VALUES:
            return False
        values.add(value)
        return len(values) > MOST_VALUES

    def _warn(self, text: str) -> None:
        warnings.warn(
            f"{self._name}(): {text}. {_SEE_ALSO}", SpecializationWarning, stacklevel=user_level()
        )


def _variable_part(spec: Spec) -> object:
    """Return the part of a spec that may have any number of values; None: it has few."""
    if isinstance(spec, StaticSpec):
        return spec
    return spec.shape[-1] if isinstance(spec, ArraySpec) else None


def _advice(name: str, spec: Spec) -> str:
    """Return what an argument does too often, and the cure."""
    if isinstance(spec, ArraySpec):
        what, cure = "lengths of the last axis", "pad it to a few lengths"
    elif isinstance(spec, StaticSpec) and spec.kind is int:
        what = "int values"
        cure = (
            f"pass float({name}), which kernels read when they run, or keep the values few if they "
            "choose slices or branches"
        )
    else:
        what, cure = "values", "keep them few, or pass numbers as floats or arrays"
    return (
        f"argument {name!r} has had more than {MOST_VALUES} {what}, and the function is traced for "
        f"each, and compiled if its kernels differ; {cure}"
    )


def _shown(spec: Spec) -> str:
    if isinstance(spec, StaticSpec):
        return show_value(spec.value)
    f16 = not isinstance(spec, WeightSpec) or spec.suits_f16
    return f"{spec}{'' if f16 else ' that f16 is too coarse for'}"
