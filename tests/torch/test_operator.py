"""Decorated functions as the operator `q4jit::call`, without a compiler: modes and bad input."""

import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from q4jit import ArgumentError, Q4JitError, specialize
from q4jit.frontend.structures import Results
from q4jit.torch import Weight, bridge, memory, operator, results
from q4jit.torch.calls import CallText
from q4jit.torch.results import name_of_builder
from tests.support.torch import cases
from tests.support.torch.cases import CASES, GATE, PLAIN, UP, Case, K, N, floats, matrix
from tests.support.torch.equal import assert_same

every_case = pytest.mark.parametrize("case", CASES, ids=str)
Recorded = list[tuple[list[Tensor], list[Tensor], list[float], str]]


@every_case
def test_the_operator_gives_the_bits_of_a_direct_call(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (0, 1, 3, 70)
    wanted = [case.call(*case.tensors(m)) for m in rows]
    calls = _record(monkeypatch)
    for m, want in zip(rows, wanted, strict=True):
        assert_same(case.call(*case.tensors(m)), want)
    assert calls


def _record(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Run every call as the operator from now on, and return the list of its arguments."""
    calls: Recorded = []

    def record(*args: Any) -> Any:
        calls.append(args)
        return operator.call(*args)

    def concerns(_: object, args: tuple[Any, ...]) -> bool:
        return any(map(bridge._has_tensor, args)) or Weight in map(type, args)

    monkeypatch.setattr(bridge, "call", record)
    monkeypatch.setattr(bridge.TorchBridge, "needs_operator", concerns)
    return calls


@every_case
def test_opcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _record(monkeypatch)
    case.call(*case.tensors(3))
    for args in calls:
        assert "\n" not in args[3], "PyTorch's compiler writes the text into comments"
        torch.library.opcheck(operator.call, args)


def one_call(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor], str]:
    """Return the arrays, weights and text of a call of the operator."""
    with monkeypatch.context() as patch:
        calls = _record(patch)
        gated(floats(3, K))
    ((arrays, weights, _, text),) = calls
    return arrays, weights, text


untyped: Any = cases.gated


def gated(x: Any) -> Any:
    return cases.gated(x, GATE, UP)


# --- modes of PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, y = floats(3, K), floats(3, K, seed=1)
    wanted, plain = gated(x.to(dtype)), gated(x)
    elementwise = cases.without_weights(x, y)
    with torch.autocast("cpu", dtype):
        assert_same(gated(x), wanted)
        assert_same(gated(x.half()), gated(x.half().to(dtype)))
        assert_same(cases.without_weights(x, y), elementwise)
        assert_same(cases.rows(torch.tensor([1, 3])), cases.rows(torch.tensor([1, 3])))
        with torch.autocast("cpu", enabled=False):
            assert_same(gated(x), plain)
        # numbers and numbers of rows are not cast
        scaled = cases.tensors_without_axes(x, torch.tensor(1.7))
    assert_same(scaled, cases.tensors_without_axes(x.to(dtype), torch.tensor(1.7)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients(mode: Any) -> None:
    x = nn.Parameter(floats(3, K))
    wanted = gated(x.detach())
    with mode():
        assert_same(gated(x), wanted)
        weight = Weight(matrix(0))
        assert_same(cases.gated(x, weight, UP), wanted)
    assert_same(cases.gated(x.detach(), weight, UP), wanted)


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(gated(floats(3, K)), gated(floats(3, K)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_fake_tensors_have_the_shapes_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = gated(torch.empty(5, 2, K, dtype=torch.float16))
        assert (y.shape, y.dtype) == ((5, 2, N), torch.float16)
    arrays, weights, text = one_call(monkeypatch)
    fakes = FakeTensorMode()
    with fakes:
        given = [fakes.from_tensor(t) for t in (*arrays, *weights)]
        (y,) = operator.call(given[:1], given[1:], [], text)
        assert y.shape == (3, N)
        with pytest.raises(ArgumentError, match=r"'x': expected an array \[\.\.\., 64\]"):
            operator.call([torch.empty(3, K + 32)], given[1:], [], text)


def test_meta_tensors_have_the_shapes_of_results() -> None:
    w = Weight(matrix(0), device="meta")
    y = cases.gated(torch.empty(5, K, device="meta"), w, w)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (5, N), torch.float32)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(mode: Any) -> None:
    trace = make_fx(gated, tracing_mode=mode, _allow_non_fake_inputs=True)
    graph = trace(floats(3, K))
    assert operator.call in [node.target for node in graph.graph.nodes]
    for m in (3, 5) if mode == "fake" else (3,):
        assert_same(graph(floats(m, K)), gated(floats(m, K)))


def test_functional_call_replaces_parameters() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = GATE
            self.b = nn.Parameter(torch.zeros(N))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = cases._affine(x, self.w, self.b, 0.0)
            return y

    x, other = floats(3, K), floats(N, seed=1)
    made = torch.func.functional_call(Layer(), {"b": other}, (x,))
    assert_same(made.detach(), cases._affine(x, GATE, other, 0.0))


@pytest.mark.parametrize("size", [0, 4])
def test_vmap_runs_one_call_after_the_other(size: int) -> None:
    x, b = floats(3, size, K), floats(N)

    def affine(x: Tensor, b: Tensor) -> Tensor:
        y: Tensor = cases._affine(x, GATE, b, 0.5)
        return y

    made = torch.vmap(affine, in_dims=(1, None))(x, b)
    assert_same(made, affine(x.transpose(0, 1), b))


def test_weights_are_passed_on_as_they_came() -> None:
    made = cases.containers_of_results(floats(3, K))
    assert made["pair"].second.shape == (3, K)
    pair = specialize(lambda x, w, u: [x @ w, w, (u,)])(floats(3, K), GATE, PLAIN)
    assert pair[1] is GATE
    assert pair[2][0] is PLAIN


def test_known_results_keep_their_types_and_signs() -> None:
    function = specialize(lambda x: x)
    for leaf in (1, True, 1.0, 0.0, -0.0, None, "1"):
        name = name_of_builder(function, Results((list, (), (None,)), (leaf,)))
        (made,) = getattr(function, name)([], [])
        assert repr(made) == repr(leaf)
        assert name_of_builder(function, Results((list, (), (None,)), (leaf,))) == name


def test_threads_get_the_containers_of_their_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def waits(given: Any) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other thread waits for this one
            both.wait(0.5)
        return builder(given)

    builder = results.builder
    monkeypatch.setattr(results, "builder", waits)
    function = specialize(lambda x: x)
    made = [Results((list, (), (None,)), (number,)) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda own: name_of_builder(function, own), made))
    assert [getattr(function, name)([], []) for name in names] == [[1], [2]]


def test_results_of_weights_alone_are_tensors() -> None:
    made = specialize(lambda w: w.dequantize())(GATE)
    assert type(made) is Tensor
    np.testing.assert_array_equal(made.numpy(), matrix(0).dequantize())


@pytest.mark.parametrize(
    "number",
    [1.7, np.float64(1.7), np.float32(1.7), np.float16(1.7), np.int64(2), 2, True],
    ids=lambda v: type(v).__name__,
)
def test_numbers_of_every_kind(number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for x in (floats(3, K), floats(3, K, dtype=torch.float16)):
        with monkeypatch.context() as patch:
            wanted = cases._scaled(x, GATE, number)
            _record(patch)
            assert_same(cases._scaled(x, GATE, number), wanted)


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_a_weight_that_is_first_used_in_a_mode(mode: Any) -> None:
    weight, x = matrix(9), floats(3, K)
    with mode():
        memory.blocks_of(weight)
    assert type(weight._tensor) is Tensor
    y = x.clone().requires_grad_()
    cases._plain_product(y, weight).sum().backward()
    assert y.grad is not None
    assert_same(cases._plain_product(x, weight), cases._plain_product(x, Weight(matrix(9))))


# --- processes and threads ------------------------------------------------------------------------


def test_threads_share_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {m: gated(floats(m, K)) for m in range(1, 9)}
    _arrays, weights, text = one_call(monkeypatch)
    operator.prepared_call.cache_clear()
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        for i in range(50):
            m = (i + number) % 8 + 1
            (y,) = operator.call([floats(m, K)], weights, [], text)
            assert_same(y, wanted[m])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


@pytest.mark.process
def test_a_forked_child_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, weights, text = one_call(monkeypatch)
    wanted = operator.call(arrays, weights, [], text)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of PyTorch's
        child = os.fork()
    if not child:
        status = 1
        try:
            status = int(not torch.equal(operator.call(arrays, weights, [], text)[0], wanted))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- memory ---------------------------------------------------------------------------------------


def tables() -> tuple[int, int]:
    """Return the sizes of the tables of weights."""
    gc.collect()
    return len(memory._known), len(memory._storages)


def test_tables_do_not_grow_with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, weights, text = one_call(monkeypatch)
    before = tables()
    for i in range(1000):
        new = [w.clone() for w in weights] if i % 10 == 0 else weights
        operator.call([arrays[0].clone()], new, [], text)
    assert tables() == before


def test_a_weight_and_its_memory_are_freed() -> None:
    before = tables()
    weight, raw = Weight(matrix(7)), matrix(8)
    cases.gated(floats(3, K), weight, raw)
    x = floats(3, K).requires_grad_()
    cases.gated(x, weight, raw).sum().backward()
    refs: list[Any] = [weakref.ref(weight), weakref.ref(raw), weakref.ref(weight.tensor())]
    storages = [weakref.ref(b.untyped_storage()) for b in (weight.blocks, raw._tensor)]
    assert tables() > before
    del weight, raw
    assert tables() == before
    assert [ref() for ref in (*refs, *storages)] == [None] * 5


def test_changed_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read a repacked copy of blocks in the order of GGUF."""
    calls, x = _record(monkeypatch), floats(3, K)
    first, other = matrix(0), matrix(20)
    wanted = [cases._plain_product(x, w) for w in (first, other)]
    text = calls[0][-1]
    blocks = torch.from_numpy(first.raw.reshape(-1).copy())
    for weight, want in zip((first, other), wanted, strict=True):
        blocks.copy_(torch.from_numpy(weight.raw.reshape(-1).copy()))
        for _ in range(2):
            assert_same(operator.call([x], [blocks], [], text)[0], want)
    stored = memory.Stored(*memory.stored_of(id(first)))
    assert memory.weight_in(blocks, stored) is memory.weight_in(blocks, stored)


def test_weights_in_one_storage_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x = _record(monkeypatch), floats(3, K)
    weights = [matrix(0), matrix(20)]
    wanted = [cases._plain_product(x, w) for w in weights]
    text, raw = calls[0][-1], [torch.from_numpy(w.raw.reshape(-1).copy()) for w in weights]
    parts = torch.cat(raw).chunk(2)
    stored = memory.Stored(*memory.stored_of(id(weights[0])))
    known = [memory.weight_in(part, stored) for part in parts]
    for part, want, weight in zip(parts, wanted, known, strict=True):
        assert_same(operator.call([x], [part], [], text)[0], want)
        assert memory.weight_in(part, stored) is weight


# --- bad input ------------------------------------------------------------------------------------


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: gated(floats(3, K).double()), r"'x'.* got float64 .*; use x\.float\(\)"),
    (lambda: gated(floats(3, K) > 0), r"'x'.* got bool .*; use x\.float\(\)"),
    (lambda: gated(floats(3, K).to(torch.complex64)), r"'x'.*; use x\.real\.float\(\)"),
    (lambda: gated(floats(3, K + 32)), r"expected x \[\.\.\., 64\] for w \[64, 96\]"),
    (lambda: gated(floats(3, K, 1).expand(3, K, K)[:, 0].int()), r"use w\.rows\(x\)"),
    (lambda: untyped(floats(3, K), GATE), r"missing a required argument: 'up'"),
    (lambda: untyped(floats(3, K), GATE, UP, 1), r"too many positional arguments"),
    (lambda: untyped(floats(3, K), GATE, up=UP, K=K), r"unknown argument 'K' \(K: an option"),
    (lambda: untyped(floats(3, K), GATE, UP, x=1), r"multiple values for argument 'x'"),
    (lambda: cases.gated(floats(3, K), GATE, nn.Linear(K, N)), r"'up'.*, got Linear"),
    (lambda: cases._scaled(floats(3, K), GATE, 1j), r"'scale'.*, got complex"),
    (lambda: cases.gated(floats(3, K), Weight(matrix(0), device="meta"), UP), r"on meta|got meta"),
    (lambda: cases._affine(floats(3, K), GATE, floats(N + 1), 0.0), r"x\[|N|96"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
@pytest.mark.parametrize("as_operator", [False, True])
def test_bad_arguments(
    call: Callable[[], Any], message: str, as_operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_operator:
        _record(monkeypatch)
    with pytest.raises(Q4JitError, match=message):
        call()


def test_tensors_on_several_devices() -> None:
    x, meta = floats(3, K), floats(3, K).to("meta")
    away = Weight(matrix(0), device="meta")
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: gated(meta), r"'gate': expected meta, as 'x' is, got cpu; use gate\.to\('meta'\)"),
        (lambda: cases._layered(x, cases.Layer(GATE, away)), r"'layer\.up': .* 'x' is, got meta"),
        (lambda: cases._elementwise(x, meta), r"'y': expected cpu, as 'x' is, got meta"),
    ]
    for call, message in calls:
        with pytest.raises(ArgumentError, match=message):
            call()


def test_methods_of_modules_are_refused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = GATE

        @specialize
        def forward(self, x: Any) -> Any:
            return x @ self.w

    with pytest.raises(ArgumentError, match=r"'self': .* got Layer; pass tensors and weights one"):
        Layer()(floats(3, K))


def test_out_is_refused_beside_gradients() -> None:
    x = floats(3, K).requires_grad_()
    with pytest.raises(ArgumentError, match=r"^gated: out= cannot be combined with gradients"):
        cases.gated(x, GATE, UP, out=torch.empty(3, N))


def test_wrong_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, (gate, up), text = one_call(monkeypatch)
    for wrong, got in (
        (gate[:-1], r"uint8 \[3455\]"),
        (gate.float(), r"float32 \[3456\]"),
        (torch.stack([gate, gate], 1)[:, 0], r"uint8 \[3456\], strided"),
    ):
        with pytest.raises(ArgumentError, match=rf"^blocks: expected .*got {got}"):
            operator.prepared_call(text).run(arrays, [wrong, up], [])


def test_wrong_numbers_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, weights, text = one_call(monkeypatch)
    for inputs in (
        ([], weights, []),
        (arrays * 2, weights, []),
        (arrays, weights[:1], []),
        (arrays, weights * 2, []),
        (arrays, weights, [1.0]),
    ):
        with pytest.raises(
            ArgumentError, match=r"q4jit::call: expected 1 arrays, 2 weights, 0 numbers, got"
        ):
            operator.call(*inputs, text)


# --- damaged texts --------------------------------------------------------------------------------


TEXTS: list[str] = []


def texts() -> list[str]:
    """Return the texts of every case."""
    if not TEXTS:
        with pytest.MonkeyPatch.context() as patch:
            calls = _record(patch)
            for case in CASES:
                case.call(*case.tensors(3))
            TEXTS.extend(dict.fromkeys(text for *_, text in calls))
    return TEXTS


def test_texts_are_read_again() -> None:
    for text in texts():
        assert str(CallText.parse(text)) == text


@settings(max_examples=400)
@given(st.data())
def test_damaged_texts_are_refused(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(texts()))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        size = data.draw(st.integers(0, 8))
        other = data.draw(st.sampled_from(texts()))
        new = data.draw(
            st.one_of(
                st.text(max_size=3),
                st.sampled_from(['"', "[", "}", "0", "-1", "1e999", "null", "9" * 30, "\n", "NaN"]),
                st.just(other[start : start + 20]),
            )
        )
        text = text[:start] + new + text[start + size :]
    try:
        parsed = CallText.parse(text)
    except Q4JitError:
        return
    assert CallText.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"inputs": "aww"', '"inputs": "awa"', r"inputs: expected"),
        ('"inputs": "aww"', '"inputs": "aw"', r"inputs: expected"),
        ('"inputs": "aww"', '"inputs": 3', r"inputs: expected a text"),
        ('["Q4_0", 64, 96', '["Q4_0", 64, 97', r"expected the weights of gated"),
        ('["Q4_0", 64, 96', '["Q4_0", 64.0, 96', r"expected a list of \[format"),
        ('["Q4_0", 64, 96', '["Q9_0", 64, 96', r"expected a list of \[format"),
        ('96, 0, "interleaved16"', '96, 0, "made up"', r"expected a list of \[format"),
        ('96, 0, "interleaved16"', '96, -1, "interleaved16"', r"expected"),
        ('"precision": "f32"', '"precision": "f64"', r"precision: expected one of"),
        ('"cache": true', '"cache": 1', r"cache: expected True or False"),
        ('"tune": false', '"tune": false, "more": 1', r"expected"),
        ('"q4jit":1', '"q4jit":2', r"expected version 1"),
        ('"K": null', '"K": nul', r"expected JSON"),
        ("{", "", r"expected the fields \['K'"),
    ],
)
def test_errors_name_the_damage(
    old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, weights, text = one_call(monkeypatch)
    assert old in text
    with pytest.raises(Q4JitError, match=message):
        operator.call(arrays, weights, [], text.replace(old, new, 1))


def test_static_values_of_other_types_are_other_calls() -> None:
    @specialize
    def chosen(x: Any, n: Any) -> Any:
        return x * 2.0 if n is True else x * 3.0

    x = torch.ones(2, K, requires_grad=True)

    def of(n: Any) -> Any:
        return chosen(x, n).detach()[0, 0]

    compiled: Any = torch.compile(of, fullgraph=True, backend="eager")
    for run in of, compiled:
        assert [run(n) for n in (1, True, 1)] == [3, 2, 3]


@pytest.mark.parametrize("tracks", [False, True])
def test_containers_that_cannot_be_taken_apart_are_refused(tracks: bool) -> None:
    @specialize
    def first(x: Any, more: Any) -> Any:
        return x * 2.0

    x = torch.ones(2, K, requires_grad=tracks)
    with pytest.raises(ArgumentError, match="keys that are str or int"):
        first(x, {True: x})


def test_weights_in_containers_need_no_operator() -> None:
    x, weights = torch.ones(2, K), [Weight(matrix(0))]
    assert not bridge.TorchBridge().needs_operator((x, weights))
    assert bridge.TorchBridge().needs_operator((x.requires_grad_(), weights))
    assert bridge.TorchBridge().needs_operator((weights,))
