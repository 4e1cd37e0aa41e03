"""Tracing: run a NumPy function once on symbolic arrays and keep the graph of its operations.

Symbolic arrays implement NumPy's protocols, so the function stays ordinary NumPy: helpers, closures
and loops over static values work. An operation that cannot be compiled raises a `TraceError` that
shows the user's line with a caret.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import collect_refusals, result_line
from q4jit.frontend.changes import changing_line
from q4jit.frontend.containers import Apart, Misfit, short_path
from q4jit.frontend.experts import SymbolicExperts
from q4jit.frontend.graph import Graph
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.memory import Memory
from q4jit.frontend.refusals import show_value
from q4jit.frontend.row_counts import RowCount
from q4jit.frontend.specs import (
    ArraySpec,
    IdsSpec,
    ScalarSpec,
    Signature,
    StaticSpec,
    StructureSpec,
    WeightSpec,
    names_in,
)
from q4jit.frontend.structures import (
    COMPUTED,
    FIXED,
    PassedOn,
    Results,
    changed_entry,
    is_plain,
    names_of,
    paths,
    show_tree,
    structure_of,
    unflattened,
)
from q4jit.frontend.symbols import SymbolicArray
from q4jit.frontend.weights import SymbolicWeight
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

_LONGEST_NAME: Final = 40  # of a name in generated texts and the names of files
_RESULTS: Final = (
    "an array computed from the arguments, or a tuple, list, dict, dataclass or NamedTuple of such "
    "arrays, ints, bools, floats, strs and None, and of weights and floats among the arguments"
)
_NUMPY_SCALARS: Final = {np.bool_: "bool", np.integer: "int", np.floating: "float"}


def trace(
    function: Callable[..., object], signature: Signature, keywords: tuple[str, ...] = ()
) -> Graph:
    """Run `function` on symbols of `signature` and return its graph.

    keywords: the names of the last arguments, which are passed by keyword. Raises TraceError, with
    the user's line, if the function cannot be compiled. Other errors of the function pass through.
    """
    names = names_in(signature, tuple(inspect.signature(function).parameters))
    builder = Builder(signature, names)
    symbols = tuple(_symbol(builder, i) for i in range(len(signature)))
    args = unflattened(symbols)
    try:
        with collect_refusals() as refusals:
            result = call_with(function, args, keywords)
    except Exception as error:
        if isinstance(error.__cause__, TraceError):  # NumPy raises its own from ours
            raise error.__cause__ from None
        if refusals and not isinstance(error, TraceError):  # NumPy or the function caught ours
            raise refusals[0] from error
        raise
    if refusals:  # the function caught it and took a branch that NumPy does not take
        raise refusals[0]
    refuse_change(function, symbols, args, keywords)
    arrays, results = _results(function, symbols, result)
    leaves = signature[:-1] if structure_of(symbols) else signature
    outputs = [_output(function, builder, path, value) for path, value in arrays]
    return Graph(
        _clean_name(getattr(function, "__name__", "function")),
        _argument_names(function, leaves, names_of(symbols, ())),
        leaves,
        tuple(output._node for output in outputs),
        tuple(output._float_type or "f32" for output in outputs),
        type(result) is tuple or results is not None,
        results,
    )


def call_with(function: Callable[..., Any], args: Sequence[Any], keywords: tuple[str, ...]) -> Any:
    """Call a function. keywords: the names of the last arguments, which are passed by keyword."""
    split = len(args) - len(keywords)
    return function(*args[:split], **dict(zip(keywords, args[split:], strict=True)))


def refuse_change(
    function: Callable[..., object],
    values: Sequence[object],
    args: tuple[object, ...],
    keywords: tuple[str, ...],
) -> None:
    """Raise TraceError if a function has changed a container among `args`.

    values: the flattened arguments; `args` was made from them.
    """
    entry = changed_entry(values, args)
    if entry:
        again = unflattened(values)
        line = changing_line(
            lambda: call_with(function, again, keywords), lambda: bool(changed_entry(values, again))
        )
        raise TraceError(
            f"cannot change {entry}, which belongs to the caller, because compiled calls only "
            "compute; change a copy of the container, and return the new value"
            f"\n\n{line or _definition(function)}"
        )


def _results(
    function: Callable[..., object], symbols: Sequence[object], result: object
) -> tuple[list[tuple[str, object]], Results | None]:
    """Return the computed results, each with its path, and the containers of all.

    The containers are None for an array and for a tuple of arrays. Raises TraceError for results
    that cannot be taken apart, and if there is nothing to compute.
    """
    apart = Apart()
    try:
        tree = apart.tree(result)
    except Misfit as misfit:
        where = place_of_result(function, misfit.path)
        raise TraceError(f"{misfit.message(where)}\n\n{_definition(function)}") from None
    leaves: list[object] = [COMPUTED] * len(apart.leaves)
    if tree is not None:
        positions = {id(symbol): i for i, symbol in enumerate(symbols)}
        leaves = [_known_result(positions, leaf) for leaf in apart.leaves]
    triples = zip(paths(tree, ""), apart.leaves, leaves, strict=True)
    arrays = [(path, value) for path, value, leaf in triples if leaf is COMPUTED]
    if not arrays:
        shown = show_tree(tree, (show_value(leaf) for leaf in apart.leaves))
        _refuse_result(function, "", f"only values that are known already: {short_path(shown)}")
    return arrays, None if is_plain(tree, leaves) else Results(tree, tuple(leaves))


def _known_result(positions: Mapping[int, int], value: Any) -> object:
    """Return a leaf of `Results` for a value that the function returns in a container.

    positions: of the symbols among the arguments, by id.
    """
    if type(value) in FIXED - {QuantizedTensor, ExpertTensor}:
        return value
    return PassedOn(positions[id(value)]) if is_passed_on(positions, value) else COMPUTED


def is_passed_on(given: Container[int], value: Any) -> bool:
    """Return whether a value in a container of results is an argument that comes back as it is.

    Numbers and weights do. Results are new arrays, also those without axes. given: the ids of the
    flattened arguments.
    """
    number = type(value) is SymbolicArray and not value._node.shape
    comes_back = (number and value._kind is not np.ndarray) or type(value) in {
        SymbolicWeight,
        SymbolicExperts,
    }
    return comes_back and id(value) in given


def _output(
    function: Callable[..., object], builder: Builder, path: str, value: object
) -> SymbolicArray:
    """Return one result. Raises TraceError if it is no array of numbers."""
    if not isinstance(value, SymbolicArray):
        got = f"{type(value).__name__} {show_value(value)}"
        _refuse_result(function, path, got, _cure_of_result(value))
    if value._builder is not builder:
        _refuse_result(function, path, "a value that was traced in another call")
    if value._node.op == "expand":
        raise TraceError(
            f"cannot return an array with an added axis; add it outside\n\n{_definition(function)}"
        )
    if value._node.is_bool:
        raise TraceError(
            "cannot return truth values (results of comparisons), because results are floats; "
            f"return np.where(…, 1.0, 0.0), and compare the result outside\n\n{value._place}"
        )
    return value


def _cure_of_result(value: object) -> str:
    """Return how to do without a value that cannot be a result, or ""."""
    if value is None:
        return "end the function with a return statement"
    if type(value) is RowCount:
        return "take the number of rows from the result's shape"
    kinds = [name for kind, name in _NUMPY_SCALARS.items() if isinstance(value, kind)]
    return f"use {kinds[0]}(…) in place of NumPy's number" if kinds else ""


def _argument_names(
    function: Callable[..., object], leaves: Signature, expressions: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names of a graph's arguments: those of parameters, or made of expressions."""
    if expressions:
        return _distinct([_clean_path(path) for path in expressions[: len(leaves)]])
    names = [_clean_name(name) for name in inspect.signature(function).parameters]
    distinct = len(names) == len(leaves) == len(set(names))
    return tuple(names) if distinct else tuple(f"arg{i}" for i in range(len(leaves)))


