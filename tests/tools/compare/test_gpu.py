"""The GPU arena without a GPU: the kernel that reads, and a runtime that runs no kernel."""

import contextlib
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit.backends import find_backend
from q4jit.hip.render import render_read
from q4jit.targets import Target
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.gpu import GpuArena
from q4jit.tools.compare.work import WeightShape
from tests.support import child, fake_gpu
from tests.support.fake_arena import K, N
from tests.support.fake_gpu import PRELUDE
from tests.support.hip_host import compile_host


@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", "gfx942"])
def test_a_read_reads_every_word(arch: str) -> None:
    target = Target("hip", arch)
    source = render_read(target, 128, 2, "host")
    program = compile_host(source.text, source.symbol)
    for units, blocks in ((1, 1), (1000, 3), (257, 5)):
        data = np.random.default_rng(units).integers(0, 1 << 32, 4 * units, np.uint32)
        sums = np.zeros(blocks * 128 // target.hip.wave, np.uint32)
        (words,) = program.run((blocks,), 128, [data, sums, units, blocks])
        assert np.bitwise_xor.reduce(words) == np.bitwise_xor.reduce(data)


def test_a_read_issues_all_loads_of_16_bytes_before_it_waits() -> None:
    target = Target("hip", "sm_90")
    compiler = find_backend(target).compiler(target)
    text = compiler.compile_assembly(render_read(target, 256, 8).text, target)
    loads = [i for i, line in enumerate(text.splitlines()) if "ld.global.nc" in line]
    assert len(loads) == 8
    assert all("v4" in text.splitlines()[i] for i in loads)


@pytest.mark.parametrize(("platform", "dtype"), [("amd", "f16"), ("nvidia", "bf16")])
def test_kernels_that_write_nothing_are_wrong(platform: str, dtype: str, tmp_path: Path) -> None:
    """The driver calls and kernel texts are real; the runtime does not run the kernels."""
    folder = str(fake_gpu.build(tmp_path, platform))
    path = tmp_path / "b.json"
    child.run(
        f"""
        import gc
        start()
        os.environ.pop("ROCM_PATH", None)  # the fake runtime is there, but no compiler
        from q4jit.tools.cli.main import main
        from q4jit.tools.compare.gpu import GpuArena
        GpuArena.rotated_bytes = lambda arena: 4000
        options = ["--shape", "64x37", "--m", "1,17", "--fused", "--quick"]
        options += ["--dtype", "{dtype}"]
        assert main(["bench", *options, "--json", {str(path)!r}]) == 1
        assert fake["launches"] > 100 and fake["replays"] > 0
        gc.collect()
        assert fake["streams"] == fake["graphs"] == fake["events"] == 0
        """,
        prelude=PRELUDE,
        FAKE_PLATFORM=platform,
        FAKE_FOLDER=folder,
        ROCM_PATH=folder,
    )
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    assert run["dtype"] == dtype
    names = {row["name"] for row in run["rows"]}
    assert names == {READ, "q4jit f32", "q4jit f16", "q4jit i8", "q4jit element"}
    assert all(row["wrong"] and row["us"] is None for row in run["rows"])
    assert all("NaN" in row["message"] for row in run["rows"])
    assert {row["note"] for row in run["rows"] if row["name"] == "q4jit i8"} == {
        "gemv_matrix in f16",
        "tile_halves in f16",
    }


def test_weights_take_turns_and_only_results_of_the_graph_count() -> None:
    """The first call runs outside of the graph: its results must be poisoned."""
    poisoned: list[Any] = []
    launched: list[Any] = []

    class Launch:
        def prepare(self, args: Any) -> None:
            pass

        def __call__(self, args: Any, out: Any) -> None:
            launched.append(args[1])

    @contextlib.contextmanager
    def replays(calls_on: Any) -> Iterator[Callable[[], float]]:
        for call in calls_on(3):
            call()
        yield lambda: 1.0

    graph = types.SimpleNamespace(returns_tuple=False)
    plan = types.SimpleNamespace(kernels=(), graph=graph)
    arena = GpuArena.__new__(GpuArena)
    arena._tuned = lambda key: None
    arena.bench = types.SimpleNamespace(  # type: ignore[assignment]  # only what the arena uses
        build=lambda *args: types.SimpleNamespace(plan=plan),
        upload=lambda args, stream: args,
        outputs=lambda built, args: ["y"],
        bind=lambda built, args: Launch(),
        poison=poisoned.extend,
        replays=replays,
    )
    work = WeightShape("Q4_0", K, N, (1,), 5000).product(1)
    with arena.own("f32").open(work) as running:
        assert poisoned == []
        running.poison()
    assert poisoned == ["y"]
    assert launched == [w for (w,) in work.copies]
