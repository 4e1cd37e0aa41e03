"""Globals that change while a function is traced, and what tracing costs."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import TraceError, specialize
from q4jit.frontend import frozen
from tests.support.functions import F32, random

X = random(2, 8)
GAIN = 1.0


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GAIN", 1.0)


def assign(value: float) -> None:
    """Assign the global in another thread."""
    thread = threading.Thread(target=lambda: globals().update(GAIN=value))
    thread.start()
    thread.join()


def times(result: Any, factor: float) -> None:
    np.testing.assert_allclose(result, X * F32(factor), rtol=1e-6)


def test_known_signatures_see_a_global_that_changed_before_a_new_one_was_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    f: Any = specialize(lambda x, n: x * (GAIN + 10 * n))
    times(f(X, 0), 1)
    tracer = f._specializer.tracer
    graph = tracer.graph

    def late(signature: Any) -> Any:
        assign(2.0)  # after the call has compared its globals
        return graph(signature)

    monkeypatch.setattr(tracer, "graph", late)
    times(f(X, 1), 12)
    monkeypatch.setattr(tracer, "graph", graph)
    times(f(X, 0), 2)


@pytest.mark.parametrize("early", [True, False], ids=["before it is read", "after it is read"])
def test_another_thread_may_assign_a_global_while_a_function_is_traced(early: bool) -> None:
    pending = iter([2.0])

    def f_(x: Any, n: int) -> Any:
        if early and n:
            assign(next(pending, 2.0))
        y = x * (GAIN + 10 * n)
        if n:
            assign(next(pending, 2.0))
        return y

    f = specialize(f_)
    times(f(X, 0), 1)
    times(f(X, 1), 12)
    times(f(X, 0), 2)


def test_another_thread_may_assign_a_global_while_known_signatures_are_compared() -> None:
    after: dict[int, float] = {}
    next_value = after.pop  # the dict itself would be compared

    def f_(x: Any, n: int) -> Any:
        y = x * (GAIN if n else 0.5)
        assign(next_value(n, GAIN))
        return y

    f = specialize(f_)
    times(f(X, 0), 0.5)
    times(f(X, 1), 1)
    after.update({0: 1.0, 1: 3.0})  # so signature 1 is traced with the value that it knows
    assign(2.0)
    times(f(X, 0), 0.5)
    times(f(X, 1), 3)


def test_a_function_may_log_its_traces() -> None:
    seen: list[int] = []

    def f_(x: Any, n: int) -> Any:
        seen.append(n)
        return x * (GAIN + n)

    f = specialize(f_)
    for _ in range(3):
        for n in range(3):
            times(f(X, n), 1 + n)
    traces = len(seen)
    for n in range(3):
        times(f(X, n), 1 + n)
    assert traces == len(seen) == 6  # twice each, because the log changes
    assign(2.0)
    for n in (0, 1, 2, 0, 1, 2):
        times(f(X, n), 2 + n)


class State:
    gain = 1.0


def set_global(n: int) -> None:
    global GAIN  # noqa: PLW0603 - what is tested
    GAIN = float(n)


def set_attribute(n: int) -> None:
    State.gain = float(n)


def set_entry(n: int) -> None:
    TABLE["gain"] = float(n)


TABLE = {"gain": 1.0}


@pytest.mark.parametrize(
    ("change", "name"),
    [(set_global, "GAIN"), (set_attribute, "State.gain"), (set_entry, r"TABLE\['gain'\]")],
    ids=["global", "attribute", "entry"],
)
def test_a_function_that_sets_a_number_is_refused(change: Any, name: str) -> None:
    traces: list[int] = []
    note = traces.append

    def f_(x: Any, n: int) -> Any:
        note(n)
        change(n)
        return x * (GAIN + State.gain + TABLE["gain"])

    with pytest.raises(TraceError, match=f"cannot change {name}, because compiled calls only"):
        specialize(f_)(X, 7)
    assert traces == [7]
    change(1)


def test_a_function_that_computes_with_its_own_log_is_refused() -> None:
    seen: list[int] = []

    def f_(x: Any) -> Any:
        seen.append(0)
        return x * len(seen)

    with pytest.raises(TraceError, match=r"cannot change len\(seen\), because compiled calls only"):
        specialize(f_)(X)


def test_a_new_class_of_arguments_leaves_the_known_calls() -> None:
    kinds = [dataclasses.make_dataclass(name, ["v"]) for name in ("A", "B", "A", "C")]
    for kind in kinds:
        kind.__module__ = __name__  # classes of libraries are not compared
    f: Any = specialize(lambda x, a: x * a.v * GAIN)
    for _ in range(2):
        for kind in kinds:
            times(f(X, kind(2.0)), 2)
    assert f.stats.misses == len(kinds)


def test_a_new_value_compares_globals_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {f"layer {i}": [float(i)] * 3 for i in range(5)}
    f: Any = specialize(lambda x, n: x * (table["layer 3"][0] + GAIN + n))
    times(f(X, 0), 4)
    before, walks = f._unchanged, []
    walk: Callable[..., Any] = frozen._Walk.function_like

    def counted(self: Any, function: Any, path: str) -> Any:
        if not path:
            walks.append(function)
        return walk(self, function, path)

    monkeypatch.setattr(frozen._Walk, "function_like", counted)
    times(f(X, 1), 5)
    assert len(walks) == 1
    assert f._unchanged is before
    table["layer 3"][0] = 5.0
    times(f(X, 1), 7)
    times(f(X, 0), 6)
