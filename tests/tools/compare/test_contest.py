"""Contests on a fake arena: turns, measurements, and wrong or failing entrants."""

from typing import Any

import numpy as np
import pytest

from q4jit.errors import DeviceError
from q4jit.floats import FloatType
from q4jit.precision import BOUNDS
from q4jit.tools.compare.arena import LIMITS, READ, AbsentError, Entrant
from q4jit.tools.compare.contest import contest
from q4jit.tools.compare.measurements import measure
from q4jit.tools.compare.request import GPU, BenchRequest, Defaults
from q4jit.tools.compare.work import TimedCall, WeightShape
from q4jit.weights.reference import random_weight
from tests.support.fake_arena import FakeArena, K, N, fault_of, measured, one_missing, one_wrong
from tests.support.halves import DTYPES


def test_all_entrants_are_checked_before_they_run_in_turns() -> None:
    arena = FakeArena()
    measurements = measured(arena, quick=True)
    names = [READ, "q4jit f32", "q4jit f16", "peer"]
    assert [each.name for each in measurements] == arena.poisoned == names
    assert arena.turns == names * 4  # the check, and three rounds
    assert all(len(each.rounds_us) == 3 and not each.failed for each in measurements)
    assert [f.__name__ for f, _ in arena.begun] == ["product"] * 2


def test_a_measurement_derives_speeds_and_ratios_from_times() -> None:
    read, f32, f16, peer = measured(FakeArena())
    weight_bytes = random_weight("Q4_0", K, N).nbytes
    assert (f32.us, f32.of_read, f32.weight_bytes) == (4.0, 0.5, weight_bytes)
    assert f32.gb_per_s == pytest.approx(weight_bytes / 4e-6 * 1e-9)
    assert f32.tflops == pytest.approx(2 * 3 * K * N / 4e-6 * 1e-12)
    assert f32.ratios == {"q4jit f16": 2.5 / 4, "peer": 2.0}
    assert peer.ratios == {"q4jit f32": 0.5, "q4jit f16": 2.5 / 8}
    assert (read.tflops, read.ratios, read.of_read) == (None, {}, 1.0)
    assert f16.bound == BOUNDS["f16"]
    assert f32.error is not None
    assert f32.error < BOUNDS["f32"]


@pytest.mark.parametrize("change", [one_wrong, one_missing])
@pytest.mark.parametrize("name", ["q4jit f32", "peer"])
def test_wrong_results_are_not_timed(name: str, change: Any) -> None:
    measurements = {each.name: each for each in measured(FakeArena(fault_of(name, change)))}
    wrong = measurements.pop(name)
    assert wrong.wrong
    assert wrong.failed
    assert (wrong.us, wrong.gb_per_s, wrong.of_read, wrong.tflops) == (None,) * 4
    assert wrong.message.startswith("wrong: ")
    for each in measurements.values():
        assert each.us is not None
        assert name not in each.ratios


def test_results_that_become_wrong_later_lose_their_times() -> None:
    arena = FakeArena()
    arena.fault = lambda name, ys: one_wrong(ys[0]) if arena.turns.count(name) > 5 else None
    measurements = measured(arena)
    assert [each.wrong for each in measurements] == [False, True, True, True]
    assert all(each.us is None for each in measurements[1:])


@pytest.mark.parametrize(
    ("error", "message", "failed"),
    [
        (DeviceError("lost\nfor good"), "DeviceError: lost for good", True),
        (RuntimeError("out of memory"), "RuntimeError: out of memory", True),
        (AbsentError("no f64"), "not available: no f64", True),
    ],
)
def test_an_error_is_recorded_and_the_others_run(
    error: Exception, message: str, failed: bool
) -> None:
    def fault(name: str, _: Any) -> None:
        if name == "q4jit f32":
            raise error

    measurements = {each.name: each for each in measured(FakeArena(fault))}
    assert measurements["q4jit f32"].message == message
    assert measurements["q4jit f32"].failed is failed
    assert not measurements["peer"].failed
    assert measurements["peer"].us == 8.0


def test_an_unexpected_error_is_raised() -> None:
    def fault(name: str, _: Any) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        measured(FakeArena(fault))


def test_a_peer_without_a_time_is_not_wrong() -> None:
    (outcome,) = contest(
        [(Entrant("peer", "i8", _refusing), WeightShape("Q4_0", K, N, (1,), 0).product(1), 1)],
        1,
    )
    assert outcome.message == "not available: no such product"
    assert not outcome.wrong


