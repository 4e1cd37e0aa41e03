"""docs/layouts.md: the code agrees with every number in its tables."""

import functools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.tools.aot.layout import describe_layout
from q4jit.weights.decode import decode
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import (
    GGUF,
    INTERLEAVED16,
    PLANAR,
    TILES16,
    Interleaved,
    Planar,
    fields,
    pack,
)
from q4jit.weights.repack import repack
from tests.support.paths import ROOT

DOCUMENT = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
BLOCK_FORMATS = [name for name, fmt in FORMATS.items() if fmt.float_type is None]


@functools.cache
def tables(heading: str) -> list[list[dict[str, str]]]:
    """Return the tables below a heading: lists of rows, each a dict by column name."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    listed = []
    for lines in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = (
            [c.strip() for c in line.strip("|\n").split("|")] for line in lines.split("\n") if line
        )
        listed.append([dict(zip(head, row, strict=True)) for row in rows])
    return listed


def numbered(fmt: Format, k: int, n: int) -> NDArray[np.uint8]:
    """Return columns of random bytes that are not zero, unlike padding."""
    column_bytes = k // fmt.block_elements * fmt.block_bytes
    return np.random.default_rng([k, n]).integers(1, 256, (n, column_bytes), np.uint8)


def field_of(columns: NDArray[np.uint8], fmt: Format, column: int, block: int, name: str) -> bytes:
    """Return the bytes of a field of a block, at its position in the document's table."""
    (row,) = (r for r in tables("Blocks")[0] if (r["format"], r["field"]) == (fmt.name, name))
    at = block * int(row["block bytes"]) + int(row["offset"])
    return columns[column, at : at + int(row["bytes"])].tobytes()


def test_the_table_of_blocks_equals_the_formats() -> None:
    documented = {
        (r["format"], r["field"]): [
            int(r[c]) for c in ("elements", "block bytes", "offset", "bytes")
        ]
        for r in tables("Blocks")[0]
    }
    wanted = {
        (name, f.name): [
            FORMATS[name].block_elements,
            FORMATS[name].block_bytes,
            f.at,
            f.size_bytes,
        ]
        for name in BLOCK_FORMATS
        for f in fields(FORMATS[name])
    }
    assert documented == wanted


def test_the_table_of_repacked_blocks_equals_the_formats() -> None:
    documented = {
        (r["format"], r["field"]): [int(r[c]) for c in ("block bytes", "offset", "bytes")]
        for r in tables("Repacked blocks")[0]
    }
    packed = {name: FORMATS[name].repacked for name in BLOCK_FORMATS}
    wanted = {
        (name, f.name): [fmt.block_bytes, f.at, f.size_bytes]
        for name, fmt in packed.items()
        if fmt is not FORMATS[name]
        for f in fields(fmt)
    }
    assert documented == wanted


