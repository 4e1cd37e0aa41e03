"""Calls with ever new values: what they share, what is forgotten, and the warning of them."""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import QuantizedTensor, SpecializationWarning, quantize, specialize
from q4jit.dispatch import kept
from q4jit.dispatch.causes import MOST_VALUES
from tests.support import child
from tests.support.functions import F32, random

K, N = 32, 16
FACTOR = 1.0
UNUSED = 0
TABLE = [1.0]


@pytest.fixture(scope="module")
def w() -> QuantizedTensor:
    return quantize(random(K, N), "F32")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let functions keep little, so that a test reaches the limits soon."""
    monkeypatch.setattr(kept, "MOST_CALLS", 16)
    monkeypatch.setattr(kept, "MOST_PLANS", 4)


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecializationWarning)
        yield


def unused(x: Any, w: Any, step: Any) -> Any:
    return x @ w + 0.5


def used(x: Any, w: Any, step: Any) -> Any:
    return x @ w * (1 + step)


def close(result: Any, wanted: Any) -> None:
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


# --- what has the same text -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [range(12), [True, 1, None, "a", "b", False, "", 0], [1, 1.0, np.float32(1), np.int64(2), 3]],
    ids=["ints", "all static kinds", "floats and ints"],
)
def test_values_that_the_kernels_ignore_share_them(w: QuantizedTensor, values: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecializationWarning)
        f = specialize(unused, cache=False)
        for value in values:
            close(f(random(2, K), w, value), unused(random(2, K), w, value))
    numbers = {type(v) for v in values} & {float, np.float32}
    texts = 1 + bool(numbers)  # a float is a value of the graph, even if nothing uses it
    assert f.stats.compiles == len(f._specializer.kept.kernels) == texts
    assert len(set(map(id, f._launches.values()))) == 1 + len(numbers)
    assert f.stats.misses == len(values)
    assert f.inspect_source().count("define void @q4jit_unused(") == texts


def test_a_signature_per_value_is_listed(w: QuantizedTensor) -> None:
    f = specialize(unused)
    for step in range(4):
        f(random(2, K), w, step)
    assert [str(signature[2]) for signature in f.signatures] == ["0", "1", "2", "3"]
    assert f.explain().count("plan unused") == 1


def test_kernels_of_different_graphs_share_those_of_the_same_text() -> None:
    def two(x: Any, w: Any, step: int) -> Any:
        return (np.tanh(x @ w) @ w) * step

    f, square = specialize(two, cache=False), quantize(random(K, K), "F32")
    kernels = 0
    for step in (1, 2, 3):
        close(f(random(2, K), square, step), two(random(2, K), square, step))
        kernels += len(f._specializer.kept.plans_in_use()[-1][0].kernels)
    assert (kernels, f.stats.compiles) == (6, 4)  # the first kernel of each has the same text


def test_values_that_matter_do_not_share(w: QuantizedTensor) -> None:
    f = specialize(used)
    for step in (0, 1, 2, True, 1):
        close(f(random(2, K), w, step), used(random(2, K), w, step))
    assert len(f._specializer.kept.compiled) == 3  # 1 and True compute the same
    assert len(f.signatures) == 4


@pytest.mark.process
def test_a_new_int_takes_little_memory() -> None:
    child.run("""
        import warnings
        warnings.simplefilter("ignore")
        f = specialize(lambda x, w, step: x @ w + 0.5)
        def resident_kib():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
        for step in range(200):
            f(x_small, small, step)
        before = resident_kib()
        for step in range(200, 1000):
            f(x_small, small, step)
        assert (resident_kib() - before) / 800 < 8, (resident_kib() - before) / 800
    """)


# --- what is forgotten ----------------------------------------------------------------------------


@pytest.mark.usefixtures("few", "quiet")
@pytest.mark.parametrize("function", [unused, used])
def test_what_is_kept_is_bounded(w: QuantizedTensor, function: Callable[..., Any]) -> None:
    f = specialize(function)
    x = random(2, K)
    for step in range(60):
        close(f(x, w, step), function(x, w, step))
        everything = f._specializer.kept
        assert len(f._launches) <= 16
        assert len(f.signatures) <= 32
        assert max(len(everything.plans), len(everything.compiled)) <= 10
        assert len(everything.kernels) <= 10
        assert sum(len(made.launches) for made in everything.compiled.values()) <= 16
    assert f.explain().count("plan ") == len(f._specializer.kept.compiled)
    for step in (0, 59):  # forgotten, and not
        close(f(x, w, step), function(x, w, step))


@pytest.mark.usefixtures("few", "quiet")
def test_kernels_that_are_forgotten_are_freed(w: QuantizedTensor) -> None:
    f, x = specialize(used), random(2, K)
    codes = []
    for step in range(30):
        f(x, w, step)
        *_, made = f._specializer.kept.compiled.values()
        loaded: Any = made.kernels[0].loaded
        codes.append(weakref.ref(loaded[1]))
    del made, loaded
    gc.collect()
    assert sum(code() is not None for code in codes) <= 10


@pytest.mark.usefixtures("few", "quiet")
def test_a_value_in_use_is_not_forgotten(w: QuantizedTensor) -> None:
    f, x = specialize(used, cache=False), random(2, K)
    for step in range(12):
        f(x, w, step)
        close(f(x, w, 1000), used(x, w, 1000))
    assert f.stats.compiles == 13
    assert 1000 in [spec.value for _, _, spec in f.signatures if hasattr(spec, "value")]


@pytest.mark.usefixtures("few", "quiet")
def test_bound_and_running_calls_outlive_what_is_forgotten(w: QuantizedTensor) -> None:
    f, x = specialize(used), random(2, K)
    bound = f.bind(x, w, 1000)
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            if not np.allclose(f(x, w, 2000), used(x, w, 2000), atol=1e-4):
                wrong.append(1)

    other = threading.Thread(target=call)
    other.start()
    try:
        for step in range(30):
            f(x, w, step)
    finally:
        stop.set()
        other.join()
    gc.collect()
    assert not wrong
    close(bound(), used(x, w, 1000))
    assert 1000 not in [getattr(spec, "value", 0) for _, _, spec in f.signatures]


@pytest.mark.usefixtures("few")
def test_what_cannot_be_compiled_is_bounded_too(
    w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    f = specialize(used, target="hip:gfx1100")  # no such device
    monkeypatch.setattr(kept, "MOST_CALLS", 8)
    for step in range(30):
        with pytest.raises(Exception, match=r"gfx1100|compile"):
            f(random(2, K), w, step)
    assert len(f.signatures) <= 17
    assert len(f._specializer.kept.plans) <= 17


# --- globals --------------------------------------------------------------------------------------


def test_values_of_a_global_that_come_back_share_kernels(
    monkeypatch: pytest.MonkeyPatch, w: QuantizedTensor
) -> None:
    f = specialize(lambda x, w: x @ w * FACTOR, cache=False)
    for turn in range(6):
        monkeypatch.setitem(globals(), "FACTOR", float(turn % 2))
        close(f(random(2, K), w), random(2, K) @ w * (turn % 2))
        assert f.explain().count("plan ") == f.inspect_source().count("define void @q4jit_") == 1
    assert f.stats.compiles == 2


def test_many_signatures_are_not_traced_again_at_once(
    monkeypatch: pytest.MonkeyPatch, w: QuantizedTensor, quiet: None
) -> None:
    traces: list[int] = []
    note = traces.append  # a list that the function reads would be compared

    def f_(x: Any, w: Any, step: int) -> Any:
        note(step)
        return x @ w * FACTOR

    f = specialize(f_)
    for step in range(40):
        f(random(2, K), w, step)
    traces.clear()
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    close(f(random(2, K), w, 7), random(2, K) @ w * F32(3))
    assert traces == [7]


# --- the warning ----------------------------------------------------------------------------------


def warned(action: Callable[[], object]) -> list[str]:
    """Return the warnings of specialisations that an action raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(w.category is SpecializationWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def calls(f: Any, *values: tuple[Any, ...]) -> Callable[[], None]:
    def action() -> None:
        for args in values:
            f(*args)

    return action


def test_one_warning_names_argument_and_cure(w: QuantizedTensor) -> None:
    f, x = specialize(unused), random(2, K)
    assert warned(calls(f, *[(x, w, step) for step in range(MOST_VALUES + 1)])) == []
    (text,) = warned(calls(f, *[(x, w, step) for step in range(100)]))
    assert text == (
        "unused(): argument 'step' has had more than 8 int values, and the function is traced for "
        "each, and compiled if its kernels differ; pass float(step), which kernels read when they "
        "run, or keep the values few if they choose slices or branches. Q4JIT_DEBUG=1 lists them"
    )
    assert warned(calls(f, *[(x, w, float(step)) for step in range(100)])) == []


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([f"layer {i}" for i in range(12)], "more than 8 values"),
        ([np.int32(i) for i in range(12)], "more than 8 int values"),
        ([(i if i % 2 else float(i)) for i in range(24)], "more than 8 int values"),
    ],
    ids=["str", "NumPy's ints", "ints among floats"],
)
def test_all_static_kinds_warn(w: QuantizedTensor, values: Any, what: str) -> None:
    (text,) = warned(calls(specialize(unused), *[(random(2, K), w, v) for v in values]))
    assert f"argument 'step' has had {what}," in text


