"""The float types of results follow NumPy's promotion of arrays."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from q4jit.arrays.specs import spec_of
from q4jit.errors import TraceError
from q4jit.floats import FloatType
from q4jit.frontend.specs import ScalarSpec, Spec, WeightSpec, array_spec
from q4jit.frontend.trace import trace

W = WeightSpec("Q4_0", 64, 32)


def result_types(function: Any, *specs: Spec) -> tuple[FloatType, ...]:
    return trace(function, specs).result_types


def array(kind: FloatType, width: int = 32) -> Spec:
    return array_spec((4, width), float_type=kind)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ("f32", "f32", "f32"),
        ("f16", "f16", "f16"),
        ("bf16", "bf16", "bf16"),
        ("f16", "f32", "f32"),
        ("bf16", "f32", "f32"),
        ("f16", "bf16", "f32"),
    ],
)
def test_arrays_promote_each_other(first: FloatType, second: FloatType, wanted: str) -> None:
    assert result_types(lambda x, y: x + y, array(first), array(second)) == (wanted,)
    assert result_types(lambda x, y: np.maximum(y, x), array(first), array(second)) == (wanted,)
    assert result_types(lambda x, y: np.where(x > y, x, y), array(first), array(second)) == (
        wanted,
    )


OPERATIONS = {
    "a product": lambda x, w: x @ w,
    "numbers of Python": lambda x, w: (x @ w * 2 + 0.5) / 3,
    "a function": lambda x, w: np.tanh(np.exp(x)),
    "a mean": lambda x, w: np.mean(x, axis=-1),
    "a norm": lambda x, w: np.linalg.norm(x, axis=-1, keepdims=True),
    "a slice": lambda x, w: (x @ w)[..., 3:9],
    "a power": lambda x, w: x**3,
    "clip": lambda x, w: np.clip(x, 0.0, 1.0),
    "where": lambda x, w: np.where(x > 0, x, 0.0),
    "a copy": lambda x, w: x.copy(),
    "a new axis": lambda x, w: np.max(x, axis=-1)[..., None],
    "a sign": lambda x, w: -(+x),
    "a float64 number": lambda x, w: x * np.float64(2),
}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_weights_and_numbers_take_no_part(operation: str, kind: FloatType) -> None:
    assert result_types(OPERATIONS[operation], array(kind, 64), W) == (kind,)


@pytest.mark.parametrize("reduce", [np.sum, np.mean, np.var, np.std])
def test_reductions_take_the_type_that_is_asked_for(reduce: Any) -> None:
    def function(x: Any) -> Any:
        return reduce(x, axis=-1), reduce(x, axis=-1, dtype=np.float32)

    results = function(np.ones((2, 4), np.float16))
    assert [y.dtype for y in results] == [np.float16, np.float32]
    assert result_types(function, array("f16")) == ("f16", "f32")


def test_numpy_scalars_take_part() -> None:
    assert result_types(lambda x: x * np.float32(2), array("f16")) == ("f32",)
    assert result_types(lambda x: x * np.float16(2), array("f16")) == ("f16",)
    scale = ScalarSpec(np.float32, "f32")
    assert result_types(lambda x, s: x * s, array("f16"), scale) == ("f32",)
    assert result_types(lambda x, s: x * s, array("f16"), ScalarSpec()) == ("f16",)


BF16 = ml_dtypes.bfloat16

NUMBERS: list[tuple[Any, dict[str, str]]] = [
    *(
        (s, {"f16": "f16", "bf16": "f32", "f32": "f32"})
        for s in (np.float16(2), np.array(2, ">f2"))
    ),
    *((s, {"f16": "f32", "bf16": "bf16", "f32": "f32"}) for s in (BF16(2), np.array(2, BF16))),
    *((s, {"f16": "f32", "bf16": "f32", "f32": "f32"}) for s in (np.float32(2), np.array(2, "f4"))),
    *((s, {"f16": "f16", "bf16": "bf16", "f32": "f32"}) for s in (2.0, np.float64(2), np.int8(2))),
]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(("number", "wanted"), NUMBERS, ids=lambda v: repr(v)[:30])
def test_a_number_promotes_as_its_own_type_does(
    number: Any, wanted: dict[str, str], kind: FloatType
) -> None:
    """The same holds for an argument and for a constant of the function."""
    spec = spec_of("s", number)
    assert result_types(lambda x, s: x * s, array(kind), spec) == (wanted[kind],)
    assert result_types(lambda x: number * x, array(kind)) == (wanted[kind],)


def test_the_type_of_a_number_in_bfloat16_is_not_known() -> None:
    """Its own types promote by rules of ml_dtypes, which differ from those of arrays."""
    with pytest.raises(TraceError, match="ask for the type of a computed number"):
        result_types(
            lambda x, s: x * isinstance(s * 2.0, float), array("f16"), spec_of("s", BF16(2))
        )


def test_comparisons_have_no_float_type() -> None:
    assert result_types(lambda x, y: (x > 0) * y, array("f32"), array("f16")) == ("f16",)
    counts = result_types(lambda x: np.sum(x > 0, -1) * np.max(x, -1), array("f16"))
    assert counts == ("f32",)  # float64 in NumPy


def test_comparisons_take_no_part() -> None:
    def function(x: Any, y: Any) -> Any:
        return np.where(y > 0, x, 1.0)

    assert result_types(function, array("f16"), array("f32")) == ("f16",)
    # NumPy gives float64 for two numbers, and kernels f32
    assert result_types(lambda x: np.where(x > 0, 1.0, 0.0), array("f16")) == ("f32",)


def test_an_operation_in_place_keeps_the_type() -> None:
    def function(x: Any, y: Any) -> Any:
        z = x.copy()
        z += y
        return z

    assert result_types(function, array("f16"), array("f32")) == ("f16",)


def test_astype_chooses_the_type() -> None:
    assert result_types(lambda x: x.astype(np.float32), array("f16")) == ("f32",)
    assert result_types(lambda x: x.astype(np.float16) * 2, array("f32")) == ("f16",)
    with pytest.raises(TraceError, match=r"expected np\.float32, np\.float16 or .*, got float64"):
        result_types(lambda x: x.astype(np.float64), array("f16"))


def test_decoded_weights_are_f32() -> None:
    assert result_types(lambda x, w: (x @ w, w.dequantize()), array("f16", 64), W) == ("f16", "f32")


def test_the_type_is_part_of_the_graph() -> None:
    texts = {
        str(trace(lambda x: x * 2, (array_spec((4, 64), float_type=kind),)))
        for kind in ("f32", "f16", "bf16")
    }
    assert len(texts) == 3


def test_dtype_is_numpys() -> None:
    seen = []

    def function(x: Any, y: Any) -> Any:
        seen.append((x.dtype, (x * y).dtype))
        return x * y

    result_types(function, array("f16"), array("f32"))
    assert seen == [(np.float16, np.float32)]
