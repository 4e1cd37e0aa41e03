"""The templates: where they are, how Jinja loads them, and the names that they use."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

FRAME: Final = "part/frame.hip.j2"
"""The template of every planned kernel."""

_MARK: Final = re.compile("\x01(.*?)\x02")
_NO_CODE: Final = re.compile(r"\{#.*?#\}|\{%.*?%\}|//[^\n]*", re.DOTALL)
_EXPRESSION: Final = re.compile(r"\{\{.*?\}\}")


def template_directory() -> Path:
    """Return the folder of the templates: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


@functools.cache
def environment(marked: bool = False) -> jinja2.Environment:
    """Return a Jinja that loads the templates; `marked` lines end with their file and number."""
    kind = _MarkedLoader if marked else jinja2.FileSystemLoader
    return jinja2.Environment(
        loader=kind(template_directory()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the text is C++; names in it are checked by `hip.values`
    )


class _MarkedLoader(jinja2.FileSystemLoader):
    """A loader that puts a mark at the end of every line that reaches the text."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str, Callable[[], bool]]:
        source, path, is_fresh = super().get_source(environment, template)
        lines = source.split("\n")
        for number, line in enumerate(lines, 1):
            # a tag that removes its line end must remain the last of its line
            if line and not line.endswith(("%}", "#}", "-}}")):
                lines[number - 1] = f"{line}\x01{template}:{number}\x02"
        return "\n".join(lines), path, is_fresh


def origins(context: dict[str, Any]) -> dict[int, str]:
    """Return the template and the line in it that each line of a text comes from."""
    marked = environment(marked=True).get_template(FRAME).render(context)
    lines = {}
    for number, line in enumerate(marked.split("\n"), 1):
        mark = _MARK.search(line)
        if mark:
            lines[number] = mark[1]
    return lines


@dataclass(frozen=True)
class Words:
    """The names in the templates' code.

    Attributes:
        names: whole names.
        before_product: the beginnings of words that end with a product's name.
        after_product: the ends of words that begin with a product's name.
    """

    names: frozenset[str]
    before_product: frozenset[str]
    after_product: frozenset[str]


@functools.cache
def words() -> Words:
    """Return the names that templates use, so that no variable of a value hides one of them."""
    files = sorted(template_directory().rglob("*.j2"))
    code = _NO_CODE.sub(" ", "\n".join(path.read_text("utf-8") for path in files))
    product = r"\{\{ p\.name \}\}"
    return Words(
        frozenset(re.findall(r"(?<![\w\0])[A-Za-z_]\w*", _EXPRESSION.sub("\0", code))),
        frozenset(re.findall(rf"(\w+){product}", code)),
        frozenset(re.findall(rf"{product}(\w+)", code)),
    )
