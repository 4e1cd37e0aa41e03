"""Block formats, compared with blocks decoded by hand and with the `gguf` package."""

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from q4jit.errors import FormatError
from q4jit.weights.decode import decode
from q4jit.weights.formats import FORMATS, UNIT_ELEMENTS, Format, find_format
from q4jit.weights.reference import store_scales
from q4jit.weights.repack import repack

QUANTISED = [name for name, fmt in FORMATS.items() if fmt.float_type is None]
F16_BITS = {
    "zero": 0x0000,
    "negative zero": 0x8000,
    "smallest denormal": 0x0001,
    "largest denormal": 0x03FF,
    "negative denormal": 0x8155,
    "one": 0x3C00,
    "negative": 0xB555,
    "max": 0x7BFF,
    "-max": 0xFBFF,
    "Inf": 0x7C00,
    "-Inf": 0xFC00,
    "NaN": 0x7E00,
}


def block(hexadecimal: str) -> NDArray[np.uint8]:
    """Return a column of one block, uint8 [1, bytes]."""
    return np.frombuffer(bytes.fromhex(hexadecimal), np.uint8).reshape(1, -1)


def oracle_decode(name: str, columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        values = quants.dequantize(columns, gguf.GGMLQuantizationType[name])
    return np.asarray(values, np.float32)


def assert_same_floats(values: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """Check that values and the signs of zeros are equal, and NaN is where it should be."""
    assert values.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(values, wanted)
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(values)[numbers], np.signbit(wanted)[numbers])


# Byte i is i in its low and 15 - i in its high nibble: the codes are 0, 1, …, 15, 15, 14, …, 0.
RISE_AND_FALL = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
CODES = [*range(16), *range(15, -1, -1)]
HIGH_BITS = "00ff00ff"  # the fifth bit of the elements 8 … 15 and 24 … 31
CODES_OF_5 = [code + 16 * (i % 16 >= 8) for i, code in enumerate(CODES)]

IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]

# Q4_K and Q5_K: eight sub-scales and sub-minima of six bits. The last four have their low nibbles
# in the last four bytes, and their two high bits above the six bits of the first four.
K_SUB_SCALES = [1, 2, 3, 4, 5, 63, 33, 16]
K_SUB_MINIMA = [0, 1, 2, 3, 63, 4, 32, 17]
K_SCALES = "01c28344" + "c0018243" + "f54f0110"
# Of 64 elements the low nibbles are the first 32.
K_CODES = [[*range(16)] * 2, [*range(15, -1, -1)] * 2] * 4

# Q3_K: sixteen sub-scales of six bits, less 32. Byte i of the first eight has the low nibbles of i
# and i + 8; byte i of the other four has the two high bits of i, i + 4, i + 8, i + 12.
Q3_K_SUB_SCALES = [-32, -31, 31, 0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6]
Q3_K_SCALES = "30d14fc051bf62ae" + "a854ab56"

# IQ4_XS: eight sub-scales of six bits, less 32: two bits each in two bytes, then nibbles
IQ4_XS_SUB_SCALES = [1, -1, 2, -32, 31, 0, -2, 3]
IQ4_XS_SCALES = "269b" + "f1020f3e"

