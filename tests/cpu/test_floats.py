"""Half-precision arrays on every CPU target."""

import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import specialize
from q4jit.errors import ArgumentError
from q4jit.precision import BOUNDS
from q4jit.weights.formats import FORMATS
from tests.support.halves import (
    BF16,
    DTYPES,
    MANTISSA_BITS,
    assert_both,
    assert_same,
    half_ulps,
    in_both,
    rows_of_every_sort,
    special_values,
)
from tests.support.kernels import (
    GUARDED,
    IN_PROCESS,
    Guarded,
    every_guarded_cpu,
    on,
    one_product,
    random_x,
    require_target,
    run_guarded,
    some_ids,
    tables,
    weight,
)
from tests.support.pairs import covering, pairs_in

K: Final = 256
HALVES: Final = ("f16", "bf16")

every_target = pytest.mark.parametrize("target", IN_PROCESS)
both = pytest.mark.parametrize("kind", HALVES)


class Case(NamedTuple):
    """What a product of a half-precision array depends on."""

    kind: str
    format: str
    rows: int
    precision: str
    cpu: Guarded | str


CPUS: Final[tuple[Guarded | str, ...]] = (*IN_PROCESS, *GUARDED)
ON_EVERY_CPU: Final = ("Q4_0", "Q4_1", "Q8_0", "Q6_K", "F16", "F32")
EVERY: Final = [
    case
    for case in itertools.starmap(
        Case, itertools.product(HALVES, FORMATS, (1, 6), ("f32", "i8"), CPUS)
    )
    if case.format in ON_EVERY_CPU or case.cpu in {"cpu", "cpu:x86-64"}
]
CASES: Final = covering(EVERY)


def test_every_pair_is_covered() -> None:
    assert pairs_in(CASES) == pairs_in(EVERY)
    assert {case.cpu for case in CASES} == set(CPUS)
    assert {case.format for case in CASES} == set(FORMATS)


def param(case: Case) -> Any:
    cpu, name = case.cpu, "-".join(map(str, case))
    is_emulated = isinstance(cpu, Guarded) and not cpu.native
    return pytest.param(case, id=name, marks=pytest.mark.emulated if is_emulated else ())


@pytest.mark.parametrize("case", [*map(param, CASES)])
def test_products_keep_the_contract(case: Case) -> None:
    w = weight(case.format, K, 37)
    rows = rows_of_every_sort(case.kind, K)
    for first in range(0, len(rows), case.rows):
        x = rows[first : first + case.rows]
        if isinstance(case.cpu, Guarded):
            args = [x, w.tensor]
            rounded, y = run_guarded(in_both, case.cpu, args, precision=case.precision)
        else:
            target = require_target(case.cpu)
            f = specialize(in_both, target=target, precision=case.precision)
            rounded, y = f(x, w.tensor)
        assert_both(rounded, y, x, w, case.kind, BOUNDS[case.precision])


def around(x: Any, w: Any, gain: Any, residual: Any) -> Any:
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    y = (x / scale) @ w
    return y * gain + residual, x / scale, scale


def around_args(m: int, kind: str) -> list[Any]:
    other = HALVES[1 - HALVES.index(kind)]
    x = random_x(m, K).astype(DTYPES[kind])
    gain = random_x(37, seed=1).astype(DTYPES[kind])
    residual = random_x(m, 37, seed=2).astype(DTYPES[other])
    return [x, weight("Q4_0", K, 37), gain, residual]


def check_around(args: list[Any], results: list[NDArray[Any]], kind: str) -> None:
    x, w, gain, residual = args
    y, normed, scale = results
    assert [r.dtype for r in results] == [DTYPES[t] for t in ("f32", kind, kind)]
    wide = x.astype(np.float64)
    exact_scale = np.sqrt((wide**2).mean(-1, keepdims=True))
    exact_normed = wide / exact_scale
    exact = exact_normed @ w.values * gain.astype(np.float64) + residual.astype(np.float64)
    for got, wanted in ((normed, exact_normed), (scale, exact_scale)):
        slack = half_ulps(wanted, kind) * (1 + 2.0**-8) + 1e-6 * np.abs(wanted)
        assert (np.abs(got.astype(np.float64) - wanted) <= slack).all()
    # the product has seen x / scale in f32, not the rounded result
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 3e-6


