"""Arrays that describe themselves wrongly: an error of q4jit's own for each, and no crash."""

from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, quantize, specialize

X = np.arange(128, dtype=np.float32).reshape(2, 64)
W = quantize(np.eye(64, dtype=np.float32), "F32")
GOOD = {"typestr": "<f4", "shape": (2, 64), "data": (0, False), "version": 3}


@specialize
def product(x: Any, w: Any) -> Any:
    return x @ w


def calls(x: Any) -> list[Any]:
    """Return the ways to pass x to a function: a call, `warmup` and `bind`."""
    return [lambda: product(x, W), lambda: product.warmup(x, W), lambda: product.bind(x, W)]


INTERFACES: dict[str, tuple[object, str]] = {
    "a number": (3, "__cuda_array_interface__ of Foreign: expected a dict, got 3"),
    "a list": ([], "expected a dict, got []"),
    "nothing": ({}, "got one without data, shape, typestr"),
    "an error": (RuntimeError("odd"), "of the Foreign failed: RuntimeError('odd')"),
    "shape 5": ({"shape": 5}, "Foreign, shape: expected a tuple of at most 64 whole numbers"),
    "a negative shape": ({"shape": (-1, 64)}, "got (-1, 64)"),
    "a shape of text": ({"shape": ("a",)}, "got ('a',)"),
    "a huge shape": ({"shape": (1 << 60, 64)}, "Foreign, shape: expected a tuple"),
    "70 axes": ({"shape": (1,) * 70}, "Foreign, shape: expected a tuple of at most 64"),
    "dtype zz": ({"typestr": "zz"}, "typestr: expected the name of a NumPy dtype, got 'zz'"),
    "no dtype": ({"typestr": None}, "typestr: expected the name of a NumPy dtype, got None"),
    "empty elements": ({"typestr": "|V0", "strides": (1, 1)}, "got '|V0'"),
    "no data": ({"data": None}, "data: expected an address and a flag, got None"),
    "half the data": ({"data": (1,)}, "data: expected an address and a flag, got (1,)"),
    "an address of text": ({"data": ("a", False)}, "data: expected an address and a flag"),
    "a negative address": ({"data": (-5, False)}, "data: expected an address and a flag"),
    "a huge address": ({"data": (1 << 70, False)}, "data: expected an address and a flag"),
    "strides 5": ({"strides": 5}, "strides: expected a tuple"),
    "one stride": ({"strides": (4,)}, "strides: expected a multiple of 4 for each of 2 dim"),
    "strides of text": ({"strides": ("a", 4)}, "strides: expected a tuple"),
    "odd strides": ({"strides": (256, 3)}, "strides: expected a multiple of 4"),
    "a stream of text": ({"stream": "x"}, "stream: expected a number or None, got 'x'"),
    "a long text": ({"typestr": "x" * 10_000}, "expected the name of a NumPy dtype, got 'xxx"),
}


@pytest.mark.parametrize("case", INTERFACES)
def test_a_wrong_array_interface(case: str) -> None:
    value, message = INTERFACES[case]
    interface = {**GOOD, **value} if isinstance(value, dict) and value else value

    class Foreign:
        @property
        def __cuda_array_interface__(self) -> object:
            if isinstance(interface, Exception):
                raise interface
            return interface

    for call in calls(Foreign()):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert message in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "value", [5, None, (), (2,), (2, 0, 1), ("a", 0), (1.5, 0), (2, None), RuntimeError("odd")]
)
def test_a_wrong_dlpack_device(value: object) -> None:
    class Foreign:
        def __dlpack_device__(self) -> object:
            if isinstance(value, Exception):
                raise value
            return value

    for call in calls(Foreign()):
        with pytest.raises(ArgumentError, match="argument 'x': __dlpack_device__"):
            call()


class Lying(np.ndarray):
    """An array that reports another shape than it has."""

    def __getattribute__(self, name: str) -> Any:
        lies = {"shape": (1 << 20, 64), "strides": (1 << 30, 4), "nbytes": 1 << 40}
        return lies.get(name) or super().__getattribute__(name)


def test_a_subclass_with_a_wrong_shape_is_read_as_it_is() -> None:
    lying = X.view(Lying)
    np.testing.assert_array_equal(product(lying, W), X)
    np.testing.assert_array_equal(product.bind(lying, W)(), X)
    out = np.zeros_like(X).view(Lying)
    assert product(X, W, out=out) is out
    np.testing.assert_array_equal(out.view(np.ndarray), X)
    with pytest.raises(
        ArgumentError, match=r"expected a writable float32 \[2, 64\], got .*\[3, 64"
    ):
        product(X, W, out=np.zeros((3, 64), np.float32).view(Lying))


def test_more_dimensions_than_numpy_broadcasts() -> None:
    assert product(X[:1].reshape((1,) * 32 + (64,)), W).shape == (1,) * 32 + (64,)
    for call in calls(X[:1].reshape((1,) * 63 + (64,))):
        with pytest.raises(ArgumentError, match="expected at most 32 leading dimensions, got 63"):
            call()


@pytest.mark.parametrize("strides", [(4, 4), (8, 4), (252, 4), (0, 4), (4, 0), (-4, 4), (4, 2)])
def test_an_out_whose_elements_share_memory_is_refused(strides: tuple[int, int]) -> None:
    memory = np.zeros(200, np.float32)[2:]
    out = np.lib.stride_tricks.as_strided(memory, (2, 64), strides)
    with pytest.raises(ArgumentError, match=r"got float32 \[2, 64\] whose elements share memory"):
        product(X, W, out=out)


@pytest.mark.parametrize("strides", [(256, 4), (4, 8), (512, 8), (1024, 16), (-256, 4)])
def test_a_strided_out_is_filled(strides: tuple[int, int]) -> None:
    memory = np.zeros(1024, np.float32)[100:]
    out = np.lib.stride_tricks.as_strided(memory, (2, 64), strides)
    assert product(X, W, out=out) is out
    np.testing.assert_array_equal(out, X)
