"""Turns, rows, and what is wrong, in a comparison on an arena that is none."""

from typing import Any

import numpy as np
import pytest

from q4jit.errors import DeviceError
from q4jit.precision import BOUNDS
from q4jit.tools.compare.arena import LIMITS, READ, AbsentError, Entrant
from q4jit.tools.compare.contest import contest
from q4jit.tools.compare.request import GPU, BenchRequest
from q4jit.tools.compare.rows import measure
from q4jit.tools.compare.work import TimedCall, WeightShape
from q4jit.weights.reference import random_weight
from tests.support.fake_arena import FakeArena, K, N, at, one_missing, one_wrong, rows_of


def test_everyone_is_checked_first_and_then_runs_in_turns() -> None:
    arena = FakeArena()
    rows = rows_of(arena, quick=True)
    names = [READ, "q4jit f32", "q4jit f16", "peer"]
    assert [row.name for row in rows] == arena.poisoned == names
    assert arena.turns == names * 4  # the check, and three rounds
    assert all(len(row.rounds_us) == 3 and not row.failed for row in rows)
    assert [f.__name__ for f, _ in arena.begun] == ["product"] * 2


def test_a_row_holds_what_follows_from_the_times() -> None:
    read, exact, half, peer = rows_of(FakeArena())
    bytes_ = random_weight("Q4_0", K, N).nbytes
    assert (exact.us, exact.of_read, exact.weight_bytes) == (4.0, 0.5, bytes_)
    assert exact.gb_per_s == pytest.approx(bytes_ / 4e-6 * 1e-9)
    assert exact.tflops == pytest.approx(2 * 3 * K * N / 4e-6 * 1e-12)
    assert exact.ratios == {"q4jit f16": 2.5 / 4, "peer": 2.0}
    assert peer.ratios == {"q4jit f32": 0.5, "q4jit f16": 2.5 / 8}
    assert (read.tflops, read.ratios, read.of_read) == (None, {}, 1.0)
    assert half.bound == BOUNDS["f16"]
    assert exact.error is not None
    assert exact.error < BOUNDS["f32"]


@pytest.mark.parametrize("change", [one_wrong, one_missing])
@pytest.mark.parametrize("name", ["q4jit f32", "peer"])
def test_what_is_wrong_has_no_time(name: str, change: Any) -> None:
    rows = {row.name: row for row in rows_of(FakeArena(at(name, change)))}
    wrong = rows.pop(name)
    assert wrong.wrong
    assert wrong.failed
    assert (wrong.us, wrong.gb_per_s, wrong.of_read, wrong.tflops) == (None,) * 4
    assert wrong.message.startswith("wrong: ")
    for row in rows.values():
        assert row.us is not None
        assert name not in row.ratios


def test_what_turns_wrong_later_loses_its_times() -> None:
    arena = FakeArena()
    arena.fault = lambda name, ys: one_wrong(ys[0]) if arena.turns.count(name) > 5 else None
    rows = rows_of(arena)
    assert [row.wrong for row in rows] == [False, True, True, True]
    assert all(row.us is None for row in rows[1:])


@pytest.mark.parametrize(
    ("error", "told", "failed"),
    [
        (DeviceError("lost\nfor good"), "DeviceError: lost for good", True),
        (RuntimeError("out of memory"), "RuntimeError: out of memory", True),
        (AbsentError("takes Q4_0"), "not present: takes Q4_0", True),
    ],
)
def test_an_error_is_told_and_the_others_run(error: Exception, told: str, failed: bool) -> None:
    def fault(name: str, _: Any) -> None:
        if name == "q4jit f32":
            raise error

    rows = {row.name: row for row in rows_of(FakeArena(fault))}
    assert rows["q4jit f32"].message == told
    assert rows["q4jit f32"].failed is failed
    assert not rows["peer"].failed
    assert rows["peer"].us == 8.0


def test_an_error_that_nobody_expects_is_raised() -> None:
    def fault(name: str, _: Any) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        rows_of(FakeArena(fault))


def test_a_peer_without_a_time_is_no_failure_of_ours() -> None:
    (outcome,) = contest(
        [(Entrant("peer", "i8", _refusing), WeightShape("Q4_0", K, N, (1,), 0).product(1), 1)],
        1,
    )
    assert outcome.message == "not present: no such product"
    assert not outcome.wrong


def _refusing(work: TimedCall) -> Any:
    raise AbsentError("no such product")


def test_gating_is_held_against_the_bare_products() -> None:
    arena = FakeArena()
    rows = [row for row in rows_of(arena, fused=True) if row.kind != "product"]
    assert [(row.kind, row.name) for row in rows] == [
        (kind, f"q4jit {p}") for kind in ("bare", "gated") for p in ("f32", "f16")
    ]
    assert [row.cost for row in rows] == [None, None, 0.5, 0.5]
    assert not any(row.failed for row in rows)
    assert {f.__name__ for f, _ in arena.begun} == {"product", "bare", "gated"}


@pytest.mark.parametrize("function", ["bare", "gated"])
def test_wrong_gating_is_found(function: str) -> None:
    shape = WeightShape("Q4_0", K, N, (3,), 0)
    work = getattr(shape, function)(3)
    values = [w.dequantize().astype(np.float64) for w in work.weights]
    made = work.function(work.x.astype(np.float64), *values, *work.others)
    results = [np.array(y) for y in (made if isinstance(made, tuple) else (made,))]
    error = work.error(results)
    assert error is not None
    assert error < 1e-12
    results[-1][0, 0] += 1
    error = work.error(results)
    assert error is not None
    assert error > 1e-3
    results[-1][0, 0] = np.inf
    assert work.error(results) is None


def test_copies_have_memory_of_their_own() -> None:
    shape = WeightShape("Q4_0", K, N, (1,), 5000)
    copies = shape.product(1).copies
    assert sum(w.nbytes for (w,) in copies) > 5000
    assert len({w.raw.ctypes.data for (w,) in copies}) == len(copies)
    assert len(WeightShape("Q4_0", K, N, (1,), 1).product(1).copies) == 2
    assert len(WeightShape("Q4_0", K, N, (1,), 0).product(1).copies) == 1  # it stays in cache


def test_products_are_held_against_their_peak() -> None:
    arena = FakeArena()
    arena.peak_names = ("f32", "i8")
    arena.times |= {"FMA peak": 3.0, "dot peak": 1.0, "q4jit i8": 2.0}
    request = BenchRequest(shapes=((K, N),), rows=(3,), precisions=("f32", "i8", "f16"))
    (rows,) = measure(arena, request, GPU)
    of_peak = {row.name: row.of_peak for row in rows}
    assert of_peak.pop("q4jit f32") == 0.75
    assert of_peak.pop("q4jit i8") == 0.5
    assert set(of_peak.values()) == {None}
    peak = next(row for row in rows if row.name == "FMA peak")
    assert (peak.gb_per_s, peak.of_read, peak.ratios) == (None, None, {})
    assert peak.tflops == pytest.approx(2 * 3 * K * N / 3e-6 * 1e-12)
    assert not any(set(row.ratios) & LIMITS for row in rows)
