"""The README: its example prints what it shows, and its commands and names exist."""

import re
import shlex
import tomllib
from pathlib import Path

from q4jit import specialize
from q4jit.tools.cli.main import make_parser
from tests.support.examples import run_example
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 120


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_the_quick_start_prints_what_it_shows(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (shown,) = re.findall(r"```text\n(\(1, .*?)```", README, re.DOTALL)
    assert run_example(program, tmp_path) == shown


def test_targets_and_extras_are_accepted() -> None:
    for name in re.findall(r'"((?:hip|cuda|cpu)(?::\w+)?)"', README):
        specialize(lambda x: x, target=name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert {"rocm", "cross", "nvidia", "torch", "transformers"} == extras
    assert extras <= project["optional-dependencies"].keys()


def test_every_command_parses() -> None:
    lines = re.findall(r"^\$ q4jit (.*?)(?: {2,}#.*)?$", README, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {
        "bench",
        "build",
        "cache",
        "doctor",
        "inspect",
        "pack",
        "selftest",
        "tune",
    }
    parser = make_parser()
    for line in lines:
        assert parser.parse_args(shlex.split(line)).run
