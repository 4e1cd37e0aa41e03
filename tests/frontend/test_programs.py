"""Programs: text of traced functions, which is read, traced, compiled and called again."""

import copy
import json
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from q4jit import ArgumentError, TraceError, specialize
from q4jit.arrays.specs import signature_of
from q4jit.frontend.graph import ELEMENTWISE, Graph
from q4jit.frontend.programs.program import Program
from q4jit.frontend.specs import Signature, array_spec
from q4jit.frontend.structures import flattened
from q4jit.frontend.trace import trace
from tests.support.functions import assert_close, random, reference, weight
from tests.support.programs import (
    FORWARD,
    Case,
    K,
    M,
    N,
    compiled,
    renumbered,
    retraced,
    statements,
    with_rows,
)
from tests.support.random_functions import Example, examples

SHAPES = {
    "one row": (1,),
    "more rows": (7,),
    "no rows": (0,),
    "three axes": (2, 1, 3),
    "ones": (1, 1),
}
"""Leading axes that take the place of M."""

OF_ONE_AXIS = {"sums without an axis"}
"""Functions that NumPy does not compute with more leading axes."""


@pytest.mark.parametrize("name", FORWARD)
def test_tracing_a_program_gives_the_same_graph(name: str) -> None:
    case = FORWARD[name]
    assert statements(retraced(case.program, case.signature)) == statements(case.graph)


@pytest.mark.parametrize("name", FORWARD)
def test_text_is_read_again(name: str) -> None:
    program = FORWARD[name].program
    again = Program.parse(program.text)
    assert again == program
    assert hash(again) == hash(program)
    assert again.text == program.text
    assert again.signature == program.signature
    assert statements(trace(again, again.signature)) == statements(trace(program, again.signature))


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("shape", ["one row", "more rows"])
def test_text_does_not_depend_on_the_number_of_rows(name: str, shape: str) -> None:
    case = FORWARD[name]
    values = with_rows(case.values, SHAPES[shape])
    other = Case(case.function, dict(zip(case.arguments, values, strict=True)))
    assert other.program.text == case.program.text


@pytest.mark.parametrize("name", FORWARD)
def test_kernels_are_those_of_the_function(name: str) -> None:
    case = FORWARD[name]
    function, program = specialize(case.function, target="cpu"), compiled(case.program)
    function.warmup(*case.values)
    program.warmup(*case.leaves)
    for target in ("cpu", "hip:gfx1100", "hip:sm_90"):
        text = renumbered(program.inspect_source(target))
        assert text == renumbered(function.inspect_source(target))


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_leading_axes_are_free(name: str, shape: str) -> None:
    if name in OF_ONE_AXIS and len(SHAPES[shape]) > 1:
        name = "SwiGLU"
    case = FORWARD[name]
    leaves, values = with_rows(case.leaves, SHAPES[shape]), with_rows(case.values, SHAPES[shape])
    with np.errstate(all="ignore"):
        wanted = case.function(*values)
    results = case.program(*leaves)
    kernels = compiled(case.program)(*leaves)
    for y, z, r in zip(
        results, kernels, wanted if type(wanted) is tuple else (wanted,), strict=True
    ):
        assert y.shape == z.shape == np.shape(r)
        half = np.float16 in (y.dtype, r.dtype) or name == "half precision"
        bound = 2e-3 if half else 1e-5  # NumPy rounds every intermediate value
        np.testing.assert_allclose(y, r, rtol=bound, atol=bound)
        np.testing.assert_allclose(z, y, rtol=bound, atol=bound)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(examples())
def test_a_random_function(example: Example) -> None:
    function, values = example.function(), tuple(example.arguments.values())
    signature = signature_of(tuple(example.arguments), values)
    graph = trace(function, signature)
    program = Program.parse(Program.of(graph).text)
    assert statements(trace(program, signature)) == statements(graph)
    wide = [v.astype(np.float64) if isinstance(v, np.ndarray) else v for v in values]
    for y, r in zip(program(*wide), reference(function, *values), strict=True):
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, r, rtol=1e-5, atol=1e-5)  # constants are rounded to f32


def test_a_program_is_called_in_a_traced_function() -> None:
    case = FORWARD["SwiGLU"]
    program, (x, w, up) = case.program, case.values

    def outer(x: Any, w: Any, up: Any) -> Any:
        return program(x * 2, w, up)[0][:, 4:12] + 1

    assert_close(specialize(outer, target="cpu")(x, w, up), reference(outer, x, w, up))


def test_a_number_of_a_traced_function_is_a_constant() -> None:
    case = FORWARD["softmax"]
    graph = trace(lambda x, w: case.program(x, w, 2.0)[0], case.signature[:2])
    wanted = trace(lambda x, w: case.function(x, w, 2.0), case.signature[:2])
    constant, product = statements(graph).splitlines()[1:3]
    assert constant.endswith("const 2.0")
    assert sorted(_operations(graph)) == sorted(_operations(wanted))
    assert product.endswith("@ arg1")