def test_arguments_that_change_together_are_both_named(w: QuantizedTensor) -> None:
    f = specialize(lambda x, w, step, total: x @ w)
    texts = warned(calls(f, *[(random(2, K), w, i, str(i)) for i in range(20)]))
    assert ["'step'" in texts[0], "'total'" in texts[1], len(texts)] == [True, True, 2]


def test_rows_that_grow_in_length_warn() -> None:
    f = specialize(lambda x, gain: x * gain)
    texts = warned(calls(f, *[(random(2, n), random(n)) for n in range(1, 15)]))
    assert ["'x'" in texts[0], "'gain'" in texts[1], len(texts)] == [True, True, 2]
    assert "has had more than 8 lengths of the last axis" in texts[0]
    assert "pad it to a few lengths" in texts[0]


def test_what_has_few_values_or_no_cure_does_not_warn() -> None:
    f: Any = specialize(lambda x, w, flag=False: x @ w)
    weights = [quantize(random(32 * k, n), "F32") for k in range(1, 11) for n in (1, 2)]
    shapes = [(1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2), (1, 1, 1), (1, 1, 2), (1, 2, 1), ()]
    values = [
        (random(*lead, weight.shape[0]), weight, flag)
        for weight in weights
        for lead in (shapes if weight is weights[0] else shapes[:2])
        for flag in (False, True, None)
    ]
    assert warned(calls(f, *values)) == []
    assert len(f.signatures) > 50


