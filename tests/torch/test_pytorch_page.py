"""docs/pytorch.md: its programs run, and print what the page shows."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest
import torch

from tests.support.examples import check_blocks, python_blocks
from tests.support.paths import ROOT

PAGE: Final = ROOT / "docs" / "pytorch.md"
GRAPHS, PROCESSES = "CUDA and HIP graphs", "Several GPUs"


def check(names: Iterable[str], folder: Path) -> None:
    """Run the programs of sections, and compare what they print."""
    sections = python_blocks(PAGE)
    check_blocks([block for name in names for block in sections[name]], folder)


@pytest.mark.usefixtures("inductor")
def test_the_programs_print_what_the_page_shows(tmp_path: Path) -> None:
    names = list(python_blocks(PAGE))
    assert {*names} > {GRAPHS, PROCESSES}
    check([name for name in names if name not in {GRAPHS, PROCESSES}], tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU")
def test_the_program_with_graphs_prints_what_the_page_shows(tmp_path: Path) -> None:
    check(("Functions", "Weights in modules", GRAPHS), tmp_path)


@pytest.mark.serial
def test_the_program_for_several_processes_runs(tmp_path: Path) -> None:
    ((source, expected),) = python_blocks(PAGE)[PROCESSES]
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
