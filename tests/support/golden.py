"""Files of generated text that are reviewed like code."""

import difflib
from pathlib import Path

import pytest


def check_golden(path: Path, text: str, *, update: bool) -> None:
    """Fail unless the file at `path` holds `text`; with `update`, write the text instead."""
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    if not path.exists():
        pytest.fail(f"{path} does not exist; to write it: pytest --update-golden")
    wanted = path.read_text(encoding="utf-8")
    if wanted != text:
        diff = difflib.unified_diff(
            wanted.splitlines(), text.splitlines(), str(path), "generated", lineterm=""
        )
        lines = "\n".join(diff) or "(only the line ends differ)"
        pytest.fail(f"the generated text changed; to accept it: pytest --update-golden\n{lines}")