@both
@pytest.mark.parametrize("m", [1, 5])
@every_target
def test_types_mix_in_prologue_and_epilogue(target: str, m: int, kind: str) -> None:
    args = around_args(m, kind)
    results = on(target, around)(args[0], args[1].tensor, *args[2:])
    check_around(args, list(results), kind)


@both
@every_guarded_cpu
def test_kernels_stay_inside_their_arrays(cpu: Guarded, kind: str) -> None:
    args = around_args(2, kind)
    results = run_guarded(around, cpu, [args[0], args[1].tensor, *args[2:]])
    check_around(args, results, kind)


@both
@every_target
def test_rounding_and_special_values(target: str, kind: str) -> None:
    dtype = DTYPES[kind]
    numbers = special_values(kind)[np.newaxis]
    with np.errstate(all="ignore"):
        wanted = numbers.astype(dtype)
    y = on(target, lambda x: x.astype(dtype))(numbers)
    np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(np.float32))
    assert (np.signbit(y) == np.signbit(wanted)).all()


@both
@every_target
def test_every_number_is_loaded_and_stored_exactly(target: str, kind: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[kind])[np.newaxis]
    np.testing.assert_array_equal(
        on(target, lambda x: x.astype(np.float32))(every), every.astype(np.float32)
    )
    same = on(target, lambda x: x * 1)(every)
    np.testing.assert_array_equal(same.astype(np.float32), every.astype(np.float32))


@both
@every_target
def test_decoded_weights_are_rounded(target: str, kind: str) -> None:
    dtype, ids = DTYPES[kind], some_ids(5)
    for w in (w for w in tables() if w.tensor.format in ON_EVERY_CPU):
        dequantized = on(target, lambda w: w.dequantize().astype(dtype))(w.tensor)
        assert_same(dequantized, w.values, kind)
        rows = on(target, lambda ids, w: w.rows(ids).astype(dtype))(ids, w.tensor)
        assert_same(rows, w.values.T[ids], kind)


@both
@every_guarded_cpu
def test_decoded_weights_stay_inside_their_arrays(cpu: Guarded, kind: str) -> None:
    w, ids, dtype = weight("Q4_1", 96, 37), some_ids(3), DTYPES[kind]

    def function(ids: Any, w: Any) -> Any:
        return w.dequantize().astype(dtype), w.rows(ids).astype(dtype)

    values, rows = run_guarded(function, cpu, [ids, w.tensor])
    assert_same(values, w.values, kind)
    assert_same(rows, w.values.T[ids], kind)


@both
def test_out_has_the_type_of_the_result(kind: str) -> None:
    w = weight("Q8_0", K, 37)
    f = specialize(one_product, target="cpu")
    x = random_x(2, K).astype(DTYPES[kind])
    out = np.empty((2, 37), DTYPES[kind])
    assert f(x, w.tensor, out=out) is out
    np.testing.assert_array_equal(out, f(x, w.tensor))
    strided = np.zeros((2, 74), DTYPES[kind])[:, ::2]
    f(x, w.tensor, out=strided)
    np.testing.assert_array_equal(strided, out)
    with pytest.raises(ArgumentError, match=f"expected a writable {DTYPES[kind]} .*got float32"):
        f(x, w.tensor, out=np.empty((2, 37), np.float32))


@both
def test_arrays_that_kernels_cannot_read_as_they_are(kind: str) -> None:
    w = weight("Q8_0", K, 37)
    f = specialize(one_product, target="cpu")
    x = random_x(4, 2 * K).astype(DTYPES[kind])
    wanted = f(np.ascontiguousarray(x[:, ::2]), w.tensor)
    np.testing.assert_array_equal(f(x[:, ::2], w.tensor), wanted)
    shifted = np.empty(x[:, ::2].nbytes + 1, np.uint8)[1:].view(DTYPES[kind]).reshape(4, K)
    shifted[...] = x[:, ::2]
    np.testing.assert_array_equal(f(shifted, w.tensor), wanted)


