"""Read JSON that q4jit did not write itself: check every field, and name the one that is wrong."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from q4jit.errors import FormatError, Q4JitError, expected
from q4jit.files import UnsuitableError, read_regular

_MOST_BYTES: Final = 64 << 20  # of a file; reports of q4jit bench take less than a MiB
_SHOWN_LETTERS: Final = 200

Rule = tuple[Callable[[Any], bool], str]
"""A test of a value, and the values that pass it in words."""
Rules = dict[str, Rule]


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file; errors call it `what`. Raises FormatError and OSError."""
    try:
        return json.loads(read_regular(path, _MOST_BYTES).decode())
    except UnsuitableError as error:
        raise FormatError(str(error)) from None
    except (ValueError, RecursionError) as error:
        got = f"text that is not JSON ({error})"
        raise FormatError(expected(what, got, where=str(path))) from None


def check_fields(
    data: Any,
    where: str,
    rules: Rules,
    optional: Rules | None = None,
    error: type[Q4JitError] = FormatError,
) -> None:
    """Raise `error` unless `data` has every field of `rules`, and no others than `optional`."""
    optional = optional or {}
    if not isinstance(data, dict) or not rules.keys() <= data.keys() <= (rules | optional).keys():
        names = f"the fields {shown(sorted(rules))}"
        if optional:
            names += f" and perhaps {shown(sorted(optional))}"
        got = shown(sorted(data) if isinstance(data, dict) else data)
        raise error(expected(names, got, where=where))
    for name, (passes, values) in (rules | optional).items():
        if name in data and not passes(data[name]):
            raise error(expected(values, shown(data[name]), where=f"{where}.{name}"))


def shown(value: Any) -> str:
    """Return a value as errors print it: in ASCII, shortened if it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 1]}…"


# --- rules ----------------------------------------------------------------------------------------


ANYTHING: Final[Rule] = (lambda v: True, "anything")
COUNT: Final[Rule] = (lambda v: type(v) is int and 0 < v < 1 << 63, "a whole number from 1")
FLAG: Final[Rule] = (lambda v: isinstance(v, bool), "true or false")
TEXT: Final[Rule] = (lambda v: isinstance(v, str) and v != "", "a text")


def one_of(names: Collection[str]) -> Rule:
    """Return a rule that accepts some names."""
    return lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}"


def or_null(rule: Rule) -> Rule:
    """Return a rule that accepts null as well."""
    passes, values = rule
    return lambda v: v is None or passes(v), f"{values}, or null"


def list_of(rule: Rule) -> Rule:
    """Return a rule that accepts a list of at least one value, if `rule` accepts each of them."""
    passes, values = rule
    return (
        lambda v: isinstance(v, list) and bool(v) and all(map(passes, v)),
        f"a list that is not empty, each item {values}",
    )
