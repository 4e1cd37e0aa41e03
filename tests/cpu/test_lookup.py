"""Row look-up inside functions: `w.rows(ids)` on every CPU target, against the gguf package."""

# ruff: noqa: PLW0108 - each lambda is a user's function, and its line is what a message shows

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, QuantizedTensor, TraceError, specialize
from q4jit.arrays.arguments import checked_ids
from q4jit.cpu.schedule import make_plan
from q4jit.frontend.specs import WeightSpec, array_spec, ids_spec
from q4jit.frontend.trace import trace
from q4jit.targets import find_target
from q4jit.weights.layouts import GGUF, INTERLEAVED16, PLANAR
from tests.support.functions import assert_close
from tests.support.kernels import (
    F32,
    IN_PROCESS,
    Guarded,
    Ids,
    assert_rows,
    every_guarded_cpu,
    lookups,
    on,
    random_x,
    run_guarded,
    some_ids,
    tables,
    weight,
)
from tests.support.layouts import held_in

K, N = 64, 40
W = weight("Q4_0", K, N)
TABLE = W.tensor

every_target = pytest.mark.parametrize("target", IN_PROCESS)


def look_up(ids: Any, table: Any) -> Any:
    return table.rows(ids)


EMBED = specialize(look_up)


# --- values -------------------------------------------------------------------------------------


@every_target
def test_rows_are_ggufs(target: str) -> None:
    found, ids = tables(), some_ids(9)
    results = on(target, lookups(len(found)))(ids, *(w.tensor for w in found))
    for got, w in zip(results, found, strict=True):
        assert_rows(got, ids, w)


@every_guarded_cpu
@pytest.mark.parametrize("gap_bytes", [0, 1], ids=["", "unaligned"])
def test_rows_beside_guard_pages(cpu: Guarded, gap_bytes: int) -> None:
    found, ids = tables(), some_ids(4)
    args = [ids, *(w.tensor for w in found)]
    results = run_guarded(lookups(len(found)), cpu, args, gap_bytes=gap_bytes)
    for got, w in zip(results, found, strict=True):
        assert_rows(got, ids, w)


@every_target
def test_rows_of_weights_that_have_only_panels(target: str) -> None:
    found = [*tables(), weight("Q8_0", 96, 37, "bits"), weight("F32", 37, 16, "bits")]
    ids = some_ids(9, n=16)
    held = [held_in(INTERLEAVED16, w.tensor) for w in found]
    results = on(target, lookups(len(found)))(ids, *held)
    for got, w, tensor in zip(results, found, held, strict=True):
        assert_rows(got, ids, w)
        assert list(tensor._resident.addresses) == [INTERLEAVED16]  # there is no second copy


@every_guarded_cpu
def test_rows_of_panels_beside_guard_pages(cpu: Guarded) -> None:
    found, ids = tables(), some_ids(4)
    args = [ids, *(held_in(INTERLEAVED16, w.tensor) for w in found)]
    for got, w in zip(run_guarded(lookups(len(found)), cpu, args), found, strict=True):
        assert_rows(got, ids, w)


@pytest.mark.parametrize(
    ("held", "read"), [("", GGUF), (GGUF, GGUF), (INTERLEAVED16, INTERLEAVED16), (PLANAR, GGUF)]
)
def test_which_layout_is_read(held: str, read: str) -> None:
    graph = trace(look_up, (ids_spec((3,)), WeightSpec("Q4_0", K, N, held=held)))
    plan = make_plan(graph, find_target("cpu"), 3)
    assert plan.weight_layouts() == [(1, read)]


def test_rows_of_panels_in_another_type() -> None:
    ids = some_ids(9, n=N)
    compiled = specialize(lambda ids, w: w.rows(ids).astype(np.float16))
    got = compiled(ids, held_in(INTERLEAVED16, TABLE))
    np.testing.assert_array_equal(got, compiled(ids, TABLE), strict=True)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 4), (1,), (1, 1), (0,), (2, 0, 3)], ids=str)
def test_ids_of_a_shape(shape: tuple[int, ...], dtype: type[np.integer[Any]]) -> None:
    ids = some_ids(*shape, n=N).astype(dtype)
    assert_rows(EMBED(ids, TABLE), ids, W)


