"""The templates: where they are, and Jinja with them."""

import functools
import re
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import jinja2

FRAME: Final = "part/frame.hip.j2"
"""The template of every planned kernel."""

_MARK: Final = re.compile("\x01(.*?)\x02")


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
            if line and not line.endswith(("%}", "#}")):  # trim_blocks wants a tag's own line end
                lines[number - 1] = f"{line}\x01{template}:{number}\x02"
        return "\n".join(lines), path, is_fresh


def origins(context: dict[str, Any]) -> dict[int, str]:
    """Return for each line of a text the template, and the line there, that it comes from."""
    marked = environment(marked=True).get_template(FRAME).render(context)
    places = {}
    for number, line in enumerate(marked.split("\n"), 1):
        mark = _MARK.search(line)
        if mark:
            places[number] = mark[1]
    return places
