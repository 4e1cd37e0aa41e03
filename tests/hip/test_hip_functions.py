"""Whole functions: HIP text executed without a GPU, compared with the functions in float64."""

import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from q4jit import quantize
from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    ROWS,
    TILE_FMA,
    TILE_MATRIX,
    HipPlan,
)
from q4jit.hip.names import RESERVED, c_names
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from tests.support.functions import (
    ELEMENTWISE,
    F32,
    assert_close,
    assert_same_specials,
    assert_within_4_ulp,
    every_operation,
    everywhere,
    random,
    reference,
    special_pairs,
    weight,
)
from tests.support.hip import hip_plan, run_on_host
from tests.support.kernels import block
from tests.support.random_functions import Example, examples

K: Final = 64
N: Final = 37
EXAMPLES: Final = 25  # about a second each

Function = Callable[..., Any]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Way:
    """A schedule for a number of rows on an arch."""

    schedule: str
    rows: int
    arch: str

    def __str__(self) -> str:
        return f"{self.schedule}-{self.rows}-{self.arch}"

    @property
    def plan_options(self) -> PlanOptions:
        return PlanOptions(schedule=self.schedule)


WAYS: Final = (
    Way(ELEMENT, 2, "gfx90a"),
    Way(GEMV, 1, "gfx1030"),
    Way(GEMV, 3, "gfx90a"),
    Way(TILE_FMA, 20, "gfx1030"),
    Way(TILE_MATRIX, 20, "gfx1100"),
)


def check(
    function: Function, args: Sequence[Any], target: str, plan_options: PlanOptions
) -> HipPlan:
    """Compare the results of a function with its results in float64; return its plan."""
    plan = hip_plan(function, target, args, plan_options)
    wanted = reference(function, *args)
    assert_close(tuple(run_on_host(plan, args)), wanted)
    return plan


# --- functions ------------------------------------------------------------------------------------


def silu(v: Any) -> Any:
    return v / (1 + np.exp(-v))


def rms_norm(x: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def layer_norm(x: Any, gain: Any, shift: Any, w: Any) -> Any:
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return (centred / np.sqrt(variance + 1e-5) * gain + shift) @ w


def softmax_of_x(x: Any, w: Any) -> Any:
    e = np.exp(x - 1)
    return (e / np.sum(e, axis=-1, keepdims=True)) @ w


def softmax_of_a_product(x: Any, w: Any) -> Any:
    e = np.exp(np.tanh(x @ w))
    return e / np.sum(e, axis=-1, keepdims=True), e


def bias_and_residual(x: Any, w: Any, bias: Any, row: Any, residual: Any) -> Any:
    return residual + (x @ w + bias) * row


def softcap(x: Any, w: Any, cap: float) -> Any:
    return cap * np.tanh(x @ w / cap)


def gelu(x: Any, w: Any) -> Any:
    y = x @ w
    return 0.5 * y * (1 + np.tanh(0.7978845608 * (y + 0.044715 * y**3)))


def log_of_sizes(x: Any, w: Any) -> Any:
    return np.log(1 + np.abs(x @ w)) - np.log(2.5)


def chained_mlp(x: Any, gain: Any, gate: Any, up: Any, down: Any) -> Any:
    h = rms_norm(x) * gain
    return x + (silu(h @ gate) * (h @ up)) @ down


def two_x(x: Any, z: Any, a: Any, b: Any) -> Any:
    return x @ a + z @ b


def normalised_result(x: Any, w: Any) -> Any:
    y = x @ w
    return y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 0.1)


def scalars(x: Any, w: Any, scale: float, shift: float) -> Any:
    return x * scale @ w + shift, scale * np.minimum(x, shift)


def comparisons(x: Any, w: Any, bias: Any, limit: float) -> Any:
    y = x @ w
    inside = (y > bias) & (y < limit) | ~(y == y)
    return np.where(inside, y, np.clip(bias, -limit, limit)), np.where(y >= 0, 1.0, -1.0)


def a_column(x: Any, w: Any, column: Any) -> Any:
    return column * (x @ w) + column


def several_results(x: Any, w: Any, bias: Any) -> Any:
    h = rms_norm(x)
    y = h @ w
    return h, y, y + bias, y, x.sum(-1), bias * 2


def slices(x: Any, z: Any, w: Any) -> Any:
    """Slice x, a product and another array."""
    y = x[..., 3 : 3 + K] @ w
    return y[..., 5:29] + z[..., 1:25]


