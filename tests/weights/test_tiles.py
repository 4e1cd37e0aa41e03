"""The layout `tiles16` of every block format, decoded by its description in plain Python."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from q4jit.weights.decode import codes, factors
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import TILES16, pack
from q4jit.weights.tiles import Tiles, is_biased, is_e2m1, shares_bytes, suits_tiles16

BLOCK_FORMATS = tuple(f.name for f in FORMATS.values() if f.float_type is None)
N = 19  # a panel and a part of one


def code_in_tiles(fmt: Format, shape: Tiles, packed: bytes, column: int, k: int) -> int:
    """Return a code, from the planes that a lane has of a quad."""
    quad = (column // 16 * shape.quads + k // 128) * 16 + column % 16
    unit, upper, part, b = k // 32 % 4, k // 16 % 2, k // 4 % 4, k % 4
    code = 0
    for i, plane in enumerate(fmt.planes):
        start, record_bytes = shape.regions[f"quants{i}"]
        at = start + quad * record_bytes + part * record_bytes // 4
        if plane.bits == 8:
            return packed[at + unit * 8 + upper * 4 + b] ^ (0x80 if fmt.signed else 0)
        if is_e2m1(fmt):
            at += unit * 4 + b // 2 * 2
            half = int.from_bytes(packed[at : at + 2], "little")
            sign, low = {0: (15, 9), 1: (12, 6), 2: (14, 3), 3: (13, 0)}[2 * upper + b % 2]
            return (half >> sign & 1) << 3 | (half >> low & 7)
        word_units = 4 // plane.bits
        pair = 2 * (unit % word_units) + b % 2
        shift = pair % word_units * plane.bits + pair // word_units * 8 + 4 * upper
        at += unit // word_units * 4 + b // 2 * 2
        bits = int.from_bytes(packed[at : at + 2], "little") >> shift
        code |= (bits & ((1 << plane.bits) - 1)) << plane.lshift
    return code


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_code_and_factor_is_where_lanes_find_it(name: str) -> None:
    fmt = FORMATS[name]
    k = max(fmt.block_elements, 160)
    columns = np.random.default_rng(k).integers(0, 256, (N, fmt.column_bytes(k)), np.uint8)
    shape = Tiles(fmt, k, N)
    packed = pack(fmt, TILES16, columns).tobytes()
    assert len(packed) == shape.size_bytes
    blocks = columns.reshape(N, -1, fmt.block_bytes)
    stored = codes(fmt, blocks).reshape(N, -1)
    for column in (0, 15, 16, 18):
        got = [code_in_tiles(fmt, shape, packed, column, i) for i in range(k)]
        assert got == stored[column].tolist()
    start, record_bytes = shape.regions["d"]
    at = start + ((shape.panels - 1) * shape.quads // shape.block_quads * 16 + 2) * record_bytes
    assert fmt.scale_at is not None
    assert packed[at] == blocks[18, 0, fmt.scale_at]
    if fmt.sub_scales is not None and not shares_bytes(fmt):
        start, record_bytes = shape.regions["scales"]
        at = start + ((shape.quads + 1) * 16 + 2) * record_bytes
        integers = factors(fmt.sub_scales, fmt.sub_blocks, blocks)[18, 0, shape.sub_blocks :]
        bias = 128 if is_biased(fmt.sub_scales) else 0
        assert [byte - bias for byte in packed[at : at + shape.sub_blocks]] == integers.tolist()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_the_size_is_at_most_a_twentieth_more(name: str) -> None:
    fmt = FORMATS[name]
    assert suits_tiles16(fmt)
    assert Tiles(fmt, 4096, 4096).size_bytes <= 1.05 * 4096 * fmt.column_bytes(4096)


def test_floats_have_no_tiles() -> None:
    assert not any(suits_tiles16(f) for f in FORMATS.values() if f.float_type is not None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("MXFP4", {"block_elements": 64}),
        ("MXFP4", {"block_elements": 64, "sub_block_elements": 16}),
        ("Q4_1", {"scale_type": "e8m0"}),
    ],
)
def test_formats_that_kernels_would_misread_have_no_tiles(
    name: str, changes: dict[str, Any]
) -> None:
    assert not suits_tiles16(replace(FORMATS[name], **changes))
