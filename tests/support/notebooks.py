"""Execute notebooks, and read the outputs of their cells."""

import json
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

CELL_SECONDS: Final = 120
# A path, but not "a / b" or "f32/f16".
ABSOLUTE_PATH: Final = re.compile(r"""(?:^|[\s'"=(\[<:])(?:/\w[\w.+~-]*/|~/|[A-Za-z]:\\)""")

Cell = Any
_read: Any = nbformat.read  # without types
_write: Any = nbformat.write


def read(path: Path) -> Any:
    """Return a notebook as it is stored."""
    return _read(path, as_version=4)


def execute(path: Path, folder: Path, *, update: bool, **environment: str) -> dict[str, Cell]:
    """Return the code cells after a run without the user's cache, settings and Jupyter kernels.

    folder: an empty one. update: store the outputs in the file. environment: of the notebook.
    """
    notebook = read(path)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("Q4JIT_CACHE_DIR", str(folder / "kernels"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        for name in ("DATA", "RUNTIME", "CONFIG"):
            patch.setenv(f"JUPYTER_{name}_DIR", str(folder / name.lower()))
        patch.setenv("IPYKERNEL_CELL_NAME", path.name)  # else errors name a temporary file
        for name, value in environment.items():
            patch.setenv(name, value)
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
            record_timing=False,
        ).execute()
    notebook.metadata.language_info = {"name": "python"}
    if update:
        _write(notebook, path)
    return code_cells(notebook)


def code_cells(notebook: Any) -> dict[str, Cell]:
    """Return the code cells by their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shown(cell: Cell) -> str:
    """Return the outputs of a cell as a reader sees them."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in cell.outputs
    )


def check_outputs(cells: dict[str, Cell], progress: Collection[str] = ()) -> None:
    """Fail unless every cell ran in order, without errors and without a text on standard error.

    progress: cells that show progress there.
    """
    for count, (name, cell) in enumerate(cells.items(), 1):
        assert cell.execution_count == count, name
        for output in cell.outputs:
            assert output.output_type in {"stream", "execute_result"}, name
            if name not in progress:
                assert output.get("name", "stdout") == "stdout", f"{name}: {output.text}"


def check_unchanged(stored: Any, executed: dict[str, Cell], name: str) -> None:
    """Fail unless a cell printed what is stored in the notebook."""
    message = "the stored output is outdated; run pytest --update-golden to change it"
    assert shown(code_cells(stored)[name]) == shown(executed[name]), message


def check_stored(notebook: Any, *, silent: set[str]) -> None:
    """Fail unless a notebook stores short outputs of every code cell, in order, and no path.

    silent: the ids of the cells that print nothing.
    """
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert bool(shown(cell)) == (name not in silent), name
        assert len(shown(cell).splitlines()) <= 32, name
    private = {str(ROOT), str(Path.home()), sys.prefix} - {os.sep}
    for text in _strings(json.loads(json.dumps(notebook))):
        # `explain()` names the device files of GPUs, which have the same names everywhere
        path = ABSOLUTE_PATH.search(re.sub(r"/dev/(kfd|dxg|nvidia\w*)", "", text))
        assert path is None, text
        assert not any(name in text for name in private), text


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
