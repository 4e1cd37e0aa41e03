"""Programs as JSON text, which is checked field by field when it is read."""

import json
import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from q4jit.checked_json import ANYTHING, FLAG, Rule, Rules, check_fields, one_of, shown
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_BYTES, FloatType
from q4jit.frontend.graph import ELEMENTWISE
from q4jit.frontend.programs.arguments import (
    AnyArgument,
    ArrayArgument,
    IdsArgument,
    NumberArgument,
    WeightArgument,
)
from q4jit.frontend.programs.operations import (
    Operation,
    operand_counts,
    place_of_operation,
)
from q4jit.weights.formats import FORMATS

LONGEST_NAME: Final = 41
"""The letters of a name: one more than those of a graph have."""

_WHERE: Final = "program"  # how errors call the text
_VERSION: Final = 1
_MOST_LETTERS: Final = 1 << 24
_MOST_ARGUMENTS: Final = 1 << 12
_MOST_OPERATIONS: Final = 1 << 16
_MOST_LEADING: Final = 32  # NumPy broadcasts at most this many
_MOST_ELEMENTS: Final = 1 << 31  # of an axis
_SPECIAL: Final[dict[str, float]] = {
    "inf": float("inf"),
    "-inf": -float("inf"),
    "nan": float("nan"),
}
"""Numbers that JSON does not have."""


@dataclass(frozen=True)
class Content:
    """What the text of a program says.

    Attributes:
        outputs: the numbers of the operations that compute results.
        result_types: the float type of each, to which it is rounded.
    """

    name: str
    arguments: tuple[AnyArgument, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]
    result_types: tuple[FloatType, ...]


# --- rules ----------------------------------------------------------------------------------------


def _whole(least: int, end: int) -> Rule:
    return (
        lambda v: type(v) is int and least <= v < end,
        f"a whole number from {least} to {end - 1}",
    )


def _list(most: int, least: int = 0, rule: Rule | None = None) -> Rule:
    passes, values = rule or (lambda v: True, "")
    items = f", each item {values}" if values else ""
    return (
        lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(passes, v)),
        f"a list of {least} to {most} items{items}",
    )


def _is_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= LONGEST_NAME
        and value.isascii()
        and value.isidentifier()
        and not keyword.iskeyword(value)
        and value != "out"
    )


_NAME: Final[Rule] = (_is_name, f"a name of at most {LONGEST_NAME} ASCII letters, not 'out'")
_SIZE: Final = _whole(1, _MOST_ELEMENTS)
_LEADING: Final = _whole(0, _MOST_LEADING + 1)
_VALUE: Final[Rule] = (
    lambda v: type(v) in {int, float} or (isinstance(v, str) and v in _SPECIAL),
    f"a number or one of {', '.join(_SPECIAL)}",
)

_PROGRAM: Final[Rules] = {
    "q4jit": (lambda v: type(v) is int and v == _VERSION, f"version {_VERSION}"),
    "name": _NAME,
    "arguments": _list(_MOST_ARGUMENTS),
    "operations": _list(_MOST_OPERATIONS, 1),
    "outputs": _list(_MOST_ARGUMENTS, 1),
}

_ARGUMENTS: Final[dict[str, tuple[Rules, Rules]]] = {
    "array": (
        {"leading": _LEADING, "fixed": _list(2, 1, _SIZE), "type": one_of(FLOAT_BYTES)},
        {},
    ),
    "weight": ({"format": one_of(FORMATS), "k": _SIZE, "n": _SIZE}, {"experts": _SIZE}),
    "ids": ({"leading": _LEADING, "fixed": _list(1, 0, _SIZE)}, {}),
    "number": ({}, {}),
}
"""The fields of each kind of argument, and those that may be left out."""

_KNOWN: Final = frozenset(
    {
        *ELEMENTWISE,
        *("load", "scalar", "const", "matmul", "sum", "max", "inner_sum", "reshape"),
        *("dequantize", "ids", "rows"),
    }
)

_TAKES: Final[dict[str, type]] = {
    "load": ArrayArgument,
    "scalar": NumberArgument,
    "ids": IdsArgument,
    "matmul": WeightArgument,
    "dequantize": WeightArgument,
    "rows": WeightArgument,
}
"""The arguments that operations name."""


