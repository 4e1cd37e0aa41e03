"""The containers of results as functions that PyTorch's compiler can trace.

It traces no constant object, only functions that it finds as attributes of the decorated function.
So the containers become a function of that kind: it has displays and calls of classes only.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

from q4jit.frontend.containers import MAPPINGS, Tree, exact_text
from q4jit.frontend.structures import COMPUTED, PassedOn, Results
from q4jit.locks import BUILD

_LITERALS: Final = frozenset({bool, int, str, type(None)})
_PREFIX: Final = "_q4jit_results_"


def name_of_builder(function: Any, results: Results) -> str:
    """Return the name of an attribute of a decorated function, which is made if necessary.

    Its value is a function `build(given, made)` like `Results.build`.
    """
    # types and texts, because 1 equals True, and 0.0 equals -0.0
    key = results.tree, tuple([(type(leaf), exact_text(leaf)) for leaf in results.leaves])
    known: dict[Any, str] = function.__dict__.setdefault(f"{_PREFIX}names", {})
    with BUILD:  # no other thread takes the same name
        if key not in known:
            name = f"{_PREFIX}{len(known)}"
            setattr(function, name, builder(results))
            known[key] = name
        return known[key]


def builder(results: Results) -> Callable[[Any, Any], Any]:
    """Return a function of the leaves of a call and of its computed arrays."""
    constants: list[Any] = []

    def constant(value: object) -> str:
        if type(value) in _LITERALS or (type(value) is float and math.isfinite(value)):
            return exact_text(value)
        constants.append(value)
        return f"c{len(constants) - 1}"

    computed = iter(range(len(results.leaves)))
    leaves = (
        f"made[{next(computed)}]"
        if leaf is COMPUTED
        else f"given[{leaf.index}]"
        if isinstance(leaf, PassedOn)
        else constant(leaf)
        for leaf in results.leaves
    )
    expression = _expression(results.tree, leaves, constant)
    names = ", ".join(f"c{i}" for i in range(len(constants)))
    # the text has no part of the user's but literals, keys and names of fields, which are quoted
    text = f"""
def closure({names}):
    def build(given, made):
        return {expression}
    return build
"""
    scope: dict[str, Any] = {"new_object": _new_object}
    exec(text, scope)
    made: Callable[[Any, Any], Any] = scope["closure"](*constants)
    return made


def _expression(tree: Tree, leaves: Iterator[str], constant: Callable[[object], str]) -> str:
    """Return the text of a container. constant: returns a name for a value."""
    if tree is None:
        return next(leaves)
    kind, keys, trees = tree
    values = [_expression(entry, leaves, constant) for entry in trees]
    listed = "".join(f"{value}, " for value in values)
    if kind is list:
        return f"[{listed}]"
    if kind is tuple:
        return f"({listed})"
    if kind in MAPPINGS:
        pairs = zip(keys, values, strict=True)
        if kind is dict:
            return f"{{{''.join(f'{key!r}: {value}, ' for key, value in pairs)}}}"
        return f"{constant(kind)}([{''.join(f'({key!r}, {value}), ' for key, value in pairs)}])"
    if issubclass(kind, tuple):
        return f"tuple.__new__({constant(kind)}, ({listed}))"
    return f"new_object({constant(kind)}, {tuple(map(str, keys))!r}, ({listed}))"


def _new_object(kind: type, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    """Return an object of a dataclass, without its `__init__`."""
    made: Any = object.__new__(kind)
    for name, value in zip(names, values):  # noqa: B905 - PyTorch's compiler has no strict=
        object.__setattr__(made, name, value)  # also if the dataclass is frozen
    return made
