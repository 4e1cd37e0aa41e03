"""The templates: where they are, and Jinja with them."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jinja2

FRAME: Final = "part/frame.hip.j2"
"""The template of every planned kernel."""

_MARK: Final = re.compile("\x01(.*?)\x02")


def template_directory() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


@functools.cache
def environment(marked: bool = False) -> jinja2.Environment:
    """Jinja with the templates; `marked` ones say at the end of each line where it stands."""
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
    """Loads templates with a mark at the end of every line that reaches the text."""

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
    """For each line of a text the template and the line there that it was written by."""
    marked = environment(marked=True).get_template(FRAME).render(context)
    places = {}
    for number, line in enumerate(marked.split("\n"), 1):
        mark = _MARK.search(line)
        if mark:
            places[number] = mark[1]
    return places
