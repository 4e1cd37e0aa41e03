"""Run the programs that the README and the pages show."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


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
