"""x in digits, in LLVM IR: what integer products multiply.

Each unit of 32 elements of x becomes integers X = x / step, the step a power of two, and each X one
digit of int8 (`i8`) or three (`f32`: 24 bits, digits of base 256 from −128 to 127, the highest
first). Units that digits cannot hold are *rough*: an element is not finite, or so large that what
others lose by its step would show. They have digits of 0, and stand in a list.

A row of x is a run of units, then the list: i32 number of rough units, i32 each of them. A unit:

     0 i32 step's exponent + STEP_BIAS, where a float has it     4 f32 sum of X·step·2^STEP_BIAS
     8 i32 −8·sum of X of the first and of the second 16        16 i32 the same of the highest digit
    24 i32 −8·sum of all X                                      28 i32 the same of the highest digit
    32 i8  the highest digit of 32 elements                     64 i8  the next digit, 96 the last
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from q4jit.cpu_fields import shift_right
from q4jit.cpu_products import sum_lanes
from q4jit.formats import Format
from q4jit.layouts import LANES
from q4jit.llvm_text import INTS, MASK, VECTOR, Function, Module, float_text, splat, splat_value
from q4jit.schedule_cpu import HEADER_BYTES, UNIT, unit_bytes

# The largest X: three digits of at most 127, or one. A product of 32 quants of 4 bits fits int32.
_LARGEST: Final = {1: 127.0, 3: 8355700.0}
STEP_BIAS: Final = 50  # the smallest step is 2^-50
# The largest element of a unit: steps are 2^-50 to 2^20 or 2^10, and sums of products stay finite.
_HIGHEST: Final = {1: 2.0**26, 3: 2.0**32}
_LOWEST: Final = {1: 2.0**-43, 3: 2.0**-27}
# A unit is left to floats where its largest element is beyond so many times the root of the usual
# energy: the squares of all elements of the row up to 4 times the mean of those that are not 0. A
# column may have zeros where a few large elements are (one in 16 has it at a single one), and is
# then this much off: rounding by a step errs by 0.29 of it, 32 elements, and the step is a 64th of
# the largest element, or a 4177850th. That makes 5e-2 and 5e-6 of what is left, a quarter of it
# over all columns.
_BEYOND: Final = {1: 1.9, 3: 12.5}
_USUAL: Final = 4.0

EXPONENT_AT, SUM_AT, HALVES_AT, TOP_HALVES_AT, WHOLE_AT, TOP_AT = 0, 4, 8, 16, 24, 28
SUM_FACTOR_LOG2: Final = 3  # sums of X are kept times −8: each format's zero is a multiple of 8
DIGIT_BITS: Final = 8


def fits(fmt: Format, limbs: int) -> bool:
    """Whether the exact sum of a sub-block with all digits of X fits int32."""
    bits = max(plane.bits + plane.lshift for plane in fmt.planes)
    zero = 1 << bits - 1 if fmt.signed else fmt.zero
    most = max(zero, (1 << bits) - 1 - zero)
    return fmt.scale_elements * most * _LARGEST[limbs] < 1 << 31


@dataclass(frozen=True)
class Digits:
    """What products need of x: how many digits, and which sums beside that of all X."""

    limbs: int
    halves: bool
    top: bool
    floats: bool


def digits_for(formats: Sequence[Format], limbs: int) -> Digits:
    """The form of x that serves products with weights of these formats."""
    return Digits(
        limbs,
        any(fmt.scale_elements < UNIT for fmt in formats),
        any(not fits(fmt, limbs) for fmt in formats),
        any(fmt.m_offset_bytes is not None for fmt in formats),
    )


def add_digits(module: Module, form: Digits) -> str:
    """Add the function `void (ptr x, ptr units, i64 count)` and return its name.

    x: f32, `count` units; units: room for as many, and for their list.
    """
    f = Function(
        "internal void @digits(ptr noalias %x, ptr noalias %units, i64 %count) #0",
        f"x as integers of {8 * form.limbs} bits in units of {UNIT} that share a step.",
    )
    for operation in ("smax", "add"):
        module.declare(f"declare i32 @llvm.vector.reduce.{operation}.v16i32({INTS})")
    size = unit_bytes(form.limbs)
    list_at = f.at("%units", "i8", f.index("list_off", ("%count", size)), "list")
    limit = _limit(module, f, form)
    with f.loop("unit", 0, "%count", carry={"rough": ("i64", "0")}) as loop:
        x_at = f.at("%x", "float", f.index("x_off", (loop.index, UNIT)), "x_at")
        unit = f.at("%units", "i8", f.index("unit_off", (loop.index, size)), "unit_at")
        x = [
            f.let("x", f"load {VECTOR}, ptr {f.at(x_at, 'float', half * LANES)}, align 4")
            for half in range(2)
        ]
        top, rough = _inspect(module, f, form, x, limit)
        inverse, exponent = _step(module, f, form, top, rough)
        whole = [_integers(module, f, v, inverse, rough) for v in x]
        _store_header(module, f, form, unit, exponent, whole)
        _store_digits(f, form, unit, whole)
        f.comment("the list has room: it is never longer than the units so far")
        entry = f.index("entry", (loop["rough"], 1), (1, 1))
        number = f.let("number", f"trunc i64 {loop.index} to i32")
        f.do(f"store i32 {number}, ptr {f.at(list_at, 'i32', entry)}, align 4")
        more = f.let("more", f"zext i1 {rough} to i64")
        loop["rough"] = f.let("rough", f"add i64 {loop['rough']}, {more}")
    count = f.let("count", f"trunc i64 {loop['rough']} to i32")
    f.do(f"store i32 {count}, ptr {list_at}, align 4")
    f.do("ret void")
    module.add("digits", f)
    return "@digits"


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _limit(module: Module, f: Function, form: Digits) -> str:
    """The bits of the largest magnitude that digits may hold in this row (NaN for none)."""
    module.declare("declare i32 @llvm.smin.i32(i32, i32)")
    module.declare("declare float @llvm.sqrt.f32(float)")
    highest = splat("float", float_text(_HIGHEST[form.limbs]))
    count = f.index("elements", ("%count", UNIT))
    f.comment("the mean magnitude of what is not 0, then the usual energy")
    number, total, _ = _moments(module, f, count, highest)
    mean = f.let("mean", f"fdiv float {total}, {number}")
    usual = f.let("usual", f"fmul float {mean}, {float_text(_USUAL)}")
    _, _, energy = _moments(module, f, count, splat_value(f, "float", usual))
    root = f.let("root", f"call float @llvm.sqrt.f32(float {energy})")
    limit = f.let("limit", f"fmul float {root}, {float_text(_BEYOND[form.limbs])}")
    bits = f.let("limit_bits", f"bitcast float {limit} to i32")
    most = _bits_of(_HIGHEST[form.limbs])
    return f.let("limit", f"call i32 @llvm.smin.i32(i32 {bits}, i32 {most})")


def _moments(module: Module, f: Function, count: str, most: str) -> list[str]:
    """Number, sum of magnitudes and sum of squares of elements that are not 0 nor above `most`."""
    module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
    zeros = dict.fromkeys(("number", "sum", "squares"), (VECTOR, "zeroinitializer"))
    with f.loop("i", 0, count, step=LANES, carry=zeros) as loop:
        x = f.let("x", f"load {VECTOR}, ptr {f.at('%x', 'float', loop.index)}, align 4")
        size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {x})")
        some = f.let("some", f"fcmp ogt {VECTOR} {size}, zeroinitializer")
        small = f.let("small", f"fcmp ole {VECTOR} {size}, {most}")
        inside = f.let("inside", f"and {MASK} {some}, {small}")
        square = f.let("square", f"fmul {VECTOR} {x}, {x}")
        values = (splat("float", "1.0"), size, square)
        for name, value in zip(zeros, values, strict=True):
            kept = f.let(
                "kept", f"select {MASK} {inside}, {VECTOR} {value}, {VECTOR} zeroinitializer"
            )
            loop[name] = f.let(name, f"fadd {VECTOR} {loop[name]}, {kept}")
    return [sum_lanes(module, f, loop[name]) for name in zeros]


def _inspect(
    module: Module, f: Function, form: Digits, x: list[str], limit: str
) -> tuple[str, str]:
    """The bits of the largest magnitude, and whether the unit is left to floats."""
    module.declare(f"declare {INTS} @llvm.smax.v16i32({INTS}, {INTS})")
    f.comment("magnitudes compare as integers do, and Inf and NaN are the largest")
    sizes = []
    for v in x:
        bits = f.let("bits", f"bitcast {VECTOR} {v} to {INTS}")
        sizes.append(f.let("size", f"and {INTS} {bits}, {splat('i32', str(0x7FFFFFFF))}"))
    larger = f.let("larger", f"call {INTS} @llvm.smax.v16i32({INTS} {sizes[0]}, {INTS} {sizes[1]})")
    top = f.let("top", f"call i32 @llvm.vector.reduce.smax.v16i32({INTS} {larger})")
    high = f.let("high", f"icmp sgt i32 {top}, {limit}")
    lowest = _bits_of(_LOWEST[form.limbs])
    f.comment("the smallest step is too coarse where all of the row is tiny")
    low = f.let("low", f"icmp slt i32 {limit}, {lowest}")
    some = f.let("some", f"icmp ne i32 {top}, 0")
    tiny = f.let("tiny", f"and i1 {low}, {some}")
    return top, f.let("is_rough", f"or i1 {high}, {tiny}")


def _step(module: Module, f: Function, form: Digits, top: str, rough: str) -> tuple[str, str]:
    """1/step, the largest power of two that fits; and the step's exponent for the header."""
    module.declare("declare i32 @llvm.smax.i32(i32, i32)")
    lowest = _bits_of(_LOWEST[form.limbs])
    least = f.let("least", f"call i32 @llvm.smax.i32(i32 {top}, i32 {lowest})")
    size = f.let("size", f"bitcast i32 {least} to float")
    most = f.let("most", f"fdiv float {float_text(_LARGEST[form.limbs])}, {size}")
    most_bits = f.let("most_bits", f"bitcast float {most} to i32")
    power = f.let("power", f"and i32 {most_bits}, {0xFF << 23}")
    inverse = f.let("inverse", f"bitcast i32 {power} to float")
    exponent = f.let("exponent", f"sub i32 {(127 + STEP_BIAS) << 23}, {power}")
    return inverse, f.let("exponent", f"select i1 {rough}, i32 0, i32 {exponent}")