def _operations(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes()]


def test_bfloat16_results_are_rounded() -> None:
    x = random(M, K).astype(ml_dtypes.bfloat16)
    program = Program.of(trace(lambda x: x * 3, (array_spec((M, K), float_type="bf16"),)))
    (y,) = program(x)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y, (x.astype(np.float32) * 3).astype(ml_dtypes.bfloat16))


def test_constants_keep_their_bits() -> None:
    values = [0.1, -0.0, 1e-45, 3e38, float("inf"), -float("inf"), float("nan")]

    def function(x: Any) -> Any:
        return tuple(np.where(x > 0, value, x) for value in values)

    program = Program.parse(Program.of(trace(function, (array_spec((1, 2)),))).text)
    results = np.array(program(np.ones((1, 2), np.float32)))[:, 0, 0]
    assert results.tobytes() == np.array(values, np.float32).tobytes()


def test_names_are_those_of_parameters() -> None:
    graph = trace(lambda tree, _if: tree["out"] + tree["w"] * _if, _containers())
    program = Program.of(graph)
    assert list(program.__signature__.parameters) == ["tree_out", "tree_w", "if_"]
    assert program.__name__ == "lambda_"
    assert Program.parse(program.text) == program


def _containers() -> Signature:
    x = np.ones((2, 4), np.float32)
    leaves = flattened(({"out": x, "w": x}, x), ("tree", "_if"))
    return signature_of(("a", "b", "c", "structure"), leaves)


def test_programs_are_pickled_as_text() -> None:
    program = FORWARD["SwiGLU"].program
    assert pickle.loads(pickle.dumps(program)) == program
    assert copy.deepcopy(program) == program
    assert program != FORWARD["a product"].program
    assert program != program.text
    function = compiled(program)
    leaves = FORWARD["SwiGLU"].leaves
    again = pickle.loads(pickle.dumps(function))
    np.testing.assert_array_equal(again(*leaves)[0], function(*leaves)[0])


# --- leaves that do not fit -----------------------------------------------------------------------

X, W, IDS = random(M, K), weight(K, N, "Q4_0"), np.zeros(M, np.int64)


def mixed(x: Any, w: Any, s: Any, ids: Any) -> Any:
    return x @ w * s, w.rows(ids)


MIXED = Case(mixed, {"x": X, "w": W, "s": 2.0, "ids": IDS}).program

