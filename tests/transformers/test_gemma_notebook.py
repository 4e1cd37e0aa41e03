"""The notebook about Gemma runs from top to bottom, and its stored outputs match.

`pytest --update-golden` stores the outputs of this machine in it.
"""

import re
import shutil
from typing import Any

import pytest

from tests.support.notebooks import (
    Cell,
    check_outputs,
    check_stored,
    check_unchanged,
    execute,
    read,
    shown,
)
from tests.support.paths import ROOT
from tests.support.tools import gemma_file

NOTEBOOK = ROOT / "examples" / "gemma.ipynb"
SILENCED = "ignore:IProgress not found"  # by tqdm, which transformers loads, without ipywidgets

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Cell]:
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(gemma_file(), folder / "gemma.gguf")  # or else it is assembled once more
    update = bool(pytestconfig.getoption("--update-golden"))
    return execute(NOTEBOOK, folder, update=update, PYTHONWARNINGS=SILENCED)


@pytest.fixture(scope="module")
def stored(executed: dict[str, Cell]) -> Any:
    assert executed  # the fixture writes the file with --update-golden
    return read(NOTEBOOK)


def test_every_cell_runs_without_errors_and_warnings(executed: dict[str, Cell]) -> None:
    assert len(executed) >= 8
    check_outputs(executed, progress={"load"})


def test_the_text_stays_the_same(executed: dict[str, Cell]) -> None:
    assert "one weight for both: True" in shown(executed["memory"])
    assert "the same text: True" in shown(executed["fuse"])
    speeds = re.findall(r"([\d.]+) (?:tokens/s )?with", shown(executed["timing"]))
    assert len(speeds) == 2
    assert all(float(speed) > 0 for speed in speeds)


def test_outputs_are_stored_short_and_without_paths(stored: Any) -> None:
    check_stored(stored, silent={"imports"})


@pytest.mark.parametrize("name", ["file", "memory", "text", "fuse"])
def test_outputs_that_no_machine_changes_are_stored(
    executed: dict[str, Cell], stored: Any, name: str
) -> None:
    check_unchanged(stored, executed, name)
