"""Unpacked weights have the bytes that were packed, whatever the format, layout and shape."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from q4jit.errors import FormatError
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import (
    GGUF,
    INTERLEAVED16,
    PLANAR,
    TILES16,
    pack,
    pack_experts,
    packed_bytes,
)
from q4jit.weights.repack import repack, unrepack
from q4jit.weights.unpack import unpack, unpack_experts
from tests.support.layouts import formats_and_layouts
from tests.support.memory import MB, peak_bytes

LAYOUTS = (INTERLEAVED16, PLANAR, TILES16)
CASES = formats_and_layouts(LAYOUTS)
of_every_format_and_layout = pytest.mark.parametrize(("name", "layout"), CASES)


def random_columns(fmt: Format, blocks: int, *lead: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng([seed, blocks, *lead])
    return rng.integers(0, 256, (*lead, blocks * fmt.block_bytes), np.uint8)


def assert_restored(fmt: Format, layout: str, columns: NDArray[np.uint8]) -> None:
    n, k = len(columns), columns.shape[1] // fmt.block_bytes * fmt.block_elements
    packed = pack(fmt, layout, columns)
    assert packed.nbytes == packed_bytes(fmt, layout, k, n)
    unpacked = unpack(fmt, layout, packed, k, n)
    np.testing.assert_array_equal(unpacked, columns, strict=True)
    np.testing.assert_array_equal(pack(fmt, layout, unpacked), packed, strict=True)
    assert not unpacked.flags.writeable


@of_every_format_and_layout
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_random_bytes_are_restored(name: str, layout: str, blocks: int, n: int) -> None:
    assert_restored(FORMATS[name], layout, random_columns(FORMATS[name], blocks, n))


@settings(max_examples=100)
@given(
    case=st.sampled_from(CASES),
    blocks=st.integers(1, 20),
    n=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_any_shape_is_restored(case: tuple[str, str], blocks: int, n: int, seed: int) -> None:
    name, layout = case
    assert_restored(FORMATS[name], layout, random_columns(FORMATS[name], blocks, n, seed=seed))


@of_every_format_and_layout
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
def test_extreme_bytes_are_restored(name: str, layout: str, byte: int) -> None:
    fmt = FORMATS[name]
    assert_restored(fmt, layout, np.full((3, 2 * fmt.block_bytes), byte, np.uint8))


@of_every_format_and_layout
def test_padding_is_dropped_whatever_it_holds(name: str, layout: str) -> None:
    fmt = FORMATS[name]
    columns = random_columns(fmt, 3, 19)
    k = 3 * fmt.block_elements
    holds_weight = pack(fmt, layout, np.full_like(columns, 0xFF)) | pack(
        fmt, layout, np.zeros_like(columns)
    )
    packed = pack(fmt, layout, columns)
    noise = np.random.default_rng(1).integers(0, 256, packed.shape, np.uint8)
    padded = np.where(holds_weight == 0, noise, packed)
    assert (padded != packed).any()
    np.testing.assert_array_equal(unpack(fmt, layout, padded, k, 19), columns)


@pytest.mark.parametrize("name", FORMATS)
def test_repacked_blocks_are_restored(name: str) -> None:
    fmt = FORMATS[name]
    blocks = random_columns(fmt, 1, 100)
    repacked = repack(fmt, blocks)
    assert repacked.shape[-1] == fmt.repacked.block_bytes
    np.testing.assert_array_equal(unrepack(fmt, repacked), blocks)


@of_every_format_and_layout
def test_experts_are_restored(name: str, layout: str) -> None:
    fmt = FORMATS[name]
    columns = random_columns(fmt, 2, 3, 5)
    packed = pack_experts(fmt, layout, columns)
    k = 2 * fmt.block_elements
    np.testing.assert_array_equal(unpack_experts(fmt, layout, packed, 3, k, 5), columns)


def test_columns_in_the_order_of_gguf_share_memory() -> None:
    fmt = FORMATS["Q4_0"]
    columns = random_columns(fmt, 2, 3, 5)
    packed = columns.reshape(-1)
    experts = unpack_experts(fmt, GGUF, packed, 3, 64, 5)
    np.testing.assert_array_equal(experts, columns)
    assert np.shares_memory(experts, packed)
    assert np.shares_memory(unpack(fmt, GGUF, packed, 64, 15), packed)
    assert packed.flags.writeable


@of_every_format_and_layout
def test_bands_equal_the_whole(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = FORMATS[name]
    columns = random_columns(fmt, 4, 16 * 5 + 3)
    packed = pack(fmt, layout, columns)
    monkeypatch.setattr("q4jit.weights.layouts._BAND_BYTES", 2 * columns[:16].nbytes)
    monkeypatch.setattr("q4jit.weights.unpack_tiles._BAND_ELEMENTS", 1)
    got = unpack(fmt, layout, packed, 4 * fmt.block_elements, len(columns))
    np.testing.assert_array_equal(got, columns)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layout in CASES if name in ("Q4_0", "Q6_K", "F16")],
)
def test_unpacking_needs_its_result_and_a_few_megabytes(name: str, layout: str) -> None:
    fmt = FORMATS[name]
    k, n = (8192 if name != "F16" else 4096), 4096
    packed = np.ones(packed_bytes(fmt, layout, k, n), np.uint8)
    size = n * fmt.column_bytes(k)
    assert size >= 18 * MB
    assert peak_bytes(lambda: unpack(fmt, layout, packed, k, n)) < size + 10 * MB


Q4_0 = FORMATS["Q4_0"]


@pytest.mark.parametrize(
    ("layout", "packed", "message"),
    [
        (
            PLANAR,
            np.zeros(511, np.uint8),
            r"Q4_0 of shape \(K, N\) = \(64, 3\) in the layout 'planar': expected 512 bytes, got",
        ),
        (TILES16, np.zeros(512, np.uint8), "expected 1280 bytes, got 512 bytes"),
        (INTERLEAVED16, np.zeros(0, np.uint8), "expected 576 bytes, got 0 bytes"),
        (GGUF, np.zeros(109, np.uint8), "expected 108 bytes, got 109 bytes"),
        (GGUF, np.zeros(27, np.float32), "expected contiguous uint8, got float32"),
        (GGUF, np.zeros(216, np.uint8)[::2], "expected contiguous uint8, got strided uint8"),
        (
            "tiled",
            np.zeros(108, np.uint8),
            "unknown weight layout 'tiled'; known layouts: 'gguf', 'interleaved16', 'planar', 't",
        ),
    ],
)
def test_other_bytes_are_refused(layout: str, packed: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack(Q4_0, layout, packed, 64, 3)


def test_other_shapes_and_formats_are_refused() -> None:
    with pytest.raises(FormatError, match="K: expected a positive multiple of 32"):
        unpack(Q4_0, PLANAR, np.zeros(512, np.uint8), 63, 3)
    with pytest.raises(FormatError, match="'tiles16': expected a format with blocks of codes"):
        unpack(FORMATS["F16"], TILES16, np.zeros(512, np.uint8), 64, 3)
    with pytest.raises(FormatError, match=r"\(E, K, N\) = \(2, 64, 3\).* expected 1024 bytes"):
        unpack_experts(Q4_0, PLANAR, np.zeros(512, np.uint8), 2, 64, 3)
