"""A traced function means what NumPy means, or it is refused: in place, by type, truth values."""

# ruff: noqa: PLW0108 - each lambda is a user's function

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import QuantizedTensor, TraceError, specialize
from tests.support.functions import F32, assert_close, random, reference
from tests.support.tracing import ARGUMENTS, arguments, refusal

# --- operations in place ------------------------------------------------------------------------


def two_names(x: Any, w: Any) -> Any:
    y = x @ w
    z = y
    z *= 2
    return y + z


def every_operator(x: Any, w: Any, bias: Any, s: float) -> Any:
    y = x @ w
    y += bias
    y -= 0.5
    y *= s
    y /= 1 + abs(y)
    y **= 2
    m = y > 0.1
    m &= y < 0.9
    m |= y > 1
    m += y < 0.01
    m *= True
    return np.where(m, y, 3.0)


def numbers(x: Any, s: float) -> Any:
    t = s
    t *= 2
    t += x
    t **= 2
    return x * s + t


def a_copy_of_an_argument(x: Any) -> Any:
    for copied in (x.copy(), np.copy(x), copy.copy(x), copy.deepcopy(x), +x, x.astype(F32)):
        y = copied
        y += 1
    return x + y


def a_slice_without_the_whole(x: Any, w: Any) -> Any:
    y = (x @ w)[..., 8:][..., 3:20]
    y *= 2
    return y


def slices_side_by_side(x: Any, w: Any) -> Any:
    y = x @ w
    gate, up = y[..., :24], y[..., 24:]
    del y
    gate *= up
    gate += 1
    return gate, up


def a_slice_that_is_gone(x: Any, w: Any) -> Any:
    y = x @ w
    y += y[..., :8].sum(-1, keepdims=True)
    return y


def a_loop(x: Any, w: Any) -> Any:
    total = 0.0
    for i in range(3):
        total += (x @ w) * i
    return total


IN_PLACE = [
    two_names,
    every_operator,
    numbers,
    a_copy_of_an_argument,
    a_slice_without_the_whole,
    slices_side_by_side,
    a_slice_that_is_gone,
    a_loop,
]


@pytest.mark.parametrize("function", IN_PLACE)
def test_in_place_as_in_numpy(function: Callable[..., Any]) -> None:
    args = arguments(function)
    assert_close(specialize(function)(*args), reference(function, *copy_arrays(args)))


def copy_arrays(args: list[object]) -> list[object]:
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def whole_with_a_slice(x: Any, w: Any) -> Any:
    y = x @ w
    z = y[:, :4]
    z *= 2
    return y


def slice_of_the_whole(x: Any, w: Any) -> Any:
    y = x @ w
    z = y[:, :4]
    y *= 2
    return z


def overlapping_slices(x: Any, w: Any) -> Any:
    y = x @ w
    a, b = y[..., :9], y[..., 8:]
    del y
    a += 1
    return a, b


def a_new_axis(x: Any) -> Any:
    total = x.sum(-1)
    column = total[:, None]
    column += 1
    return total


def an_ellipsis(x: Any, w: Any) -> Any:
    y = x @ w
    z = y[...]
    z += 1
    return y


def an_argument(x: Any) -> Any:
    x += 1
    return x


def a_slice_of_an_argument(x: Any) -> Any:
    y = x[..., :4]
    y -= 1
    return x


def an_argument_by_another_name(x: Any) -> Any:
    y = x
    y **= 2
    return y


def wider_result(bias: Any, residual: Any) -> Any:
    y = bias * 2
    y += residual
    return y


def numbers_into_truth_values(x: Any) -> Any:
    y = x > 0
    y += 1.5
    return y * 1.0


def a_product(x: Any, w: Any) -> Any:
    y = x * 2
    y @= w
    return y


REFUSED = [
    (whole_with_a_slice, "z *= 2", r"change an array in place with \*= while a slice"),
    (slice_of_the_whole, "y *= 2", "while a slice"),
    (overlapping_slices, "a += 1", "while a slice"),
    (a_new_axis, "column += 1", "while a slice"),
    (an_ellipsis, "z += 1", "while a slice"),
    (an_argument, "x += 1", r"change an argument in place with \+=.*x\.copy\(\)"),
    (a_slice_of_an_argument, "y -= 1", "an argument"),
    (an_argument_by_another_name, "y **= 2", "an argument"),
    (wider_result, "y += residual", r"left side's shape \[48\], got \[M, 48\]"),
    (numbers_into_truth_values, "y += 1.5", "expected truth values .*, got numbers"),
    (a_product, "y @= w", "@="),
]


@pytest.mark.parametrize(("function", "line", "reason"), REFUSED)
def test_in_place_is_refused(function: Callable[..., Any], line: str, reason: str) -> None:
    shown = refusal(function)
    assert shown.marked == line
    assert re.search(reason, shown.reason)


def test_an_array_without_axes_is_not_changed() -> None:
    def function(x: Any, s: Any) -> Any:
        s += 1
        return x * s

    assert_close(specialize(function)(random(2, 5), F32(0.5)), (random(2, 5) * 1.5,))
    with pytest.raises(TraceError, match="change an argument in place"):
        specialize(function)(random(2, 5), np.array(0.5, F32))


