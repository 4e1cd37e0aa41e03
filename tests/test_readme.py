"""The README: its example runs as it stands, and its tables name what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tools import model_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path) -> None:
    example, _on_a_gpu = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "model.gguf").symlink_to(model_file())
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "define void @q4jit_swiglu(ptr %args)" in done.stdout
    assert "// swiglu for hip:gfx1100, gemv" in done.stdout
    assert "fmla" in done.stdout
    assert "v1 = v0 @ gate    Q4_1 [576, 1536]" in done.stdout


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^@[A-Z]+@$", README, re.MULTILINE) == []


def test_every_environment_variable_is_in_the_table() -> None:
    read = set(re.findall(r"Q4JIT_\w+", (ROOT / "q4jit" / "config.py").read_text("utf-8")))
    assert read == set(re.findall(r"^\| `(Q4JIT_\w+)`", README, re.MULTILINE))


def test_every_module_is_in_the_table() -> None:
    modules = {path.stem for path in (ROOT / "q4jit").glob("*.py")} - {"__init__"}
    modules |= {path.name for path in (ROOT / "q4jit").iterdir() if (path / "__init__.py").exists()}
    table = README[README.index("| module | job |") : README.index("## GPUs")]
    assert modules == set(re.findall(r"`(\w+)`", table)) - {"QuantizedTensor", "quantize"}
