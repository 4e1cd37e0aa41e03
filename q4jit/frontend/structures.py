"""How the leaves of a call make its arguments, and how the computed arrays make its results."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit.errors import ArgumentError, expected
from q4jit.floats import is_float
from q4jit.frontend.containers import (
    LEAVES,
    MAPPINGS,
    Apart,
    Misfit,
    Tree,
    exact_text,
    fields_of,
    short_path,
    step,
    together,
)

COMPUTED: Final = object()  # stands for a leaf of results that kernels compute
FIXED: Final = LEAVES - {np.ndarray}
"""The types of leaves of results that no kernel computes."""


def paths(tree: Tree, path: str) -> Iterator[str]:
    """Yield the expression of each leaf, such as `layer['q']`; path: that of the container."""
    if tree is None:
        yield short_path(path)
        return
    kind, keys, trees = tree
    for key, entry in zip(keys or range(len(trees)), trees, strict=True):
        yield from paths(entry, path + step(kind, key))


def show_tree(tree: Tree, leaves: Iterator[str]) -> str:
    """Return the text of a container, as people write it, from the texts of its leaves."""
    if tree is None:
        return next(leaves)
    kind, keys, trees = tree
    texts = [show_tree(entry, leaves) for entry in trees]
    if kind is list:
        return f"[{', '.join(texts)}]"
    if kind is tuple:
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
    if kind in MAPPINGS:
        pairs = ", ".join(
            f"{exact_text(key)}: {text}" for key, text in zip(keys, texts, strict=True)
        )
        return f"{{{pairs}}}" if kind is dict else f"{kind.__name__}({{{pairs}}})"
    pairs = ", ".join(f"{key}={text}" for key, text in zip(keys, texts, strict=True))
    return f"{kind.__name__}({pairs})"


def classes_in(trees: Sequence[Tree]) -> list[type]:
    """Return the classes of containers that are not Python's own, in the order of the trees."""
    pending = list(trees)
    kinds: dict[type, None] = {}
    for tree in pending:
        if tree is not None:
            kinds[tree[0]] = None
            pending += tree[2]
    return [kind for kind in kinds if fields_of(kind) is not None]


