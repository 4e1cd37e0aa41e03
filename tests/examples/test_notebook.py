"""The notebook runs from top to bottom, its claims hold, and its stored outputs match.

`pytest --update-golden` stores the outputs of this machine in it.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELL_SECONDS = 120
# A path, but not "a / b" or "f32/f16".
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s'"=(\[<:])(?:/\w[\w.+~-]*/|~/|[A-Za-z]:\\)""")

Cell = Any
read: Any = nbformat.read  # without types
write: Any = nbformat.write


def code_cells(notebook: Any) -> dict[str, Cell]:
    """Return the code cells by their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shown(cell: Cell) -> str:
    """Return the outputs of a cell as a reader sees them."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in cell.outputs
    )


def strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


@pytest.fixture(scope="module")
def stored(executed: dict[str, Cell]) -> Any:
    assert executed  # the fixture writes the file with --update-golden
    return read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Cell]:
    """Return the cells after a run without the user's cache, settings and Jupyter kernels."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = read(NOTEBOOK, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("Q4JIT_CACHE_DIR", str(folder / "kernels"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        for name in ("DATA", "RUNTIME", "CONFIG"):
            patch.setenv(f"JUPYTER_{name}_DIR", str(folder / name.lower()))
        patch.setenv("IPYKERNEL_CELL_NAME", NOTEBOOK.name)  # else errors name a temporary file
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
            record_timing=False,
        ).execute()
    notebook.metadata.language_info = {"name": "python"}
    if pytestconfig.getoption("--update-golden"):
        write(notebook, NOTEBOOK)
    return code_cells(notebook)


def test_every_cell_runs_without_errors_and_warnings(executed: dict[str, Cell]) -> None:
    assert len(executed) >= 10
    for count, (name, cell) in enumerate(executed.items(), 1):
        assert cell.execution_count == count, name
        for output in cell.outputs:
            assert output.output_type in {"stream", "execute_result"}, name
            assert output.get("name", "stdout") == "stdout", f"{name}: {output.text}"


def test_the_kernels_agree_with_numpy(executed: dict[str, Cell]) -> None:
    for name, count in {"compare": 2, "where": 1}.items():
        assert "assert " in executed[name].source
        errors = [float(text) for text in re.findall(r"\d\.\de[-+]\d+", shown(executed[name]))]
        assert len(errors) == count
        assert all(0 < error < 3e-6 for error in errors), errors
    assert "(1, 1536) (5, 1536) float32" in shown(executed["calls"])


def test_weights_are_a_seventh_of_their_floats(executed: dict[str, Cell]) -> None:
    assert "Q4_0 (K, N) = (576, 1536)" in shown(executed["weights"])
    assert re.search(r"Q4_0 +497,664 +14\.1%", shown(executed["sizes"]))


def test_the_generated_code_is_shown(executed: dict[str, Cell]) -> None:
    assert "Q4_0 [576, 1536]" in shown(executed["explain"])
    assert "swiglu for cpu:x86-64-v3" in shown(executed["source"])
    assert shown(executed["loop"]).count("@multiply_add") >= 4
    counts = dict(re.findall(r"(cpu:\S+): (\d+) fused", shown(executed["assembly"])))
    assert counts.keys() == {"cpu:x86-64-v4", "cpu:aarch64"}
    assert all(int(count) > 0 for count in counts.values()), counts
    assert re.search(r"^\s+fmla\s+v\d+\.4s", shown(executed["assembly"]), re.MULTILINE)


def test_the_error_shows_the_readers_own_line(executed: dict[str, Cell]) -> None:
    lines = shown(executed["error"]).splitlines()
    assert "np.where" in lines[0]
    at = next(i for i, line in enumerate(lines) if "return y if y > 0 else" in line)
    assert lines[at + 1].strip() == "^" * len("y > 0")
    assert lines[at + 1].index("^") == lines[at].index("y > 0")


def test_scalars_do_not_recompile(executed: dict[str, Cell]) -> None:
    assert shown(executed["scalars"]).strip() == "1000 calls, 0 compilations"


def test_timings_compare_three_ways(executed: dict[str, Cell]) -> None:
    assert re.findall(r"^ *(\d+) +[\d.]+ .*times.*times", shown(executed["timing"]), re.MULTILINE)


def test_outputs_are_stored_and_short(stored: Any) -> None:
    silent = {"imports"}
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert bool(shown(cell)) == (name not in silent), name
        assert len(shown(cell).splitlines()) <= 32, name


@pytest.mark.parametrize("name", ["weights", "sizes", "source", "loop", "error"])
def test_outputs_that_no_machine_changes_are_stored(
    executed: dict[str, Cell], stored: Any, name: str
) -> None:
    message = "the stored output is outdated; run pytest --update-golden to change it"
    assert shown(code_cells(stored)[name]) == shown(executed[name]), message


def test_the_file_names_no_machine(stored: Any) -> None:
    private = {str(ROOT), str(Path.home()), sys.prefix} - {os.sep}
    for text in strings(json.loads(json.dumps(stored))):
        # `explain()` names the device files of GPUs, which have the same names everywhere
        path = ABSOLUTE_PATH.search(re.sub(r"/dev/(kfd|dxg|nvidia\w*)", "", text))
        assert path is None, text
        assert not any(name in text for name in private), text


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("File '/tmp/ipykernel_1/2.py', line 3", True),
        ("/home/user/x", True),
        ("dir=~/x", True),
        (r"C:\Users", True),
        ("g / (1 + np.exp(-g)) / 2", False),
        ("bytes/row, ../README.md, f32/f16", False),
    ],
)
def test_divisions_are_not_paths(text: str, is_path: bool) -> None:
    assert bool(ABSOLUTE_PATH.search(text)) is is_path
