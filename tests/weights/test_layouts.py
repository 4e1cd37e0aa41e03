"""The layout `interleaved16`, compared with positions computed by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.errors import FormatError
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import INTERLEAVED16, Interleaved, fields, pack
from q4jit.weights.repack import repack
from q4jit.weights.tiles import PANEL_COLUMNS
from tests.support.memory import MB, peak_bytes


def numbered(fmt: Format, blocks: int, n: int) -> NDArray[np.uint8]:
    """Return columns of random bytes that are not zero, unlike padding."""
    rng = np.random.default_rng([blocks, n])
    return rng.integers(1, 256, (n, blocks * fmt.block_bytes), np.uint8)


def shape_of(fmt: Format, columns: NDArray[np.uint8]) -> Interleaved:
    k = columns.shape[1] // fmt.block_bytes * fmt.block_elements
    return Interleaved(fmt.repacked, k, len(columns))


# --- positions computed by hand -------------------------------------------------------------------


def test_a_slab_of_q4_0() -> None:
    # a block is [d: 2][qs: 16]; a slab [16 d][16 d][4 words of block 0, 16 × 4 each][… block 1]
    columns = numbered(FORMATS["Q4_0"], 4, 32)
    packed = pack(FORMATS["Q4_0"], INTERLEAVED16, columns)
    assert len(packed) == 2 * 2 * 576
    for panel, column, slab, block in [(0, 0, 0, 0), (0, 15, 1, 1), (1, 3, 0, 1), (1, 7, 1, 0)]:
        source = columns[16 * panel + column, 18 * (2 * slab + block) :]
        start = (2 * panel + slab) * 576
        d_at = start + 32 * block + 2 * column
        assert packed[d_at : d_at + 2].tolist() == source[:2].tolist()
        for word in range(4):
            at = start + 64 + 256 * block + 64 * word + 4 * column
            expected = source[2 + 4 * word : 6 + 4 * word]
            assert packed[at : at + 4].tolist() == expected.tolist()


def test_a_slab_of_q6_k() -> None:
    # a block is [ql: 128][qh: 64][scales: 16][d: 2]; a slab of one block
    # [16 d][16 scales, 16 × 1 each][8 × 4 words of low bits, 16 × 4 each][8 × 2 words of high bits]
    columns = numbered(FORMATS["Q6_K"], 3, 16)
    packed = pack(FORMATS["Q6_K"], INTERLEAVED16, columns)
    assert len(packed) == 3 * 3360
    for column, block in [(0, 0), (15, 1), (6, 2)]:
        source, start = columns[column, 210 * block :], 3360 * block
        at = start + 2 * column
        assert packed[at : at + 2].tolist() == source[208:210].tolist()
        for i in range(16):
            assert packed[start + 32 + 16 * i + column] == source[192 + i]
        for element in range(256):
            # elements i and i + 16 of a unit of 32 share a byte of the low bits, i, i + 8, i + 16
            # and i + 24 one of the high bits
            unit, i = divmod(element, 32)
            low_word, low_byte = divmod(i % 16, 4)
            at = start + 288 + 64 * (4 * unit + low_word) + 4 * column + low_byte
            low = packed[at] >> 4 * (i // 16) & 15
            high_word, high_byte = divmod(i % 8, 4)
            at = start + 2336 + 64 * (2 * unit + high_word) + 4 * column + high_byte
            high = packed[at] >> 2 * (i // 8) & 3
            half, j = divmod(element, 128)
            assert low == source[64 * half + j % 64] >> 4 * (j // 64) & 15
            assert high == source[128 + 32 * half + j % 32] >> 2 * (j // 32) & 3


def test_a_slab_of_q5_1() -> None:
    # [16 d × 2][16 m × 2][words of block 0: 4 of low bits, 1 of high bits][… of block 1]
    columns = numbered(FORMATS["Q5_1"], 2, 16)
    packed = pack(FORMATS["Q5_1"], INTERLEAVED16, columns)
    assert len(packed) == 2 * 16 * 24
    for column, block, i in [(0, 0, 0), (9, 1, 31), (15, 0, 18), (3, 1, 5)]:
        source = columns[column, 24 * block :]
        at = 128 + 320 * block + 64 * (i % 16 // 4) + 4 * column + i % 4
        assert packed[at] == source[8 + i % 16]
        at = 128 + 320 * block + 256 + 4 * column + i % 4
        assert packed[at] >> i // 4 & 1 == source[4 + i // 8] >> i % 8 & 1


def test_a_slab_of_mxfp4() -> None:
    # [16 e of block 0][16 e of block 1][4 words of block 0][4 words of block 1]
    columns = numbered(FORMATS["MXFP4"], 2, 16)
    packed = pack(FORMATS["MXFP4"], INTERLEAVED16, columns)
    assert len(packed) == 2 * 16 * 17
    for column, block in [(0, 0), (9, 1), (15, 0)]:
        source = columns[column, 17 * block :]
        assert packed[16 * block + column] == source[0]
        at = 32 + 256 * block + 64 * 3 + 4 * column
        assert packed[at : at + 4].tolist() == source[13:17].tolist()


def test_a_slab_of_q4_1() -> None:
    # [16 d][16 d][16 m][16 m][quants of block 0][quants of block 1]
    columns = numbered(FORMATS["Q4_1"], 2, 16)
    packed = pack(FORMATS["Q4_1"], INTERLEAVED16, columns)
    for column, block in [(0, 0), (9, 1), (15, 0)]:
        source = columns[column, 20 * block :]
        for field_at, start in ((0, 0), (2, 64)):
            at = start + 32 * block + 2 * column
            assert packed[at : at + 2].tolist() == source[field_at : field_at + 2].tolist()
        at = 128 + 256 * block + 64 * 3 + 4 * column
        assert packed[at : at + 4].tolist() == source[16:20].tolist()


@pytest.mark.parametrize(("name", "itemsize"), [("F16", 2), ("F32", 4)])
def test_floats_are_interleaved_by_element(name: str, itemsize: int) -> None:
    columns = numbered(FORMATS[name], 37, 5)
    packed = pack(FORMATS[name], INTERLEAVED16, columns)
    assert len(packed) == 64 * PANEL_COLUMNS * itemsize  # K = 37 takes two blocks of 32
    elements = packed.reshape(64, PANEL_COLUMNS, itemsize)
    expected = columns.reshape(5, 37, itemsize).transpose(1, 0, 2)
    np.testing.assert_array_equal(elements[:37, :5], expected)
    assert not elements[37:].any()
    assert not elements[:, 5:].any()


# --- every format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 16, 37, 64])
def test_a_permutation_and_zeros(name: str, blocks: int, n: int) -> None:
    fmt = FORMATS[name]
    columns = numbered(fmt, blocks, n)
    packed = pack(fmt, INTERLEAVED16, columns)
    shape = shape_of(fmt, columns)
    assert packed.size == shape.panels * shape.panel_bytes
    repacked = repack(fmt, columns.reshape(n, blocks, -1))
    np.testing.assert_array_equal(np.sort(packed[packed != 0]), np.sort(repacked[repacked != 0]))
    assert not packed.flags.writeable
    assert packed.ctypes.data % 64 == 0  # a vector load never crosses a cache line


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocks", [2, 3])
def test_every_byte_has_its_own_position(name: str, blocks: int) -> None:
    # each byte has a 16-bit label; the low and the high bytes of the labels are packed separately
    fmt = FORMATS[name].repacked
    blocks *= 32 if fmt.float_type else 1
    size = PANEL_COLUMNS * blocks * fmt.block_bytes
    labels = np.arange(size).reshape(PANEL_COLUMNS, -1)
    low, high = (
        pack(fmt, INTERLEAVED16, (labels >> shift & 0xFF).astype(np.uint8)) for shift in (0, 8)
    )
    packed = low.astype(np.int64) | high.astype(np.int64) << 8
    np.testing.assert_array_equal(np.sort(packed), np.arange(size))


@pytest.mark.parametrize("name", FORMATS)
def test_repacked_sizes_are_close_to_the_files(name: str) -> None:
    fmt = FORMATS[name]
    stored = pack(fmt, INTERLEAVED16, numbered(fmt, 256 // fmt.block_elements, 16)).size
    assert stored <= 1.05 * 16 * fmt.column_bytes(256)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_cover_the_block(name: str) -> None:
    fmt = FORMATS[name].repacked
    in_order = sorted(fields(fmt), key=lambda field: field.at)
    ends = [field.at + field.size_bytes for field in in_order]
    assert [field.at for field in in_order] == [0, *ends[:-1]]
    assert ends[-1] == fmt.block_bytes * (32 if fmt.float_type else 1)


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_of_blocks_fill_whole_cache_lines(name: str) -> None:
    fmt = FORMATS[name].repacked
    pair = Interleaved(fmt, 1024, 16)
    assert pair.blocks_per_slab == 2
    assert pair.slab_bytes % (64 if fmt.scale_type == "f16" else 32) == 0
    alone = Interleaved(fmt, 3 * pair.block_elements, 16)
    assert alone.blocks_per_slab == 1
    for shape in (pair, alone):
        # loads of quants are declared with this alignment
        aligned = 16 if shape is alone and fmt.scale_type == "e8m0" else 32
        assert shape.slab_bytes % aligned == 0
        quants = [f.name for f in fields(fmt) if f.name.startswith("quants")]
        for at, stride in map(shape.field_at, quants):
            assert at % aligned == 0
            assert stride % aligned == 0


def test_unknown_names() -> None:
    with pytest.raises(
        FormatError,
        match="unknown weight layout 'tiled'; known layouts: 'gguf', 'interleaved16', 'planar', 't",
    ):
        pack(FORMATS["Q4_0"], "tiled", np.zeros((1, 18), np.uint8))
    with pytest.raises(KeyError, match="quants7"):
        Interleaved(FORMATS["Q4_0"], 64, 16).field_at("quants7")


@pytest.mark.parametrize(("name", "n"), [("Q4_0", 4096), ("Q6_K", 4096), ("F16", 4091)])
def test_packing_needs_its_result_and_a_few_megabytes(name: str, n: int) -> None:
    fmt = FORMATS[name]
    columns = np.ones((n, fmt.column_bytes(8192 if name != "F16" else 4096)), np.uint8)
    assert columns.nbytes >= 18 * MB
    assert peak_bytes(lambda: pack(fmt, INTERLEAVED16, columns)) < columns.nbytes + 10 * MB


@pytest.mark.parametrize("panels", [1, 3])
def test_packing_in_bands_equals_packing_at_once(
    panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = numbered(FORMATS["Q8_0"], 4, 16 * 7 + 5)
    whole = pack(FORMATS["Q8_0"], INTERLEAVED16, columns)
    monkeypatch.setattr(
        "q4jit.weights.layouts._BAND_BYTES", panels * PANEL_COLUMNS * columns.shape[1]
    )
    np.testing.assert_array_equal(pack(FORMATS["Q8_0"], INTERLEAVED16, columns), whole)


def test_small_weights_share_memory_but_do_not_overlap() -> None:
    columns = [numbered(FORMATS["Q4_0"], 5, n) for n in (16, 33, 48)]
    packed = [pack(FORMATS["Q4_0"], INTERLEAVED16, each) for each in columns]
    before = [each.copy() for each in packed]
    assert all(each.ctypes.data % 64 == 0 for each in packed)
    assert packed[0].base is packed[1].base is not None
    for each in columns:
        pack(FORMATS["Q4_0"], INTERLEAVED16, each[::-1].copy())
    for each, first in zip(packed, before, strict=True):
        np.testing.assert_array_equal(each, first)
