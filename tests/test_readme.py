"""The README: its example runs as it stands, and its tables name what there is."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from q4jit import specialize
from q4jit.targets import HIP_ARCHS
from q4jit.tools.cli.main import make_parser
from tests.support.paths import ROOT
from tests.support.tools import model_file

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
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


def test_names_of_gpus_and_extras_are_accepted() -> None:
    gpus = README[README.index("## GPUs") : README.index("## Targets")]
    targets = re.findall(r'"((?:hip|cuda|cpu)(?::\w+)?)"', gpus.replace('device="cuda"', ""))
    assert {"hip", "hip:1", "hip:gfx1100", "hip:sm_90", "cuda:0", "cpu"} <= set(targets)
    for name in targets:
        specialize(lambda x: x, target=name)
    families = re.search(r"AMD's GPUs (.*) are known, of NVIDIA's (.*?)\.", gpus, re.DOTALL)
    assert families is not None
    named = set(re.findall(r"gfx\w+", families[1])) | {
        f"sm_{number}" for number in re.findall(r"\d+", families[2])
    }
    assert named <= HIP_ARCHS.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert extras == {"rocm", "cross", "nvidia", "plot"}
    assert extras <= project["optional-dependencies"].keys()


def test_every_command_is_one() -> None:
    """What the README writes after `$ q4jit` passes the parser, and so do its options elsewhere."""
    lines = re.findall(r"^\$ q4jit (.*?)(?: {2,}#.*)?$", README, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"bench", "build", "pack", "selftest", "tune"}
    parser = make_parser()
    for line in lines:
        assert parser.parse_args(shlex.split(line)).run
    aot_part = README[README.index("## Ahead-of-time builds") : README.index("## Environment")]
    build = parser.parse_args(["build", "--arch", "gfx1100", "--out", "kernels"]).parser
    for option in re.findall(r"`(--[a-z-]+)", aot_part):
        assert option in build.format_help()