def test_both_dtypes_share_a_signature_and_a_kernel() -> None:
    compiled = specialize(look_up)
    ids = some_ids(5, n=N)
    for dtype in (np.int32, np.int64):
        assert_rows(compiled(ids.astype(dtype), TABLE), ids, W)
    assert [[str(s) for s in signature] for signature in compiled.signatures] == [
        ["ids [M]", f"Q4_0 [{K}, {N}]"]
    ]
    assert compiled.stats.compiles <= 1


def test_many_rows_are_shared_among_threads() -> None:
    ids = some_ids(70, 90, n=N)
    assert_rows(EMBED(ids, TABLE), ids, W)


def unaligned(ids: Ids) -> Ids:
    memory = np.zeros(ids.nbytes + 1, np.uint8)
    moved = memory[1:].view(ids.dtype).reshape(ids.shape)
    moved[...] = ids
    assert not moved.flags.aligned
    return moved


def frozen(ids: Ids) -> Ids:
    kept = ids.copy()
    kept.flags.writeable = False
    return kept


ARRANGEMENTS: dict[str, Callable[[Ids], Ids]] = {
    "a slice": lambda ids: np.repeat(ids, 2, axis=0)[::2],
    "columns": lambda ids: np.repeat(ids, 3, axis=1)[:, ::3],
    "transposed": np.asfortranarray,
    "negative strides": lambda ids: np.flip(np.flip(ids).copy()),
    "read-only": frozen,
    "unaligned": unaligned,
    "subclass": lambda ids: ids.view(type("Mine", (np.ndarray,), {})),
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_arrangement(arrange: Callable[[Ids], Ids], dtype: type[np.integer[Any]]) -> None:
    wanted = some_ids(4, 6, n=N).astype(dtype)
    ids = arrange(wanted)
    got = EMBED(ids, TABLE)
    assert type(got) is np.ndarray
    assert_rows(got, wanted, W)
    np.testing.assert_array_equal(ids, wanted)


def test_the_kernel_reads_a_copy_of_checked_ids() -> None:
    """Else another thread could change an id between its check and the kernel that reads there."""
    compiled = specialize(look_up)
    ids = some_ids(3, n=N)
    compiled(ids, TABLE)
    assert not np.shares_memory(checked_ids("ids", ids, None, N), ids)


# --- beside other results -------------------------------------------------------------------------


def test_rows_beside_a_product() -> None:
    def both(ids: Any, table: Any, x: Any, w: Any) -> Any:
        return table.rows(ids), np.tanh(x @ w) + x.sum(-1, keepdims=True)

    compiled, other = specialize(both), weight("Q8_0", K, 16).tensor
    for lead in [(5,), (1,), (2, 3), (0,)]:
        ids, x = some_ids(*lead, n=N), random_x(*lead, K)
        rows, y = compiled(ids, TABLE, x, other)
        assert_rows(rows, ids, W)
        assert_close(y, (both(ids, TABLE, x, other)[1],))


@pytest.mark.parametrize(
    ("ids_lead", "x_lead"),
    [((3,), (2, 3)), ((1,), (4,)), ((4,), (1,)), ((2, 1), (2, 3)), ((1,), (0,))],
    ids=str,
)
def test_ids_and_rows_of_other_numbers(ids_lead: tuple[int, ...], x_lead: tuple[int, ...]) -> None:
    """Each result has the leading dimensions of its own arguments."""
    ids, x = some_ids(*ids_lead, n=N), random_x(*x_lead, K)
    rows, y = specialize(lambda ids, table, x: (table.rows(ids), x * 2))(ids, TABLE, x)
    assert_rows(rows, ids, W)
    np.testing.assert_array_equal(y, x * 2)


def test_lengths_that_disagree() -> None:
    compiled = specialize(lambda ids, table, x: (table.rows(ids), x * 2))
    with pytest.raises(
        ArgumentError,
        match=r"expected leading dimensions that are equal, .*, got \[3\], \[2, 64\]$",
    ):
        compiled(some_ids(3, n=N), TABLE, random_x(2, K))


def test_several_ids_several_tables_and_a_result_twice() -> None:
    def function(a: Any, b: Any, first: Any, second: Any) -> Any:
        return first.rows(a), second.rows(a), first.rows(b), first.rows(a), first.dequantize()

    second = weight("F16", K, 7)
    a, b = some_ids(5, n=7), some_ids(5, n=N, seed=1)
    results = specialize(function)(a, b, TABLE, second.tensor)
    for got, ids, w in zip(results, (a, a, b, a), (W, second, W, W), strict=False):
        assert_rows(got, ids, w)
    assert_rows(results[-1].T, np.arange(N), W)


def test_out() -> None:
    ids, wide = some_ids(3, n=N), np.full((3, 2 * K), np.nan, F32)
    for out in (np.empty((3, K), F32), wide[:, K:]):
        assert EMBED(ids, TABLE, out=out) is out
        assert_rows(out, ids, W)
    assert np.isnan(wide[:, :K]).all()
    same = np.zeros((3, K), F32)
    with pytest.raises(ArgumentError, match="out= overlaps the argument 'ids'"):
        EMBED(same.view(np.int32)[:, 0], TABLE, out=same)


def test_warmup_takes_ids() -> None:
    compiled = specialize(look_up)
    compiled.warmup(np.zeros(3, np.int64), TABLE)
    EMBED(some_ids(3, n=N), TABLE)
    compiled(some_ids(3, n=N), TABLE)
    assert (compiled.stats.hits, compiled.stats.misses) == (1, 1)


def test_without_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    interpreted = specialize(look_up)
    ids = some_ids(2, 3, n=N)
    assert_rows(interpreted(ids, TABLE), ids, W)
    for wrong in (ids.astype(np.int16), ids.astype(">i8")):
        with pytest.raises(
            ArgumentError, match=r"argument 'ids': .*; use ids\.astype\(np\.int64\)"
        ):
            interpreted(wrong, TABLE)


# --- what is refused ------------------------------------------------------------------------------

OUT_OF_RANGE = [
    (np.array([0, N]), N),
    (np.array([-1, 3]), -1),
    (np.array([[5], [-N]], np.int32), -N),
    (np.array([N - 1, 2**31 - 1], np.int32), 2**31 - 1),
    (np.array([-(2**63)]), -(2**63)),
    (np.array([2**63 - 1]), 2**63 - 1),
    (np.array([0, -3, N + 5]), -3),
]


@pytest.mark.parametrize(("ids", "wrong"), OUT_OF_RANGE, ids=[str(w) for _, w in OUT_OF_RANGE])
@pytest.mark.parametrize("known", [False, True], ids=["first call", "later call"])
def test_an_id_out_of_range(ids: Ids, wrong: int, known: bool) -> None:
    compiled = specialize(look_up)
    if known:
        compiled(np.zeros_like(ids), TABLE)
    with pytest.raises(
        ArgumentError, match=rf"'ids' at \[.*\]: expected ids from 0 to {N - 1}, got {wrong}$"
    ):
        compiled(ids, TABLE)
    with pytest.raises(ArgumentError, match=f"ids from 0 to {N - 1}, got {wrong}$"):
        look_up(ids, TABLE)


def test_an_id_must_be_in_every_table() -> None:
    small = weight("Q4_0", K, 7).tensor
    for order in ((TABLE, small), (small, TABLE)):
        with pytest.raises(
            ArgumentError, match=r"argument 'i' at \[.*\]: expected ids from 0 to 6, got 7"
        ):
            specialize(lambda i, a, b: (a.rows(i), b.rows(i)))(np.array([7]), *order)


def test_an_id_out_of_range_beside_no_rows() -> None:
    compiled = specialize(lambda ids, table, x: (table.rows(ids), x * 2))
    with pytest.raises(ArgumentError, match=f"argument 'ids' at .*, got {N}$"):
        compiled(np.array([N]), TABLE, random_x(0, K))


@pytest.mark.parametrize("known", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(
    ("dtype", "shown"),
    [
        (np.uint8, r"uint8 \[3\]"),
        (np.int16, r"int16 \[3\]"),
        (np.uint32, r"uint32 \[3\]"),
        (np.uint64, r"uint64 \[3\]"),
        (">i8", r"int64 in foreign byte order \[3\]"),
    ],
)
def test_other_integers(dtype: Any, shown: str, known: bool) -> None:
    compiled = specialize(look_up)
    ids = some_ids(3, n=N)
    if known:
        compiled(ids, TABLE)
    with pytest.raises(
        ArgumentError, match=rf"'ids': .* got {shown}; use ids\.astype\(np\.int64\)"
    ):
        compiled(ids.astype(dtype), TABLE)


def test_floats_where_ids_were() -> None:
    """Arrays of one shape and two kinds do not share a launch."""
    compiled = specialize(look_up)
    ids = some_ids(3, n=N)
    compiled(ids, TABLE)
    with pytest.raises(
        TraceError,
        match=re.escape("w.rows(ids): expected an int32 or int64 array [M], got <traced f32 [3]>"),
    ):
        compiled(ids.astype(F32), TABLE)
    with pytest.raises(
        ArgumentError, match="'ids': expected float32, float16 or bfloat16, got bool"
    ):
        compiled(ids > 0, TABLE)
    assert_rows(compiled(ids, TABLE), ids, W)


def test_a_masked_array_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="argument 'ids': expected a plain array, got a MaskedArray"
    ):
        EMBED(np.ma.masked_array(some_ids(3, n=N), mask=[False, True, False]), TABLE)


ARGUMENTS: dict[str, object] = {
    "ids": some_ids(3, n=N),
    "w": TABLE,
    "x": random_x(3, K),
    "one": 1,
    "number": np.array(1),
}
ONLY_ROWS = r"use w\.rows\(ids\), or pass ids\.astype\(np\.float32\) for numbers"
AS_ARGUMENT = r"int64 array .* pass np\.array\(ids, np\.int64\) as an argument"
AS_RESULT = "return it as a result of the function"

REFUSALS: list[tuple[Callable[..., object], str, str, str]] = [
    (lambda ids: ids * 2, "ids * 2", r"arithmetic with row numbers \(ids: ids \[M\]\)", ONLY_ROWS),
    (lambda ids: 1 - ids, "1 - ids", "do arithmetic with", ONLY_ROWS),
    (lambda ids: ids // 2, "ids // 2", "do arithmetic with", ONLY_ROWS),
    (lambda ids: -ids, "-ids", "do arithmetic with", ONLY_ROWS),
    (lambda ids, x: x + ids, "x + ids", r"use \+ with", ONLY_ROWS),
    (lambda ids, x: ids + x, "ids + x", "do arithmetic with", ONLY_ROWS),
    (lambda ids: ids == 0, "ids == 0", "compare row numbers", ONLY_ROWS),
    (lambda ids, x: x > ids, "x > ids", "use > with", ONLY_ROWS),
    (lambda ids, w: ids @ w, "ids @ w", "use @ with", ONLY_ROWS),
    (lambda ids, x: x @ ids, "x @ ids", "use @ with", ONLY_ROWS),
    (lambda ids, w: np.matmul(ids, w), "np.matmul(ids, w)", "use @ with", ONLY_ROWS),
    (lambda ids: np.exp(ids), "np.exp(ids)", r"use np\.exp with", ONLY_ROWS),
    (lambda ids: np.sum(ids), "np.sum(ids)", r"use np\.sum with", ONLY_ROWS),
    (
        lambda ids, x: np.where(x > 0, ids, x),
        "np.where(x > 0, ids, x)",
        r"use np\.where",
        ONLY_ROWS,
    ),
    (lambda ids: ids[1:], "ids[1:]", "index row numbers", ONLY_ROWS),
    (lambda ids: ids.shape, "ids.shape", r"the attribute \.shape", ONLY_ROWS),
    (lambda ids: ids.astype(F32), "ids.astype", r"the attribute \.astype", ONLY_ROWS),
    (lambda ids: len(ids), "len(ids)", r"take len\(\) of", ONLY_ROWS),
    (lambda ids: list(ids), "list(ids)", "iterate over", ONLY_ROWS),
    (lambda ids: int(ids), "int(ids)", "to a number", ONLY_ROWS),
    (lambda ids: bool(ids), "bool(ids)", "branch on", ONLY_ROWS),
    (lambda ids: np.asarray(ids), "np.asarray(ids)", "read the values of", ONLY_ROWS),
    (lambda ids: TABLE.rows(ids), "TABLE.rows(ids)", "a captured weight as an argument", ONLY_ROWS),
    (lambda ids, x: x[..., ids], "x[..., ids]", r"index: .*<traced ids \[M\]>", "slices"),
    # what rows take
    (lambda w: w.rows([0, 1]), "w.rows([0, 1])", "got list", AS_ARGUMENT),
    (lambda w: w.rows(np.arange(3)), "w.rows(np.arange(3))", "got ndarray", AS_ARGUMENT),
    (lambda w, x: w.rows(x), "w.rows(x)", r"got <traced f32 \[M, 64\]>", AS_ARGUMENT),
    (lambda w, one: w.rows(one), "w.rows(one)", "got int", AS_ARGUMENT),
    (lambda w, number: w.rows(number), "w.rows(number)", r"got <traced f32 \[\]>", AS_ARGUMENT),
    # what rows give
    (lambda w, ids: w.rows(ids) * 2, "w.rows(ids) * 2", r"compute with w\.rows", AS_RESULT),
    (lambda w, ids: np.tanh(w.rows(ids)), "np.tanh(w.rows(ids))", r"with w\.rows", AS_RESULT),
    (lambda w, ids: w.rows(ids) @ w, "w.rows(ids) @ w", r"compute with w\.rows", AS_RESULT),
    (lambda w, ids: w.rows(ids).sum(-1), "w.rows(ids).sum(-1)", r"with w\.rows", AS_RESULT),
    (lambda w, ids: w.rows(ids)[..., :3], "w.rows(ids)[..., :3]", "cannot slice", AS_RESULT),
]


@pytest.mark.parametrize(
    ("function", "marked", "found", "accepted"), REFUSALS, ids=[r[1] for r in REFUSALS]
)
def test_refusal(function: Callable[..., object], marked: str, found: str, accepted: str) -> None:
    args = [ARGUMENTS[name] for name in inspect.signature(function).parameters]
    with pytest.raises(TraceError) as caught:
        specialize(function)(*args)
    reason, place = str(caught.value).split("\n\n")
    assert re.search(found, reason)
    assert re.search(accepted, reason)
    header, line, caret = place.splitlines()
    number = function.__code__.co_firstlineno
    assert header == f"  File {__file__!r}, line {number}, in <lambda>"
    assert line[caret.index("^") : caret.rindex("^") + 1] == marked


def test_ids_are_no_result() -> None:
    with pytest.raises(
        TraceError, match=r"expected an array .* got SymbolicIds <traced ids \[M\]>"
    ):
        specialize(lambda ids: ids)(some_ids(3, n=N))


def test_ids_of_another_trace_are_refused() -> None:
    kept: list[Any] = []

    def function(ids: Any, w: Any) -> Any:
        kept.append(ids)
        return w.rows(kept[0])

    # `kept` is read and changes, so the function is traced twice
    with pytest.raises(TraceError, match="traced in another call"):
        specialize(function)(some_ids(3, n=N), TABLE)


# --- how it reads ---------------------------------------------------------------------------------


def traced(function: Callable[..., object]) -> Any:
    specs = ids_spec((2, 3)), WeightSpec("Q4_0", K, N), array_spec((2, 3, K))
    return trace(function, specs)


def test_the_graph_and_the_plan_in_full() -> None:
    def both(ids: Any, table: QuantizedTensor, x: Any) -> Any:
        return table.rows(ids), x @ table

    graph = traced(both)
    assert str(graph) == textwrap.dedent(
        """\
        graph both(ids: ids [M2, M], table: Q4_0 [64, 40], x: f32 [M2, M, 64])
          v0: [M2, M] = ids arg0
          v1: [M2, M, 64] = load arg2
          v2: [M2, M, 64] = rows v0 of arg1
          v3: [M2, M, 40] = matmul v1 @ arg1
          return v2, v3"""
    )
    assert str(make_plan(graph, find_target("cpu:x86-64-v3"), 6)) == textwrap.dedent(
        """\
        plan both for cpu:x86-64-v3
          kernel both_0: 3 rows a tile
            rows:
              v1 = x
            40 columns:
              v3 = v1 @ table    Q4_0 [64, 40]
              output1 = v3
          kernel both_1: one row for each id
            output0 = table.rows(ids)"""
    )


def test_every_number_of_ids_has_one_kernel() -> None:
    compiled = specialize(look_up)
    for m in (1, 2, 9, 100):
        compiled(np.zeros(m, np.int64), TABLE)
    sources = {source.text for source in compiled._sources(None)}
    assert len(sources) == 1


def test_explain_and_the_text_say_what_is_looked_up() -> None:
    EMBED(some_ids(3, n=N), TABLE)
    assert "one row for each id\n    output0 = table.rows(ids)\n" in EMBED.explain()
    for target in ("cpu:x86-64", "cpu:aarch64"):
        text = EMBED.inspect_source(target)
        assert "; output0 = table.rows(ids)\n" in text
        slots = re.findall(r"^  (?:ptr|i64),? *; \d (\w+)$", text, re.MULTILINE)
        assert slots == ["pool", "m", "ids", "table", "output0"]