def _integers(module: Module, f: Function, x: str, inverse: str, rough: str) -> str:
    module.declare(f"declare {VECTOR} @llvm.rint.v16f32({VECTOR})")
    scaled = f.let("scaled", f"fmul {VECTOR} {x}, {splat_value(f, 'float', inverse)}")
    whole = f.let("whole", f"call {VECTOR} @llvm.rint.v16f32({VECTOR} {scaled})")
    number = f.let("X", f"fptosi {VECTOR} {whole} to {INTS}")
    return f.let("X", f"select i1 {rough}, {INTS} zeroinitializer, {INTS} {number}")


def _store_header(
    module: Module, f: Function, form: Digits, unit: str, exponent: str, whole: list[str]
) -> None:
    f.do(f"store i32 {exponent}, ptr {unit}, align 4")
    total = _store_sums(f, unit, whole, WHOLE_AT, HALVES_AT if form.halves else None)
    if form.top:
        top = [_digit(f, form, v, 0) for v in whole]
        wide = [f.let("wide", f"sext <16 x i8> {v} to {INTS}") for v in top]
        _store_sums(f, unit, wide, TOP_AT, TOP_HALVES_AT if form.halves else None)
    if form.floats:
        number = f.let("number", f"sitofp i32 {total} to float")
        power = f.let("power", f"add i32 {exponent}, {127 << 23}")
        step = f.let("step", f"bitcast i32 {power} to float")
        value = f.let("value", f"fmul float {number}, {step}")
        f.do(f"store float {value}, ptr {f.at(unit, 'i8', SUM_AT)}, align 4")


