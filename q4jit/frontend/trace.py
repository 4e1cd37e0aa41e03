"""Tracing: run a NumPy function once on symbolic arrays and keep the graph of its operations.

Symbolic arrays implement NumPy's protocols, so the function stays ordinary NumPy: helpers, closures
and loops over static values work. An operation that cannot be compiled raises a `TraceError` that
shows the user's line with a caret.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import collect_refusals, located
from q4jit.frontend.graph import Graph
from q4jit.frontend.ids import SymbolicIds
from q4jit.frontend.memory import Memory
from q4jit.frontend.refusals import refuse, show_value
from q4jit.frontend.specs import ArraySpec, IdsSpec, ScalarSpec, Signature, WeightSpec
from q4jit.frontend.symbols import SymbolicArray, SymbolicWeight

_LONGEST_NAME: Final = 40  # of a name in generated texts and the names of files


def trace(
    function: Callable[..., object], signature: Signature, keywords: tuple[str, ...] = ()
) -> Graph:
    """Run `function` on symbols of `signature` and return its graph.

    keywords: the names of the last arguments, which are passed by keyword. Raises TraceError, with
    the user's line, if the function cannot be compiled. Other errors of the function pass through.
    """
    builder = Builder(signature)
    symbols = [_symbol(builder, i) for i in range(len(signature))]
    split = len(symbols) - len(keywords)
    try:
        with collect_refusals() as refusals:
            result = function(*symbols[:split], **dict(zip(keywords, symbols[split:], strict=True)))
    except Exception as error:
        if isinstance(error.__cause__, TraceError):  # NumPy raises its own from ours
            raise error.__cause__ from None
        raise
    if refusals:  # the function caught it and took a branch that NumPy does not take
        raise refusals[0]
    name = getattr(function, "__name__", "function")
    outputs = [_output(function, builder, value) for value in _results(function, result)]
    return Graph(
        _clean_name(name),
        _argument_names(function, signature),
        signature,
        tuple(output._node for output in outputs),
        tuple(output._float_type or "f32" for output in outputs),
        returns_tuple=type(result) is tuple,
    )


def refuse_symbols(name: str, values: Iterable[object]) -> None:
    """Raise TraceError if an argument of the specialised function `name` is being traced."""
    if not {SymbolicArray, SymbolicWeight, SymbolicIds}.isdisjoint(map(type, values)):
        located(refuse)(
            f"call {name}, which is specialised itself",
            f"use {name}.py_func(...), which becomes part of this function's kernels",
        )


def _results(function: Callable[..., object], result: object) -> tuple[object, ...]:
    """Return the results of a function one by one. Raises TraceError for other collections."""
    if isinstance(result, SymbolicArray):  # before questions about the type that it shows
        return (result,)
    if type(result) is tuple:
        if not result:
            _refuse_result(function, "an empty tuple")
        return result
    if isinstance(result, tuple):  # a caller would get a plain tuple
        _refuse_result(function, f"a {type(result).__name__}", "return a plain tuple")
    if isinstance(result, list):
        _refuse_result(function, f"a list of {len(result)}", "return a tuple")
    return (result,)


def _output(function: Callable[..., object], builder: Builder, value: object) -> SymbolicArray:
    """Return one result. Raises TraceError if it is no array of numbers."""
    if not isinstance(value, SymbolicArray):
        _refuse_result(function, f"{type(value).__name__} {show_value(value)}")
    if value._builder is not builder:
        _refuse_result(function, "a value that was traced in another call")
    if value._node.is_bool:
        raise TraceError(
            "cannot return truth values (results of comparisons), because results are floats; "
            f"return np.where(…, 1.0, 0.0), and compare the result outside\n\n{value._place}"
        )
    return value


def _argument_names(function: Callable[..., object], signature: Signature) -> tuple[str, ...]:
    names = [_clean_name(name) for name in inspect.signature(function).parameters]
    distinct = len(names) == len(signature) == len(set(names))
    return tuple(names) if distinct else tuple(f"arg{i}" for i in range(len(signature)))


def _clean_name(name: str) -> str:
    clean = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_")
    clean = clean[:_LONGEST_NAME]
    return clean if clean and not clean[0].isdigit() else f"f_{clean}"


def _refuse_result(function: Callable[..., object], result: str, cure: str = "") -> NoReturn:
    code = getattr(function, "__code__", None)
    user_line = f"\n\n  File {code.co_filename!r}, line {code.co_firstlineno}" if code else ""
    message = expected(
        "an array computed from the arguments, or a tuple of them",
        result,
        where=f"result of {getattr(function, '__name__', 'the function')}",
        cure=cure,
    )
    raise TraceError(f"{message}{user_line}")


def _symbol(builder: Builder, arg: int) -> object:
    spec = builder.signature[arg]
    if isinstance(spec, ArraySpec):
        load = builder.load(arg, spec.shape)
        return SymbolicArray(builder, load, memory=Memory(True), float_type=spec.float_type)
    if isinstance(spec, WeightSpec):
        return SymbolicWeight(builder, arg)
    if isinstance(spec, IdsSpec):
        return SymbolicIds(builder, builder.ids(arg))
    if isinstance(spec, ScalarSpec):
        memory = Memory(spec.kind is np.ndarray)
        number = builder.scalar(arg)
        return SymbolicArray(builder, number, spec.kind, memory, float_type=spec.float_type)
    return spec.value