# --- types of arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("s", [2.0, F32(2), np.float64(2), np.array(2.0), 2, True])
def test_isinstance_as_in_numpy(s: Any) -> None:
    seen: list[Any] = []

    def function(x: Any, w: Any, s: Any) -> Any:
        y = x @ w
        values = (x, w, s, y, y > 0, x[:], x.shape[0], np.mean(x, -1), s * 2, s > 1)
        kinds = (float, int, bool, np.floating, np.generic, np.ndarray, QuantizedTensor)
        seen.append([[isinstance(value, kind) for kind in kinds] for value in values[:8]])
        if type(s) is not np.ndarray and not isinstance(s, np.ndarray):
            seen[-1] += [[isinstance(value, kind) for kind in kinds] for value in values[8:]]
        seen[-1] += [hasattr(s, name) for name in ("shape", "sum", "astype", "ndim")]
        return y * s

    args = ARGUMENTS["x"], ARGUMENTS["w"], s
    function(*args)
    specialize(function)(*args)
    assert seen[0] == seen[1]


def test_a_branch_on_the_type_of_a_number() -> None:
    def function(x: Any, s: Any) -> Any:
        if isinstance(s, float):
            s = 1.0 / s
        return x * s

    compiled = specialize(function)
    x = random(2, 5)
    for s in (4.0, F32(4), np.float64(4), F32(4), 4.0):
        assert np.array_equal(np.asarray(compiled(x, s)), function(x, s))


def test_the_type_of_a_number_that_is_not_known() -> None:
    shown = refusal(lambda x, s: x * isinstance(s * 2, float), random(2, 5), np.array(2.0))
    assert shown.marked == "isinstance(s * 2, float)"


def test_a_match_on_types() -> None:
    def function(x: Any, w: Any) -> Any:
        match x:
            case np.ndarray():
                return x @ w
        return (x @ w) * 7

    assert_close(
        specialize(function)(ARGUMENTS["x"], ARGUMENTS["w"]),
        reference(function, ARGUMENTS["x"], ARGUMENTS["w"]),
    )


# --- errors that the function catches -----------------------------------------------------------


def caught_type_error(x: Any) -> Any:
    try:
        return np.sort(x, axis=-1)
    except TypeError:
        return x


def caught_anything(x: Any) -> Any:
    try:
        if (x > 0).all():
            return x
    except Exception:  # noqa: BLE001 - a user's function
        return x * 2
    return x * 3


def caught_in_a_helper(x: Any, w: Any) -> Any:
    def first(weight: Any) -> Any:
        try:
            return weight[0]
        except TypeError:
            return 1.0

    return x * first(w)


def caught_and_hidden(x: Any) -> Any:
    try:
        return np.sort(x, axis=-1)
    except TypeError:
        raise KeyError("hidden")  # noqa: B904 - an error of its own


@pytest.mark.parametrize(
    ("function", "marked"),
    [
        (caught_and_hidden, "np.sort(x, axis=-1)"),
        (caught_type_error, "np.sort(x, axis=-1)"),
        (caught_anything, "(x > 0).all"),
        (caught_in_a_helper, "weight[0]"),
    ],
)
def test_a_caught_refusal_is_raised_after_all(function: Callable[..., Any], marked: str) -> None:
    compiled = specialize(function)
    for _ in range(2):
        with pytest.raises(TraceError) as caught:
            compiled(*arguments(function))
        assert marked in str(caught.value)


# --- truth values and kinds of results ----------------------------------------------------------

TRUTHS: list[Callable[..., Any]] = [
    lambda x: (x > 0) + True,
    lambda x: True * (x > 0),
    lambda x: (x > 0) + np.True_,
    lambda x: (x > 0) & True,
    lambda x: np.maximum(x > 0, False),
    lambda x: np.add(x > 0, True),
    lambda x: np.add(x > 0, np.array(True)),
    lambda x: np.where(x > 0, x < 1, True) + True,
    lambda x: np.where(x > 0, True, False) + (x < 0),
    lambda x: np.where(x > 0, x < 1, x > -1) * True,
    lambda x: abs(x > 0) + True,
    lambda x: (x > 0) + 1,
    lambda x: (x > 0) + 1.0,
    lambda x: (x > 0) - True + (x > 1),
    lambda x, s: x * ((s > 1) + (s > 0)),
    lambda x, s: x * ((s > 1) + True),
    lambda x, s: x * (-(s > 1) + +(s > 0)),
    lambda x, s: x * np.add(s > 1, s > 0),
    lambda x, s: x * ((s > 1) & (s < 3)),
]


@pytest.mark.parametrize("function", TRUTHS)
def test_truth_values_count_as_in_numpy(function: Callable[..., Any]) -> None:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    args: list[Any] = [ARGUMENTS[name] for name in names]

    def as_numbers(x: Any, s: float = 1.5) -> Any:
        return function(*[x, s][: len(args)]) * F32(1)

    try:
        wanted = as_numbers(*args)
    except TypeError:  # NumPy does not subtract truth values
        with pytest.raises(TraceError, match="truth values"):
            specialize(as_numbers)(*args)
        return
    assert np.array_equal(np.asarray(specialize(as_numbers)(*args)), wanted)


