"""`q4jit bench` on a real GPU: right results are timed, and times include reading memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit.floats import FLOAT_BYTES, FloatType
from q4jit.precision import BOUNDS
from q4jit.runtime import devices
from q4jit.tools.cli.main import main
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.contest import contest
from q4jit.tools.compare.gpu import GpuArena
from q4jit.tools.compare.work import WeightShape

pytestmark = pytest.mark.gpu

K, N = 4096, 1024


@pytest.fixture(scope="module")
def arena() -> Iterator[GpuArena]:
    gpus = devices.find_devices()
    if not gpus:
        pytest.skip(devices.why_none())
    opened = GpuArena(gpus[0])
    yield opened
    opened.close()


def test_the_command_runs_and_nothing_is_wrong(arena: GpuArena, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    options = ["--shape", f"{K}x{N}", "--m", "1,8,64", "--fused", "--quick", "--json", str(path)]
    options += ["--dtype", ",".join(FLOAT_BYTES)]
    assert main(["bench", "--target", "hip:0", *options]) == 0
    runs = json.loads(path.read_text("utf-8"))["runs"]
    assert [run["dtype"] for run in runs] == list(FLOAT_BYTES)
    for run in runs:
        own = [row for row in run["rows"] if row["own"]]
        assert len(own) == 3 * 3 * len(BOUNDS)  # M, kinds, precisions
        for row in own:
            assert row["us"] > 0
            assert row["error"] <= row["bound"]
        for row in run["rows"]:
            assert not row["wrong"], row


@pytest.mark.parametrize("dtype", FLOAT_BYTES)
@pytest.mark.parametrize("name", ["torch fp16", "torch int4", "dequantise + matmul"])
def test_a_product_of_pytorch_is_right_and_timed(
    arena: GpuArena, name: str, dtype: FloatType
) -> None:
    entrants = {entrant.name: entrant for entrant in arena.peers(dtype)}
    if dtype == "bf16" and name == "torch fp16":
        name = "torch bf16"
    if name not in entrants:
        pytest.skip(arena.absent[name])
    for m in (1, 8, 64):
        work = WeightShape("Q4_0", K, N, (m,), 64 << 20, dtype).product(m)
        entrant = entrants[name]
        (outcome,) = contest([(entrant, work, BOUNDS[entrant.precision])], 3)
        assert outcome.message == ""
        assert len(outcome.us) == 3
        assert min(outcome.us) > 1


def test_a_read_is_as_fast_as_a_copy(arena: GpuArena) -> None:
    """A copy reads and writes; a read alone must be as fast per byte."""
    work = WeightShape("Q4_0", 8192, 16384, (1,), arena.rotated_bytes()).product(1)
    with arena.read().open(work) as running:
        running.poison()
        rate = max(work.weight_bytes / running.us() for _ in range(5))
        assert running.error() == 0.0
    copy_rate = 2 * arena.bench.copy_bytes() / arena.bench.copy_us
    assert rate > 0.9 * copy_rate, running.note


def test_no_kernel_is_faster_than_the_read(arena: GpuArena) -> None:
    work = WeightShape("Q4_0", 8192, 16384, (1,), arena.rotated_bytes()).product(1)
    entrants = [(e, work, BOUNDS["f32"]) for e in (arena.read(), arena.own("f32"))]
    read, own = contest(entrants, 5)
    assert read.entrant.name == READ
    assert np.median(own.us) > 0.95 * np.median(read.us)


def test_a_kernel_that_does_not_run_is_not_timed(
    arena: GpuArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WeightShape("Q4_0", K, 64, (1,), 1 << 20).product(1)
    real = arena.bench.bind

    def bind(built: Any, args: Any) -> Any:
        launch = real(built, args)

        class IdleLaunch:
            prepare = staticmethod(launch.prepare)

            def __call__(self, *_: Any) -> None:
                pass

        return IdleLaunch()

    monkeypatch.setattr(arena.bench, "bind", bind)
    (outcome,) = contest([(arena.own("f32"), work, BOUNDS["f32"])], 1)
    assert outcome.wrong
    assert not outcome.us