def _store_sums(f: Function, unit: str, v: list[str], at: int, halves_at: int | None) -> str:
    """Store −8 times the sum, and that of each half where asked for; returns the sum."""

    def reduce(value: str) -> str:
        return f.let("sum", f"call i32 @llvm.vector.reduce.add.v16i32({INTS} {value})")

    def store(total: str, where: int) -> None:
        many = f.let("many", f"mul i32 {total}, {-1 << SUM_FACTOR_LOG2}")
        f.do(f"store i32 {many}, ptr {f.at(unit, 'i8', where)}, align 4")

    if halves_at is None:
        total = reduce(f.let("both", f"add {INTS} {v[0]}, {v[1]}"))
    else:
        sums = [reduce(value) for value in v]
        for half, one in enumerate(sums):
            store(one, halves_at + 4 * half)
        total = f.let("sum", f"add i32 {sums[0]}, {sums[1]}")
    store(total, at)
    return total


def _store_digits(f: Function, form: Digits, unit: str, whole: list[str]) -> None:
    for limb in range(form.limbs):
        for half, v in enumerate(whole):
            at = HEADER_BYTES + UNIT * limb + LANES * half
            digit = _digit(f, form, v, limb)
            f.do(f"store <16 x i8> {digit}, ptr {f.at(unit, 'i8', at)}, align 16")


def _digit(f: Function, form: Digits, whole: str, limb: int) -> str:
    """Digit `limb` of X as int8; adding 128 to each carries, and its sign bit takes that off."""
    if form.limbs == 1:
        return f.let("digit", f"trunc {INTS} {whole} to <16 x i8>")
    carried = f.let("carried", f"add {INTS} {whole}, {splat('i32', str(0x808080))}")
    bits = shift_right(f, carried, str(DIGIT_BITS * (form.limbs - 1 - limb)))
    low = f.let("low", f"trunc {INTS} {bits} to <16 x i8>")
    return f.let("digit", f"xor <16 x i8> {low}, {splat('i8', '-128')}")
