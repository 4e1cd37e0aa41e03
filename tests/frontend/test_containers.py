"""Lists, tuples, dicts, dataclasses and NamedTuples as arguments and results."""

import dataclasses
import enum
import gc
import re
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest

from q4jit import (
    ArgumentError,
    QuantizedTensor,
    SpecializationWarning,
    TraceError,
    specialize,
)
from q4jit.dispatcher import Specialized
from q4jit.frontend.containers import Apart
from q4jit.frontend.structures import flattened
from q4jit.frontend.trace import trace
from tests.support.functions import F32, random, relative_rms, weight
from tests.support.tracing import TABLE, refusal

T = TypeVar("T")
M, K, N = 3, 32, 48
X, W, V = random(M, K), weight(K, N), weight(K, N, seed=7)
GAIN, BIAS = random(K, seed=2), random(N, seed=3)


class Pair(NamedTuple):
    first: Any
    second: Any


class Shifted(Pair):
    __slots__ = ()

    def sum(self) -> Any:
        return self.first + self.second


@dataclasses.dataclass
class Layer:
    w: Any
    gain: Any
    scale: float = 0.5
    kind: str = "plain"


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    w: Any
    gain: Any
    scale: float = 0.5
    kind: str = "plain"


@dataclasses.dataclass(slots=True)
class SlotLayer(Layer):
    extra: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Both:
    w: Any
    gain: Any
    scale: float = 0.5
    kind: str = "plain"


@dataclasses.dataclass
class Odd:
    """Its code must not run: it is made in other ways than by `__init__(w, gain)`."""

    w: Any
    gain: Any
    rows: dataclasses.InitVar[int]
    scale: float = dataclasses.field(init=False)
    unset: float = dataclasses.field(init=False)
    kind: str = dataclasses.field(default="plain", init=False)

    made = 0

    def __post_init__(self, rows: int) -> None:
        type(self).made += 1
        self.scale = rows / 2
        self.hidden = 0.25


@dataclasses.dataclass(init=False)
class OwnInit:
    w: Any
    gain: Any
    scale: float
    kind: str

    def __init__(self, *everything: Any) -> None:
        assert everything, "made without arguments"
        self.w, self.gain, self.scale, self.kind = *everything, 0.5, "plain"


@dataclasses.dataclass
class Of(Generic[T]):
    w: T
    gain: Any
    scale: float = 0.5
    kind: str = "plain"


def by_attribute(x: Any, layer: Any) -> Any:
    assert type(layer).__name__ in {"Layer", *(c.__name__ for c in DATACLASSES)}
    y = (x * layer.gain) @ layer.w * layer.scale
    return y if layer.kind == "plain" else -y


