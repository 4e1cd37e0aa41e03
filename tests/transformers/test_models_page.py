"""docs/models.md: its first programs run, and print what the page shows."""

from pathlib import Path

import pytest

from tests.support.examples import check_blocks, python_blocks
from tests.support.paths import ROOT
from tests.support.tools import model_file

SECTIONS = ("from_gguf", "Fused layers")


@pytest.mark.model
def test_the_programs_print_what_the_page_shows(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(model_file())
    blocks = python_blocks(ROOT / "docs" / "models.md")
    check_blocks([block for name in SECTIONS for block in blocks[name]], tmp_path)
