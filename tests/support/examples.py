"""Run the programs that the README and the pages show."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.support.paths import ROOT

_BLOCK: Final = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
_MARK: Final = "=== the next block\n"

Block = tuple[str, str]
"""A Python program of a page, and what it prints."""


def python_blocks(page: Path) -> dict[str, list[Block]]:
    """Return the programs of each section of a page."""
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        text.partition("\n")[0]: [(m[1], m[2] or "") for m in _BLOCK.finditer(text)]
        for text in sections
    }


def check_blocks(blocks: Sequence[Block], folder: Path) -> None:
    """Run blocks as one program, as a reader would, and compare what each prints."""
    program = "".join(f"print({_MARK!r}, end='')\n{source}\n" for source, _ in blocks)
    shown = run_example(program, folder).split(_MARK)[1:]
    for (source, expected), printed in zip(blocks, shown, strict=True):
        assert printed == expected, source


def run_example(program: str, folder: Path) -> str:
    """Run a program in a folder, as a reader would, and return what it prints."""
    (folder / "example.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