def no_product(x: Any, z: Any) -> Any:
    return rms_norm(x) + np.exp(-z * z), np.sum(np.tanh(x), axis=-1, keepdims=True)


def products_of_products(x: Any, a: Any, b: Any) -> Any:
    """Compute a product of a product of a product, in a loop."""
    for _ in range(2):
        x = rms_norm(np.tanh(x @ a) @ b)
    return x


def cases(m: int) -> dict[str, tuple[Function, Arguments]]:
    """Return functions by name, with arguments of m rows."""
    x, z, residual = random(m, K), random(m, N, seed=1), random(m, N, seed=2)
    gain, bias, row = random(K), random(N), random(1, N)
    w, up = weight(K, N, "Q4_0"), weight(K, N, "Q8_0", seed=1)
    down = weight(32, K, "Q4_1", seed=2)
    inner = [weight(K, 32, "Q4_0", seed=s) for s in (3, 4)]
    made: list[tuple[Function, Arguments]] = [
        (block, (x, gain, w, up, bias, residual, 0.5)),
        (layer_norm, (x, gain, random(K, seed=5), w)),
        (softmax_of_x, (x, w)),
        (softmax_of_a_product, (x, w)),
        (bias_and_residual, (x, w, bias, row, residual)),
        (softcap, (x, w, 2.0)),
        (gelu, (x, w)),
        (log_of_sizes, (x, w)),
        (chained_mlp, (x, gain, *inner, down)),
        (two_x, (x, random(m, 32), w, weight(32, N, "Q8_0"))),
        (normalised_result, (x, w)),
        (scalars, (x, w, 0.75, -0.25)),
        (comparisons, (x, w, bias, 1.5)),
        (a_column, (x, w, random(m, 1))),
        (several_results, (x, w, bias)),
        (slices, (random(m, 80), z, w)),
        (no_product, (x, random(m, K, seed=6))),
        (products_of_products, (x, inner[0], down)),
    ]
    return {function.__name__: (function, args) for function, args in made}


# Their text differs from schedule to schedule; that of an epilogue does not.
ON_EVERY_WAY: Final = (block, layer_norm, softmax_of_x, chained_mlp, several_results, slices, two_x)
FUNCTIONS: Final = [
    pytest.param(way, name, id=f"{name}-{way}")
    for way in WAYS
    for name in (cases(1) if way in WAYS[2::2] else [f.__name__ for f in ON_EVERY_WAY])
]


@pytest.mark.parametrize(("way", "name"), FUNCTIONS)
def test_a_function(way: Way, name: str) -> None:
    function, args = cases(way.rows)[name]
    plan = check(function, args, f"hip:{way.arch}", way.plan_options)
    if name != "no_product":
        assert {kernel.schedule for kernel in plan.kernels} - {ROWS} == {way.schedule}


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1), (0,)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    """Call with one row, several leading dimensions, arrays that lack some, and no rows."""
    w, z = weight(K, N, "Q4_0"), random(*lead[-1:], N)

    def function(x: Any, w: Any, z: Any) -> Any:
        return x @ w + z, np.mean(x * x, axis=-1)

    check(function, [random(*lead, K), w, z], "hip:gfx1030", PlanOptions())


@settings(
    max_examples=EXAMPLES,
    derandomize=True,  # about one graph of 200 is ill-conditioned
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate),  # a smaller example would take minutes
)
@given(
    examples(),
    st.sampled_from(["gfx90a", "gfx1030", "gfx1100"]),
    st.sampled_from([None, None, ELEMENT, GEMV, TILE_FMA]),
)
def test_a_random_function(example: Example, arch: str, schedule: str | None) -> None:
    args = tuple(example.arguments.values())
    check(example.function(), args, f"hip:{arch}", PlanOptions(schedule=schedule))


# --- element-wise functions -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_element_wise_within_4_ulp(name: str) -> None:
    function, low, high = ELEMENTWISE[name]
    x = everywhere(low, high)
    plan = hip_plan(function, "hip:gfx1100", [x])
    assert [kernel.schedule for kernel in plan.kernels] == [ROWS]
    (y,) = run_on_host(plan, [x], seeds=(1,))
    assert_within_4_ulp(y, function, x)


def test_nan_and_infinity() -> None:
    a, b = special_pairs()
    plan = hip_plan(every_operation, "hip:gfx90a", [a, b])
    assert_same_specials(run_on_host(plan, [a, b]), a, b)


