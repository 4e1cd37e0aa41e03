"""Decorated functions under torch.compile: equal bits, few graphs, and nothing stale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from q4jit import ArgumentError, TraceError, specialize
from q4jit.torch import Weight
from tests.support.torch import cases
from tests.support.torch.cases import (
    CASES,
    DOWN,
    GATE,
    PLAIN,
    UP,
    Case,
    K,
    Layer,
    N,
    Pair,
    floats,
    matrix,
)
from tests.support.torch.equal import Graphs, assert_same

ROWS = (1, 3, 17, 200)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


untyped: Any = cases.gated


def gated(x: Any) -> Any:
    return cases.gated(x, GATE, UP)


# --- equal bits, few graphs -----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dynamic", [None, True])
def test_at_most_two_graphs_serve_any_number_of_rows(case: Case, dynamic: bool | None) -> None:
    graphs = Graphs()
    function = compiled(case.call, graphs, dynamic=dynamic)
    for m in ROWS:
        assert_same(function(*case.tensors(m)), case.call(*case.tensors(m)))
    assert graphs.count <= 2
    assert graphs.calls >= 1
    assert_same(function(*case.tensors(0)), case.call(*case.tensors(0)))


@every_case
def test_aot_eager(case: Case) -> None:
    function = compiled(case.call, dynamic=True)
    for m in (17, 200):
        assert_same(function(*case.tensors(m)), case.call(*case.tensors(m)))


class Model(nn.Module):
    """A layer with products of PyTorch's own before, between and behind those of q4jit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = Weight(matrix(0)), Weight(matrix(1, "Q6_K", 256)), DOWN
        self.wide = nn.Linear(K, 256)

    @torch.no_grad()
    def forward(self, x: Tensor, eps: float = 1e-5) -> Tensor:
        y = cases._norm(torch.sin(x), self.gate, eps)
        z = cases._scaled(self.wide(x).relu(), self.up, eps + 1)
        made: Tensor = cases._chained(x, self.gate, self.down) + (y * z)[..., :K]
        return made


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode: str) -> None:
    model = Model()
    function = torch.compile(model, fullgraph=True, mode=mode)
    for m in (*ROWS, 0):
        x = floats(m, K)
        torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("inductor")
def test_inductor_gives_the_bits_of_single_calls() -> None:
    def calls(x: Tensor, ids: Tensor, gates: Tensor) -> Any:
        return (
            gated(x),
            cases.several_experts_per_row(x, ids, gates),
            cases.containers_of_results(x),
            gated(x.half()),
        )

    function = torch.compile(calls, fullgraph=True, dynamic=True)
    for m in (17, 200):
        given = floats(m, K), cases.ids(m, 2, most=cases.E), floats(m, 2)
        assert_same(function(*given), calls(*given))


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("backend", [Graphs, "inductor"])
def test_two_graphs_serve_any_float(backend: Any) -> None:
    def scaled(x: Tensor, factor: float) -> Any:
        return cases._scaled(x, GATE, factor), cases._norm(x, PLAIN, gain=factor)

    torch._dynamo.utils.counters.clear()
    function = compiled(scaled, backend() if backend is Graphs else backend)
    x = floats(3, K)
    for factor in (0.5, 0.25, -1.5, 3.0, -0.0, 1e-30, 1e30):
        assert_same(function(x, factor), scaled(x, factor))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for factor in (float("nan"), float("inf"), -float("inf"), 0.125):
        assert_same(function(x, factor), scaled(x, factor))


def test_each_static_value_has_its_graph() -> None:
    def power(x: Tensor, n: int, kind: str) -> Any:
        return cases._static(x, GATE, n, True, kind)

    for dynamic in (None, True):
        torch.compiler.reset()
        graphs = Graphs()
        function = compiled(power, graphs, dynamic=dynamic)
        for n, kind in ((0, "tanh"), (1, "tanh"), (2, "tanh"), (2, ""), (1, "tanh")):
            assert_same(function(floats(3, K), n, kind), power(floats(3, K), n, kind))
        assert graphs.count == 4


def test_defaults_of_every_kind() -> None:
    @specialize
    def function(
        x: Any,
        w: Any = PLAIN,
        numbers: Any = (1.5, 2, None, "text", float("inf")),
        *,
        layer: Any = Layer(GATE, 0.5),  # noqa: B008 - nobody changes it
        table: Any = {"k": 3.0},  # noqa: B006 - nobody changes it
    ) -> Any:
        y = x @ w * numbers[0] + x @ layer.gate * layer.up
        return np.minimum(y, numbers[-1]) if numbers[3] == "text" else y + table["k"]

    graphs, x = Graphs(), floats(3, K)
    call = compiled(lambda x: (function(x), function(x, layer=Layer(UP, 2.0))), graphs)
    assert_same(call(x), (function(x), function(x, layer=Layer(UP, 2.0))))
    assert_same(compiled(function)(x), function(x))
    assert graphs.count == 1


