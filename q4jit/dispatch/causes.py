"""Why a function is specialised again: the arguments and globals that are new, and a warning.

Compilations that never end are hard to see: every call works, and takes milliseconds instead of
microseconds. So one argument that causes many of them is named.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from q4jit.errors import SpecializationWarning
from q4jit.frontend.carets import user_level
from q4jit.frontend.containers import MAPPINGS, Tree, short_path, step
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
        # new ones of each argument, up to the limit, and new containers of each
        self._values: dict[str, set[object]] = {}
        self._trees: dict[str, set[object]] = {}
        self._changes: dict[str, int] = {}  # of each global
        self._changed = ""

    def of(self, signature: Signature) -> str:
        """Return what is new in a signature, and warn of arguments that are new too often."""
        names = names_in(signature, self._parameters)
        weights = tuple(spec for spec in signature if isinstance(spec, WeightSpec))
        kind = (structure_in(signature), weights)
        with BUILD:
            alike = [s for (_, same), s in self._last.items() if same == weights]
            before = self._last.pop(kind, None)
            known = before or next(reversed(self._last.values()), None)
            if len(self._last) >= _MOST_WEIGHTS:
                del self._last[next(iter(self._last))]
            self._last[kind] = signature
            if known is None:
                return self._changed or "it is the first call"
            advice = list(self._of_containers(signature, alike[-1])) if alike else []
            if structure_in(signature) == structure_in(known):
                new = [i for i, spec in enumerate(signature) if spec != known[i]]
                changes = "; ".join(
                    f"argument {names[i]!r} is {_shown(signature[i])}, was {_shown(known[i])}"
                    for i in new
                )
                advice += [
                    _advice(names[i], signature[i])
                    for i in new
                    if before and self._exceeds(names[i], signature[i], before[i])
                ]
            else:
                changes = "the containers of its arguments are new"
        for text in advice:
            self._warn(text)
        return changes or "it was forgotten"

    def _of_containers(self, signature: Signature, before: Signature) -> Iterator[str]:
        """Count new containers of each argument; yield what to do about those beyond the limit."""
        trees = zip(*map(self._trees_in, (signature, before)), strict=True)
        for name, (tree, old) in zip(self._parameters, trees, strict=True):
            known = self._trees.setdefault(name, set())
            if tree not in {None, old} and _is_first_beyond(known, tree):
                path, kind = _difference(name, tree, old)
                yield _advice_of_containers(path, kind)

    def _trees_in(self, signature: Signature) -> tuple[Tree, ...]:
        structure = structure_in(signature)
        return (None,) * len(self._parameters) if structure is None else structure.trees

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
        return value not in {None, _variable_part(before)} and _is_first_beyond(values, value)

    def _warn(self, text: str) -> None:
        warnings.warn(
            f"{self._name}(): {text}. {_SEE_ALSO}", SpecializationWarning, stacklevel=user_level()
        )


def _is_first_beyond(values: set[object], value: object) -> bool:
    """Count a value, up to the limit; return whether it is the first beyond."""
    if len(values) > MOST_VALUES:
        return False
    values.add(value)
    return len(values) > MOST_VALUES


def _difference(path: str, tree: Tree, old: Tree) -> tuple[str, type]:
    """Return the first container that is not as before, as an expression, and its class.

    Only its own keys or length differ, or something that has become a container.
    """
    while tree is not None and old is not None and tree[:2] == old[:2]:
        kind, keys, entries = tree
        if len(entries) != len(old[2]):
            break
        pairs = zip(keys or range(len(entries)), entries, old[2], strict=True)
        key, tree, old = next(pair for pair in pairs if pair[1] != pair[2])
        path += step(kind, key)
    return short_path(path), type(None) if tree is None else tree[0]


def _advice_of_containers(path: str, kind: type) -> str:
    """Return what a container does too often, and the cure."""
    if kind in MAPPINGS:
        what, cure = "sets of keys", "use a fixed set of keys, in one order"
    elif kind in {list, tuple}:
        what, cure = "lengths", f"pad the {kind.__name__} to a few lengths"
    else:
        what, cure = "kinds of containers", "keep them few"
    return _too_many(path, what, cure)


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
    return _too_many(name, what, cure)


def _too_many(name: str, what: str, cure: str) -> str:
    return (
        f"argument {name!r} has had more than {MOST_VALUES} {what}, and the function is traced for "
        f"each, and compiled if its kernels differ; {cure}"
    )


def _shown(spec: Spec) -> str:
    if isinstance(spec, StaticSpec):
        return show_value(spec.value)
    f16 = not isinstance(spec, WeightSpec) or spec.suits_f16
    return f"{spec}{'' if f16 else ' that f16 is too coarse for'}"