@both
def test_bound_calls_read_current_contents(kind: str) -> None:
    w = weight("Q8_0", K, 37)
    x = random_x(1, K).astype(DTYPES[kind])
    f = specialize(one_product, target="cpu")
    step = f.bind(x, w.tensor)
    x *= 2
    np.testing.assert_array_equal(step(), f(x, w.tensor))


@both
def test_the_function_in_numpy_has_the_same_types(kind: str) -> None:
    w = weight("Q8_0", K, 37)
    x = random_x(2, K).astype(DTYPES[kind])

    def function(x: Any, w: Any) -> Any:
        return x @ w * 2

    y, reference = specialize(function, target="cpu")(x, w.tensor), function(x, w.tensor)
    assert y.dtype == reference.dtype == DTYPES[kind]
    step = 2.0 ** -{"f16": 10, "bf16": 7}[kind]
    np.testing.assert_allclose(y.astype(np.float64), reference.astype(np.float64), rtol=step)


def in_place(x: Any, y: Any) -> Any:
    z = x.copy()
    z += y
    z *= 0.5
    return z


IN_NUMPY: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a norm": lambda x, y, w: (x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)) @ w,
    "GELU": lambda x, y, w: 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "two arrays": lambda x, y, w: (x + y, np.maximum(x, y), np.where(x > y, x, y)),
    "numbers in functions": lambda x, y, w: (np.maximum(x, 0.0), np.clip(x, -0.5, None), x / 3.0),
    "where": lambda x, y, w: np.where(y > 0, x, 0.0),
    "np.linalg.norm": lambda x, y, w: x / np.linalg.norm(x, axis=-1, keepdims=True),
    "reductions": lambda x, y, w: (x.mean(-1), np.var(x, -1), x.std(-1), np.max(x, -1) * 1.5),
    "in place": lambda x, y, w: in_place(x, y),
    "a comparison": lambda x, y, w: (x > 0) * y,
    "numbers of NumPy": lambda x, y, w: (x * np.float16(2), x * np.float32(2), x * BF16.type(2)),
    "astype": lambda x, y, w: (x.astype(np.float32) + y, x.astype(BF16)),
    "containers": lambda x, y, w: {"y": [y * 2.0], "x": x - 1.0},
}


def leaves(results: Any) -> list[NDArray[Any]]:
    if isinstance(results, dict):
        return [leaf for entry in results.values() for leaf in leaves(entry)]
    return (
        [r for entry in results for r in leaves(entry)]
        if type(results) in {tuple, list}
        else [results]
    )


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("what", IN_NUMPY)
def test_without_the_jit_results_have_the_same_types(
    what: str, kind: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = random_x(2, K).astype(DTYPES[kind]), random_x(2, K, seed=1).astype(DTYPES[other])
    w = weight("Q8_0", K, 37).tensor
    compiled = specialize(IN_NUMPY[what], target="cpu")(x, y, w)
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    interpreted = specialize(IN_NUMPY[what], target="cpu")
    results = interpreted(x, y, w)
    coarsest = 2.0 ** -min(MANTISSA_BITS[kind], MANTISSA_BITS[other], MANTISSA_BITS["bf16"] + 3)
    for got, wanted in zip(leaves(results), leaves(compiled), strict=True):
        assert type(got) is type(wanted)
        assert got.dtype == wanted.dtype
        exact = wanted.astype(np.float64)
        slack = 4 * coarsest * np.abs(exact).max()
        np.testing.assert_allclose(got.astype(np.float64), exact, atol=slack)
    out = [np.empty_like(leaf) for leaf in leaves(compiled)]
    if isinstance(compiled, np.ndarray):
        interpreted(x, y, w, out=out[0])
        np.testing.assert_array_equal(out[0], results)


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.ones((1, K), np.complex64), "complex64"),
        (np.ones((1, K), np.int8), "int8"),
        (np.ones((1, K), ">f2"), "float16 in foreign byte order"),
        (np.ones((1, K), np.float64), "float64"),
        (np.ones((1, K), np.bool_), "bool"),
    ],
)
def test_other_types_are_refused(array: Any, shown: str) -> None:
    with pytest.raises(ArgumentError, match=f"argument 'x': expected .*got {shown}"):
        specialize(one_product, target="cpu")(array, weight("Q8_0", K, 37).tensor)
