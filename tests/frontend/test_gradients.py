"""Gradients of programs: against finite differences, and as kernels against NumPy."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from q4jit import TraceError
from q4jit.arrays.specs import signature_of
from q4jit.frontend.graph import reachable
from q4jit.frontend.programs.arguments import ArrayArgument
from q4jit.frontend.programs.gradients import BackwardInput, Contribution, gradient
from q4jit.frontend.programs.program import Program
from q4jit.frontend.trace import trace
from tests.support.functions import random, weight
from tests.support.gradients import (
    Array,
    arrays_in,
    cotangents_of,
    derivatives,
    differences,
    in_float64,
    slope_along,
)
from tests.support.programs import (
    FORWARD,
    Case,
    K,
    M,
    N,
    compiled,
    gelu,
    layer_norm,
    rms_norm,
    silu,
    softmax,
    with_rows,
)
from tests.support.random_functions import Example, examples

X, Y, GAIN, BIAS = random(M, K), random(M, K, seed=1), random(K, seed=2), random(N, seed=3)
W, UP, DOWN = weight(K, N, "Q4_0"), weight(K, N, "Q8_0", seed=1), weight(N, K, seed=2)


def _case(function: Any, **arguments: Any) -> Case:
    return Case(function, arguments)


def _chain(x: Any, w: Any, down: Any, bias: Any) -> Any:
    return np.tanh(gelu(x @ w + bias) @ down * 0.3 + x) @ w


def _blocks(x: Any, gain: Any, w: Any, down: Any) -> Any:
    for _ in range(2):
        h = rms_norm(x, gain) @ w
        x = x + (silu(h[..., : N // 2]) * h[..., N // 2 :] * np.max(h, -1, keepdims=True)) @ down
    return x


def _used_in_parts(x: Any, w: Any) -> Any:
    h = x @ w
    return h[..., :20] * h[..., 12:], np.tanh(h), softmax(h)[..., 3:9]


CASES: Final[dict[str, Case]] = {
    **{n: c for n, c in FORWARD.items() if n not in {"constants", "rows"} and "expert" not in n},
    "two chained products": _case(_chain, x=X, w=W, down=DOWN, bias=BIAS),
    "a residual": _case(lambda x, w, down: x + silu(x @ w) @ down, x=X, w=W, down=DOWN),
    "two blocks": _case(_blocks, x=X, gain=GAIN, w=W, down=weight(N // 2, K, seed=5)),
    "overlapping parts": _case(_used_in_parts, x=X, w=W),
    "one part": _case(lambda x, w: np.exp((x @ w)[..., 3:7]), x=X, w=W),
    "parts of a transpose": _case(
        lambda y, w: (y @ w.T)[..., :40] * 2 + (y @ w.T)[..., 24:], y=random(M, N), w=W
    ),
    "two products of one value": _case(
        lambda x, w, up: (np.tanh(x) @ w) * (np.tanh(x) @ up), x=X, w=W, up=UP
    ),
    "a product twice": _case(lambda x, w: (x @ w) * (x * x @ w), x=X, w=W),
    "reduced alone": _case(lambda x: (np.sum(x, -1), np.sum(x * 3, -1, keepdims=True)), x=X),
    "a reduced product": _case(lambda x, w: np.sum(x @ w + 1, -1, keepdims=True), x=X, w=W),
    "the sum of a product and columns": _case(
        lambda x, w: np.sum((x @ w)[..., 4:9], -1) * np.mean(x, -1), x=X, w=W
    ),
    "a sum of a sum": _case(
        lambda x, y: np.sum(np.sum(x, -1, keepdims=True) + y * 0.5 + GAIN[0], -1), x=X, y=Y
    ),
    "columns of one": _case(
        lambda x, c, w: (x * c + c) @ w / (1 + c * c), x=X, c=random(M, 1), w=W
    ),
    "broadcast arrays": _case(
        lambda x, gain, row, w: x * gain - row / (2 + np.tanh(gain)),
        x=X,
        gain=GAIN,
        row=random(1, K, seed=8),
        w=W,
    ),
    "the largest": _case(
        lambda x, w: np.max(x @ w, -1, keepdims=True) * x + np.min(x, -1, keepdims=True), x=X, w=W
    ),
    "maximum and minimum": _case(
        lambda x, y, gain: np.maximum(x, y) * np.minimum(y, gain) + np.clip(x, -1, 1),
        x=X,
        y=Y,
        gain=GAIN,
    ),
    "logs": _case(
        lambda x, y: np.log(np.sum(np.exp(x), -1, keepdims=True)) / (1 + y * y) - abs(y), x=X, y=Y
    ),
    "norms": _case(
        lambda x, y: x / np.linalg.norm(x, axis=-1, keepdims=True) * np.std(y, -1, keepdims=True),
        x=X,
        y=Y,
    ),
    "powers": _case(lambda x, y: (2 + x**3) / (1 + y**2) + (2 + abs(y)) ** -2, x=X, y=Y),
    "where": _case(
        lambda x, y, w: np.where((x > y) & ~(x > 1), x * y, np.where(x < 0, x, 2.0)) @ w,
        x=X,
        y=Y,
        w=W,
    ),
    "numbers": _case(lambda x, s, w: (x * s + s) @ w / (s * s), x=X, s=1.75, w=W),
    "results with other rows": _case(
        lambda x, gain, row: (x * gain + row, gain * 2 + row, np.tanh(gain)),
        x=X,
        gain=GAIN,
        row=random(1, K, seed=8),
    ),
    "parts with other rows": _case(
        lambda x, gain, w: (np.tanh(gain @ w)[:8] * 2, x[..., :24] + (gain @ w)[8:]),
        x=X,
        gain=GAIN,
        w=W,
    ),
    "results with other axes": _case(
        lambda x, y, w: (x + y, np.tanh(y) @ w, x @ w), x=random(2, M, K), y=Y, w=W
    ),
    "LayerNorm and softmax": _case(
        lambda x, gain, y, w: softmax(layer_norm(x, gain, y) @ w), x=X, gain=GAIN, y=Y, w=W
    ),
}

SECOND: Final = [
    *("a product", "SwiGLU", "softmax", "a gated block", "norms", "where", "the largest"),
    *("maximum and minimum", "reduced alone", "columns of one"),
]


def setting(case: Case) -> tuple[Program, list[Any], dict[int, Array], list[int]]:
    """Return a program, its leaves in float64, cotangents, and the numbers of its arrays."""
    leaves = in_float64(case.leaves)
    program = case.program
    return program, leaves, cotangents_of(program(*leaves)), arrays_in(leaves)


def assert_near(result: Array, wanted: Array, bound: float) -> None:
    """Check the largest error, relative to the largest number."""
    assert result.shape == wanted.shape
    scale = np.max(np.abs(wanted), initial=0)
    assert np.max(np.abs(result - wanted), initial=0) <= bound * scale


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_slopes(name: str) -> None:
    program, leaves, cotangents, wanted = setting(CASES[name])
    computed = derivatives(program, leaves, cotangents, wanted)
    for i in wanted:
        assert_near(computed[i], differences(program, leaves, cotangents, i), 1e-7)


def in_kernels(program: Program, leaves: Sequence[Any]) -> Sequence[Any]:
    """Run a program's kernels on the CPU; check them against NumPy."""
    assert Program.parse(program.text) == program
    function = compiled(program)
    results: Sequence[Any] = function(*leaves)
    for target in ("hip:gfx1100", "hip:sm_90"):
        assert program.name in function.inspect_source(target)
    wide = in_float64(leaves)
    for y, r, reference in zip(results, program(*leaves), program(*wide), strict=True):
        assert y.dtype == r.dtype
        assert_near(y.astype(np.float64), reference, 1e-3 if y.dtype == np.float16 else 1e-5)
        assert_near(r.astype(np.float64), reference, 1e-3 if y.dtype == np.float16 else 1e-5)
    return results