# --- arguments ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """The containers of a call's arguments, without their leaves.

    Attributes:
        parameters: the names of the arguments.
        trees: their trees.
    """

    parameters: tuple[str, ...]
    trees: tuple[Tree, ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.trees)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The expressions of the leaves, and a name for the structure itself."""
        pairs = zip(self.parameters, self.trees, strict=True)
        return (*(path for name, tree in pairs for path in paths(tree, name)), "structure")

    def build(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments of a call with these leaves."""
        values = iter(leaves)
        return tuple([together(tree, values) for tree in self.trees])


_structure = functools.lru_cache(maxsize=1 << 10)(Structure)  # so that calls share its names


def flattened(args: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the leaves of arguments, and their `Structure` at the end.

    Without a container, the arguments are returned as they are. Raises ArgumentError for a
    container that cannot be taken apart.
    """
    apart = Apart()
    trees: list[Tree] = []
    for name, value in zip(names, args, strict=True):
        try:
            trees.append(apart.tree(value))
        except Misfit as misfit:
            where = f"argument {short_path(name + misfit.path)!r}"
            raise ArgumentError(misfit.message(where)) from None
    if not any(trees):
        return args
    return *apart.leaves, _structure(names, tuple(trees))


def structure_of(values: Sequence[Any]) -> Structure | None:
    """Return the structure of `flattened` arguments; None if they had no container."""
    return values[-1] if values and type(values[-1]) is Structure else None


def unflattened(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments that `flattened` has taken apart."""
    structure = structure_of(values)
    return tuple(values) if structure is None else structure.build(values[:-1])


def names_of(values: Sequence[Any], parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Return the expressions of `flattened` arguments."""
    structure = structure_of(values)
    return parameters if structure is None else structure.names


def changed_entry(values: Sequence[Any], args: tuple[Any, ...]) -> str:
    """Return an entry of `args` that is not as in `unflattened(values)`; "" if all are."""
    structure = structure_of(values)
    if structure is None:
        return ""
    now = Apart()
    for name, old, value in zip(structure.parameters, structure.trees, args, strict=True):
        try:
            same = now.tree(value) == old
        except Misfit:  # it had none when it came
            same = False
        if not same:
            return name
    pairs = zip(structure.names[:-1], values[:-1], now.leaves, strict=True)
    return next((name for name, old, new in pairs if old is not new), "")


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassedOn:
    """A leaf of results that is leaf number `index` of the arguments, unchanged."""

    index: int


@dataclass(frozen=True)
class Results:
    """The containers of a function's results.

    Attributes:
        leaves: of each leaf, its value if tracing determined it, else COMPUTED or PassedOn.
    """

    tree: Tree
    leaves: tuple[object, ...]

    def show(self, arrays: Sequence[str]) -> str:
        """Return the results as text, from the texts of the computed arrays."""
        texts = iter(arrays)
        shown = [next(texts) if leaf is COMPUTED else exact_text(leaf) for leaf in self.leaves]
        return show_tree(self.tree, iter(shown))

    @property
    def classes(self) -> list[type]:
        """The classes of containers that are not Python's own."""
        return classes_in([self.tree])

    def build(self, args: Sequence[Any], arrays: Sequence[Any]) -> Any:
        """Return the results of a call, from its flattened arguments and the computed arrays."""
        values = iter(arrays)
        leaves = [next(values) if leaf is COMPUTED else _known(leaf, args) for leaf in self.leaves]
        return together(self.tree, iter(leaves))

    def arrays(self, args: Sequence[Any], out: object) -> tuple[Any, ...]:
        """Return the arrays of `out=` for a call with these flattened arguments.

        Raises ArgumentError unless `out` has the containers, and the other leaves, of the results.
        """
        apart = Apart()
        try:
            alike = apart.tree(out) == self.tree
        except Misfit:
            alike = False
        if not alike or not all(
            leaf is COMPUTED or _same(given, _known(leaf, args))
            for leaf, given in zip(self.leaves, apart.leaves, strict=True)
        ):
            known = [(v, _known(v, args)) for v in self.leaves]
            shown = ["array" if v is COMPUTED else exact_text(value) for v, value in known]
            what = f"containers like those of the result, {show_tree(self.tree, iter(shown))}"
            raise ArgumentError(expected(short_path(what), _shown(out), where="out="))
        pairs = zip(self.leaves, apart.leaves, strict=True)
        return tuple([given for leaf, given in pairs if leaf is COMPUTED])


def results_for(result: object, out: object) -> tuple[tuple[Any, ...], Results | None]:
    """Return NumPy's results that `out=` has arrays for, and the containers of all.

    The containers are None for one array and for a tuple of arrays.
    """
    apart, given = Apart(), Apart()
    tree = apart.tree(result)
    with contextlib.suppress(Misfit):  # `arrays` refuses it
        given.tree(out)
    wanted = given.leaves if len(given.leaves) == len(apart.leaves) else apart.leaves
    leaves = tuple(
        value if _is_fixed(value) and _is_fixed(array) else COMPUTED
        for value, array in zip(apart.leaves, wanted, strict=True)
    )
    pairs = zip(apart.leaves, leaves, strict=True)
    values = tuple([value for value, leaf in pairs if leaf is COMPUTED])
    return values, None if is_plain(tree, leaves) else Results(tree, leaves)


def is_plain(tree: Tree, leaves: Sequence[object]) -> bool:
    """Return whether results are an array or a tuple of arrays."""
    computed = all(leaf is COMPUTED for leaf in leaves)
    return tree is None or (computed and tree == (tuple, (), (None,) * len(leaves)))


def _is_fixed(value: object) -> bool:
    return type(value) in FIXED or is_float(value)


def _known(leaf: object, args: Sequence[Any]) -> object:
    return args[leaf.index] if type(leaf) is PassedOn else leaf


def _same(given: object, value: object) -> bool:
    return given is value or (type(given) is type(value) and given == value)


def _shown(out: object) -> str:
    """Return what `out=` is, with its containers."""
    apart = Apart()
    try:
        tree = apart.tree(out)
    except Misfit:
        return type(out).__name__
    shown = (exact_text(v) if type(v) in FIXED else type(v).__name__ for v in apart.leaves)
    return short_path(show_tree(tree, shown))
