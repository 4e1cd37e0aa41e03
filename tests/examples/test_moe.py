"""The example of a mixture of experts."""

import re

from tests.support import child
from tests.support.paths import ROOT


def test_the_example_agrees_with_numpy() -> None:
    program = f"""
import runpy, sys
sys.argv = ["moe.py", "--tokens", "2"]
runpy.run_path({str(ROOT / "examples" / "moe.py")!r}, run_name="__main__")
"""
    printed = child.run(program)
    (difference,) = re.findall(r"largest difference from NumPy: (.*)", printed)
    assert float(difference) < 1e-5
    assert "vecmat(" in printed