def of_the_same_rank(program: Program, leaves: Sequence[Any]) -> Sequence[Any]:
    """Run kernels on arrays with as many axes as the program says."""
    for argument, leaf in zip(program.arguments, leaves, strict=True):
        if isinstance(argument, ArrayArgument):
            assert leaf.ndim == argument.leading + 1, argument.name
    return in_kernels(program, leaves)


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_derivatives(name: str) -> None:
    case = CASES[name]
    program, wide, exact, wanted = setting(case)
    results = program(*case.leaves)
    cotangents = {j: exact[j].astype(y.dtype) for j, y in enumerate(results)}
    wide_cotangents = {j: g.astype(np.float64) for j, g in cotangents.items()}
    computed = derivatives(program, case.leaves, cotangents, wanted, of_the_same_rank)
    for i, reference in derivatives(program, wide, wide_cotangents, wanted).items():
        half = np.float16 in (computed[i].dtype, *(g.dtype for g in cotangents.values()))
        assert_near(computed[i].astype(np.float64), reference, 2e-3 if half else 1e-5)


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name: str) -> None:
    program, leaves, cotangents, wanted = setting(CASES[name])
    (step,) = gradient(program, wanted, cotangents)
    inputs = [
        leaves[what.number]
        if what.kind == "argument"
        else cotangents[what.number][..., None]
        if what.adds_axis
        else cotangents[what.number]
        for what in step.inputs
    ]
    again = cotangents_of(step.program(*inputs))
    moving = arrays_in(inputs)
    computed = derivatives(step.program, inputs, again, moving)
    for i in moving:
        slopes = differences(step.program, inputs, again, i)
        scale = max(np.max(np.abs(slopes)), 1e-3)
        assert np.max(np.abs(computed[i] - slopes)) <= 1e-6 * scale


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
@given(examples())
def test_a_random_function(example: Example) -> None:
    names, values = tuple(example.arguments), tuple(example.arguments.values())
    program = Program.of(trace(example.function(), signature_of(names, values)))
    leaves = in_float64(values)
    cotangents = cotangents_of(program(*leaves))
    wanted = arrays_in(leaves)
    directions = {i: random(*leaves[i].shape, seed=i + 50).astype(np.float64) for i in wanted}
    computed = derivatives(program, leaves, cotangents, wanted)
    slope = sum(float(np.sum(directions[i] * computed[i])) for i in wanted)
    wanted_slope, size = slope_along(program, leaves, cotangents, directions)
    assert abs(slope - wanted_slope) <= 1e-5 * max(size, abs(slope), 1)