@pytest.mark.parametrize("schedule", [ELEMENT, GEMV, TILE_FMA])
def test_nan_and_infinity_in_an_epilogue(schedule: str) -> None:
    """Check operations whose first operand is a product with 1."""
    a, b = special_pairs()
    a += 0.0  # a sum that begins with 0 is never -0
    ones = quantize(np.ones((1, a.shape[1]), F32), "F32")

    def function(x: Any, w: Any, b: Any) -> Any:
        return every_operation(x @ w, b)

    args = [a[:, :1].copy(), ones, b]
    plan = hip_plan(function, "hip:gfx90a", args, PlanOptions(schedule=schedule))
    assert_same_specials(run_on_host(plan, args), a, b)


# --- names ----------------------------------------------------------------------------------------


def named(names: Sequence[str], function: Function) -> Function:
    """Give `function` parameters with these names, including names that a `def` cannot have."""

    def called(*values: Any) -> Any:
        return function(*values)

    called.__signature__ = Signature(  # type: ignore[attr-defined]  # of *values
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return called


def texts(way: Way, platform: str = "host") -> list[str]:
    """Return kernels with prologue, epilogue, sums and all functions, without their comments."""
    rendered = []
    for function, args in (cases(way.rows)[name] for name in ("block", "gelu", "log_of_sizes")):
        plan = hip_plan(function, f"hip:{way.arch}", args, way.plan_options)
        rendered += [render(plan, kernel, platform).text for kernel in plan.kernels]
    return [re.sub(r"//.*", "", text) for text in rendered]


def words(way: Way) -> list[str]:
    """Return every word of the generated texts that can name a parameter in Python."""
    found = {word for text in texts(way) for word in re.findall(r"[A-Za-z_]\w*", text)}
    found |= {"sum1", "x_element", "output0", "output1", "temp0", "temp1"}
    return usable(found)


def usable(names: Iterable[str]) -> list[str]:
    """Return the names that a parameter can have, without those that begin or end with `_`.

    Generated names lose underscores at their ends.
    """
    return sorted({w for w in names if not keyword.iskeyword(w) and w.strip("_") == w} - {"x", "w"})


def sum_of_all(x: Any, w: Any, *others: Any) -> Any:
    """Use every argument in the epilogue, and one in the prologue."""
    total = others[0]
    for i, other in enumerate(others):
        total = total + other * (i % 7 - 3)  # whole numbers, so exact
    return (x * others[-1]) @ w + 0.5 * total


def check_names(names: Sequence[str], way: Way) -> None:
    """Check that kernels of `way` take scalars and arrays with these names."""
    others: list[Any] = [float(i) for i in range(len(names))]
    others[::2] = [np.full(N, value, F32) for value in others[::2]]
    others[-1] = 0.5
    args = [random(way.rows, K), weight(K, N, "Q4_0"), *others]
    plan = check(named(["x", "w", *names], sum_of_all), args, f"hip:{way.arch}", way.plan_options)
    assert plan.graph.names == ("x", "w", *names)


@pytest.mark.parametrize("way", [WAYS[0], *WAYS[2:]], ids=str)
def test_arguments_named_like_words_of_the_text(way: Way) -> None:
    check_names(words(way), way)


def test_arguments_named_like_words_of_cxx() -> None:
    check_names(usable(RESERVED), WAYS[1])


@pytest.mark.parametrize("name", ["new", "m", "row", "column", "a", "id", "W", "values", "output0"])
def test_a_weight_and_ids_with_any_name(name: str) -> None:
    w, ids = weight(K, N, "Q4_0"), np.array([3, 0, 36])
    calls: list[tuple[list[str], Function, list[Any]]] = [
        ([name, "w"], lambda ids, w: w.rows(ids), [ids, w]),
        (["i", name], lambda ids, w: w.rows(ids), [ids, w]),
        ([name], lambda w: w.dequantize(), [w]),
    ]
    for names, function, args in calls:
        plan = hip_plan(named(names, function), "hip:gfx1030", args)
        np.testing.assert_array_equal(run_on_host(plan, args)[0], function(*args))
    way = WAYS[-1]
    args = [random(way.rows, K), w]
    check(named(["x", name], product), args, f"hip:{way.arch}", way.plan_options)


def product(x: Any, w: Any) -> Any:
    return x @ w


@pytest.mark.parametrize("platform", ["amd", "nvidia", "host"])
def test_no_argument_has_the_name_of_a_macro(platform: str) -> None:
    rendered = [text for way in WAYS for text in texts(way, platform)]
    macros = {name for text in rendered for name in re.findall(r"# *define +(\w+)", text)}
    assert macros
    for name in macros:
        assert c_names([name]) != (name,)