def code_of(name: str, planes: list[bytes], bits: list[int], i: int) -> int:
    """Return the code of element i by the document's formula and its table of widths."""
    (row,) = (r for r in tables("Blocks")[2] if name in r["format"].split(", "))
    code = shift = 0
    for number, (plane, b) in enumerate(zip(planes, bits, strict=True)):
        width = int(row[f"quants{number}"])
        run = 8 * width // b
        byte = plane[i // run * width + i % width]
        code |= (byte >> b * (i % run // width) & (1 << b) - 1) << shift
        shift += b
    return code


def integers_of(name: str, b: bytes, j: int) -> tuple[int, int]:
    """Return the scale and the minimum of a sub-block, as the document's table has them."""
    match name:
        case "Q2_K":
            return b[j] & 15, b[j] >> 4
        case "Q3_K":
            high = (b[8 + j % 4] >> 2 * (j // 4) & 3) << 4
            return (b[j % 8] >> 4 * (j // 8) & 15 | high) - 32, 0
        case "Q4_K" | "Q5_K" if j < 4:
            return b[j] & 63, b[j + 4] & 63
        case "Q4_K" | "Q5_K":
            return b[j + 4] & 15 | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4
        case "Q6_K":
            return b[j] - 256 * (b[j] > 127), 0
    assert name == "IQ4_XS"
    return (b[2 + j // 2] >> 4 * (j % 2) & 15 | (b[j // 4] >> 2 * (j % 4) & 3) << 4) - 32, 0


def numbers_of(name: str) -> list[int]:
    """Return the numbers that the document lists for a format with a table."""
    (listed,) = re.findall(r"The numbers of IQ4_NL and IQ4_XS are (.*?)\.", DOCUMENT, re.DOTALL)
    if name == "MXFP4":
        (listed,) = re.findall(r"Those of MXFP4 are (.*?),\sand the same", DOCUMENT, re.DOTALL)
    found = [int(number) for number in listed.replace("−", "-").split(",")]
    return found + [-number for number in found] if name == "MXFP4" else found


def scale_of(name: str, stored: bytes) -> np.float32:
    """Return the scale of a block by the document."""
    if name != "MXFP4":
        return np.float32(np.frombuffer(stored, "<f2")[0])
    (d,) = stored
    return np.float32(2.0 ** (d - 128) if d >= 2 else np.uint32(0x00200000 << d).view("f4"))


def value_of(fmt: Format, block: bytes, i: int) -> np.float32:
    """Return element i of a block by the document's formulas."""

    def field(name: str) -> bytes:
        return field_of(np.frombuffer(block, np.uint8)[np.newaxis], fmt, 0, 0, name)

    named = [row["field"] for row in tables("Blocks")[0] if row["format"] == fmt.name]
    (row,) = (r for r in tables("Blocks")[1] if r["format"] == fmt.name)
    planes = [field(name) for name in sorted(named) if name.startswith("quants")]
    q = code_of(fmt.name, planes, [8 * len(p) // fmt.block_elements for p in planes], i)
    scale, minimum = scale_of(fmt.name, field("d")), np.float32(0)
    if "m" in named:
        minimum = np.float32(np.frombuffer(field("m"), "<f2")[0])
    if "scales" in named:
        s, t = integers_of(fmt.name, field("scales"), i // int(row["sub-blocks of"]))
        scale, minimum = scale * np.float32(s), -minimum * np.float32(t)
    if "number[q]" in row["value"]:
        number = numbers_of(fmt.name)[q]
    elif fmt.name == "Q8_0":
        number = q - 256 * (q > 127)
    else:
        number = q - int((re.findall(r"q − (\d+)", row["value"]) or ["0"])[0])
    return scale * np.float32(number) + minimum


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_decoding_by_the_document(name: str) -> None:
    fmt = FORMATS[name]
    columns = numbered(fmt, fmt.block_elements, 1)
    for at in (fmt.scale_at if fmt.scale_type == "f16" else None, fmt.minimum_at):
        if at is not None:
            columns[0, at : at + 2] = np.frombuffer(np.float16(0.37).tobytes(), np.uint8)
    for stored in range(256) if fmt.scale_type == "e8m0" else [columns[0, fmt.scale_at or 0]]:
        columns[0, fmt.scale_at or 0] = stored
        with np.errstate(over="ignore"):
            values = [value_of(fmt, columns.tobytes(), i) for i in range(fmt.block_elements)]
        np.testing.assert_array_equal(np.array(values), decode(fmt, columns)[0])


@pytest.mark.parametrize(
    ("layout", "size"), [(GGUF, 108), (PLANAR, 512), (TILES16, 1280), (INTERLEAVED16, 576)]
)
def test_the_worked_examples(layout: str, size: int) -> None:
    fmt = FORMATS["Q4_0"]
    columns = numbered(fmt, 64, 3)
    packed = (columns.reshape(-1) if layout == GGUF else pack(fmt, layout, columns)).tobytes()
    assert len(packed) == size
    assert f"{size} bytes" in DOCUMENT
    example = tables(f"`{layout}`")[-1]
    assert len(example) >= 6
    for row in example:
        at, size_bytes, word = int(row["at"]), int(row["bytes"]), int(row.get("word", 0))
        field = field_of(columns, fmt, int(row["column"]), int(row["block"]), row["field"])
        expected = field[word * size_bytes :][:size_bytes] if "word" in row else field
        assert packed[at : at + size_bytes] == expected, row
    if layout == PLANAR:
        gaps = re.search(r"Bytes (\d+) … (\d+) and (\d+) … (\d+) are zeros", DOCUMENT)
        assert gaps is not None
        a, b, c, d = map(int, gaps.groups())
        zeros = [i for i, byte in enumerate(packed) if byte == 0]
        assert zeros == [*range(a, b + 1), *range(c, d + 1)]


def test_the_regions_of_planar() -> None:
    rows = tables("`planar`")[0]
    assert {row["format"] for row in rows} == set(FORMATS)
    for name in FORMATS:
        mine = [row for row in rows if row["format"] == name]
        shape = Planar(FORMATS[name].repacked, int(mine[0]["K"]), int(mine[0]["N"]))
        documented = {row["field"]: (int(row["region"]), int(row["bytes"])) for row in mine}
        assert list(documented.items()) == list(shape.regions.items())
        assert {int(row["size"]) for row in mine} == {shape.size_bytes}


@pytest.mark.parametrize(("k", "n"), [(32, 1), (160, 19), (256, 48)])
def test_the_formula_of_tiles16_locates_every_word(k: int, n: int) -> None:
    fmt = FORMATS["Q4_0"]
    stored = numbered(fmt, k, n)
    packed = pack(fmt, TILES16, stored).tobytes()
    blocks, columns = -(-k // 32 // 4) * 4, -(-n // 16) * 16
    region, words = 0, 0
    for name, size, word_bytes in [("quants0", 16, 4), ("d", 2, 2)]:
        for column in range(n):
            for block in range(k // 32):
                field = field_of(stored, fmt, column, block, name)
                for word in range(size // word_bytes):
                    at = (
                        region
                        + column // 16 * blocks * 16 * size
                        + (block // 4 * 16 + column % 16) * 4 * size
                        + (word * 4 + block % 4) * word_bytes
                    )
                    assert packed[at : at + word_bytes] == field[word * word_bytes :][:word_bytes]
                    words += word_bytes
        region += -(-columns * blocks * size // 256) * 256
    assert len(packed) == region
    assert sum(byte != 0 for byte in packed) == words, "padding must be zeros"


def test_the_slabs_of_interleaved16() -> None:
    rows = tables("`interleaved16`")[0]
    assert {row["format"] for row in rows} == set(FORMATS)
    for name in FORMATS:
        mine = [row for row in rows if row["format"] == name]
        shape = Interleaved(FORMATS[name].repacked, int(mine[0]["K"]), int(mine[0]["N"]))
        words = {f.name: f.word_bytes for f in fields(FORMATS[name].repacked)}
        documented = {
            r["field"]: [int(r[c]) for c in ("offset", "stride", "word bytes")] for r in mine
        }
        assert documented == {f: [*shape.field_at(f), word] for f, word in words.items()}
        assert {int(row["slab bytes"]) for row in mine} == {shape.slab_bytes}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", [GGUF, PLANAR, INTERLEAVED16])
@pytest.mark.parametrize("blocks", [2, 3])
def test_the_formula_of_a_description_locates_every_byte(
    name: str, layout: str, blocks: int
) -> None:
    # `address` checks that a manifest has the document's formulas
    fmt, n = FORMATS[name], 19
    k = blocks * (32 if fmt.float_type else fmt.block_elements)
    columns = numbered(fmt, k, n)
    packed = columns.reshape(-1) if layout == GGUF else pack(fmt, layout, columns)
    described = describe_layout(fmt, layout, (k, n))
    assert described["size_bytes"] == packed.size
    count = described["blocks"]
    if layout != GGUF:
        whole = columns.reshape(n, -1, fmt.block_bytes)
        fmt, columns = fmt.repacked, repack(fmt, whole).reshape(n, -1)
    field_at = {f.name: f.at for f in fields(fmt)}
    for region in described["regions"]:
        for column, block in [(0, 0), (17, count - 1), (n - 1, count // 2)]:
            source = columns[column].reshape(count, -1)[block, field_at[region["name"]] :]
            unit_bytes = region.get("unit_bytes", region["field_bytes"])
            for unit in range(region["field_bytes"] // unit_bytes):
                at = address(described, region, column, block, unit)
                expected = source[unit * unit_bytes :][:unit_bytes]
                assert packed[at : at + unit_bytes].tolist() == expected.tolist()


def address(
    described: dict[str, Any], region: dict[str, Any], column: int, block: int, u: int
) -> int:
    """Return the position of a field by a description's formula, which is the document's."""
    if described["layout"] != INTERLEAVED16:
        assert described["address"] == "offset_bytes + (column * blocks + block) * stride_bytes"
        index = column * described["blocks"] + block
        return int(region["offset_bytes"] + index * region["stride_bytes"])
    assert described["address"] == (
        "(column // 16 * tiles + block // blocks_per_tile) * tile_bytes"
        " + offset_bytes + block % blocks_per_tile * stride_bytes"
        " + (unit * 16 + column % 16) * unit_bytes"
    )
    slab = column // 16 * described["tiles"] + block // described["blocks_per_tile"]
    within = block % described["blocks_per_tile"] * region["stride_bytes"]
    start = slab * described["tile_bytes"] + region["offset_bytes"] + within
    return int(start + (u * 16 + column % 16) * region["unit_bytes"])
