"""Exported programs: equal bits with any number of rows, also in another process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q4jit import specialize
from tests.support.torch import cases
from tests.support.torch.cases import CASES, GATE, PLAIN, UP, Case, K, floats
from tests.support.torch.equal import assert_same

ROWS = (1, 2, 17, 200)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
either = pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])


class Calls(nn.Module):
    """A module that makes the calls of some cases, one after the other."""

    def __init__(self, *cases: Case) -> None:
        super().__init__()
        self.cases = cases
        self.weights = nn.ModuleList([GATE, UP])  # others are constants

    def forward(self, *given: tuple[Tensor, ...]) -> Any:
        pairs = zip(self.cases, given, strict=True)
        return [case.call(*tensors) for case, tensors in pairs]


def exported(calls: Calls, strict: bool) -> torch.export.ExportedProgram:
    given = tuple(case.tensors(3) for case in calls.cases)
    dynamic = tuple(
        tuple({} if i in case.fixed else {0: torch.export.Dim.DYNAMIC} for i in range(len(tensors)))
        for case, tensors in zip(calls.cases, given, strict=True)
    )
    return torch.export.export(calls, given, dynamic_shapes={"given": dynamic}, strict=strict)


@every_case
@either
def test_an_exported_program_gives_equal_bits(case: Case, strict: bool) -> None:
    calls = Calls(case)
    program = exported(calls, strict).module()
    for m in ROWS:
        assert_same(program(case.tensors(m)), calls(case.tensors(m)))


LOADED = """
import sys
import torch
import q4jit.torch

program = torch.export.load(sys.argv[1]).module()
calls = torch.load(sys.argv[2])
torch.save([program(*given) for given in calls], sys.argv[3])
assert not any(name.startswith("tests") for name in sys.modules)
"""


@pytest.mark.process
@either
def test_a_saved_program_runs_in_another_process(strict: bool, tmp_path: Path) -> None:
    calls = Calls(*(case for case in CASES if case.call is not cases.containers_of_results))
    given = [tuple(case.tensors(m) for case in calls.cases) for m in ROWS]
    program, tensors, results = (str(tmp_path / name) for name in ("p.pt2", "in.pt", "out.pt"))
    torch.export.save(exported(calls, strict), program)
    torch.save(given, tensors)
    command = [sys.executable, "-c", LOADED, program, tensors, results]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    for made, tensors_of in zip(torch.load(results), given, strict=True):
        assert_same(made, calls(*tensors_of))


@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch 2.11
def test_a_program_is_compiled_ahead_of_time(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = GATE

        def forward(self, x: Tensor) -> Any:
            return cases.gated(torch.relu(x), self.gate, PLAIN) * 2

    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Gated(), (floats(3, K),), dynamic_shapes=shapes)
    package = str(tmp_path / "gated.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    for m in ROWS:
        assert_same(loaded(floats(m, K)), Gated()(floats(m, K)))


def test_a_program_keeps_the_globals_that_it_was_exported_with() -> None:
    factor = 2.0

    @specialize
    def scaled(x: Any, w: Any) -> Any:
        return x @ w * factor

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return scaled(x, GATE)

    x = floats(3, K)
    wanted, program = scaled(x, GATE), torch.export.export(Scaled(), (x,)).module()
    factor = 3.0
    assert_same(program(x), wanted)
    assert not torch.equal(scaled(x, GATE), wanted)