def total(x: Any, d: Any) -> Any:
    while isinstance(d, dict | list | tuple):
        for entry in d.values() if isinstance(d, dict) else d:
            d = entry
    return x + d


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda i, x: [x] * (i + 1), "'d' has had more than 8 lengths, |pad the list to a few"),
        (lambda i, x: (x,) * (i + 1), "'d' has had more than 8 lengths, |pad the tuple to a few"),
        (lambda i, x: {f"k{i}": x}, "'d' has had more than 8 sets of keys, |use a fixed set of"),
        (
            lambda i, x: {"a": x, "b": [(x,), (x,) * (i + 1)]},
            "\"d['b'][1]\" has had more than 8 lengths, |pad the tuple to a few",
        ),
        (
            lambda i, x: x if i % 2 else [x] * (i + 1),
            "'d' has had more than 8 lengths, |pad the list",
        ),
    ],
    ids=["list", "tuple", "dict", "nested", "list or array"],
)
def test_containers_that_are_ever_new_warn(make: Callable[[int, Any], Any], what: str) -> None:
    x = random(2, 4)
    f = specialize(total)
    assert warned(calls(f, *[(x, make(i, x)) for i in range(9)])) == []
    (text,) = warned(calls(f, *[(x, make(i, x)) for i in range(40)]))
    assert all(part in text for part in what.split("|"))