@pytest.mark.parametrize("name", ["two blocks", "SwiGLU", "broadcast arrays", "reduced alone"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 1, 3)], ids=str)
def test_leading_axes_are_free(name: str, shape: tuple[int, ...]) -> None:
    case = CASES[name]
    leaves = with_rows(case.leaves, shape)
    exact = cotangents_of(case.program(*leaves))
    cotangents = {j: g.astype(np.float32) for j, g in exact.items()}
    wanted = arrays_in(leaves)
    computed = derivatives(case.program, leaves, cotangents, wanted, in_kernels)
    reference = derivatives(
        case.program,
        in_float64(leaves),
        {j: g.astype(np.float64) for j, g in cotangents.items()},
        wanted,
    )
    for i in wanted:
        assert_near(computed[i].astype(np.float64), reference[i], 1e-5)


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_whole_products_take_one_step(name: str) -> None:
    program = CASES[name].program
    products = [n for n in reachable(program.outputs) if n.op == "matmul"]
    is_in_parts = {(n.operands[0].id, n.arg) for n in products if n.width not in {K, N}}
    steps = gradient(program, arrays_in(CASES[name].leaves), range(len(program.outputs)))
    assert (len(steps) == 1) == (not is_in_parts)


def test_parts_are_joined_between_steps() -> None:
    case = _case(lambda x, w: silu((x @ w)[..., :16]) * (x @ w)[..., 16:] + x[..., 5:21], x=X, w=W)
    first, second = gradient(case.program, [0], [0])
    assert first.contributions == (
        Contribution("argument", 0, 5, 16, K),
        Contribution("product", 0, 16, 16, N),
        Contribution("product", 0, 0, 16, N),
    )
    assert first.inputs[-1] == BackwardInput("cotangent", 0)
    assert second.inputs == (BackwardInput("argument", 1), BackwardInput("product", 0))
    assert second.contributions == (Contribution("argument", 0, 0, K, K),)
    assert first.program.name == "lambda__gradient_1"