def _refusing(work: TimedCall) -> Any:
    raise AbsentError("no such product")


def test_gating_is_compared_with_the_bare_products() -> None:
    arena = FakeArena()
    measurements = [each for each in measured(arena, fused=True) if each.kind != "product"]
    assert [(each.kind, each.name) for each in measurements] == [
        (kind, f"q4jit {p}") for kind in ("bare", "gated") for p in ("f32", "f16")
    ]
    assert [each.cost for each in measurements] == [None, None, 0.5, 0.5]
    assert not any(each.failed for each in measurements)
    assert {f.__name__ for f, _ in arena.begun} == {"product", "bare", "gated"}


@pytest.mark.parametrize("function", ["bare", "gated"])
def test_wrong_gating_has_an_error(function: str) -> None:
    shape = WeightShape("Q4_0", K, N, (3,), 0)
    work = getattr(shape, function)(3)
    values = [w.dequantize().astype(np.float64) for w in work.weights]
    result = work.function(work.x.astype(np.float64), *values, *work.others)
    results = [np.array(y) for y in (result if isinstance(result, tuple) else (result,))]
    error = work.error(results)
    assert error is not None
    assert error < 1e-12
    results[-1][0, 0] += 1
    error = work.error(results)
    assert error is not None
    assert error > 1e-3
    results[-1][0, 0] = np.inf
    assert work.error(results) is None


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("function", ["product", "bare", "gated"])
def test_only_errors_beyond_rounding_count(function: str, dtype: FloatType) -> None:
    shape = WeightShape("Q4_0", K, N, (3,), 0, dtype)
    work = getattr(shape, function)(3)
    values = [w.dequantize().astype(np.float64) for w in work.weights]
    exact = work.function(*(a.astype(np.float64) for a in (work.x, *values, *work.others)))
    exact = exact if isinstance(exact, tuple) else (exact,)
    rounded = [np.array(y).astype(DTYPES[dtype]) for y in exact]
    assert work.error(rounded) < 1e-12
    widened = [y.astype(np.float32) for y in rounded]  # as of a tensor
    assert work.error(widened, dtype) < 1e-12
    assert work.error(widened) > BOUNDS["f32"]
    rounded[-1] += rounded[-1] * DTYPES[dtype].type(2.0**-6)
    assert work.error(rounded) > BOUNDS["f32"]


def test_copies_do_not_share_memory() -> None:
    shape = WeightShape("Q4_0", K, N, (1,), 5000)
    copies = shape.product(1).copies
    assert sum(w.nbytes for (w,) in copies) > 5000
    assert len({w.raw.ctypes.data for (w,) in copies}) == len(copies)
    assert len(WeightShape("Q4_0", K, N, (1,), 1).product(1).copies) == 2
    assert len(WeightShape("Q4_0", K, N, (1,), 0).product(1).copies) == 1  # it stays in the cache


def test_products_are_compared_with_their_peak() -> None:
    arena = FakeArena()
    arena.peak_names = ("f32", "i8")
    arena.times |= {"FMA peak": 3.0, "dot peak": 1.0, "q4jit i8": 2.0}
    request = BenchRequest(shapes=((K, N),), rows=(3,), precisions=("f32", "i8", "f16"))
    (measurements,) = measure(arena, request, GPU)
    of_peak = {each.name: each.of_peak for each in measurements}
    assert of_peak.pop("q4jit f32") == 0.75
    assert of_peak.pop("q4jit i8") == 0.5
    assert set(of_peak.values()) == {None}
    peak = next(each for each in measurements if each.name == "FMA peak")
    assert (peak.gb_per_s, peak.of_read, peak.ratios) == (None, None, {})
    assert peak.tflops == pytest.approx(2 * 3 * K * N / 3e-6 * 1e-12)
    assert not any(set(each.ratios) & LIMITS for each in measurements)


def test_default_shapes_are_whole_blocks() -> None:
    default = Defaults(((288, 5), (512, 5), (64, 5)), (1,), ("f32",))
    for name, wanted in (("Q4_0", [288, 512, 64]), ("Q4_K", [512])):
        results = measure(FakeArena(), BenchRequest(name), default)
        assert [measurements[0].k for measurements in results] == wanted
