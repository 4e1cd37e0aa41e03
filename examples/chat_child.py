"""Render a chat template, in a process of its own that may not take much memory or time.

A template is a program from a downloaded file: one step of it can ask for gigabytes, or never end.
Jinja's sandbox keeps it from files and from Python's internals. The system's limits for this
process keep it from the rest, whichever operator, filter or method it uses.

chat_child.py SECONDS MEMORY_BYTES CHARACTERS < REQUEST

The request is JSON: {"template": …, "variables": {…}}. The text goes to standard output in UTF-8.
If the template fails, its error goes to standard error in one line, and the exit status is 1.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_ERROR_CHARACTERS = 300


def main(arguments: list[str]) -> int:
    """Render the template on standard input. Return the exit status."""
    seconds, memory_bytes, characters = map(int, arguments)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
    _limit(resource.RLIMIT_AS, memory_bytes)
    try:
        request = json.load(sys.stdin.buffer)
        text = render(request["template"], request["variables"], characters)
        sys.stdout.buffer.write(text.encode())  # fails for half of a surrogate pair
        return 0
    except MemoryError:
        problem = f"MemoryError: it needs over {memory_bytes >> 20} MiB"
    except Exception as error:  # noqa: BLE001 - whatever a template can cause
        problem = _in_one_line(f"{type(error).__name__}: {error}")
    sys.stderr.buffer.write(problem.encode(errors="replace"))
    return 1


def render(template: str, variables: Mapping[str, Any], characters: int) -> str:
    """Return the text of a template, as transformers' `apply_chat_template` renders it.

    Source: `_compile_jinja_template` in transformers/utils/chat_template_utils.py, version 5.24.
    Raises whatever the template raises, and TemplateError for more than `characters` characters.
    """
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    parts: list[str] = []
    length = 0
    for part in environment.from_string(template).generate(variables):
        parts.append(part)
        length += len(part)
        if length > characters:
            raise TemplateError(f"it wrote over {characters} characters")
    return "".join(parts)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which access to an unsafe attribute is an error, not an empty string."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Raise SecurityError for an attribute that could lead out of the sandbox."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} cannot be used")


class Generation(Extension):
    """The block `{% generation %}`: it marks what the model wrote, and changes no text."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the statements up to `{% endgeneration %}`, with variables of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON for a model to read. Jinja's own filter writes it for HTML, with keys sorted."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, unless it is lower already."""
    soft, hard = resource.getrlimit(kind)
    if soft == resource.RLIM_INFINITY or soft > most:
        resource.setrlimit(kind, (most, hard))


def _in_one_line(text: str) -> str:
    """Return a text without line breaks and other characters that could disturb a terminal."""
    words = " ".join(text[: 2 * MOST_ERROR_CHARACTERS].split())
    shown = "".join(character for character in words if character.isprintable())
    if len(shown) > MOST_ERROR_CHARACTERS:
        return shown[:MOST_ERROR_CHARACTERS] + "…"
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