@dataclass(frozen=True, slots=True)
class Small:
    y: Any
    rest: Any = None


@pytest.mark.parametrize("kind", [Pair, Layer, Small], ids=lambda kind: kind.__name__)
def test_containers_cross_the_border_of_a_graph(kind: Any) -> None:
    @specialize
    def function(x: Any, given: Any) -> Any:
        return kind(x @ given[0], {"n": 1, 2: [None, float("inf"), x]})

    def call(x: Tensor, w: Any) -> Any:
        return function(x, kind(w, 0.5) if kind is Pair else [w])

    made, wanted = compiled(call, Graphs())(floats(3, K), GATE), call(floats(3, K), GATE)
    assert type(made) is kind
    fields = [f.name for f in wanted.__dataclass_fields__.values()] if kind is not Pair else None
    if fields is None:
        assert_same(made, wanted)
    else:
        for field in fields:
            assert_same(getattr(made, field), getattr(wanted, field))


def test_methods_and_attributes_of_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(GATE, Weight(matrix(6)))
            self.weights = nn.ModuleList([Weight(matrix(7, "Q4_0", K, K)) for _ in range(3)])

        @staticmethod
        @specialize
        def product(x: Any, w: Any) -> Any:
            return x + x @ w

        def forward(self, x: Tensor) -> Any:
            for w in self.weights:
                x = self.product(x, w)
            return cases._layered(x, self.layer)

    block, graphs = Block(), Graphs()
    function = compiled(block, graphs)
    for m in ROWS:
        assert_same(function(floats(m, K)), block(floats(m, K)))
    assert (graphs.count, graphs.calls) == (2, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode: Any) -> None:
    function = compiled(gated)
    with mode():
        assert_same(function(floats(3, K)), gated(floats(3, K)))
    assert_same(function(floats(3, K)), gated(floats(3, K)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    def inside(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            y = gated(x), cases.without_weights(x, x)
            with torch.autocast("cpu", enabled=False):
                return *y, gated(x)

    x = floats(3, K)
    assert_same(compiled(inside)(x), inside(x))
    assert inside(x)[0].dtype == dtype
    function, wanted = compiled(gated), gated(x)
    with torch.autocast("cpu", dtype):
        assert_same(function(x), gated(x))
    assert_same(function(x), wanted)


def test_vmap() -> None:
    x = floats(4, 3, K)
    assert_same(compiled(torch.vmap(gated))(x), gated(x))


def test_rows_that_a_mask_chooses() -> None:
    function, x = compiled(lambda x, mask: gated(x[mask])), floats(5, K)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for mask in (x[:, 0] > 0, x[:, 1] > 0, x[:, 0] > -9):
            assert_same(function(x, mask), gated(x[mask]))


def test_rows_that_broadcast() -> None:
    function = compiled(lambda x, y: (cases._elementwise(x, y), gated(x), gated(y)), dynamic=True)
    for m, n in ((3, 3), (5, 5), (1, 7), (7, 1)):
        x, y = floats(m, K), floats(n, K, seed=1)
        assert_same(function(x, y), (cases._elementwise(x, y), gated(x), gated(y)))


# --- nothing is stale -----------------------------------------------------------------------------

WEIGHT: Any = PLAIN
FACTOR: Any = 2.0
TABLE = {"shift": 1.0}


@specialize
def reads_globals(x: Any, w: Any) -> Any:
    return helper(x @ w) * FACTOR


def helper(y: Any) -> Any:
    return y + TABLE["shift"]


def calls_with_globals(x: Any) -> Any:
    return reads_globals(x, WEIGHT)


def test_another_weight_of_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, x = Graphs(), floats(3, K)
    function = compiled(calls_with_globals, graphs)
    for weight in (PLAIN, matrix(30, "Q5_0"), Weight(PLAIN), Weight(matrix(30, "Q5_0")), PLAIN):
        monkeypatch.setattr("tests.torch.test_compile.WEIGHT", weight)
        for _ in range(2):
            assert_same(function(x), calls_with_globals(x))
    assert graphs.count <= 4


def test_weights_that_take_the_place_of_freed_ones() -> None:
    holder: list[Any] = [None]
    function = compiled(lambda x: reads_globals(x, holder[0]), Graphs())
    with torch._dynamo.config.patch(recompile_limit=64):
        for seed in range(12):  # their ids may be the same
            holder[0] = matrix(seed, "Q8_0")
            made = function(floats(3, K))
            wanted = reads_globals(floats(3, K), matrix(seed, "Q8_0"))
            assert_same(made, wanted)


def test_a_module_that_loads_another_state() -> None:
    model, other = Model(), Model()
    other.gate = Weight(matrix(40))
    function, x = compiled(model), floats(3, K)
    function(x)
    model.load_state_dict(other.state_dict())
    assert_same(function(x), other(x))


def test_changed_globals_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, x = Graphs(), floats(3, K)
    function = compiled(calls_with_globals, graphs)

    def check(count: int) -> None:
        for _ in range(2):
            assert_same(function(x), calls_with_globals(x))
        assert graphs.count == count

    check(1)
    monkeypatch.setattr("tests.torch.test_compile.FACTOR", 3.0)
    check(2)
    monkeypatch.setattr("tests.torch.test_compile.FACTOR", float("3.0"))
    check(2)  # another object with the same value
    monkeypatch.setitem(TABLE, "shift", -1.0)
    check(3)
    monkeypatch.setattr("tests.torch.test_compile.helper", lambda y: y * y)
    check(4)
    monkeypatch.undo()
    check(4)  # the first graph holds again


def test_changed_closures_are_compiled_again() -> None:
    factor = 2.0

    @specialize
    def scaled(x: Any, w: Any) -> Any:
        return x @ w * factor

    function, x = compiled(lambda x: scaled(x, GATE), Graphs()), floats(3, K)
    for factor in (2.0, 3.0, 2.0):  # noqa: B007 - the closure reads it
        assert_same(function(x), scaled(x, GATE))


def test_a_global_that_makes_a_function_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    function, x = compiled(calls_with_globals, Graphs()), floats(3, K)
    wanted = function(x)
    with monkeypatch.context() as patch:
        patch.setattr("tests.torch.test_compile.FACTOR", "text")
        with pytest.raises(Exception, match="TraceError: "):
            function(x)
    assert_same(function(x), wanted)


# --- bad input ------------------------------------------------------------------------------------


def refused() -> list[tuple[Callable[[Tensor], Any], Tensor, str]]:
    """Return calls, their argument and a part of the message."""
    x, w = floats(3, K), GATE
    away = Weight(matrix(0), device="meta")
    return [
        (gated, x.double(), r"'x': expected float32, .* got float64 .*; use x\.float\(\)"),
        (gated, floats(3, K + 32), r"expected x \[\.\.\., 64\] for w \[64, 96\]"),
        (gated, x.int(), r"use w\.rows\(x\)"),
        (lambda x: untyped(x, w), x, r"gated\(\): missing a required argument: 'up'"),
        (lambda x: untyped(x, w, w, 1), x, r"too many positional arguments"),
        (lambda x: untyped(x, w, up=w, K=K), x, r"unknown argument 'K' \(K: an option"),
        (lambda x: untyped(x, w, w, x=1), x, r"multiple values for argument 'x'"),
        (lambda x: cases.gated(x, w, w, out=x), x, r"gated: out= cannot be combined with"),
        (lambda x: cases.gated(x, w, x), x, r"x @ w: |cannot|expected"),
        (lambda x: cases.gated(x, away, w), x, r"'gate': expected cpu, as 'x' is, got meta"),
        (lambda x: cases.gated(x, PLAIN.T, w), x, r"'gate': .*, got TransposedTensor"),
        (lambda x: cases._scaled(x, w, {1, 2}), x, r"'scale': .*, got set"),
        (lambda x: cases._scaled(x, w, nn.Linear(2, 2)), x, r"'scale': .*, got Linear"),
        (
            lambda x: cases._scaled(x, w, x.numpy()),
            x,
            r"'scale': .*; use torch\.as_tensor\(scale\)",
        ),
    ]


@pytest.mark.parametrize("number", range(len(refused())))
def test_the_compiler_shows_our_errors(number: int) -> None:
    call, x, message = refused()[number]
    with pytest.raises(Exception, match=message):
        compiled(call)(x)


def test_shapes_that_do_not_broadcast() -> None:
    def affine(x: Tensor, residual: Tensor) -> Any:
        return cases._affine(x, GATE, 0.0, residual)

    function = compiled(affine, dynamic=True)
    assert_same(function(floats(5, K), floats(5, N)), affine(floats(5, K), floats(5, N)))
    with pytest.raises((ArgumentError, TraceError), match=r"residual|broadcast|expected"):
        function(floats(5, K), floats(4, N))