BY_HAND = {
    "Q4_0": (
        "0038" + RISE_AND_FALL,  # scale 0.5
        [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5,
         3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5, -4],
    ),
    "Q4_1": (
        "003400bc" + RISE_AND_FALL,  # scale 0.25, minimum -1
        [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75,
         2.75, 2.5, 2.25, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, -0.25, -0.5, -0.75, -1],
    ),
    "Q8_0": (
        "00c0" + "0001027f80ff4081" + "00" * 23 + "03",  # scale -2
        [0, -2, -4, -254, 256, 2, -128, 254, *[0] * 23, -6],
    ),
    "Q6_K": (
        # First 128 elements: low bits 1 and 2, high bits 0, 1, 2, 3: codes 1, 17, 34, 50.
        # Second 128: low bits 0 and 15, high bits 3, 2, 1, 0: codes 48, 32, 31, 15.
        "21" * 64 + "f0" * 64 + "e4" * 32 + "1b" * 32
        # Sub-scales 1, 2, …, 8, then -1, -2, 127, -128, 3, 0, 1, -1; scale 0.5.
        + "0102030405060708" + "fffe7f80030001ff" + "0038",
        [-15.5] * 16 + [-31.0] * 16 + [-22.5] * 16 + [-30.0] * 16
        + [5.0] * 16 + [6.0] * 16 + [63.0] * 16 + [72.0] * 16
        + [-8.0] * 16 + [-16.0] * 16 + [0.0] * 16 + [0.0] * 16
        + [-1.5] * 16 + [0.0] * 16 + [-8.5] * 16 + [8.5] * 16,
    ),
    "Q5_0": (
        "0038" + HIGH_BITS + RISE_AND_FALL,  # scale 0.5
        [0.5 * (code - 16) for code in CODES_OF_5],
    ),
    "Q5_1": (
        "003400bc" + HIGH_BITS + RISE_AND_FALL,  # scale 0.25, minimum -1
        [0.25 * code - 1 for code in CODES_OF_5],
    ),
    "Q2_K": (
        # Sub-block j has the scale j and the minimum 15 - j; each byte the codes 0, 1, 2, 3, which
        # are 32 elements apart.
        RISE_AND_FALL + "e4" * 64 + "00380034",  # scale 0.5, minimum 0.25
        [0.5 * j * (j // 2 % 4) - 0.25 * (15 - j) for j in range(16) for _ in range(16)],
    ),
    "Q3_K": (
        # Bit j of a byte is the highest bit of an element of the j-th 32 elements.
        "0f" * 16 + "f0" * 16 + "e4" * 64 + Q3_K_SCALES + "0038",  # scale 0.5
        [0.5 * Q3_K_SUB_SCALES[j] * (j // 2 % 4 + 4 * ((j < 8) == (j % 2 == 0)) - 4)
         for j in range(16) for _ in range(16)],
    ),
    "Q4_K": (
        "00380034" + K_SCALES + RISE_AND_FALL * 8,  # scale 0.5, minimum 0.25
        [0.5 * K_SUB_SCALES[j] * K_CODES[j][i] - 0.25 * K_SUB_MINIMA[j]
         for j in range(8) for i in range(32)],
    ),
    "Q5_K": (
        # Bit j of a byte is the highest bit of an element of sub-block j.
        "00380034" + K_SCALES + "55" * 16 + "aa" * 16 + RISE_AND_FALL * 8,
        [0.5 * K_SUB_SCALES[j] * (K_CODES[j][i] + 16 * ((j % 2 == 0) == (i < 16)))
         - 0.25 * K_SUB_MINIMA[j] for j in range(8) for i in range(32)],
    ),
    "IQ4_NL": ("0038" + RISE_AND_FALL, [0.5 * IQ4[code] for code in CODES]),  # scale 0.5
    "IQ4_XS": (
        "0038" + IQ4_XS_SCALES + RISE_AND_FALL * 8,  # scale 0.5
        [0.5 * sub_scale * IQ4[code] for sub_scale in IQ4_XS_SUB_SCALES for code in CODES],
    ),
    "MXFP4": ("7e" + RISE_AND_FALL, [0.25 * E2M1[code] for code in CODES]),  # scale 2^(126 - 128)
    "BF16": ("803f00c000807f7f0100", [1, -2, -0.0, (2 - 2.0**-7) * 2.0**127, 2.0**-133]),
    "F16": ("003c00c00080ff7b0100", [1, -2, -0.0, 65504, 2.0**-24]),
    "F32": ("0000803f000000c0010000000000c07f", [1, -2, 2.0**-149, np.nan]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_decoded_by_hand(name: str) -> None:
    stored, values = BY_HAND[name]
    decoded = decode(FORMATS[name], block(stored))
    np.testing.assert_array_equal(decoded, np.array([values], np.float32))


def test_the_bits_of_a_q6_k_element() -> None:
    stored = np.zeros((1, 210), np.uint8)
    stored[0, 192:208] = 1
    stored[0, 208:] = 0x00, 0x3C  # scale 1
    stored[0, 5] = 0xA3  # low bits of elements 5 (3) and 69 (10)
    stored[0, 64 + 33] = 0x07  # low bits of element 128 + 33
    stored[0, 128 + 5] = 0b10_00_00_01  # high bits of elements 5 (1) and 101 (2)
    values = decode(FORMATS["Q6_K"], stored)[0]
    changed = {int(i): float(values[i]) for i in np.flatnonzero(values != -32)}
    assert changed == {5: 16 + 3 - 32, 69: 10 - 32, 101: 32 - 32, 161: 7 - 32}


def scale_positions(fmt: Format) -> list[int]:
    """Return where fields in f16 are."""
    scale_at = fmt.scale_at if fmt.scale_type == "f16" else None
    return [at for at in (scale_at, fmt.minimum_at) if at is not None]


def test_every_scale_of_8_bits() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (256, 17), np.uint8)
    blocks[:, 0] = range(256)
    assert_same_floats(decode(FORMATS["MXFP4"], blocks), oracle_decode("MXFP4", blocks))


def test_extreme_scales_of_8_bits_decoded_by_hand() -> None:
    codes = "17" + "00" * 15  # element 0 has the number 12, element 16 the number 1
    for exponent, one in {0: -128, 1: -127, 2: -126, 253: 125, 254: 126, 255: 127}.items():
        values = decode(FORMATS["MXFP4"], block(f"{exponent:02x}{codes}"))[0]
        assert values[16] == 2.0**one
        assert values[0] == (12 * 2.0**one if exponent < 253 else np.inf)


@pytest.mark.parametrize("name", [name for name in QUANTISED if scale_positions(FORMATS[name])])
@pytest.mark.parametrize("bits", F16_BITS.values(), ids=F16_BITS)
def test_every_kind_of_scale(name: str, bits: int) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(bits)
    for changed_at in scale_positions(fmt):
        columns = rng.integers(0, 256, (3, 2 * fmt.block_bytes), np.uint8)
        for at in scale_positions(fmt):
            columns.reshape(-1, fmt.block_bytes)[:, at : at + 2] = 0x00, 0x40
        columns.reshape(-1, fmt.block_bytes)[:, changed_at : changed_at + 2] = bits & 255, bits >> 8
        assert_same_floats(decode(fmt, columns), oracle_decode(name, columns))


def test_extreme_scales_decoded_by_hand() -> None:
    codes = "8f" + "88" * 15  # element 0 has the code 15, the others 8
    fmt = FORMATS["Q4_0"]
    assert decode(fmt, block("007c" + codes))[0, :2].tolist() == [
        np.inf,
        pytest.approx(np.nan, nan_ok=True),
    ]
    assert decode(fmt, block("00fc" + codes))[0, 0] == -np.inf
    assert np.isnan(decode(fmt, block("007e" + codes))).all()
    assert decode(fmt, block("ff7b" + codes))[0, 0] == 7 * 65504
    assert decode(fmt, block("0100" + codes))[0, 0] == 7 * 2.0**-24


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_decode_like_gguf(name: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(1)
    columns = rng.integers(0, 256, (23, 5 * fmt.block_bytes), np.uint8)
    assert_same_floats(decode(fmt, columns), oracle_decode(name, columns))


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_takes_any_strides_and_changes_nothing(name: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(2)
    stored = rng.integers(0, 256, 20 * 3 * fmt.block_bytes + 1, np.uint8)
    columns = stored[1:].reshape(20, -1)  # unaligned
    before = columns.copy()
    wanted = oracle_decode(name, before)
    assert_same_floats(decode(fmt, columns[::-3]), wanted[::-3])
    columns.flags.writeable = False
    assert_same_floats(decode(fmt, columns), wanted)
    assert (columns == before).all()


def block_of_units(fmt: Format) -> NDArray[np.uint8]:
    """Return a column of one block of codes 0: scale and sub-scales are 1, the minimum is 0."""
    stored = np.zeros((1, fmt.block_bytes), np.uint8)
    store_scales(fmt, stored, np.ones(1))
    if fmt.scale_type == "e8m0":
        stored[0, fmt.scale_at] = 128
    if (sub := fmt.sub_scales) is None:
        return stored
    for part in sub.parts:
        for j in range(fmt.sub_blocks):
            byte, shift = part.position(j)
            field = (1 + sub.zero) >> part.lshift & ((1 << part.bits) - 1)
            stored[0, byte] |= field << shift
    return stored


@pytest.mark.parametrize("name", QUANTISED)
def test_planes_give_the_position_of_each_element(name: str) -> None:
    fmt = FORMATS[name]
    zeros = decode(fmt, block_of_units(fmt))[0]
    assert set(zeros) == {fmt.numbers[0]}
    for element in range(fmt.block_elements):
        stored = block_of_units(fmt)
        for plane in fmt.planes:
            byte, shift = plane.position(element)
            assert byte < plane.size_bytes(fmt.block_elements)
            stored[0, plane.at + byte] |= ((1 << plane.bits) - 1) << shift
        change = decode(fmt, stored)[0] - zeros
        assert np.flatnonzero(change).tolist() == [element]
        assert change[element] == fmt.numbers[-1] - fmt.numbers[0]


@pytest.mark.parametrize("name", QUANTISED)
def test_repacked_blocks_have_the_same_values(name: str) -> None:
    fmt = FORMATS[name]
    columns = np.random.default_rng(5).integers(0, 256, (7, 3 * fmt.block_bytes), np.uint8)
    packed = repack(fmt, columns.reshape(7, 3, -1))
    assert packed.shape == (7, 3, fmt.repacked.block_bytes)
    assert_same_floats(decode(fmt.repacked, packed.reshape(7, -1)), decode(fmt, columns))
    assert all(plane.run_elements == UNIT_ELEMENTS for plane in fmt.repacked.planes)
    assert fmt.repacked.repacked == fmt.repacked


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("k", [0, -32, 1, 31, 33, 100])
def test_k_must_be_whole_blocks(name: str, k: int) -> None:
    fmt = FORMATS[name]
    with pytest.raises(
        FormatError, match=rf"^K: expected a positive multiple of {fmt.block_elements} .*, got {k}$"
    ):
        fmt.column_bytes(k)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_and_numbers_equal_ggmls(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    fmt = find_format(name)
    assert fmt.ggml_type == kind.value
    assert (fmt.block_elements, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", ["Q1_K", "q4 0", "", None, 2, ["Q4_0"]])
def test_an_unknown_format_is_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(
        FormatError, match=r"unknown format .*; known formats: F32, F16, BF16, Q4_0, Q4_1, Q5_0"
    ):
        find_format(name)
