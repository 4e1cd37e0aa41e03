"""The example that trains adapters on a packed model."""

import re
import subprocess
import sys
from typing import Final

import pytest
import torch

from tests.support import child
from tests.support.paths import ROOT

ROW: Final = re.compile(
    r"^(\S+) +(\d+) MiB +([\d.]+) +([\d.]+) +(\d+) MiB +(\d+) MiB +[\d.]+$", re.MULTILINE
)


ON_GPU: Final = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU"),
)


@pytest.mark.serial
@pytest.mark.process
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_the_loss_falls_and_the_base_stays(device: str) -> None:
    """Both models learn the same; the packed one needs less memory."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "finetune_lora.py", f"--device={device}", "--steps=4"],
        env=child.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = ROW.findall(done.stdout)
    assert [name for name, *_ in rows] == ["Q4_0", "dequantised"]
    packed, floats = ([float(text) for text in row] for _, *row in rows)
    assert packed[0] < 0.2 * floats[0]  # MiB of the base
    assert packed[2] < packed[1] - 0.5  # the loss
    assert packed[1:3] == pytest.approx(floats[1:3], abs=0.01)
    assert packed[3] < floats[3] - 30  # the peak, in MiB
    assert done.stdout.endswith("The bytes of the base did not change.\n")