def test_steps_of_chained_parts_follow_each_other() -> None:
    steps = gradient(CASES["two blocks"].program, [0], [0])
    products = [[c.number for c in step.contributions if c.kind == "product"] for step in steps]
    assert products == [[0, 0, 0], [1, 1, 1], []]
    assert [[w.number for w in step.inputs if w.kind == "product"] for step in steps] == [
        [],
        [0],
        [0, 1],
    ]


def test_only_what_is_asked_for_is_computed() -> None:
    def function(x: Any, y: Any, w: Any, up: Any) -> Any:
        return x @ w, np.tanh(y @ up), x * y

    program = _case(function, x=X, y=Y, w=W, up=UP).program
    (step,) = gradient(program, [1], [1])
    assert [a.name for a in step.program.arguments] == ["y", "up", "cotangent_1"]
    assert gradient(program, [0], [1]) == ()
    assert gradient(program, [], [0, 1, 2]) == ()
    assert gradient(program, [0], []) == ()
    (step,) = gradient(program, [0, 1], [2])
    assert [a.name for a in step.program.arguments] == ["x", "y", "cotangent_2"]


def test_results_with_the_same_rows_share_cotangents() -> None:
    def function(x: Any, y: Any, gain: Any, bias: Any, w: Any) -> Any:
        h = rms_norm(x, gain)
        return h @ w, h @ w + bias, h + y

    program = _case(function, x=X, y=Y, gain=GAIN, bias=BIAS, w=W).program
    (step,) = gradient(program, [0], [0, 1])  # a bias has no rows of its own
    assert step.contributions == (Contribution("argument", 0, 0, K, K),)
    (step,) = gradient(program, [0], [0, 2])
    assert step.contributions == (Contribution("argument", 0, 0, K, K),) * 2


def test_results_have_the_types_of_arguments() -> None:
    half = X.astype(np.float16)
    program = _case(lambda x, w, b: (x @ w)[..., :9] + b, x=half, w=W, b=random(9)).program
    assert program.result_types == ("f32",)
    first, second = gradient(program, [0, 2], [0])
    assert first.program.result_types == ("f32", "f32")
    assert second.program.result_types == ("f16",)


def test_names_of_arguments_differ() -> None:
    case = _case(lambda cotangent_0, w: np.exp(cotangent_0 @ w)[..., :5], cotangent_0=X, w=W)
    (first, _) = gradient(case.program, [0], [0])
    assert [a.name for a in first.program.arguments] == ["cotangent_0", "w", "cotangent_0_"]
    assert Program.parse(first.program.text) == first.program


# --- single values --------------------------------------------------------------------------------


def at(function: Any, *arrays: Any) -> list[list[float]]:
    """Return derivatives of a function of arrays [1, n], where every cotangent is 1."""
    values = [np.array([a], np.float32) for a in arrays]
    names = tuple("abc"[: len(values)])
    program = Program.of(trace(function, signature_of(names, values)))
    ones = {j: np.ones_like(y) for j, y in enumerate(program(*values))}
    wanted = range(len(values))
    both = [
        derivatives(program, values, ones, wanted),
        derivatives(program, values, ones, wanted, lambda p, leaves: compiled(p)(*leaves)),
    ]
    for i in wanted:
        np.testing.assert_allclose(both[0][i], both[1][i], rtol=1e-6)
    return [both[1][i][0].tolist() for i in wanted]


# ufuncs have no signature before NumPy 2.3
def larger(a: Array, b: Array) -> Any:
    return np.maximum(a, b)


def smaller(a: Array, b: Array) -> Any:
    return np.minimum(a, b)