MISFITS: dict[str, tuple[tuple[Any, ...], str]] = {
    "columns": ((X[:, :5], W, 1.0, IDS), r"'x' of mixed: expected an array \[..., 64\], got"),
    "no columns": ((X[0, 0], W, 1.0, IDS), r"'x' of mixed: expected an array"),
    "ids for floats": ((IDS, W, 1.0, IDS), r"'x' of mixed: expected an array \[..., 64\], got"),
    "another format": ((X, weight(K, N, "Q8_0"), 1.0, IDS), r"'w' .* weight Q4_0 \[64, 32\], got"),
    "another size": ((X, weight(K, 2 * N, "Q4_0"), 1.0, IDS), r"'w' of mixed: expected a weight"),
    "an array": ((X, X, 1.0, IDS), r"'w' of mixed: expected a weight"),
    "an array for a number": ((X, W, X, IDS), r"'s' of mixed: expected a number, got"),
    "floats for ids": ((X, W, 1.0, X), r"'ids' of mixed: expected ids \[\.\.\.\], got"),
    "too few": ((X, W, 1.0), r"mixed\(\): expected 4 arguments, got 3"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_leaf_that_does_not_fit_is_refused(name: str) -> None:
    leaves, message = MISFITS[name]
    with pytest.raises(ArgumentError, match=message):
        MIXED(*leaves)
    if len(leaves) == 4:
        with pytest.raises(ArgumentError, match=message):
            compiled(MIXED)(*leaves)


def test_rows_that_do_not_match_are_refused_by_name() -> None:
    program = Case(lambda x, y: x + y, {"x": X, "y": X}).program
    with pytest.raises(
        TraceError, match=r"^lambda_: cannot broadcast \[3, 64\] with \[2, 64\]; use"
    ):
        compiled(program)(X, X[:2])


def test_another_number_of_chosen_experts_is_refused() -> None:
    """The function may have divided by it."""
    case = FORWARD["vectors of experts"]
    x, experts, chosen, y = case.leaves
    with pytest.raises(
        ArgumentError, match=r"'chosen' of vectors: expected ids \[\.\.\., 2\], got"
    ):
        case.program(x, experts, np.repeat(chosen, 2, axis=1), y)


# --- text from outside ----------------------------------------------------------------------------


def changed(path: str, value: object) -> str:
    """Return the text of `MIXED` with another value at a path, such as "arguments 0 name".

    None removes the field.
    """
    data = json.loads(MIXED.text)
    *outer, last = [int(key) if key.isdigit() else key for key in path.split()]
    container = data
    for key in outer:
        container = container[key]
    if value is None:
        del container[last]
    elif isinstance(container, list) and last == len(container):
        container.append(value)
    else:
        container[last] = value
    return json.dumps(data)


_OPS = {o["op"]: i for i, o in enumerate(json.loads(MIXED.text)["operations"])}
_PRODUCT, _ROWS, _IDS = _OPS["matmul"], _OPS["rows"], _OPS["ids"]
_END = len(_OPS)

HOSTILE: dict[str, tuple[str, object, str]] = {
    "version": ("q4jit", 2, r"program\.q4jit: expected version 1, got 2"),
    "version as truth": ("q4jit", True, r"program\.q4jit: expected version 1, got True"),
    "no name": ("name", None, r"program: expected the fields .*'name'.*, got"),
    "another field": ("code", "import os", r"program: expected the fields"),
    "name": ("name", "f(x); import os", r"program\.name: expected a name of at most"),
    "long name": ("name", "f" * 42, r"program\.name: expected a name of at most"),
    "keyword": ("arguments 0 name", "lambda", r"arguments\[0\]\.name: expected a name"),
    "out": ("arguments 0 name", "out", r"arguments\[0\]\.name: expected a name.* not 'out'"),
    "same names": ("arguments 1 name", "x", r"arguments\[1\]\.name: expected a name of its own"),
    "arguments": ("arguments", {}, r"program\.arguments: expected a list of 0 to 4096 items"),
    "argument": ("arguments 0", 7, r"arguments\[0\]\.kind: expected one of array, .*, got 7"),
    "kind": ("arguments 0 kind", "file", r"arguments\[0\]\.kind: expected one of array"),
    "kind as list": ("arguments 0 kind", ["array"], r"arguments\[0\]\.kind: expected one of"),
    "type": ("arguments 0 type", "f64", r"arguments\[0\]\.type: expected one of f32, f16, bf16"),
    "leading": ("arguments 0 leading", 33, r"leading: expected a whole number from 0 to 32, got"),
    "negative": ("arguments 0 leading", -1, r"leading: expected a whole number from 0 to 32"),
    "fixed": ("arguments 0 fixed", [], r"fixed: expected a list of 1 to 2 items"),
    "huge": ("arguments 0 fixed", [1 << 31], r"fixed: expected a list .* from 1 to 2147483647"),
    "inner axis": ("arguments 0 fixed", [2, 64], r"fixed: expected one length, as no argument is"),
    "chosen": ("arguments 3 fixed", [2], r"arguments\[3\]\.fixed: expected no length, as no"),
    "float size": ("arguments 0 fixed", [64.0], r"fixed: expected a list of 1 to 2 items"),
    "format": ("arguments 1 format", "Q9_9", r"arguments\[1\]\.format: expected one of"),
    "k": ("arguments 1 k", 0, r"arguments\[1\]\.k: expected a whole number from 1 to"),
    "experts": ("arguments 1 experts", 4, r"arg: expected a weight without experts, got"),
    "operations": ("operations", [], r"operations: expected a list of 1 to 65536 items, got"),
    "operation": ("operations 0", [], r"operations\[0\]\.op: expected one of"),
    "op": ("operations 0 op", "exec", r"operations\[0\]\.op: expected one of .*, got 'exec'"),
    "no op": ("operations 0 op", None, r"operations\[0\]\.op: expected one of"),
    "own operand": (
        f"operations {_PRODUCT} of",
        [_PRODUCT],
        r"\.of: expected a list of 1 to 2 items",
    ),
    "later operand": (f"operations {_PRODUCT} of", [9], r"\.of: expected a list of 1 to 2 items"),
    "negative operand": (f"operations {_PRODUCT} of", [-1], r"\.of: expected a list of 1 to 2"),
    "ids to a product": (f"operations {_PRODUCT} of", [0, 0], r"\.arg: expected an expert tensor"),
    "argument number": (f"operations {_PRODUCT} arg", 4, r"\.arg: expected a whole number from 0"),
    "argument kind": (f"operations {_PRODUCT} arg", 0, r"\.arg: expected a weight, got an array"),
    "width": (
        f"operations {_PRODUCT} width",
        33,
        r"\]: matmul: expected columns among 32, got 0 to",
    ),
    "start": (
        f"operations {_PRODUCT} start",
        1,
        r"\]: matmul: expected columns among 32, got 1 to 33",
    ),
    "load": ("operations 0 width", 65, r"\[0\]: load: expected columns among 64, got 0 to 65"),
    "transposed": (f"operations {_PRODUCT} transposed", True, r"\]: x @ w\.T: expected x"),
    "flag": (f"operations {_PRODUCT} transposed", 1, r"transposed: expected true or false, got 1"),
    "value": (f"operations {_END}", {"op": "const", "value": "1"}, r"value: expected a number or"),
    "large": (
        f"operations {_END}",
        {"op": "const", "value": 10**400},
        r"number that float\(\) takes",
    ),
    "truth": (
        f"operations {_END}",
        {"op": "and", "of": [0, 0]},
        r"\]: operands of .*: expected truth",
    ),
    "ids": (
        f"operations {_END}",
        {"op": "neg", "of": [_IDS]},
        r"operands of neg: expected ids for rows",
    ),
    "decoded": (
        f"operations {_END}",
        {"op": "neg", "of": [_ROWS]},
        r"\]: cannot compute with w\.rows",
    ),
    "reshape": (
        f"operations {_END}",
        {"op": "reshape", "of": [0]},
        r"operand of reshape: expected one",
    ),
    "new axis": (
        *(f"operations {_END}", {"op": "reshape", "of": [0], "adds_axis": True}),
        r"\]: cannot add an axis to \[1, 64\]",
    ),
    "sum of a number": (
        *(f"operations {_END}", {"op": "sum", "of": [_OPS["scalar"]]}),
        r"operand of sum: expected columns, got \[\]",
    ),
    "inner sum": (
        f"operations {_END}",
        {"op": "inner_sum", "of": [0]},
        r"\]: cannot add up the axis",
    ),
    "vectors": (
        *(f"operations {_END}", {"op": "load", "arg": 0, "width": 64, "adds_axis": True}),
        r"adds_axis: expected False, as no argument is an expert tensor",
    ),
    "shapes": (
        *(f"operations {_END}", {"op": "add", "of": [0, _PRODUCT]}),
        r"\]: cannot broadcast \[1, 64\] with \[1, 32\]",
    ),
    "no outputs": (
        "outputs",
        [],
        r"program\.outputs: expected a list of 1 to 4096 items, got \[\]",
    ),
    "output": ("outputs 0", 3, r"outputs\[0\]: expected the fields \['of', 'type'\], got 3"),
    "output number": ("outputs 0 of", 99, r"outputs\[0\]\.of: expected a whole number from 0 to"),
    "output type": ("outputs 0 type", "f8", r"outputs\[0\]\.type: expected one of f32"),
    "output of ids": ("outputs 0 of", _IDS, r"outputs\[0\]: expected an array of floats, got ids"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused(name: str) -> None:
    path, value, message = HOSTILE[name]
    with pytest.raises(ArgumentError, match=message):
        Program.parse(changed(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"program: expected JSON, got ''"),
        ("{", r"program: expected JSON, got '\{'"),
        ("[" * 100_000, r"program: expected JSON, got '\[\["),
        ("9" * 5_000, r"program: expected JSON, got"),
        (" " * ((1 << 24) + 1), r"program: expected a text of at most 16777216 letters, got"),
        (b"{}", r"program: expected a text of at most .*, got bytes"),
        ("[]", r"program: expected the fields"),
        ("null", r"program: expected the fields"),
    ],
    ids=["empty", "brace", "deep", "digits", "long", "bytes", "list", "null"],
)
def test_text_that_is_no_program_is_refused(text: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        Program.parse(text)
    assert len(str(caught.value)) < 500


_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-2, 70), st.sampled_from([None, True, 1.5, "nan", "f16", "w", [], [0], [0, 1], {}])
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORWARD)), st.data())
def test_any_text_is_a_program_or_refused(name: str, data: st.DataObject) -> None:
    content = json.loads(FORWARD[name].program.text)
    for _ in range(data.draw(st.integers(1, 2))):
        items = content[
            data.draw(st.sampled_from(["arguments", "operations", "operations", "outputs"]))
        ]
        item = data.draw(st.sampled_from(items))
        item[data.draw(st.sampled_from([*item, "of", "start", "adds_axis", "transposed"]))] = (
            data.draw(_VALUES | st.sampled_from(sorted(ELEMENTWISE)))
        )
    try:
        program = Program.parse(json.dumps(content))
        graph = trace(program, program.signature)
    except (ArgumentError, TraceError):
        return
    assert Program.parse(program.text) == program
    assert Program.of(graph).text == program.text


def test_the_same_value_twice_is_one_operation() -> None:
    data = json.loads(FORWARD["a product"].program.text)
    load = data["operations"][0]
    data["operations"] += [load, {"op": "neg", "of": [2]}, {"op": "neg", "of": [0]}]
    data["outputs"] = [{"of": 3, "type": "f32"}, {"of": 4, "type": "f32"}]
    program = Program.parse(json.dumps(data))
    assert [o["op"] for o in json.loads(program.text)["operations"]] == ["load", "neg"]
