"""Specialised functions that a traced function calls: they become part of its graph."""

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Final, Protocol

from q4jit.arrays.libraries import with_views
from q4jit.dispatch.options import Options
from q4jit.errors import ArgumentError, TraceError
from q4jit.frontend.carets import located, user_line
from q4jit.frontend.containers import Apart, Misfit, Tree, together
from q4jit.frontend.experts import SymbolicExperts, SymbolicIndexed
from q4jit.frontend.graph import Node
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.refusals import refuse, refuse_other_trace
from q4jit.frontend.row_counts import RowCount
from q4jit.frontend.structures import flattened, names_of, unflattened
from q4jit.frontend.symbols import SymbolicArray
from q4jit.frontend.trace import call_with, is_passed_on
from q4jit.frontend.weights import SymbolicTranspose, SymbolicWeight
from q4jit.precision import BOUNDS

_WITH_BUILDER: Final = frozenset(
    {
        SymbolicArray,
        SymbolicWeight,
        SymbolicTranspose,
        SymbolicExperts,
        SymbolicIndexed,
        SymbolicIds,
    }
)
_SYMBOLS: Final = _WITH_BUILDER | {RowCount}

_outer: ContextVar[Options | None] = ContextVar("outer", default=None)


@contextlib.contextmanager
def tracing(options: Options) -> Iterator[None]:
    """Trace a function with these options in this context; they hold for the functions inside."""
    token = _outer.set(options)
    try:
        yield
    finally:
        _outer.reset(token)


def hold_symbols(values: Sequence[object]) -> bool:
    """Return whether flattened arguments belong to a function that is being traced."""
    return not _SYMBOLS.isdisjoint(map(type, values))


class Helper(Protocol):
    """A specialised function, whose module imports this one."""

    @property
    def py_func(self) -> Callable[..., Any]:
        """The undecorated function."""
        ...

    options: Options
    _name: str
    _parameters: tuple[str, ...]
    _keywords: tuple[str, ...]


def trace_through(helper: Helper, args: tuple[Any, ...], leaves: Sequence[Any], out: object) -> Any:
    """Return the traced result of a specialised function that a traced one calls.

    leaves: those of `args`. Raises TraceError unless the outer function's target and precision are
    good enough for the inner one, and ArgumentError unless products and results have its K and N.
    """
    name, options = helper._name, helper.options
    _check_call(name, options, out)
    _check_leaves(name, leaves)
    builders = [leaf._builder for leaf in leaves if type(leaf) in _WITH_BUILDER]
    known = builders[0].products if builders else []
    start = len(known)
    result = call_with(helper.py_func, args, helper._keywords)
    products = known[start:]
    if products:
        _check_precision(name, options)
    tree, values = _taken_apart(name, result)
    _check_sizes(name, options, values, products)
    given = frozenset(map(id, leaves)) if tree is not None else ()
    return together(tree, (_as_returned(given, value) for value in values))


@located
def _check_leaves(name: str, leaves: Sequence[Any]) -> None:
    # outside of a trace, too, a transpose is no argument
    if SymbolicTranspose in map(type, leaves):
        refuse(f"pass a transpose to {name}", "pass w, and write w.T in that function")


@located
def _taken_apart(name: str, result: object) -> tuple[Tree, list[Any]]:
    apart = Apart()
    try:
        return apart.tree(result), apart.leaves
    except Misfit as misfit:
        raise TraceError(misfit.message(f"result of {name}")) from None


def _as_returned(given: Container[int], value: Any) -> Any:
    """Return a leaf of a traced result as a compiled call returns it: arrays are new ones."""
    if type(value) is not SymbolicArray or is_passed_on(given, value):
        return value
    return SymbolicArray(value._builder, value._node, float_type=value._float_type or "f32")


def leaves_to_prepare(
    function: Helper, args: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the leaves of a call to prepare, with views, and its arguments in new containers.

    Raises ArgumentError, and TraceError if the arguments are being traced.
    """
    leaves = flattened(args, function._parameters)
    if hold_symbols(leaves):
        located(refuse)(
            f"prepare calls of {function._name} while a function is traced",
            f"call {function._name} itself",
        )
    names = names_of(leaves, function._parameters)
    return with_views(leaves, names), unflattened(leaves)


@located
def _check_call(name: str, options: Options, out: object) -> None:
    outer = _outer.get()
    if outer is None:
        refuse_other_trace()
    if out is not None:
        refuse(f"pass out= to {name} while a function is traced", "use the result that it returns")
    if options.target not in {None, outer.target}:
        refuse(
            f"trace through {name}, whose target is {options.target!r}, in a function with "
            f"target={outer.target!r}",
            f"use {name}.py_func(...) to run it where the outer function runs",
        )


def _check_sizes(
    name: str, options: Options, values: Sequence[Any], products: Sequence[Node]
) -> None:
    try:
        options.check([v._node for v in values if type(v) is SymbolicArray], products, name)
    except ArgumentError as error:
        raise ArgumentError(f"{error}\n\n{user_line()}".rstrip()) from None


@located
def _check_precision(name: str, options: Options) -> None:
    outer = _outer.get()
    if outer is not None and BOUNDS[outer.precision] > BOUNDS[options.precision]:
        refuse(
            f"trace through {name}, whose precision is {options.precision!r}, in a function with "
            f"precision={outer.precision!r}",
            f"use {name}.py_func(...) for a product that is less exact",
        )