DATACLASSES = (Layer, FrozenLayer, SlotLayer, Both, OwnInit, Of)
ARGUMENTS: dict[str, tuple[Callable[..., Any], Any]] = {
    "dict": (
        lambda x, d: (x * d["gain"]) @ d["w"] * d["scale"],
        {"w": W, "gain": GAIN, "scale": 0.5},
    ),
    "ordered dict": (
        lambda x, d: x @ next(iter(d.values())),
        OrderedDict(b=W, a=V),
    ),
    "dict of ints": (lambda x, d: x @ d[0] - x @ d[-1], {0: W, -1: V}),
    "list": (lambda x, ws: sum(x @ w for w in ws), [W, V, W]),
    "tuple": (lambda x, ws: x @ ws[0] + ws[1], (W, BIAS)),
    "tuple of one": (lambda x, ws: x @ ws[0], (W,)),
    "NamedTuple": (lambda x, p: x @ p.first + p.second, Pair(W, BIAS)),
    "NamedTuple with a method": (lambda x, p: x * p.sum(), Shifted(0.5, 2.0)),
    "nested": (
        lambda x, d: x @ d["layers"][1].w * d["n"] + d["layers"][0][0]["bias"],
        {
            "layers": [({"bias": BIAS},), Layer(W, GAIN)],
            "n": 3,
            "name": "a",
            "on": True,
            "no": None,
        },
    ),
    "empty containers": (lambda x, d: x * (1 + len(d["a"]) + len(d["b"])), {"a": [], "b": {}}),
    "only an empty one": (lambda x, d: -x if d else 2 * x, {}),
    "numbers": (lambda x, s: x * s[0] + s[1], [0.5, np.float32(2.0)]),
    "static numbers": (lambda x, s: x[:, s[0] : s[1]], (4, 12)),
    "several rows": (lambda x, d: x + d["r"], {"r": random(M, K, seed=9)}),
    "one row": (lambda x, d: x + d["r"], {"r": random(1, K, seed=9)}),
    "an array without axes": (lambda x, d: x * d["s"], {"s": np.array(2.0)}),
    "the same array twice": (lambda x, d: x + d[0] * d[1], [X, X]),
    "a shared container": (lambda x, d: x * d[0][0] * d[1][0], [[2.0]] * 2),
    **{
        kind.__name__: (by_attribute, kind(W, GAIN))
        for kind in (Layer, FrozenLayer, SlotLayer, Both, OwnInit, Of)
    },
    "Of[int]": (by_attribute, Of[Any](W, GAIN)),
}


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of a container, each container first as its type and keys."""
    if isinstance(value, dict):
        return [type(value), *value, *(leaf for v in value.values() for leaf in leaves_of(v))]
    if isinstance(value, list | tuple):
        return [type(value), len(value), *(leaf for v in value for leaf in leaves_of(v))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        entries = [(n, getattr(value, n)) for n in names]
        return [type(value), *(part for n, v in entries for part in (n, *leaves_of(v)))]
    return [value]


def assert_same(result: Any, wanted: Any) -> None:
    """Check that two results are the same containers, with arrays that are close."""
    pairs = list(zip(leaves_of(result), leaves_of(wanted), strict=True))
    assert pairs
    for got, right in pairs:
        if isinstance(right, np.ndarray):
            assert isinstance(got, np.ndarray)
            assert got.dtype == F32
            assert got.shape == right.shape
            assert relative_rms(got, right) < 3e-6
        else:
            assert got is right or (type(got) is type(right) and got == right)


def check(function: Callable[..., Any], *args: Any, **keywords: Any) -> Specialized[..., Any]:
    compiled = function if isinstance(function, Specialized) else specialize(function)
    for _ in range(2):  # the second call is warm
        assert_same(compiled(*args, **keywords), compiled.py_func(*args, **keywords))
    return compiled


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_container_is_an_argument(kind: str) -> None:
    function, container = ARGUMENTS[kind]
    before = leaves_of(container)
    compiled = check(function, X, container)
    assert compiled.stats.hits == 1
    assert all(a is b for a, b in zip(before, leaves_of(container), strict=True))


def test_no_code_of_a_dataclass_runs() -> None:
    layer = Odd(W, GAIN, 3)
    Odd.made = 0

    def function(x: Any, layer: Odd) -> Any:
        assert type(layer) is Odd
        assert not hasattr(layer, "unset")
        scale = layer.scale + layer.hidden
        return {"y": (x * layer.gain) @ layer.w * scale, "layer": layer}

    compiled: Any = specialize(function)
    for _ in range(2):
        result = compiled(X, layer)
        assert relative_rms(result["y"], (X * GAIN) @ W * 1.75) < 3e-6
        assert type(result["layer"]) is Odd
        assert vars(result["layer"]).keys() == {*vars(layer), "kind"}
        assert result["layer"].w is W
    assert Odd.made == 0


@pytest.mark.parametrize("kind", [Layer, FrozenLayer, Both])
def test_a_dataclass_takes_few_python_calls(kind: type) -> None:
    apart, value = Apart(), kind(W, GAIN, 0.5, "plain")
    Apart().tree(value)  # the fields of a class are looked up once
    events: list[str] = []
    sys.setprofile(lambda frame, event, arg: events.append(event))
    try:
        apart.tree(value)
    finally:
        sys.setprofile(None)
    assert events.count("call") <= 4  # none for each field


def test_containers_are_of_the_kinds_that_python_shows() -> None:
    def function(x: Any, d: Any, p: Any, layer: Any) -> Any:
        assert isinstance(d, dict)
        assert type(d) is dict
        assert isinstance(d["ws"], list)
        assert type(d["ws"]) is list
        assert isinstance(p, Pair)
        assert isinstance(layer, FrozenLayer)
        assert isinstance(d["ws"][0], QuantizedTensor)
        with pytest.raises(dataclasses.FrozenInstanceError):
            layer.w = None  # type: ignore[misc]  # refused at run time too
        match d:
            case {"ws": [first, *_], "n": int(n)}:
                return x @ first * n + p.first
        raise AssertionError

    check(function, X, {"ws": [W], "n": 2}, Pair(1.5, None), FrozenLayer(W, GAIN))


# --- results --------------------------------------------------------------------------------------

RESULTS: dict[str, Callable[..., Any]] = {
    "a list": lambda x, d: [x @ d["w"], x * 2],
    "a list of one": lambda x, d: [x @ d["w"]],
    "a dict": lambda x, d: {"y": x @ d["w"], 3: x},
    "an ordered dict": lambda x, d: OrderedDict(b=x @ d["w"], a=x + 1),
    "a NamedTuple": lambda x, d: Pair(x @ d["w"], x + 1),
    "a dataclass": lambda x, d: Layer(x @ d["w"], x + 1, 0.25, "result"),
    "a frozen dataclass": lambda x, d: FrozenLayer(x @ d["w"], x + 1),
    "a dataclass with slots": lambda x, d: Both(x @ d["w"], x + 1),
    "nested": lambda x, d: (x * 2, [Pair({"y": x @ d["w"]}, ()), (x + 1,)]),
    "with values that are known": lambda x, d: (x * 2, 3, None, "text", True, 1.5, [], d["n"]),
    "an argument in new containers": lambda x, d: {**d, "y": x @ d["w"]},
    "a part of an argument": lambda x, d: dataclasses.replace(d["layer"], gain=x + 1),
    "an array of the argument": lambda x, d: [d["gain"], x * 1],
    "twice": lambda x, d: [x + 1, x + 1],
}
HOLDER = {"w": W, "n": 5, "s": 0.75, "gain": GAIN, "layer": Layer(V, GAIN)}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_come_back_as_they_were_returned(kind: str) -> None:
    check(RESULTS[kind], X, HOLDER)


@pytest.mark.parametrize("kind", RESULTS)
def test_out_has_the_containers_of_the_results(kind: str) -> None:
    compiled = specialize(RESULTS[kind])
    wanted = compiled(X, HOLDER)
    out = compiled(X + 1, HOLDER)
    assert compiled(X, HOLDER, out=out) is out
    assert_same(out, wanted)
    call = compiled.bind(X, HOLDER, out=compiled(X + 1, HOLDER))
    assert_same(call(), wanted)
    assert_same(compiled.bind(X, HOLDER)(), wanted)


@pytest.mark.parametrize("number", [1.5, np.float32(1.5), np.float64(1.5)])
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_number_among_the_arguments_comes_back_as_it_is(kind: type, number: Any) -> None:
    compiled = specialize(lambda x, s: kind((x * s, s)))
    for args in ((X, number), (X, number * 2)):
        out = compiled(*args)
        assert_same(out, kind((args[0] * args[1], args[1])))
        assert out[1] is args[1]
        assert compiled(*args, out=out) is out
        assert compiled.bind(*args)()[1] is args[1]
        assert compiled.bind(*args, out=out)() is out
    with pytest.raises(ArgumentError, match=r"result, [(\[]array, .*1\.5.*, got"):
        compiled(X, number, out=out)


@pytest.mark.parametrize("number", [1.5, np.float32(1.5), np.float64(1.5)])
def test_a_number_comes_back_without_kernels_too(
    monkeypatch: pytest.MonkeyPatch, number: Any
) -> None:
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    compiled = specialize(lambda x, s: (x * s, s))
    out = compiled(X, number)
    assert compiled(X, number, out=out) is out
    with pytest.raises(ArgumentError, match=r"result, \(array, .*2\.5.*, got"):
        compiled(X, type(number)(2.5), out=out)


@pytest.mark.parametrize("number", [np.array(1.5, F32), np.array(3)])
@pytest.mark.parametrize("kind", [tuple, list])
def test_an_array_without_axes_is_a_new_array_in_results(kind: type, number: Any) -> None:
    compiled = specialize(lambda x, s: kind((x * 2, s)))
    for _ in range(2):
        result = compiled(X, number)
        assert type(result[1]) is np.ndarray
        assert result[1].dtype == F32
        assert result[1] == number
        assert not np.shares_memory(result[1], number)
    assert compiled(X, np.asarray(number * 2), out=result)[1] == number * 2


def bad_outs() -> dict[str, tuple[Any, str]]:
    y, z = np.empty((M, N), F32), np.empty((M, K), F32)
    like = re.escape("out=: expected containers like those of the result, {'y': array, 'n': [5, ")
    return {
        "a tuple": ((y, z), rf"{like}.*, got \(ndarray, ndarray\)$"),
        "another key": ({"y": y, "m": [5, z]}, rf"{like}.*got \{{'y': ndarray, 'm': \[5, ndarray"),
        "another value": ({"y": y, "n": [6, z]}, like),
        "an array": (y, rf"{like}.*got ndarray$"),
        "a cycle": (cyclic_list(), rf"{like}.*got list$"),
        "a shape": ({"y": z, "n": [5, z]}, r"expected a writable float32 \[3, 48\], got"),
        "the argument": ({"y": y, "n": [5, X]}, r"out= overlaps the argument 'x'"),
    }


def cyclic_list() -> list[Any]:
    entry: list[Any] = []
    entry.append(entry)
    return entry


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("kind", bad_outs())
def test_other_containers_for_out_are_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, jit: bool
) -> None:
    if not jit:
        monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    compiled = specialize(lambda x, d: {"y": x @ d["w"], "n": [d["n"], x + 1]})
    out, message = bad_outs()[kind]
    with pytest.raises(ArgumentError, match=message):
        compiled(X, HOLDER, out=out)


@pytest.mark.parametrize(("jit", "error"), [(True, TraceError), (False, ArgumentError)])
def test_results_without_a_place_for_out_are_refused(
    monkeypatch: pytest.MonkeyPatch, jit: bool, error: type[Exception]
) -> None:
    if not jit:
        monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    compiled = specialize(lambda x: [x, {1.5: x * 2}])
    with pytest.raises(
        error, match=r"result of <lambda>, at \[1\]: expected keys that are str or "
    ):
        compiled(X, out=[X * 1, X * 1])


def test_out_that_overlaps_a_leaf_is_refused_with_its_name() -> None:
    compiled = specialize(lambda x, d: x + d["r"])
    r = random(M, K, seed=4)
    with pytest.raises(ArgumentError, match=re.escape("overlaps the argument \"d['r']\"")):
        compiled(X, {"r": r}, out=r)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: {"y": [x, TABLE]}, r"result of <lambda>, at \['y'\]\[1\]: .*got ndarray"),
        (lambda x: Layer(x, {1.5}), r"at gain: expected an array .*got set"),
        (
            lambda x: {"n": 1, "s": ["a"]},
            r"got only values that are known already: \{'n': 1, 's': \['a'\]\}",
        ),
        (lambda x: {(1, 2): x}, r"expected keys that are str or int, got the tuple \(1, 2\)"),
        (lambda x: {True: x}, r"str or int, got the bool True"),
        (lambda x: [x, cyclic_list()], r"at \[1\]\[0\].*: expected containers nested at most 64"),
        (lambda x: defaultdict(list, y=x), r"got defaultdict"),
        (
            lambda x: [x.shape[0], x],
            r"at \[0\]: .* got RowCount M; take the number of rows from the ",
        ),
        (
            lambda x: [x, np.int64(3)],
            r"at \[1\]: .* got int64 .*3.*; use int\(…\) in place of NumPy",
        ),
        (
            lambda x: [x, np.float64(3)],
            r"at \[1\]: .* got float64 .*3.*; use float\(…\) in place of",
        ),
        (
            lambda x: [x, np.bool_(True)],
            r"at \[1\]: .* got bool.*True.*; use bool\(…\) in place of",
        ),
        (
            lambda x: [x, 1j],
            "bools, floats, strs and None, and of weights and floats among the arg",
        ),
        (lambda x: [Deleted()], r"at \[0\]: .*got Deleted"),
        (lambda x: [x > 0], r"cannot return truth values"),
    ],
)
def test_refused_results(function: Callable[..., Any], got: str) -> None:
    with pytest.raises(TraceError, match=f"(?s){got}.*\n\n.*line"):
        specialize(function)(X)


# --- signatures -----------------------------------------------------------------------------------


def test_structure_and_static_leaves_are_part_of_the_signature() -> None:
    def function(x: Any, d: Any) -> Any:
        entries = list(d.items()) if isinstance(d, dict) else list(enumerate(d))
        return sum(x * v * (i + 1) for i, (_, v) in enumerate(entries))

    compiled = specialize(function)
    for d in ({"a": 0.5, "b": 1.5}, {"a": 2.5, "b": 3.5}):  # floats are run-time arguments
        check(compiled, X, d)
    assert (len(compiled.signatures), compiled.stats.misses) == (1, 1)
    others: list[Any] = [
        {"b": 0.5, "a": 1.5},
        {"a": 0.5, "c": 1.5},
        {"a": 0.5, "b": 2},
        {"a": 0.5, "b": 3},
        {"a": 0.5},
        [0.5, 1.5],
        (0.5, 1.5),
        Pair(0.5, 1.5),
        {0: 0.5, 1: 1.5},
        OrderedDict(a=0.5, b=1.5),
    ]
    for i, d in enumerate(others):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpecializationWarning)
            check(compiled, X, d)
        assert compiled.stats.misses == i + 2
    assert len(compiled.signatures) == 1 + len(others)


def test_signatures_read_as_the_user_writes_arguments() -> None:
    compiled = specialize(lambda x, d, n=2: x @ d["w"][0] * n)
    compiled(X, {"w": [W], "p": Pair(0.5, "a"), "l": Layer(V, GAIN), "t": (1,), "e": {}})
    (signature,) = compiled.signatures
    assert [str(spec) for spec in signature] == [
        "f32 [M, 32]",
        (
            "{'w': [F32 [32, 48]], 'p': Pair(first=float, second='a'), 'l': Layer(w=F32 [32, 48], "
            "gain=f32 [32], scale=float, kind='plain'), 't': (1,), 'e': {}}"
        ),
        "2",
    ]


def test_names_in_kernels_come_from_paths() -> None:
    compiled = specialize(lambda x, layer, ws: x @ layer.w + (x * layer.gain) @ ws[0])
    compiled(X, Layer(W, GAIN), [V])
    for target in ("cpu:x86-64-v3", "hip:gfx1100"):
        text = compiled.inspect_source(target)
        assert all(re.search(rf"\b{name}\b", text) for name in ("layer_w", "layer_gain", "ws_0"))
    assert "layer_w" in compiled.explain()


def test_names_in_kernels_are_distinct_and_bounded() -> None:
    names = ["a b", "a-b", "a_b", "a", "é" * 50, "ü" * 50, "x" * 200, "x" * 201, "int", "1", ""]
    d = {name: float(i) for i, name in enumerate(names)}
    deep: Any = [0.5]
    for _ in range(40):
        deep = {"some_long_name": deep}

    def function(x: Any, d: Any, deep: Any) -> Any:
        while not isinstance(deep, list):
            (deep,) = deep.values()
        return x * sum(d.values()) + deep[0]

    compiled = check(function, X, d, deep)
    for target in ("cpu:x86-64-v3", "hip:gfx1100", "hip:sm_90"):
        assert compiled.inspect_source(target)
    leaves = flattened((X, d, deep), ("x", "d", "deep"))
    graph = trace(function, compiled._specializer.signature_of(leaves)[0])
    assert len(set(graph.names)) == len(graph.names) == len(names) + 2
    assert all(re.fullmatch(r"[A-Za-z_]\w{0,42}", n, re.ASCII) for n in graph.names)


# --- errors ---------------------------------------------------------------------------------------


def test_errors_name_the_leaf() -> None:
    compiled = specialize(lambda x, layer: x @ layer["w"][0])
    cases: list[tuple[Any, str]] = [
        (
            {"w": [X.astype(np.float64)]},
            (
                "argument \"layer['w'][0]\": expected float32, float16 or bfloat16, "
                "got float64 [3, 32]; use layer['w'][0].astype(np.float32)"
            ),
        ),
        ({"w": [W], "f": len}, "argument \"layer['f']\": expected a float array"),
        ({"w": [W], "z": 1j}, "argument \"layer['z']\": expected a float array"),
        ({"w": [W], "a": X[:, :0]}, "argument \"layer['a']\": expected a last dimension"),
        ([Layer(W, {1: b"x"})], "argument 'layer[0].gain[1]': expected a float array"),
    ]
    for layer, message in cases:
        for call in (compiled, compiled.bind, compiled.warmup):
            with pytest.raises(ArgumentError, match=re.escape(message)):
                call(X, layer)


def test_an_id_out_of_range_is_named_by_its_path() -> None:
    compiled = specialize(lambda d: d["w"].rows(d["ids"]))
    check(compiled, {"w": W, "ids": np.array([1, 2])})
    with pytest.raises(
        ArgumentError, match=re.escape("argument \"d['ids']\" at [1]: expected ids")
    ):
        compiled({"w": W, "ids": np.array([1, 99])})


class Deleted:
    pass


@dataclasses.dataclass
class WithProperty:
    w: Any


def never(self: object) -> None:
    raise AssertionError


WithProperty.w = property(never)


@dataclasses.dataclass
class WithDel:
    w: Any

    def __del__(self) -> None:
        DELETED.append(self)


DELETED: list[object] = []


@dataclasses.dataclass
class AlsoDict(dict):  # type: ignore[type-arg]
    w: Any = None


class OwnDict(dict):  # type: ignore[type-arg]
    def __getitem__(self, key: object) -> Any:
        return 2.0


class OwnTuple(Pair):
    def __iter__(self) -> Any:
        return iter((1.0,))


class Loose(Pair):
    pass


def loose() -> Loose:
    made = Loose(1.0, 2.0)
    made.extra = 3  # type: ignore[attr-defined]
    return made


def shared(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def deep(levels: int) -> list[Any]:
    value: list[Any] = [1.0]
    for _ in range(levels):
        value = [value]
    return value


def cyclic_dict() -> dict[str, Any]:
    entry: dict[str, Any] = {"a": 1.0}
    entry["again"] = [entry]
    return entry


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list in itself": (cyclic_list, "nested at most 64 levels deep, got more levels, or one th"),
    "a dict in itself": (cyclic_dict, "nested at most 64 levels deep, got more levels, or one th"),
    "many levels": (lambda: deep(100), "nested at most 64 levels deep"),
    "many paths": (lambda: shared(60), "at most 4096 values in containers, got more"),
    "many numbers": (lambda: [0.5] * 5000, "got more; use NumPy arrays instead of lists of numb"),
    "a set": (lambda: {"a": {1.0}}, "got set; use list(d['a'])"),
    "a frozenset": (lambda: frozenset({1.0}), "got frozenset; use list(d)"),
    "a key": (lambda: {"a": {1.5: 2.0}}, "\"d['a']\": expected keys that are str or int, got the "),
    "a key of None": (lambda: {None: 2.0}, "got the NoneType None"),
    "a defaultdict": (lambda: defaultdict(list), "got defaultdict; use dict(d)"),
    "a subclass of dict": (lambda: OwnDict(a=1.0), "got OwnDict; use dict(d)"),
    "a mapping": (lambda: MappingProxyType({"a": 1.0}), "got mappingproxy; use dict(d)"),
    "a deque": (lambda: deque([1.0]), "got deque; use list(d)"),
    "a NamedTuple that is too short": (lambda: tuple.__new__(Pair, (1.0,)), "its fields and nothi"),
    "a large key": (lambda: {2**99999: {1.5: 0}}, "d[0x"),
    "a subclass of list": (lambda: type("Own", (list,), {})([1.0]), "got Own; use list(d)"),
    "a subclass of tuple": (lambda: OwnTuple(1.0, 2.0), "got OwnTuple; use tuple(d)"),
    "a NamedTuple with an attribute": (
        loose,
        "a NamedTuple with its fields and nothing else, got one",
    ),
    "a property": (lambda: object.__new__(WithProperty), "got WithProperty"),
    "a finaliser": (lambda: WithDel(1.0), "got WithDel"),
    "a dataclass that is a dict": (lambda: AlsoDict(w=1.0), "got AlsoDict; use dict(d)"),
    "a dataclass itself": (lambda: Layer, "got type"),
    "an object": (Deleted, "got Deleted"),
    "a function": (lambda: {"act": np.tanh}, "argument \"d['act']\": expected a float array"),
    "a generator": (lambda: (i for i in (1.0,)), "got generator"),
    "a view of a dict": ({"a": 1.0}.values, "got dict_values"),
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_containers(monkeypatch: pytest.MonkeyPatch, kind: str, jit: bool) -> None:
    if not jit:
        monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    make, message = REFUSED[kind]
    compiled = specialize(lambda x, d: x * 2)
    value = make()
    for call in (compiled, compiled.bind, compiled.warmup):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            call(X, value)
    del value
    gc.collect()
    assert len(DELETED) <= 2 * list(REFUSED).index(kind)
    assert np.array_equal(compiled(X, 1.0), X * 2)


def test_long_paths_are_shortened() -> None:
    value: Any = {1.5: 2.0}
    for _ in range(60):
        value = {"key" * 100: value}
    with pytest.raises(ArgumentError) as caught:
        specialize(lambda d: d)(value)
    assert len(str(caught.value)) < 400


def test_static_leaves_of_subclasses() -> None:
    class Act(enum.IntEnum):
        SILU = 2

    check(lambda x, d: x * int(d["act"] == 2) * d["n"], X, {"act": Act.SILU, "n": np.int64(3)})


def test_attributes_behind_a_property_and_other_ways_to_look() -> None:
    @dataclasses.dataclass
    class Guarded:
        w: Any

        def __getattribute__(self, name: str) -> Any:
            LOOKED.append(name)
            return object.__getattribute__(self, name)

        @property
        def hidden(self) -> Any:
            raise AssertionError

    guarded = Guarded(2.0)
    vars(guarded)["hidden"] = 3
    LOOKED.clear()
    compiled: Any = specialize(lambda x, g: [x * 2, g])
    result = compiled(X, guarded)[1]
    assert not LOOKED
    assert vars(result) == {"w": 2.0, "hidden": 3}


LOOKED: list[str] = []


def test_a_key_that_cannot_be_shown() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(ArgumentError, match="expected keys that are str or int, got the Bad <Bad"):
        specialize(lambda d: d)({Bad(): 1.0})


# --- lists are no arrays --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "value", "cure"),
    [
        (lambda x, w: x @ w, [1.0] * K, "an array of it, np.asarray(x, np.float32)"),
        (lambda x, w: w.rows(x), [1, 2], "pass np.array(ids, np.int64) as an argument"),
        (lambda x, w: np.exp(x), [1.0, 2.0], "cannot"),
    ],
)
def test_a_list_in_place_of_an_array(function: Callable[..., Any], value: Any, cure: str) -> None:
    assert cure in refusal(function, value, W).reason


# --- changes --------------------------------------------------------------------------------------


def set_key(x: Any, d: Any) -> Any:
    d["y"] = x * 2
    return d["y"]


def replace_key(x: Any, d: Any) -> Any:
    y = x * d["s"]
    d["s"] = y
    return y


def delete_key(x: Any, d: Any) -> Any:
    del d["s"]
    return x * 2


def pop_key(x: Any, d: Any) -> Any:
    return x * d.pop("s")


def add_in_place(x: Any, d: Any) -> Any:
    d["s"] += 1.0
    return x * d["s"]


def append(x: Any, d: Any) -> Any:
    d["l"].append(x)
    return x * 2


def sort(x: Any, d: Any) -> Any:
    d["l"].reverse()
    return x * 2


def set_field(x: Any, d: Any) -> Any:
    d["layer"].scale = x * 2
    return x * 2


def new_field(x: Any, d: Any) -> Any:
    d["layer"].other = 5
    return x * 2


def around_frozen(x: Any, d: Any) -> Any:
    object.__setattr__(d["frozen"], "scale", 2.0)
    return x * 2


def grow(entries: list[Any], x: Any) -> None:
    entries += [x]


def by_a_helper(x: Any, d: Any) -> Any:
    grow(d["l"], x)
    return x * 2


def with_a_call(x: Any, d: Any) -> Any:
    d["l"][0] = double(x)
    return x * 2


def double(x: Any) -> Any:
    y = x * 2
    return y + 1


def put_into_itself(x: Any, d: Any) -> Any:
    d["l"].append(d["l"])
    return x * 2


def odd_key(x: Any, d: Any) -> Any:
    d[1.5] = 2.0
    return x * 2


CHANGES = {
    set_key: ('d["y"] = x * 2', "d"),
    replace_key: ('d["s"] = y', "d['s']"),
    delete_key: ('del d["s"]', "d"),
    pop_key: ('return x * d.pop("s")', "d"),
    add_in_place: ('d["s"] += 1.0', "d['s']"),
    append: ('d["l"].append(x)', "d"),
    sort: ('d["l"].reverse()', "d['l'][0]"),
    set_field: ('d["layer"].scale = x * 2', "d['layer'].scale"),
    new_field: ('d["layer"].other = 5', "d"),
    around_frozen: ('object.__setattr__(d["frozen"], "scale", 2.0)', "d['frozen'].scale"),
    by_a_helper: ("entries += [x]", "d"),
    put_into_itself: ('d["l"].append(d["l"])', "d"),
    odd_key: ("d[1.5] = 2.0", "d"),
    with_a_call: ('d["l"][0] = double(x)', "d['l'][0]"),
}


def changeable() -> dict[str, Any]:
    return {
        "s": 0.5,
        "l": [1.0, 2.0],
        "layer": Layer(1.0, GAIN),
        "frozen": FrozenLayer(1.0, GAIN),
    }


@pytest.mark.parametrize("function", CHANGES)
@pytest.mark.parametrize("jit", [True, False])
def test_changing_a_container_is_refused(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], jit: bool
) -> None:
    if not jit:
        monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    d = changeable()
    before = leaves_of(d)
    shown = refusal(function, X, d)
    line, entry = CHANGES[function]
    assert shown.line.strip() == line
    assert shown.marked
    assert shown.reason.startswith(f"cannot change {entry}, which belongs to the caller")
    assert all(a is b for a, b in zip(before, leaves_of(d), strict=True))


def test_changing_a_copy_is_right() -> None:
    def function(x: Any, d: Any) -> Any:
        own = dict(d)
        own["s"] = x * d["s"]
        entries = list(d["l"])
        entries.append(own["s"])
        layer = dataclasses.replace(d["layer"], scale=entries[-1])
        return {**own, "l": entries, "layer": layer}

    check(function, X, changeable())


def test_an_array_in_a_container_is_not_changed_in_place() -> None:
    def function(d: Any) -> Any:
        d["x"] += 1
        return d["x"]

    assert "cannot change an argument in place" in refusal(function, {"x": X}).reason


def test_a_debugger_keeps_its_trace_function() -> None:
    import sys

    def follow(*event: Any) -> Any:
        return None

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        with pytest.raises(TraceError):
            specialize(set_key)(X, {})
        assert sys.gettrace() is follow
    finally:
        sys.settrace(before)


# --- other ways to call ---------------------------------------------------------------------------


def test_defaults_and_keywords() -> None:
    def function(x: Any, p: Any = (2, 0.5), *, layer: Any = FrozenLayer(W, GAIN)) -> Any:
        return x @ layer.w * p[0] * p[1]

    compiled = check(function, X)
    check(compiled, X, (3, 1.5))
    check(compiled, x=X, p=[2, 2.5], layer=Layer(V, GAIN))
    misses = compiled.stats.misses
    compiled.warmup((M, K))  # the tuple that is the default is no shape
    compiled.warmup(X, layer=FrozenLayer(V, (K,)))
    assert compiled.stats.misses == misses
    compiled.warmup(X, layer=FrozenLayer(V, (1, K)))
    assert compiled.stats.misses == misses + 1


def test_warmup_takes_shapes_in_containers() -> None:
    compiled = specialize(lambda x, d: x @ d["w"] + d["more"][0])
    compiled.warmup((M, K), {"w": W, "more": [(N,)]})
    check(compiled, X, {"w": W, "more": [BIAS]})
    assert (compiled.stats.misses, compiled.stats.hits) == (1, 2)


SCALE = 2.0


def test_a_bound_call_keeps_the_entries_and_reads_their_contents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = specialize(lambda x, d: {"y": x * d["g"] * SCALE})
    x, d = X.copy(), {"g": GAIN.copy()}
    call = compiled.bind(x, d)
    x += 1
    d["g"][:] = 3
    d["g"] = GAIN * 0  # the container was read by bind
    np.testing.assert_allclose(call()["y"], x * 6, rtol=1e-6)
    monkeypatch.setattr("tests.frontend.test_containers.SCALE", 3.0)  # binds again
    np.testing.assert_allclose(call()["y"], x * 9, rtol=1e-6)


def test_a_method_of_a_dataclass() -> None:
    @dataclasses.dataclass
    class Block:
        w: Any
        gain: Any

        @specialize
        def forward(self, x: Any) -> Any:
            return self.normed(x) @ self.w

        def normed(self, x: Any) -> Any:
            return x * self.gain

    for w in (W, V):
        block = Block(w, GAIN)
        assert relative_rms(block.forward(X), (X * GAIN) @ w) < 3e-6
    with pytest.raises(ArgumentError, match=r"argument 'self\.w': expected .*float64"):
        Block(X.astype(np.float64), GAIN).forward(X)


@dataclasses.dataclass
class Scaled:
    gain: Any
    factor = 2.0  # of the class

    def of(self, x: Any) -> Any:
        return x * self.gain * self.factor * SCALE

    @property
    def doubled(self) -> Any:
        return self.gain * (2 * SCALE)

    @staticmethod
    def shifted(x: Any) -> Any:
        return x + SCALE


class Named(NamedTuple):
    gain: Any

    def of(self, x: Any) -> Any:
        return x * self.gain * SCALE


METHODS: list[tuple[Callable[..., Any], Any]] = [
    (lambda x, layer: layer.of(x), Scaled(GAIN)),
    (lambda x, layer: x * layer.doubled, Scaled(GAIN)),
    (lambda x, layer: layer.shifted(x), Scaled(GAIN)),
    (lambda x, layer: layer[0]["a"].of(x), [{"a": Scaled(GAIN)}]),
    (lambda x, layer: layer.of(x), Named(GAIN)),
]


@pytest.mark.parametrize(("function", "layer"), METHODS)
def test_values_that_methods_of_an_argument_read_are_frozen(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], layer: Any
) -> None:
    compiled = check(function, X, layer)
    monkeypatch.setattr("tests.frontend.test_containers.SCALE", 3.0)
    check(compiled, X, layer)
    monkeypatch.setattr(Scaled, "factor", 5.0)
    check(compiled, X, layer)


def test_without_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    for kind, function in RESULTS.items():
        compiled = specialize(function)
        wanted = compiled.py_func(X, HOLDER)
        assert_same(compiled(X, HOLDER), wanted)
        assert_same(compiled.bind(X, HOLDER)(), wanted)
        if not kind.startswith("an a"):  # NumPy returns the argument's own array
            out = compiled(X + 1, HOLDER)
            assert compiled(X, HOLDER, out=out) is out
            assert_same(out, wanted)


def test_a_class_that_is_made_again_has_a_signature_of_its_own() -> None:
    compiled = specialize(lambda x, p: Pair(x * p.s, type(p).__name__))
    for _ in range(2):  # as in a notebook
        made = dataclasses.make_dataclass("Made", ["s"])
        check(compiled, X, made(0.5))
    assert len(compiled.signatures) == 2


def test_many_layers() -> None:
    def function(x: Any, layers: Any) -> Any:
        for layer in layers:
            x = x + (x * layer.gain) @ layer.w * layer.scale
        return {"x": x, "layers": len(layers)}

    square = weight(K, K)
    check(function, X, [Layer(square, GAIN, 0.1 * i) for i in range(20)])


def test_fields_with_defaults_are_no_frozen_values() -> None:
    compiled = check(lambda x, layer: x * layer.scale * layer.factor, X, WithFactor(0.25))
    assert "frozen when it was traced: WithFactor.factor = 2.0\n" in compiled.explain()


@dataclasses.dataclass
class WithFactor:
    scale: float = 0.5
    factor = 2.0  # of the class


Answer: Any = None


def test_a_class_of_results_that_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = specialize(lambda x: Answer(x * 2, 2**5000))
    for _ in range(2):  # as in a notebook: the kernels are the same, the class is another
        made = dataclasses.make_dataclass("Answer", ["y", "n"])
        monkeypatch.setattr("tests.frontend.test_containers.Answer", made)
        for _ in range(2):
            assert type(compiled(X)) is made


def test_a_leaf_with_many_values_is_named_in_the_warning() -> None:
    compiled = specialize(lambda x, d: x[:, : d["n"]] * d["s"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(1, 15):
            compiled(X, {"n": n, "s": 2.0})
            compiled(X, {"s": 2.0, "n": n})  # another structure
    texts = [str(w.message) for w in caught if w.category is SpecializationWarning]
    assert len(texts) == 1
    assert "argument \"d['n']\" has had more than 8 int values" in texts[0]


def test_new_containers_are_a_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("Q4JIT_DEBUG", "1")
    compiled = specialize(lambda x, d: x * d["s"])
    for d in ({"s": 2.0}, {"s": 2.0, "n": 1}, {"s": 2.0, "n": 2}):
        compiled(X, d)
    log = capsys.readouterr().err
    assert "because the containers of its arguments are new" in log
    assert "argument \"d['n']\" is 2, was 1" in log
