"""The templates: where they are, how Jinja loads them, and the names that they use."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import jinja2

FRAME: Final = "part/frame.hip.j2"
"""The template of every planned kernel."""

_MARK: Final = re.compile("\x01(.*?)\x02")
_NO_CODE: Final = re.compile(r"\{#.*?#\}|\{%.*?%\}|//[^\n]*", re.DOTALL)
_EXPRESSION: Final = re.compile(r"\{\{.*?\}\}")


def template_directory() -> Traversable:
    """Return the folder of templates: in the package, or beside it in a checkout.

    The package may be in a zip file.
    """
    package = resources.files("q4jit")
    inside = package / "templates"
    beside = package.parent / "templates" if isinstance(package, Path) else inside
    return inside if inside.is_dir() else beside


@functools.cache
def environment(marked: bool = False) -> jinja2.Environment:
    """Return Jinja with the templates; `marked` ones name their place at the end of each line."""
    kind = _MarkedLoader if marked else _Loader
    return jinja2.Environment(
        loader=kind(template_directory()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the text is C++; names in it are checked by `hip.values`
    )


class _Loader(jinja2.BaseLoader):
    """Load templates from a folder, which may be in a zip file."""

    def __init__(self, folder: Traversable) -> None:
        self._folder = folder

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str, Callable[[], bool]]:
        file = self._folder.joinpath(*template.split("/"))
        try:
            return file.read_text(encoding="utf-8"), str(file), lambda: True
        except OSError as error:
            raise jinja2.TemplateNotFound(template, f"{file}: {error}") from error


class _MarkedLoader(_Loader):
    """Load templates with a mark at the end of every line that reaches the text."""

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


def _texts(folder: Traversable) -> Iterator[str]:
    """Yield the texts of all templates in a folder and its folders."""
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        if child.is_dir():
            yield from _texts(child)
        elif child.name.endswith(".j2"):
            yield child.read_text(encoding="utf-8")


@functools.cache
def words() -> Words:
    """Return the names that templates use, so that no variable of a value hides one of them."""
    code = _NO_CODE.sub(" ", "\n".join(_texts(template_directory())))
    product = r"\{\{ p\.name \}\}"
    return Words(
        frozenset(re.findall(r"(?<![\w\0])[A-Za-z_]\w*", _EXPRESSION.sub("\0", code))),
        frozenset(re.findall(rf"(\w+){product}", code)),
        frozenset(re.findall(rf"{product}(\w+)", code)),
    )