# --- writing --------------------------------------------------------------------------------------


def written(content: Content) -> str:
    """Return the text of a program: the same text for the same content."""
    outputs = zip(content.outputs, content.result_types, strict=True)
    data = {
        "q4jit": _VERSION,
        "name": content.name,
        "arguments": [_argument_data(a) for a in content.arguments],
        "operations": [_operation_data(i) for i in content.operations],
        "outputs": [{"of": number, "type": kind} for number, kind in outputs],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _argument_data(argument: AnyArgument) -> dict[str, Any]:
    match argument:
        case ArrayArgument(name, leading, fixed, float_type):
            fields = {"leading": leading, "fixed": list(fixed), "type": float_type}
            return {"kind": "array", "name": name, **fields}
        case WeightArgument(name, fmt, k, n, experts):
            fields = {"format": fmt, "k": k, "n": n} | ({"experts": experts} if experts else {})
            return {"kind": "weight", "name": name, **fields}
        case IdsArgument(name, leading, fixed):
            return {"kind": "ids", "name": name, "leading": leading, "fixed": list(fixed)}
    return {"kind": "number", "name": argument.name}


def _operation_data(operation: Operation) -> dict[str, Any]:
    data: dict[str, Any] = {"op": operation.op}
    if operation.of:
        data["of"] = list(operation.of)
    if operation.arg >= 0:
        data["arg"] = operation.arg
    if operation.op == "const":
        data["value"] = _number_data(operation.value)
    optional = {
        "start": operation.start,
        "width": operation.width,
        "transposed": operation.transposed,
        "adds_axis": operation.adds_axis,
    }
    return data | {name: value for name, value in optional.items() if value}


def _number_data(value: float) -> float | str:
    if value != value:
        return "nan"
    return next((name for name, special in _SPECIAL.items() if special == value), value)


# --- reading --------------------------------------------------------------------------------------


def read(text: object) -> Content:
    """Return the content of a text. Raises ArgumentError that names the first wrong field."""
    if not isinstance(text, str) or len(text) > _MOST_LETTERS:
        got = f"{len(text)} letters" if isinstance(text, str) else type(text).__name__
        what = f"a text of at most {_MOST_LETTERS} letters"
        raise ArgumentError(expected(what, got, where=_WHERE))
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"{shown(text)} ({type(error).__name__})"
        raise ArgumentError(expected("JSON", got, where=_WHERE)) from None
    check_fields(data, _WHERE, _PROGRAM, error=ArgumentError)
    arguments = tuple(_argument(a, i) for i, a in enumerate(data["arguments"]))
    _check_names(arguments)
    operations = tuple(_operation(n, i, arguments) for i, n in enumerate(data["operations"]))
    if not any(isinstance(a, WeightArgument) and a.experts for a in arguments):
        _check_axes(arguments, operations)
    rules: Rules = {"of": _whole(0, len(operations)), "type": one_of(FLOAT_BYTES)}
    for i, output in enumerate(data["outputs"]):
        check_fields(output, f"{_WHERE}.outputs[{i}]", rules, error=ArgumentError)
    outputs = tuple(output["of"] for output in data["outputs"])
    types = tuple(output["type"] for output in data["outputs"])
    return Content(data["name"], arguments, operations, outputs, types)


def _selected(data: Any, where: str, field: str, names: Any) -> str:
    """Return the field that says which other fields there are. Raises ArgumentError."""
    value = data.get(field) if isinstance(data, dict) else None
    passes, values = one_of(names)
    if not passes(value):
        got = shown(value if isinstance(data, dict) and field in data else data)
        raise ArgumentError(expected(values, got, where=f"{where}.{field}"))
    return str(value)


def _argument(data: Any, number: int) -> AnyArgument:
    where = f"{_WHERE}.arguments[{number}]"
    kind = _selected(data, where, "kind", _ARGUMENTS)
    rules, optional = _ARGUMENTS[kind]
    check_fields(data, where, {"kind": ANYTHING, "name": _NAME, **rules}, optional, ArgumentError)
    name = data["name"]
    match kind:
        case "array":
            return ArrayArgument(name, data["leading"], tuple(data["fixed"]), data["type"])
        case "weight":
            return WeightArgument(
                name, data["format"], data["k"], data["n"], data.get("experts", 0)
            )
        case "ids":
            return IdsArgument(name, data["leading"], tuple(data["fixed"]))
    return NumberArgument(name)


def _check_names(arguments: Sequence[AnyArgument]) -> None:
    names: dict[str, None] = {}
    for i, argument in enumerate(arguments):
        if argument.name in names:
            where = f"{_WHERE}.arguments[{i}].name"
            raise ArgumentError(expected("a name of its own", repr(argument.name), where=where))
        names[argument.name] = None


def _check_axes(arguments: Sequence[AnyArgument], operations: Sequence[Operation]) -> None:
    """Raise ArgumentError for the inner axes that values of experts have."""
    reason = "as no argument is an expert tensor"
    for i, argument in enumerate(arguments):
        most = {ArrayArgument: 1, IdsArgument: 0}.get(type(argument), 0)
        fixed = getattr(argument, "fixed", ())
        if len(fixed) > most:
            what, where = "one length" if most else "no length", f"{_WHERE}.arguments[{i}].fixed"
            raise ArgumentError(expected(f"{what}, {reason}", shown(list(fixed)), where=where))
    for i, operation in enumerate(operations):
        if operation.op == "load" and operation.adds_axis:
            where = f"{place_of_operation(i)}.adds_axis"
            raise ArgumentError(expected(f"False, {reason}", "True", where=where))


def _operation(data: Any, number: int, arguments: Sequence[AnyArgument]) -> Operation:
    where = place_of_operation(number)
    op = _selected(data, where, "op", _KNOWN)
    rules, optional = _fields(op, number, arguments)
    check_fields(data, where, {"op": ANYTHING, **rules}, optional, ArgumentError)
    of, arg = tuple(data.get("of", ())), data.get("arg", -1)
    transposed = data.get("transposed", False)
    if arg >= 0:
        _check_argument(op, where, arguments[arg], len(of), transposed)
    value = data.get("value", 0.0)
    return Operation(
        op,
        of,
        arg,
        data.get("start", 0),
        data.get("width", 0),
        _SPECIAL[value] if isinstance(value, str) else _as_float(value, where),
        transposed,
        data.get("adds_axis", False),
    )


def _fields(op: str, number: int, arguments: Sequence[AnyArgument]) -> tuple[Rules, Rules]:
    """Return the fields of an operation, and those that may be left out."""
    rules: Rules = {}
    counts = operand_counts(op)
    if counts[-1]:
        rules["of"] = _list(counts[-1], counts[0], _whole(0, number))
    if op in _TAKES:
        rules["arg"] = _whole(0, len(arguments))
    if op == "const":
        rules["value"] = _VALUE
    if op in {"load", "matmul"}:
        rules["width"] = _SIZE
    optional = {
        "load": {"start": _SIZE, "adds_axis": FLAG},
        "matmul": {"start": _SIZE, "transposed": FLAG},
        "reshape": {"adds_axis": FLAG},
    }
    return rules, optional.get(op, {})


def _check_argument(
    op: str, where: str, argument: AnyArgument, operands: int, transposed: bool
) -> None:
    """Raise ArgumentError if an operation cannot take an argument."""
    if not isinstance(argument, _TAKES[op]):
        what = {ArrayArgument: "an array", NumberArgument: "a number", IdsArgument: "ids"}
        wanted = what.get(_TAKES[op], "a weight")
        raise ArgumentError(expected(wanted, str(argument), where=f"{where}.arg"))
    if isinstance(argument, WeightArgument):
        with_ids = op == "matmul" and operands == 2
        if bool(argument.experts) is not with_ids or (with_ids and transposed):
            wanted = "an expert tensor" if with_ids else "a weight without experts"
            got = f"{argument}{', transposed' if transposed else ''}"
            raise ArgumentError(expected(wanted, got, where=f"{where}.arg"))


def _as_float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        what = "a number that float() takes"
        raise ArgumentError(expected(what, shown(value), where=f"{where}.value")) from None