def test_equal_values_share() -> None:
    a, b = [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]
    assert at(larger, a, b) == [[0.5, 0, 1], [0.5, 1, 0]]
    assert at(smaller, a, b) == [[0.5, 1, 0], [0.5, 0, 1]]
    assert at(lambda a: np.max(a, -1, keepdims=True), [4.0, 1, 4, 4, 2]) == [
        [pytest.approx(1 / 3), 0, pytest.approx(1 / 3), pytest.approx(1 / 3), 0]
    ]
    assert at(lambda a: np.min(a, -1), [1.0, 1, 4]) == [[0.5, 0.5, 0]]
    assert at(abs, [-2.0, 0.0, -0.0, 3.0]) == [[-1, 0, 0, 1]]


def test_a_branch_that_is_not_taken_gives_no_nan() -> None:
    values = [-2.0, 0.0, 4.0]
    assert at(lambda a: np.where(a > 0, np.sqrt(a), 0.0), values) == [[0, 0, 0.25]]
    assert at(lambda a: np.where(a > 0, np.log(a), 0.0), values) == [[0, 0, 0.25]]
    assert at(lambda a: np.where(a != 0, 1 / a, 0.0), values) == [[-0.25, 0, -0.0625]]
    assert at(lambda a: np.where(a < 1, 0.0, np.exp(a * 100)), [0.0, 0.5]) == [[0, 0]]
    assert at(lambda a: np.where(a < 1000, a, np.exp(a)), [900.0]) == [[1]]


def test_gates_have_no_nan_far_from_zero() -> None:
    assert at(silu, [-1e4, -100.0, 100.0, 1e4]) == [[0, 0, 1, 1]]
    (slopes,) = at(gelu, [-100.0, 100.0])
    assert slopes == [0, 1]
    assert at(lambda a: 1 / (1 + np.exp(-a)), [-1e4, -200.0, 200.0]) == [[0, 0, 0]]


def test_norms_of_zeros_have_the_derivative_0() -> None:
    assert at(lambda a: np.linalg.norm(a, axis=-1), [0.0, 0.0]) == [[0, 0]]
    assert at(lambda a: np.std(a, -1), [3.0, 3.0]) == [[0, 0]]


def test_nan_is_passed_on() -> None:
    nan = float("nan")
    for function in (np.exp, np.tanh, abs, lambda a: a * a, lambda a: a / (1 + a)):
        (slopes,) = at(lambda a, f=function: f(a) * a, [nan, 1.0])
        assert np.isnan(slopes[0])
        assert np.isfinite(slopes[1])


# --- what has no formula --------------------------------------------------------------------------

REFUSED: Final = {
    "an expert for each row": r"cannot differentiate np\.vecmat\(x, w\[ids\]\) in lambda_; ask",
    "a mixture of experts": r"cannot differentiate np\.sum\(y, axis=-2\) in mixture; ask for no",
    "vectors of experts": r"cannot differentiate vectors of experts in vectors; ask for no",
}


@pytest.mark.parametrize("name", REFUSED)
def test_experts_have_no_derivative(name: str) -> None:
    program = FORWARD[name].program
    with pytest.raises(TraceError, match=REFUSED[name]):
        gradient(program, arrays_in(FORWARD[name].leaves), range(len(program.outputs)))


def test_experts_elsewhere_do_not_matter() -> None:
    base = FORWARD["a mixture of experts"]

    def function(x: Any, y: Any, experts: Any, chosen: Any, parts: Any, w: Any) -> Any:
        mixed = base.function(x, experts, chosen, parts)
        return np.tanh(y @ w) * mixed, np.where(mixed > 0, y @ w, 0.0), mixed

    x, experts, chosen, parts = base.leaves
    case = _case(function, x=x, y=Y, experts=experts, chosen=chosen, parts=parts, w=W)
    program, leaves, cotangents, _ = setting(case)
    computed = derivatives(program, leaves, cotangents, [1])[1]
    assert_near(computed, differences(program, leaves, cotangents, 1), 1e-7)
    assert gradient(program, [1], [2]) == ()
    with pytest.raises(TraceError, match="cannot differentiate"):
        gradient(program, [0], [0])


def test_decoded_weights_have_no_derivative() -> None:
    assert gradient(FORWARD["decoded"].program, [0], [1]) == ()
    assert gradient(FORWARD["rows"].program, [], [0]) == ()
