"""Globals and closures: a call after one has changed computes with the new value."""

import functools
import gc
import math
import sys
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from q4jit import TraceError, specialize
from q4jit.frontend.frozen import freeze
from tests.support.functions import F32, random

SCALE = 2.0
CONFIG: dict[str, Any] = {"scale": 2.0, "more": [3.0, {"last": 4.0}]}
OTHER = ModuleType("a_module_of_the_user")
SETTINGS = SimpleNamespace(scale=2.0, unused=1.0)
TABLE = np.array([2.0, 3.0], F32)
ACTIVATION: Any = np.tanh
NAMES = {"wide"}
FACTORS = [3.0]


class Layer:
    factor = 1.5
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 2.0

    @property
    def scale(self) -> float:
        return self.gain * float(SETTINGS.scale)

    def scaled(self, x: Any) -> Any:
        return x * self.factor * self.gain


LAYER = Layer()


def scaled(x: Any, by: float = 1.0) -> Any:
    return x * SCALE * by


@specialize
def inner(x: Any) -> Any:
    return x * SCALE


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    OTHER.SCALE = 2.0  # type: ignore[attr-defined]
    for name, value in (("SCALE", 2.0), ("ACTIVATION", np.tanh), ("scaled", scaled)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(CONFIG, "scale", 2.0)
    monkeypatch.setitem(CONFIG, "more", [3.0, {"last": 4.0}])
    monkeypatch.setattr(SETTINGS, "scale", 2.0)
    monkeypatch.setattr(Layer, "factor", 1.5)
    LAYER.gain = 2.0
    TABLE[:] = 2, 3
    NAMES.clear()
    NAMES.add("wide")


def assign(name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(sys.modules[__name__], name, value)


# ruff: noqa: PLW0108 - each lambda is a user's function
# the function · how a value that it reads changes
CHANGES: list[tuple[Callable[..., Any], Callable[[], object]]] = [
    (lambda x: x * SCALE, assign("SCALE", 5.0)),
    (lambda x: scaled(x), assign("SCALE", 5.0)),
    (lambda x: scaled(x), assign("scaled", lambda x: x + 1)),
    (lambda x: scaled(x), lambda: setattr(scaled, "__defaults__", (7.0,))),
    (lambda x: inner.py_func(x), assign("SCALE", 5.0)),
    (lambda x: [v * SCALE for v in (x,)][0], assign("SCALE", 5.0)),  # noqa: RUF015
    (lambda x: ACTIVATION(x), assign("ACTIVATION", np.exp)),
    (lambda x: x * CONFIG["scale"], lambda: CONFIG.update(scale=5.0)),
    (lambda x: x * CONFIG["more"][0], lambda: CONFIG["more"].__setitem__(0, 5.0)),
    (lambda x: x * CONFIG["more"][1]["last"], lambda: CONFIG["more"][1].update(last=5.0)),
    (lambda x: x * len(CONFIG["more"]), lambda: CONFIG["more"].append(1.0)),
    (lambda x: x * sum(v for v in CONFIG["more"][:1]), lambda: CONFIG.update(more=[9.0])),
    (lambda x: x * OTHER.SCALE, lambda: setattr(OTHER, "SCALE", 5.0)),
    (lambda x: x * SETTINGS.scale, lambda: setattr(SETTINGS, "scale", 5.0)),
    (lambda x: x * getattr(SETTINGS, "scale"), lambda: setattr(SETTINGS, "scale", 5.0)),  # noqa: B009
    (lambda x: x * LAYER.gain, lambda: setattr(LAYER, "gain", 5.0)),
    (lambda x: x * LAYER.scale, lambda: setattr(SETTINGS, "scale", 5.0)),
    (LAYER.scaled, lambda: setattr(LAYER, "gain", 5.0)),
    (LAYER.scaled, lambda: setattr(Layer, "factor", 5.0)),
    (lambda x: LAYER.scaled(x), lambda: setattr(Layer, "factor", 5.0)),
    (
        functools.partial(lambda by, x: x * by[0], FACTORS),
        lambda: FACTORS.append(FACTORS.pop() + 1),
    ),
    (lambda x: x * float(TABLE[0]), lambda: TABLE.__setitem__(0, 5)),
    (
        lambda x: x * 2 if "wide" in NAMES else x,
        lambda: NAMES.symmetric_difference_update({"wide", "a"}),
    ),
    (lambda x: x * math.pi * SCALE, assign("SCALE", True)),
]


@pytest.mark.parametrize(("function", "change"), CHANGES)
def test_a_changed_value_is_used(
    function: Callable[..., Any], change: Callable[[], object]
) -> None:
    compiled = specialize(function)
    x, y = random(2, 5), random(3, 1, 5)
    bound = compiled.bind(x)
    for _ in range(2):
        for result in (compiled(x), bound()):
            assert np.allclose(np.asarray(result), function(x), atol=1e-6)
        assert np.allclose(np.asarray(compiled(y)), function(y), atol=1e-6)
        change()
    assert compiled.stats.misses <= 6


def test_a_closure_value_is_used() -> None:
    factor = 3.0
    compiled = specialize(lambda x: x * factor)
    x = random(2, 5)
    for value in (3.0, 7.0, 3.0):
        factor = value
        assert np.array_equal(np.asarray(compiled(x)), x * F32(value))


def test_an_equal_value_and_an_unused_one_compile_nothing() -> None:
    compiled = specialize(lambda x: x * CONFIG["scale"] + SETTINGS.scale)
    x = random(2, 5)
    compiled(x)
    before = compiled.stats
    CONFIG["scale"] = float("2.0")
    compiled(x)
    SETTINGS.unused += 1.0
    compiled(x)
    assert compiled.stats.misses == before.misses == 1
    CONFIG["unused"] = 1.0  # traced again, to the same graph
    compiled(x)
    assert compiled.stats.misses == 1
    del CONFIG["unused"]


def test_explain_lists_the_frozen_values() -> None:
    compiled = specialize(lambda x: x * SCALE + CONFIG["scale"])
    compiled(random(2, 5))
    assert "frozen when it was traced: SCALE = 2.0, CONFIG['scale'] = 2.0" in compiled.explain()
    assert "frozen" not in check_plain().explain()


def check_plain() -> Any:
    compiled = specialize(lambda x: np.tanh(x) * 2)
    compiled(random(2, 5))
    assert not freeze(compiled.py_func)  # so that a warm call compares nothing
    return compiled


def test_a_function_that_changes_a_number_is_refused() -> None:
    calls = 0

    def counted(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return x * calls

    with pytest.raises(TraceError, match=r"cannot change calls, because compiled calls only comp"):
        specialize(counted)(random(2, 5))


def test_a_deleted_value_and_an_error_in_the_new_trace() -> None:
    table: dict[str, Any] = {"a": 2.0}
    compiled = specialize(lambda x: x * table["a"])
    x = random(2, 5)
    compiled(x)
    del table["a"]
    for _ in range(2):
        with pytest.raises(KeyError):
            compiled(x)
    table["a"] = 3.0
    assert np.array_equal(np.asarray(compiled(x)), x * 3)


def test_what_is_frozen_is_freed_with_the_function() -> None:
    class Held:
        gain = 2.0

    def reader(held: Held) -> Any:
        return specialize(lambda x: x * held.gain)

    held = Held()
    compiled = reader(held)
    compiled(random(2, 5))
    gone = weakref.ref(held)
    del held, compiled
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("where", "seen"), [("here", True), ("elsewhere", False)])
def test_helpers_of_installed_packages(
    monkeypatch: pytest.MonkeyPatch, where: str, seen: bool
) -> None:
    """Those of the function's own package are looked at, as `docs/functions.md` says."""
    helpers = ModuleType("installed.helpers")
    installed = ModuleType("installed")
    installed.__file__ = "/venv/lib/site-packages/installed/__init__.py"
    for module in (installed, helpers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("SCALE = 2.0\ndef helper(x): return x * SCALE", vars(helpers))
    package = ModuleType("installed.functions" if where == "here" else "user")
    vars(package)["helper"] = vars(helpers)["helper"]
    exec("def function(x): return helper(x)", vars(package))
    frozen = freeze(vars(package)["function"])
    assert ("SCALE" in frozen.values) is seen
