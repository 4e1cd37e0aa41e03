"""`quantize`: what it takes, the bytes that it makes, and what it refuses."""

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from q4jit.errors import FormatError
from q4jit.weights import quantize as module
from q4jit.weights.encode import ENCODERS, encode
from q4jit.weights.formats import FORMATS
from q4jit.weights.quantize import quantize
from q4jit.weights.tensor import QuantizedTensor
from tests.support.memory import MB, peak_bytes

SMALL = 12 * MB  # temporary memory of a call, whatever the size of its tensor
SEARCHED = ("IQ4_NL", "Q4_K", "Q5_K", "Q6_K")


def wanted_bytes(w: NDArray[Any], name: str) -> NDArray[np.uint8]:
    columns = np.ascontiguousarray(w.T)
    if name in SEARCHED:
        return encode(FORMATS[name], columns)
    return quants.quantize(columns, gguf.GGMLQuantizationType[name]).view(np.uint8)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4", ">f8", "bfloat16"])
def test_quantize_gives_ggufs_bytes(name: str, dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    w: NDArray[Any] = np.random.default_rng(7).standard_normal((256, 37)).astype(kind)
    wanted = wanted_bytes(w.astype(w.dtype.newbyteorder("=")), name)
    np.testing.assert_array_equal(quantize(w, name).raw, wanted)


@pytest.mark.parametrize("name", ENCODERS)
def test_quantize_takes_any_strides(name: str) -> None:
    w = np.random.default_rng(8).standard_normal((256, 300)).astype(np.float32)
    wanted = wanted_bytes(w, name)
    wide = np.zeros((512, 900), np.float32)
    wide[::2, ::3] = w
    unaligned = np.frombuffer(b"\0" + w.tobytes(), np.uint8)[1:].view(np.float32).reshape(w.shape)
    for same in (np.asfortranarray(w), w[::-1, ::-1][::-1, ::-1], wide[::2, ::3], unaligned):
        np.testing.assert_array_equal(quantize(same, name).raw, wanted)
    np.testing.assert_array_equal(quantize(w[:, ::-1], name).raw, wanted[::-1])
    np.testing.assert_array_equal(quantize(w.tolist(), name).raw, wanted)


def test_quantizing_in_bands_equals_quantizing_at_once() -> None:
    w = np.random.default_rng(9).standard_normal((4096, 200)).astype(np.float32)
    np.testing.assert_array_equal(quantize(w, "Q4_0").raw, wanted_bytes(w, "Q4_0"))


def test_large_matrices_show_their_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    w = np.ones((4096, 200), np.float32)
    quantize(w, "Q4_0")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_SHOWN_ELEMENTS", w.size)
    assert (quantize(w, "Q4_0").raw == wanted_bytes(w, "Q4_0")).all()
    assert "quantising to Q4_0 1 of 7\n" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["i4", "u1", "?", "c8", "O", "g"])
def test_quantize_refuses_other_dtypes_with_the_conversion(dtype: str) -> None:
    with pytest.raises(FormatError, match=r"got \w+ \[32, 2\]; use w(\.real)?\.astype"):
        quantize(np.zeros((32, 2), dtype), "Q4_0")


@pytest.mark.parametrize("shape", [(), (32,), (32, 2, 2)])
def test_quantize_takes_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        FormatError, match=r"shape of a weight: expected a pair of ints \(K, N\), got "
    ):
        quantize(np.zeros(shape, np.float32), "Q4_0")


def test_k_is_whole_blocks() -> None:
    with pytest.raises(FormatError, match=r"K: expected a positive multiple of 256 .*, got 288$"):
        quantize(np.zeros((288, 2), np.float32), "Q4_K")


@pytest.mark.parametrize("name", ["q4_0", "Q4_0", "q4_1", "f16", "F32", "iq4_nl", "bf16", "mxfp4"])
def test_a_format_has_its_name_in_any_case(name: str) -> None:
    assert quantize(np.ones((32, 1)), name).format == name.upper()
    raw = bytes(FORMATS[name.upper()].column_bytes(32))
    assert QuantizedTensor.from_bytes(raw, shape=(32, 1), format=name).format == name.upper()