@pytest.mark.parametrize(
    ("function", "marked", "reason"),
    [
        (lambda x: x > 0, "x > 0", "cannot return truth values"),
        (lambda x: (x, np.isfinite(x)), "np.isfinite(x)", "cannot compile"),
        (lambda x: (x, (x > 0) | (x < -1)), "(x > 0) | (x < -1)", r"np\.where\(…, 1\.0, 0\.0\)"),
        (lambda x: (x > 0)[..., :3], "(x > 0)[..., :3]", "cannot return truth values"),
        (lambda x: (x > 0) - (x < 0), "(x > 0) - (x < 0)", "subtract truth values"),
        (lambda x: -(x > 0), "-(x > 0)", "negate truth values"),
        (lambda x: +(x > 0), "+(x > 0)", r"unary \+ of truth values"),
        (lambda x: np.exp(x > 0), "np.exp(x > 0)", r"np\.exp of truth values"),
        (lambda x: np.reciprocal(x > 0), "np.reciprocal(x > 0)", r"np\.reciprocal of truth"),
        (lambda x, s: x * ~(s > 0), "~(s > 0)", "Python's truth values"),
    ],
)
def test_truth_values_are_refused(function: Callable[..., Any], marked: str, reason: str) -> None:
    shown = refusal(function)
    assert shown.marked == marked
    assert re.search(reason, shown.reason)


# --- axes put back after a reduction ------------------------------------------------------------

NEW_AXES: list[Callable[..., Any]] = [
    lambda x, w: (x @ w) * np.mean(x, -1)[..., None],
    lambda x, w: (x @ w) / np.sum(x @ w, -1)[..., None],
    lambda x, w: (x @ w) * np.mean(np.mean(x, -1, keepdims=True), -1)[..., None],
    lambda x, w: (x @ w) * np.sum(x[..., :1], -1)[..., None],
    lambda x, w: (x @ w) * (np.exp(x.sum(-1) / 9) + 1)[..., None],
    lambda x, w: (x @ w) * np.where(x.sum(-1) > 0, x.mean(-1), 2.0)[..., np.newaxis],
    lambda x, w: x.sum(-1)[...],
    lambda x, w: (x.sum(-1) * 2 + 1, x.mean(-1)[..., None] + x),
]


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (2, 1), (1, 2), (3, 1, 2), (1, 1, 1), ()])
@pytest.mark.parametrize("function", NEW_AXES)
def test_a_reduced_axis_is_put_back(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    args = random(*shape, 32), ARGUMENTS["w"]
    assert_close(specialize(function)(*args), reference(function, *args))


@pytest.mark.parametrize("m", [1, 2])
def test_one_row_is_refused_like_many(m: int) -> None:
    for function in (
        lambda x: np.mean(np.mean(x, -1), -1),
        lambda x: x.sum(-1)[..., :1],
        lambda x: x[..., None],
    ):
        with pytest.raises(TraceError):
            specialize(function)(random(m, 5))


# --- reductions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 40])
def test_the_largest_and_the_smallest_are_exact(width: int) -> None:
    """NaN wins at any position, and lanes beyond the width do not count."""

    def function(x: Any) -> Any:
        return x.max(-1), np.min(x, -1), np.max(-abs(x) - 1, -1), np.min(abs(x) + 1, axis=-1)

    x = np.tile(random(1, width), (width + 4, 1))
    x[:width][np.eye(width, dtype=bool)] = np.nan
    x[width:] = np.array([[np.inf], [-np.inf], [0.0], [1e-45]], F32)
    x[-1, ::2] = -3e38
    for got, wanted in zip(specialize(function)(x), function(x), strict=True):
        assert np.array_equal(got, wanted, equal_nan=True)


def test_a_safe_softmax_does_not_overflow() -> None:
    def softmax(x: Any) -> Any:
        e = np.exp(x - np.max(x, -1, keepdims=True))
        return e / np.sum(e, -1, keepdims=True)

    x = np.array([[1e4, 1e4 - 1, 3e38 * 0, -1e4], [-200, -201, -202, -300]], F32)
    assert_close(specialize(softmax)(x), reference(softmax, x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: np.max(x),
        lambda x: np.max(x, 0),
        lambda x: np.max(x, -1, initial=0.0),
        lambda x: np.min(x, -1, where=x > 0),
        lambda x: np.var(x, -1, mean=0.0),
        lambda x: np.linalg.norm(x, 1, -1),
        lambda x: np.linalg.norm(x, np.inf, -1),
        lambda x: np.linalg.norm(x),
        lambda x: np.argmax(x, -1),
        lambda x: np.max(x, -1, out=np.zeros(3, F32)),
        lambda x: x.max(-1, dtype=np.float64),
    ],
)
def test_other_reductions_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TraceError):
        specialize(function)(ARGUMENTS["x"])