def test_few_containers_and_lists_of_weights_do_not_warn() -> None:
    f: Any = specialize(lambda x, d: x @ d[0] if isinstance(d, list) else x)
    w = quantize(random(K, K), "F32")
    x = random(2, K)
    few = [(x, d) for _ in range(10) for d in ({"a": x}, {"b": x}, (x,), x)]
    assert warned(calls(f, *few)) == []
    assert warned(calls(f, *[(x, [w] * n) for n in range(1, 20)])) == []


def test_a_global_that_changes_in_every_call_warns(
    monkeypatch: pytest.MonkeyPatch, w: QuantizedTensor
) -> None:
    f = specialize(lambda x, w: x @ w * (FACTOR + len(TABLE)) if UNUSED >= 0 else x)

    def action(name: str) -> None:
        for step in range(20):
            monkeypatch.setitem(globals(), name, step)
            f(random(2, K), w)

    (text,) = warned(lambda: action("UNUSED"))
    assert "UNUSED changed more than 8 times" in text
    assert "pass it as an argument" in text
    (text,) = warned(lambda: action("FACTOR"))
    assert "FACTOR changed more than 8 times" in text

    def grow() -> None:
        for _ in range(20):
            TABLE.append(1.0)
            f(random(2, K), w)

    (text,) = warned(grow)
    assert "len(TABLE) changed more than 8 times" in text
    TABLE[:] = [1.0]


def test_a_warning_that_is_an_error_leaves_the_function_usable(w: QuantizedTensor) -> None:
    f, x = specialize(unused), random(2, K)
    raised = 0
    for step in range(20):
        try:
            f(x, w, step)
        except SpecializationWarning:
            raised += 1
            close(f(x, w, step), unused(x, w, step))
    assert raised == 1
    assert f.stats.misses == len(f.signatures) == 20


def test_the_warning_points_at_the_call_of_warmup_and_bind(w: QuantizedTensor) -> None:
    for prepare in (specialize(unused).warmup, specialize(unused).bind):
        values = [(random(2, K), w, step) for step in range(12)]
        assert len(warned(calls(prepare, *values))) == 1


# --- Q4JIT_DEBUG ----------------------------------------------------------------------------------


def test_debug_lists_compilations_with_their_causes(
    w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("Q4JIT_DEBUG", "1")

    def lines(f: Any, *args: Any) -> list[str]:
        f(*args)
        text = capsys.readouterr().err.splitlines()
        return [line for line in text if line.startswith("q4jit: ") and "q4jit: plan" not in line]

    f, x = specialize(used, cache=False), random(2, K)
    traced, compiled = lines(f, x, w, 1)
    assert traced.startswith("q4jit: used traced in ")
    assert traced.endswith(" ms, because it is the first call")
    assert compiled.startswith("q4jit: q4jit_used for cpu:")
    assert ": compiled in " in compiled
    assert compiled.endswith("because it is the first call")
    traced, compiled = lines(f, x, w, 2)
    for line in (traced, compiled):
        assert line.endswith("because argument 'step' is 2, was 1")
    (traced,) = lines(f, x, w, True)
    assert traced.endswith("argument 'step' is True, was 2; to the same graph as before")
    assert lines(f, x, w, True) == []
    (compiled,) = lines(f, random(20, K), w, True)
    assert "because it is the first call with 20 rows on cpu:" in compiled
    lines(specialize(used), x, w, 1)
    _, compiled = lines(specialize(used), x, w, 1)
    assert ": read from disk in " in compiled


def test_debug_names_the_global_that_changed(
    w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    f = specialize(lambda x, w: x @ w * FACTOR + 0 * UNUSED)
    f(random(2, K), w)
    monkeypatch.setenv("Q4JIT_DEBUG", "1")
    monkeypatch.setitem(globals(), "FACTOR", 7.0)
    f(random(2, K), w)
    assert capsys.readouterr().err.count("because FACTOR changed") == 3
