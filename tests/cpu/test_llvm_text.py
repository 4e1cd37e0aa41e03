"""Constants and struct types as LLVM IR."""

import numpy as np
import pytest

from q4jit.cpu.llvm_text import Module, Struct, StructField, float_bits, float_text, int_text
from q4jit.targets import find_target

PAIR = Struct(
    "Pair",
    "Two rows of bytes and a number.",
    (
        StructField("rows", "[2 x [16 x i8]]", "the rows"),
        StructField("number", "i32", "their number"),
    ),
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-126, "-126"),
        (0x7C00, "31744"),
        (0x7F800000, "u0x7F800000"),
        (0x80808080, "u0x80808080"),
        (-0x80000000, "u0x80000000"),
    ],
)
def test_bit_patterns_are_hexadecimal(value: int, text: str) -> None:
    assert int_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.0"),
        (-0.625, "-0.625"),
        (2.0**-25, "0x3E60000000000000"),
        (np.inf, "0x7FF" + "0" * 13),
    ],
)
def test_floats_are_decimal_if_that_is_exact(value: float, text: str) -> None:
    assert float_text(value) == text


def test_the_bits_of_a_float() -> None:
    assert float_bits(1.0) == 127 << 23
    assert float_bits(-0.0) == -0x80000000


def test_a_struct_names_its_fields() -> None:
    assert PAIR.text() == (
        "; Two rows of bytes and a number.\n"
        "%Pair = type {\n"
        "  [2 x [16 x i8]],  ; 0 the rows\n"
        "  i32               ; 1 their number\n"
        "}\n"
    )
    assert PAIR.number("number") == 1
    assert PAIR.offset_bytes("number") == 32
    assert PAIR.offset_bytes("rows", 1, 3) == 19


def test_a_module_defines_a_struct_once() -> None:
    module = Module(find_target("cpu:x86-64"))
    module.add_struct(PAIR)
    module.add_struct(PAIR)
    assert module.text("").count("%Pair = type") == 1
    with pytest.raises(AssertionError):
        module.add_struct(Struct("Pair", "Another.", PAIR.fields))
