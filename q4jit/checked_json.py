"""JSON from elsewhere: every field is checked, and an error says what was found and accepted."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from q4jit.errors import FormatError, Q4JitError

_SHOWN_LETTERS: Final = 200

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is accepted, and what is, in words."""
Rules = dict[str, Rule]


def read_json(path: Path, what: str) -> Any:
    """Return what a JSON file holds; `what` names it in errors. Raises FormatError and OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: found no JSON ({error}), accepted is {what}") from None


def check_fields(
    data: Any,
    where: str,
    rules: Rules,
    optional: Rules | None = None,
    error: type[Q4JitError] = FormatError,
) -> None:
    """Raise `error` unless `data` has the fields of `rules`, and of others only `optional`."""
    optional = optional or {}
    if not isinstance(data, dict) or not rules.keys() <= data.keys() <= (rules | optional).keys():
        found = shown(sorted(data) if isinstance(data, dict) else data)
        more = f", and perhaps {shown(sorted(optional))}" if optional else ""
        raise error(f"{where}: found {found}, accepted is {shown(sorted(rules))}{more}")
    for name, (accepts, accepted) in (rules | optional).items():
        if name in data and not accepts(data[name]):
            raise error(f"{where}.{name}: found {shown(data[name])}, accepted is {accepted}")


def shown(value: Any) -> str:
    """Return a value as errors print it: in ASCII, and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 1]}…"


# --- rules ----------------------------------------------------------------------------------------


ANYTHING: Final[Rule] = (lambda v: True, "anything")
COUNT: Final[Rule] = (lambda v: type(v) is int and 0 < v < 1 << 63, "a whole number from 1")
FLAG: Final[Rule] = (lambda v: isinstance(v, bool), "true or false")
TEXT: Final[Rule] = (lambda v: isinstance(v, str) and v != "", "a text")


def one_of(names: Collection[str]) -> Rule:
    """Return the rule of a value that is one of some names."""
    return lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}"


def or_null(rule: Rule) -> Rule:
    """Return the rule of a value that may be missing."""
    accepts, accepted = rule
    return lambda v: v is None or accepts(v), f"{accepted}, or null"


def list_of(rule: Rule) -> Rule:
    """Return the rule of a list that is not empty."""
    accepts, accepted = rule
    return (
        lambda v: isinstance(v, list) and bool(v) and all(map(accepts, v)),
        f"a list, of which each is {accepted}",
    )