F16 = 65504.0
F16_BEYOND = 65536.0
# A value that is accepted (the largest, if the encoder does not search), and a positive and a
# negative one that are not. In a block of zeros, a value is a code times a scale, or a minimum and
# perhaps the largest code.
RANGES: dict[str, tuple[float, float, float]] = {
    "Q4_0": (8 * F16, 8 * F16_BEYOND, -8 * F16_BEYOND),
    "Q5_0": (16 * F16, 16 * F16_BEYOND, -16 * F16_BEYOND),
    "Q4_1": (F16, 15 * F16_BEYOND, -F16_BEYOND),
    "Q5_1": (F16, 31 * F16_BEYOND, -F16_BEYOND),
    "Q8_0": (127 * F16, 127 * F16_BEYOND, -127 * F16_BEYOND),
    "F16": (F16, 65520, -65520),
    "BF16": (float(np.float32(2.0**128 - 2.0**120)), 3.4e38, -3.4e38),
    "F32": (float(np.finfo(np.float32).max), 1e39, -1e39),
    "IQ4_NL": (110 * F16, 130 * F16_BEYOND, -130 * F16_BEYOND),
    "Q4_K": (12 * 63 * F16, 15 * 63 * F16_BEYOND, -63 * F16_BEYOND),
    "Q5_K": (28 * 63 * F16, 31 * 63 * F16_BEYOND, -63 * F16_BEYOND),
    "Q6_K": (25 * 128 * F16, 32 * 128 * F16_BEYOND, -32 * 128 * F16_BEYOND),
}


@pytest.mark.parametrize("name", RANGES)
def test_values_beyond_the_range_of_a_format_are_refused(name: str) -> None:
    largest, *beyond = RANGES[name]
    w = np.zeros((512, 700))  # of several bands
    w[340, 601] = largest
    assert quantize(w, name).has_finite_scales
    for value in beyond:
        w[340, 601] = value
        with pytest.raises(FormatError) as caught:
            quantize(w, name)
        message = str(caught.value)
        dtype = {"F32": "float32", "BF16": "bfloat16"}.get(name, "float16")
        assert f"within {dtype}'s range for {name}, got w[340, 601] = {value:g}; scale" in message


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_kept(name: str, value: float) -> None:
    w = np.zeros((512, 3))
    w[40, 1] = value
    assert not quantize(w, name).has_finite_scales


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_mxfp4_refuses_values_that_it_does_not_have(value: float) -> None:
    w = np.zeros((1 << 14, 18))  # of several bands in both directions
    w[12_000, 17] = value
    with pytest.raises(FormatError) as caught:
        quantize(w, "MXFP4")
    assert str(caught.value) == (
        "argument 'w' of quantize: expected finite float32 values for MXFP4, which has neither NaN "
        f"nor Inf, got w[12000, 17] = {value:g}; quantise to another format"
    )


def test_bfloat16_is_refused_with_its_place_too() -> None:
    w = np.zeros((64, 3), ml_dtypes.bfloat16)
    w[40, 1] = 2.0**100
    with pytest.raises(FormatError, match=r"range for Q8_0, got w\[40, 1\] = 1\.26765e\+30; scale"):
        quantize(w, "Q8_0")
    w[50, 2] = np.nan
    with pytest.raises(FormatError, match=r"nor Inf, got w\[50, 2\] = nan; quantise to another"):
        quantize(w, "MXFP4")


@pytest.mark.parametrize("largest", [1e38, float(np.finfo(np.float32).max), 1e-40])
def test_mxfp4_takes_every_finite_float(largest: float) -> None:
    w = np.zeros((32, 3))
    w[4, 1] = largest
    values = quantize(w, "MXFP4").dequantize()
    assert np.isfinite(values).all()
    assert abs(values[4, 1] - largest) <= largest / 2 + 2.0**-125


@pytest.mark.parametrize("name", ["Q2_K", "q3_k", "IQ4_XS"])
def test_formats_that_are_only_read_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"cannot quantise to {name.upper()}, only to F32"):
        quantize(np.zeros((256, 1), np.float32), name)


@pytest.mark.process
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", [(4096, 2048), (1 << 23, 1)])
def test_quantize_makes_no_transposed_copy(name: str, shape: tuple[int, int]) -> None:
    w = np.ones(shape, np.float32, order="C" if name in SEARCHED else "F")
    assert peak_bytes(lambda: quantize(w, name)) < FORMATS[name].column_bytes(w.size) + SMALL
