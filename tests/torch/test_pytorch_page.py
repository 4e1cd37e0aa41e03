"""docs/pytorch.md: its programs run, and print what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch

from tests.support.examples import run_example
from tests.support.paths import ROOT

PAGE: Final = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
BLOCK: Final = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
MARK: Final = "=== the next block\n"
GRAPHS, PROCESSES = "CUDA and HIP graphs", "Several GPUs"


def blocks() -> dict[str, list[tuple[str, str]]]:
    """Return the Python programs of each section, with what they print."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    return {
        text.partition("\n")[0]: [(m[1], m[2] or "") for m in BLOCK.finditer(text)]
        for text in sections
    }


def check(sections: dict[str, list[tuple[str, str]]], folder: Path) -> None:
    """Run the blocks as one program, as a reader would, and compare what each prints."""
    programs = [block for section in sections.values() for block in section]
    program = "".join(f"print({MARK!r}, end='')\n{source}\n" for source, _ in programs)
    shown = run_example(program, folder).split(MARK)[1:]
    for (source, expected), printed in zip(programs, shown, strict=True):
        assert printed == expected, source


@pytest.mark.usefixtures("inductor")
def test_the_programs_print_what_the_page_shows(tmp_path: Path) -> None:
    sections = blocks()
    assert sections.keys() > {GRAPHS, PROCESSES}
    check({n: s for n, s in sections.items() if n not in {GRAPHS, PROCESSES}}, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU")
def test_the_program_with_graphs_prints_what_the_page_shows(tmp_path: Path) -> None:
    names = ("Functions", "Weights in modules", GRAPHS)
    sections = blocks()
    check({name: sections[name] for name in names}, tmp_path)


@pytest.mark.serial
def test_the_program_for_several_processes_runs(tmp_path: Path) -> None:
    ((source, expected),) = blocks()[PROCESSES]
    assert source.startswith("# divided.py: torchrun --nproc-per-node 2 divided.py\n")
    (tmp_path / "divided.py").write_text(source, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "divided.py"]
    # as `torchrun`, which is not on the path of an environment that is not activated
    done = subprocess.run(
        run,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
