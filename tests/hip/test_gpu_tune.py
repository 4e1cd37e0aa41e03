"""The search on a real GPU: it runs once, and wrong candidates cannot win."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit import specialize
from q4jit.hip import search, tunings
from q4jit.hip.harness import Bench
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.runtime.driver import Device
from q4jit.tools.cli.main import main
from q4jit.tools.selftest.cases import product
from q4jit.weights.reference import random_weight, random_x

pytestmark = pytest.mark.gpu

K, N = 1024, 512


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache directory of its own."""
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tunings, "_kept", {})
    return tmp_path / "cache"


@pytest.mark.parametrize("m", [1, 2, 8, 16, 64])
def test_candidates_are_right_and_the_best_is_no_slower_than_the_rules(
    bench: Bench, m: int
) -> None:
    key = search.key_for(bench.target, K, N, ("Q4_0",), m, "f32")
    trials = search.search(bench, [key])[key]
    print(search.table({key: trials}))  # noqa: T201 - shown if the test fails, and with -s
    wrong = [t for t in trials if t.rejected.startswith("wrong")]
    assert wrong == []
    best = tunings.best(trials)
    assert best is not None
    assert best.error is not None
    assert best.error <= BOUNDS["f32"]
    by_rule = trials[0]  # the constants from the rules come first
    assert by_rule.us is not None
    assert best.us is not None
    assert best.us <= 1.05 * by_rule.us


def test_a_search_is_not_repeated(bench: Bench) -> None:
    key = search.key_for(bench.target, K, N, ("Q8_0",), 1, "f32")
    first = search.search(bench, [key])
    assert set(search.search(bench, [key])[key]) == set(first[key])


def test_a_candidate_with_wrong_results_is_rejected(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.run

    def run(built: Any, args: Any) -> Any:
        (y,) = real(built, args)
        kernel = built.plan.kernels[-1]
        return [y * np.float32(1 + 1e-3 * (kernel.block_size == 256))]

    monkeypatch.setattr(bench, "run", run)
    key = search.key_for(bench.target, 4096, N, ("Q4_0",), 1, "f32")
    trials = search.search(bench, [key])[key]
    broken = [t for t in trials if ("block_size", 256) in t.constants]
    assert broken
    assert all(t.us is None and t.rejected.startswith("wrong: error") for t in broken)
    best = tunings.best(trials)
    assert best is not None
    assert ("block_size", 256) not in best.constants


@pytest.mark.parametrize("m", [1, 64])
def test_replayed_calls_are_right_and_take_no_longer_than_launched_ones(
    bench: Bench, m: int
) -> None:
    x, w = random_x(m, 4096), random_weight("Q4_0", 4096, 4096)
    built = bench.build(product, (x, w), PlanOptions())
    outputs = []

    def calls_on(stream: int) -> list[Any]:
        args = bench.upload((x, w), stream)
        (out,) = bench.outputs(built, args)
        launch = bench.bind(built, args)
        launch.prepare(args)
        outputs.append(out)
        return [functools.partial(launch, args, out)]

    replayed = bench.replay_us(calls_on)
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64)
    np.testing.assert_allclose(outputs[0].to_numpy(), exact, rtol=1e-3, atol=1e-4)
    launched = bench.call_us(calls_on(0) * 20)
    assert 1 < replayed <= 1.2 * launched


def test_a_decorated_function_is_tuned_once(device: Device) -> None:
    gate, up = (random_weight("Q4_0", K, N, seed=seed) for seed in range(2))
    name = f"hip:{device.index}"

    def gated(x: Any, gate: Any, up: Any) -> Any:
        g = x @ gate
        return g / (1 + np.exp(-g)) * (x @ up)

    x = random_x(1, K)
    f: Any = specialize(gated, tune=True, target=name)
    y = f(x, gate, up)
    np.testing.assert_allclose(y, specialize(gated, target="cpu")(x, gate, up), 1e-3, 1e-4)
    assert "measured constants (" in f.explain()
    ((_, key),) = tunings.stored()
    assert (key.format, key.m) == ("Q4_0+Q4_0", 1)
    again: Any = specialize(gated, target=name)
    again(x, gate, up)
    assert "measured constants (" in again.explain()


def test_the_command(device: Device, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--shape", f"{K}x{N}", "--m", "1", "--m", "16"]
    assert main(["tune", "--device", f"hip:{device.index}", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("\n*") == 2
    exported = tmp_path / "all.json"
    assert main(["tune", "--export", str(exported), "--winners"]) == 0
    assert len(tunings.load(exported)) == 2
