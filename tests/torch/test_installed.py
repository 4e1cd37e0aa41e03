"""Which PyTorch `q4jit.torch` accepts."""

import subprocess
import sys
import tomllib

import pytest
import torch

from q4jit.torch.installed import OLDEST, check_installed
from tests.support.child import environment
from tests.support.paths import ROOT

pytestmark = pytest.mark.torch


def test_the_oldest_version_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (required,) = [r for r in project["optional-dependencies"]["torch"] if r.startswith("torch")]
    assert required == f"torch>={OLDEST[0]}.{OLDEST[1]}"


@pytest.mark.parametrize("version", ["2.10.9", "1.13.1+cu117", "2.10.0a0+git1234"])
def test_an_old_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError) as caught:
        check_installed()
    assert str(caught.value) == (
        f"q4jit.torch: expected PyTorch 2.11 or newer, got {version}; "
        "run pip install 'q4jit[torch]', or pip install --upgrade torch"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cpu", "3.0.0a1", "unknown"])
def test_other_versions_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check_installed()


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("sys.modules['torch'] = None", "got none; run pip install 'q4jit[torch]'"),
        ("import torch; torch.__version__ = '2.5.0'", "got 2.5.0; run pip install"),
    ],
)
def test_importing_without_a_suitable_version(prelude: str, message: str) -> None:
    program = f"import sys; {prelude}; import q4jit.torch"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert run.returncode == 1
    assert f"ImportError: q4jit.torch: expected PyTorch 2.11 or newer, {message}" in run.stderr