def _clean_path(path: str) -> str:
    """Return the name of a leaf: `layer_q` for `layer['q']`; of a long path it has the end."""
    clean = re.sub(r"[^0-9A-Za-z_]+", "_", path).strip("_")
    return _clean_name(clean[-_LONGEST_NAME:])


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Return names with a number at the end of each that is repeated."""
    taken: dict[str, None] = {}
    counts = Counter[str]()
    for name in names:
        candidate = name
        while candidate in taken:
            counts[name] += 1
            candidate = f"{name[: _LONGEST_NAME - 5]}_{counts[name] + 1}"
        taken[candidate] = None
    return tuple(taken)


def _clean_name(name: str) -> str:
    clean = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_")
    clean = clean[:_LONGEST_NAME]
    return clean if clean and not clean[0].isdigit() else f"f_{clean}"


def _refuse_result(
    function: Callable[..., object], path: str, got: str, cure: str = ""
) -> NoReturn:
    message = expected(_RESULTS, got, where=place_of_result(function, path), cure=cure)
    raise TraceError(f"{message}\n\n{_definition(function)}")


def place_of_result(function: Callable[..., object], path: str) -> str:
    """Return the words for a place in a function's results, for errors."""
    result = f"result of {getattr(function, '__name__', 'the function')}"
    return f"{result}, at {path.removeprefix('.')}" if path else result


def _definition(function: Callable[..., object]) -> str:
    """Return where a function is defined, for an error that has no line."""
    code = getattr(function, "__code__", None)
    return result_line(code) if code else ""


def _symbol(builder: Builder, arg: int) -> object:
    spec = builder.signature[arg]
    if isinstance(spec, ArraySpec):
        load = builder.load(arg, spec.shape)
        return SymbolicArray(builder, load, memory=Memory(True), float_type=spec.float_type)
    if isinstance(spec, WeightSpec) and spec.experts:
        return SymbolicExperts(builder, arg)
    if isinstance(spec, WeightSpec):
        return SymbolicWeight(builder, arg)
    if isinstance(spec, IdsSpec):
        return SymbolicIds(builder, builder.ids(arg))
    if isinstance(spec, ScalarSpec):
        memory = Memory(spec.kind is np.ndarray)
        number = builder.scalar(arg)
        return SymbolicArray(builder, number, spec.kind, memory, float_type=spec.float_type)
    if isinstance(spec, StructureSpec):
        return spec.structure
    assert isinstance(spec, StaticSpec)
    return spec.value
