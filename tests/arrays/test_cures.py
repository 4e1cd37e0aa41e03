"""Errors of arguments name the argument, and end with a cure that works for that kind of array."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from q4jit import quantize, specialize
from tests.support.cures import check_cure

K, N = 32, 3
X = np.random.default_rng(0).standard_normal((2, K)).astype(np.float32)
W = quantize(np.ones((K, N), np.float32), "Q8_0")
BF16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn

PRODUCT = specialize(lambda x, w: x @ w, target="cpu")
SCALED = specialize(lambda x, s: x * s, target="cpu")

ARRAYS = [
    (X.astype(np.complex64), "x.real.astype(np.float32)"),
    (X.astype(">c16"), "x.real.astype(np.float32)"),
    (X.astype(np.int8), "x.astype(np.float32)"),
    (X.astype(np.uint16), "x.astype(np.float32)"),
    (X.astype(np.int32), "x.astype(np.float32)"),
    (X.astype(np.int64), "x.astype(np.float32)"),
    (X.astype(">i4"), "x.astype(np.float32)"),
    (X > 0, "x.astype(np.float32)"),
    (X.astype(">f2"), "x.astype(np.float32)"),
    (X.astype(">f4"), "x.astype(np.float32)"),
    (X.astype(np.float64), "x.astype(np.float32)"),
    (X.astype(np.longdouble), "x.astype(np.float32)"),
    (X.astype(FLOAT8), "x.astype(np.float32)"),
    (X.astype(ml_dtypes.float8_e5m2), "x.astype(np.float32)"),
    (X.astype(ml_dtypes.int4), "x.astype(np.float32)"),
    (X.astype(object), "x.astype(np.float32)"),
    (X.tolist(), "np.asarray(x, np.float32)"),
    (memoryview(X.data), "np.asarray(x, dtype=np.float32)"),
    (np.ma.masked_array(X), "np.asarray(x)"),
]


@pytest.mark.parametrize(("x", "cure"), ARRAYS, ids=lambda v: str(getattr(v, "dtype", ""))[:20])
def test_cures_of_arrays(x: Any, cure: str) -> None:
    check_cure(lambda x: PRODUCT(x, W), x, "x", cure)


@pytest.mark.parametrize(
    ("s", "cure"),
    [
        (np.complex64(2), "s.real"),
        (2j, "s.real"),
        (FLOAT8(2), "float(s)"),
        (ml_dtypes.int4(2), "float(s)"),
        (np.array(2j), "s.real.astype(np.float32)"),
        (np.array(2, FLOAT8), "s.astype(np.float32)"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_cures_of_numbers(s: Any, cure: str) -> None:
    check_cure(lambda s: SCALED(X, s), s, "s", cure)


@pytest.mark.parametrize(
    ("x", "cure"), [pair for pair in ARRAYS if isinstance(pair[0], np.ndarray)][:14]
)
def test_cures_of_matrices(x: Any, cure: str) -> None:
    w = x.T
    if x.dtype.kind == "f" and x.dtype.itemsize <= 8:
        assert quantize(w, "Q8_0").shape == (K, 2)
    else:
        check_cure(lambda w: quantize(w, "Q8_0"), w, "w", cure.replace("x.", "w."))


def test_bfloat16_matrices_are_quantised() -> None:
    w = X.T.astype(BF16)
    np.testing.assert_array_equal(
        quantize(w, "Q8_0").dequantize(), quantize(w.astype(np.float32), "Q8_0").dequantize()
    )


@pytest.mark.parametrize("dtype", [np.complex64, np.int8, FLOAT8, np.bool_], ids=str)
def test_cures_of_the_reference(dtype: Any) -> None:
    real = "x.real" if dtype is np.complex64 else "x"
    check_cure(lambda x: PRODUCT.py_func(x, W), X.astype(dtype), "x", f"{real}.astype(np.float32)")
