"""The notebook runs from top to bottom, its claims hold, and its stored outputs match.

`pytest --update-golden` stores the outputs of this machine in it.
"""

import re
from typing import Any

import pytest

from tests.support.notebooks import (
    ABSOLUTE_PATH,
    Cell,
    check_outputs,
    check_stored,
    check_unchanged,
    execute,
    read,
    shown,
)
from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def stored(executed: dict[str, Cell]) -> Any:
    assert executed  # the fixture writes the file with --update-golden
    return read(NOTEBOOK)


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Cell]:
    folder = tmp_path_factory.mktemp("notebook")
    return execute(NOTEBOOK, folder, update=bool(pytestconfig.getoption("--update-golden")))


def test_every_cell_runs_without_errors_and_warnings(executed: dict[str, Cell]) -> None:
    assert len(executed) >= 10
    check_outputs(executed)


def test_the_kernels_agree_with_numpy(executed: dict[str, Cell]) -> None:
    for name, count in {"compare": 2, "where": 1}.items():
        assert "assert " in executed[name].source
        errors = [float(text) for text in re.findall(r"\d\.\de[-+]\d+", shown(executed[name]))]
        assert len(errors) == count
        assert all(0 < error < 3e-6 for error in errors), errors
    assert "(1, 1536) (5, 1536) float32" in shown(executed["calls"])


def test_weights_are_a_seventh_of_their_floats(executed: dict[str, Cell]) -> None:
    assert "Q4_0 (K, N) = (576, 1536)" in shown(executed["weights"])
    assert re.search(r"Q4_0 +497,664 +14\.1%", shown(executed["sizes"]))


def test_the_generated_code_is_shown(executed: dict[str, Cell]) -> None:
    assert "Q4_0 [576, 1536]" in shown(executed["explain"])
    assert "swiglu for cpu:x86-64-v3" in shown(executed["source"])
    assert shown(executed["loop"]).count("@multiply_add") >= 4
    counts = dict(re.findall(r"(cpu:\S+): (\d+) fused", shown(executed["assembly"])))
    assert counts.keys() == {"cpu:x86-64-v4", "cpu:aarch64"}
    assert all(int(count) > 0 for count in counts.values()), counts
    assert re.search(r"^\s+fmla\s+v\d+\.4s", shown(executed["assembly"]), re.MULTILINE)


def test_the_error_shows_the_readers_own_line(executed: dict[str, Cell]) -> None:
    lines = shown(executed["error"]).splitlines()
    assert "np.where" in lines[0]
    at = next(i for i, line in enumerate(lines) if "return y if y > 0 else" in line)
    assert lines[at + 1].strip() == "^" * len("y > 0")
    assert lines[at + 1].index("^") == lines[at].index("y > 0")


def test_scalars_do_not_recompile(executed: dict[str, Cell]) -> None:
    assert shown(executed["scalars"]).strip() == "1000 calls, 0 compilations"


def test_timings_compare_three_ways(executed: dict[str, Cell]) -> None:
    assert re.findall(r"^ *(\d+) +[\d.]+ .*times.*times", shown(executed["timing"]), re.MULTILINE)


def test_outputs_are_stored_short_and_without_paths(stored: Any) -> None:
    check_stored(stored, silent={"imports"})


@pytest.mark.parametrize("name", ["weights", "sizes", "source", "loop", "error"])
def test_outputs_that_no_machine_changes_are_stored(
    executed: dict[str, Cell], stored: Any, name: str
) -> None:
    check_unchanged(stored, executed, name)


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("File '/tmp/ipykernel_1/2.py', line 3", True),
        ("/home/user/x", True),
        ("dir=~/x", True),
        (r"C:\Users", True),
        ("g / (1 + np.exp(-g)) / 2", False),
        ("bytes/row, ../README.md, f32/f16", False),
    ],
)
def test_divisions_are_not_paths(text: str, is_path: bool) -> None:
    assert bool(ABSOLUTE_PATH.search(text)) is is_path
