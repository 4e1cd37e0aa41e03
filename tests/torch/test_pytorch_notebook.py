"""The notebook about PyTorch runs from top to bottom, and its stored outputs match.

`pytest --update-golden` stores the outputs of this machine in it.
"""

import re
from typing import Any, Final

import pytest

from tests.support.notebooks import (
    Cell,
    check_outputs,
    check_stored,
    check_unchanged,
    execute,
    read,
    shown,
)
from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "pytorch.ipynb"
# what PyTorch logs without Triton, and without the CUDA that a variable of this machine names
SILENCED: Final = "-torch.utils.flop_counter,-torch.utils.cpp_extension"

pytestmark = pytest.mark.usefixtures("inductor")


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, inductor: None
) -> dict[str, Cell]:
    folder = tmp_path_factory.mktemp("notebook")
    update = bool(pytestconfig.getoption("--update-golden"))
    return execute(NOTEBOOK, folder, update=update, TORCH_LOGS=SILENCED)


@pytest.fixture(scope="module")
def stored(executed: dict[str, Cell]) -> Any:
    assert executed  # the fixture writes the file with --update-golden
    return read(NOTEBOOK)


def test_every_cell_runs_without_errors_and_warnings(executed: dict[str, Cell]) -> None:
    assert len(executed) >= 10
    check_outputs(executed)


def test_the_function_agrees_with_pytorch(executed: dict[str, Cell]) -> None:
    for name, bound in {"compare": 3e-6, "gradients": 1e-5}.items():
        assert "assert " in executed[name].source
        (error, *_) = re.findall(r"\d\.\de[-+]\d+", shown(executed[name]))
        assert 0 < float(error) < bound


def test_a_fused_block_is_one_node(executed: dict[str, Cell]) -> None:
    targets = shown(executed["nodes"]).split()
    assert targets.count("q4jit.call.default") == 4
    assert set(targets) == {"q4jit.call.default", "<built-in", "function", "getitem>"}
    assert re.search(r"^graphs: [12]$", shown(executed["compile"]), re.MULTILINE)


def test_the_kernels_are_shown(executed: dict[str, Cell]) -> None:
    assert shown(executed["explain"]).count("Q4_0 [576, 1536]") == 2
    assert "feed_forward" in shown(executed["source"])


def test_timings_compare_three_ways(executed: dict[str, Cell]) -> None:
    assert (
        len(
            re.findall(
                r"^ *\d+ +[\d.]+ .*times\) +[\d.]+$", shown(executed["timing"]), re.MULTILINE
            )
        )
        == 3
    )


def test_outputs_are_stored_short_and_without_paths(stored: Any) -> None:
    check_stored(stored, silent={"imports", "function"})


@pytest.mark.parametrize("name", ["model", "module", "sizes", "nodes", "source"])
def test_outputs_that_no_machine_changes_are_stored(
    executed: dict[str, Cell], stored: Any, name: str
) -> None:
    check_unchanged(stored, executed, name)
