"""x in digits, in LLVM IR: what integer products multiply.

Each unit of 32 elements of x becomes integers X = x / step, the step a power of two, and each X one
digit of int8 (`i8`) or three (`f32`: 24 bits, digits of base 256 from −128 to 127, the highest
first). Units that digits cannot hold are *rough*: an element is not finite, or so large that what
others lose by its step would show. They have digits of 0, and stand in a list.

Steps are relative to that of the row's largest unit: a step's *lift* is how far its exponent stands
above the smallest one, 50 below the largest. A row of x is a run of units, then i32 number of rough
units, f32 the smallest step, i32 each rough unit. A unit:

     0 i32 lift, where a float has its exponent                  4 f32 sum of X·2^lift
     8 i32 −8·sum of X of the first and of the second 16        16 i32 the same of the highest digit
    24 i32 −8·sum of all X                                      28 i32 the same of the highest digit
    32 i8  the highest digit of 32 elements                     64 i8  the next digit, 96 the last
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from q4jit.cpu.fields import shift_right
from q4jit.cpu.lanes import splat_value, sum_lanes
from q4jit.cpu.llvm_text import (
    INTS,
    MASK,
    VECTOR,
    Function,
    Module,
    float_text,
    splat,
)
from q4jit.cpu.schedule import HEADER_BYTES, UNIT, unit_bytes
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES

# The largest X: three digits of at most 127, or one. A product of 32 quants of 4 bits fits int32.
_LARGEST: Final = {1: 127.0, 3: 8355700.0}
_LIFTS: Final = 50  # steps by so many powers of two: sums of K products stay finite
# A row whose largest unit is below this is left to floats: 1/step would overflow.
_LEAST_ROW: Final = 2.0**-48
# The usual energy of a row: the squares of elements up to so many times the mean of those not 0.
_USUAL: Final = {1: 4.0, 3: 2.0}
# `f32`: what rounding loses may be 1.4e-6 of the usual energy, whatever weights are zero or small:
# 32 elements of a unit lose 0.29 of a step each, which is between a 4.2 and an 8.4 millionth of the
# largest. Where all units lose more, those that lose more than half of their part go to floats.
_ALL_TOPS: Final = 25.6
_ONE_TOP: Final = 12.8
# `i8`, as llama.cpp, errs relative to the energy of its own unit. Beyond so many times the root of
# the usual energy a unit goes to floats: a column may have zeros where a few huge elements are.
_BEYOND: Final = 1.9

LIFT_AT, SUM_AT, HALVES_AT, TOP_HALVES_AT, WHOLE_AT, TOP_AT = 0, 4, 8, 16, 24, 28
SUM_FACTOR_LOG2: Final = 3  # sums of X are kept times −8: each format's zero is a multiple of 8
DIGIT_BITS: Final = 8
STEP_AT, LIST_AT = 4, 8  # behind the units: their number stands first


def fits(fmt: Format, limbs: int) -> bool:
    """Whether the exact sum of a sub-block with all digits of X fits int32."""
    zero = 1 << fmt.quant_bits - 1 if fmt.signed else fmt.zero
    most = max(zero, (1 << fmt.quant_bits) - 1 - zero)
    return fmt.sub_block_elements * most * _LARGEST[limbs] < 1 << 31


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
        any(fmt.sub_block_elements < UNIT for fmt in formats),
        any(not fits(fmt, limbs) for fmt in formats),
        any(fmt.minimum_at is not None for fmt in formats),
    )


def add_digits(module: Module, form: Digits) -> str:
    """Add the function `void (ptr x, ptr units, i64 count)` and return its name.

    x: f32, `count` units; units: room for as many, and for their list.
    """
    f = Function(
        "internal void @digits(ptr noalias %x, ptr noalias %units, i64 %count) #0",
        f"x as integers of {8 * form.limbs} bits in units of {UNIT} that share a step.",
    )
    for operation in ("smax", "smin"):
        module.declare(f"declare i32 @llvm.{operation}.i32(i32, i32)")
    module.declare(f"declare i32 @llvm.vector.reduce.add.v16i32({INTS})")
    size = unit_bytes(form.limbs)
    end = f.at("%units", "i8", f.index("end_off", ("%count", size)), "end")
    list_at = f.at(end, "i8", LIST_AT, "list")
    limit, largest = _limits(module, f, form)
    coarsest = _power(f, form, largest)
    with f.loop("unit", 0, "%count", carry={"rough": ("i64", "0")}) as loop:
        unit = f.at("%units", "i8", f.index("unit_off", (loop.index, size)), "unit_at")
        top = f.let("top", f"load i32, ptr {unit}, align 4")
        rough, inverse, lift = _step(f, form, top, limit, largest, coarsest)
        whole = [_integers(module, f, v, inverse, rough) for v in _unit(f, loop.index)]
        _store_header(f, form, unit, lift, whole)
        _store_digits(f, form, unit, whole)
        f.comment("the list has room: it is never longer than the units so far")
        number = f.let("number", f"trunc i64 {loop.index} to i32")
        f.do(f"store i32 {number}, ptr {f.at(list_at, 'i32', loop['rough'])}, align 4")
        more = f.let("more", f"zext i1 {rough} to i64")
        loop["rough"] = f.let("rough", f"add i64 {loop['rough']}, {more}")
    count = f.let("count", f"trunc i64 {loop['rough']} to i32")
    f.do(f"store i32 {count}, ptr {end}, align 4")
    f.comment("the smallest step is the inverse of a power of two")
    step = f.let("step", f"sub i32 {(254 - _LIFTS) << 23}, {coarsest}")
    f.do(f"store i32 {step}, ptr {f.at(end, 'i8', STEP_AT)}, align 4")
    f.do("ret void")
    module.add("digits", f)
    return "@digits"


def load_word(f: Function, unit: str, at: int | str) -> str:
    """Load the i32 at byte `at` of a unit."""
    return f.let("word", f"load i32, ptr {f.at(unit, 'i8', at)}, align 4")


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


_INFINITY: Final = _bits_of(float("inf"))
_MAGNITUDE: Final = 0x7FFFFFFF  # all bits of a float but its sign
_CARRY: Final = 0x808080  # 128 in each digit


def _unit(f: Function, number: str) -> list[str]:
    """The two halves of a unit of x."""
    x_at = f.at("%x", "float", f.index("x_off", (number, UNIT)), "x_at")
    return [
        f.let("x", f"load {VECTOR}, ptr {f.at(x_at, 'float', half * LANES)}, align 4")
        for half in range(2)
    ]


def _limits(module: Module, f: Function, form: Digits) -> tuple[str, str]:
    """The bits of the largest magnitude that digits may hold in this row, and of the largest there.

    Leaves the bits of each unit's largest magnitude in its header.
    """
    module.declare("declare float @llvm.sqrt.f32(float)")
    f.comment("the mean magnitude of what is not 0 or beyond f32")
    mean = _mean(module, f)
    usual = f.let("usual", f"fmul float {mean}, {float_text(_USUAL[form.limbs])}")
    f.comment("the usual energy, and the largest magnitude of each unit")
    energy, tops, largest = _energy(module, f, form, splat_value(f, "float", usual))
    if form.limbs == 1:
        share = f.let("share", f"fmul float {energy}, {float_text(_BEYOND**2)}")
    else:
        number = f.let("number", "sitofp i64 %count to float")
        each = f.let("each", f"fdiv float {energy}, {number}")
        share = f.let("share", f"fmul float {each}, {float_text(_ONE_TOP)}")
    root = f.let("root", f"call float @llvm.sqrt.f32(float {share})")
    limit = f.let("limit", f"bitcast float {root} to i32")
    if form.limbs > 1:
        most = f.let("most", f"fmul float {energy}, {float_text(_ALL_TOPS)}")
        few = f.let("few", f"fcmp ole float {tops}, {most}")
        limit = f.let("limit", f"select i1 {few}, i32 {_INFINITY - 1}, i32 {limit}")
    limit = f.let("limit", f"call i32 @llvm.smin.i32(i32 {limit}, i32 {_INFINITY - 1})")
    largest = f.let("largest", f"call i32 @llvm.smin.i32(i32 {largest}, i32 {limit})")
    tiny = f.let("tiny", f"icmp slt i32 {largest}, {_bits_of(_LEAST_ROW)}")
    limit = f.let("limit", f"select i1 {tiny}, i32 0, i32 {limit}")
    least = f"i32 {largest}, i32 {_bits_of(_LEAST_ROW)}"
    return limit, f.let("largest", f"call i32 @llvm.smax.i32({least})")


def _mean(module: Module, f: Function) -> str:
    module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
    zeros = dict.fromkeys(("number", "sum"), (VECTOR, "zeroinitializer"))
    end = f.index("elements", ("%count", UNIT))
    with f.loop("i", 0, end, step=LANES, carry=zeros) as loop:
        x = f.let("x", f"load {VECTOR}, ptr {f.at('%x', 'float', loop.index)}, align 4")
        size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {x})")
        some = f.let("some", f"fcmp ogt {VECTOR} {size}, zeroinitializer")
        infinity = splat("float", float_text(float("inf")))
        finite = f.let("finite", f"fcmp olt {VECTOR} {size}, {infinity}")
        counted = f.let("counted", f"and {MASK} {some}, {finite}")
        for name, value in (("number", splat("float", "1.0")), ("sum", size)):
            loop[name] = _add_where(f, loop[name], counted, value)
    total, number = (sum_lanes(module, f, loop[name]) for name in ("sum", "number"))
    return f.let("mean", f"fdiv float {total}, {number}")


def _add_where(f: Function, total: str, mask: str, value: str) -> str:
    kept = f.let("kept", f"select {MASK} {mask}, {VECTOR} {value}, {VECTOR} zeroinitializer")
    return f.let("total", f"fadd {VECTOR} {total}, {kept}")


def _energy(module: Module, f: Function, form: Digits, usual: str) -> tuple[str, str, str]:
    """The usual energy, the squares of all units' largest, and the bits of the row's largest."""
    module.declare(f"declare {INTS} @llvm.smax.v16i32({INTS}, {INTS})")
    module.declare(f"declare i32 @llvm.vector.reduce.smax.v16i32({INTS})")
    carry = {
        "energy": (VECTOR, "zeroinitializer"),
        "tops": ("float", "0.0"),
        "largest": ("i32", "0"),
    }
    with f.loop("unit", 0, "%count", carry=carry) as loop:
        sizes = []
        for x in _unit(f, loop.index):
            bits = f.let("bits", f"bitcast {VECTOR} {x} to {INTS}")
            size = f.let("size", f"and {INTS} {bits}, {splat('i32', str(_MAGNITUDE))}")
            sizes.append(size)
            magnitude = f.let("magnitude", f"bitcast {INTS} {size} to {VECTOR}")
            inside = f.let("inside", f"fcmp ole {VECTOR} {magnitude}, {usual}")
            square = f.let("square", f"fmul {VECTOR} {x}, {x}")
            loop["energy"] = _add_where(f, loop["energy"], inside, square)
        f.comment("magnitudes compare as integers do, and Inf and NaN are the largest")
        both = f"{INTS} {sizes[0]}, {INTS} {sizes[1]}"
        larger = f.let("larger", f"call {INTS} @llvm.smax.v16i32({both})")
        top = f.let("top", f"call i32 @llvm.vector.reduce.smax.v16i32({INTS} {larger})")
        offset = f.index("unit_off", (loop.index, unit_bytes(form.limbs)))
        f.do(f"store i32 {top}, ptr {f.at('%units', 'i8', offset)}, align 4")
        finite = f.let("finite", f"icmp slt i32 {top}, {_INFINITY}")
        counted = f.let("counted", f"select i1 {finite}, i32 {top}, i32 0")
        value = f.let("value", f"bitcast i32 {counted} to float")
        square = f.let("square", f"fmul float {value}, {value}")
        loop["tops"] = f.let("tops", f"fadd float {loop['tops']}, {square}")
        pair = f"i32 {loop['largest']}, i32 {counted}"
        loop["largest"] = f.let("largest", f"call i32 @llvm.smax.i32({pair})")
    return sum_lanes(module, f, loop["energy"]), loop["tops"], loop["largest"]


def _power(f: Function, form: Digits, top: str) -> str:
    """The bits of 1/step, the largest power of two that brings `top` into the digits."""
    size = f.let("size", f"bitcast i32 {top} to float")
    most = f.let("most", f"fdiv float {float_text(_LARGEST[form.limbs])}, {size}")
    bits = f.let("most_bits", f"bitcast float {most} to i32")
    return f.let("power", f"and i32 {bits}, {_INFINITY}")


def _step(
    f: Function, form: Digits, top: str, limit: str, largest: str, coarsest: str
) -> tuple[str, str, str]:
    """Whether a unit is rough, its 1/step, and its lift."""
    high = f.let("high", f"icmp sgt i32 {top}, {limit}")
    least = f.let("least", f"sub i32 {largest}, {_LIFTS << 23}")
    some = f.let("some", f"icmp ne i32 {top}, 0")
    under = f.let("under", f"icmp slt i32 {top}, {least}")
    low = f.let("low", f"and i1 {some}, {under}")
    rough = f.let("is_rough", f"or i1 {high}, {low}")
    held = f.let("held", f"call i32 @llvm.smax.i32(i32 {top}, i32 {least})")
    held = f.let("held", f"call i32 @llvm.smin.i32(i32 {held}, i32 {largest})")
    power = _power(f, form, held)
    inverse = f.let("inverse", f"bitcast i32 {power} to float")
    below = f.let("below", f"sub i32 {power}, {coarsest}")
    lift = f.let("lift", f"sub i32 {_LIFTS << 23}, {below}")
    return rough, inverse, f.let("lift", f"select i1 {rough}, i32 0, i32 {lift}")


def _integers(module: Module, f: Function, x: str, inverse: str, rough: str) -> str:
    module.declare(f"declare {VECTOR} @llvm.rint.v16f32({VECTOR})")
    scaled = f.let("scaled", f"fmul {VECTOR} {x}, {splat_value(f, 'float', inverse)}")
    whole = f.let("whole", f"call {VECTOR} @llvm.rint.v16f32({VECTOR} {scaled})")
    number = f.let("X", f"fptosi {VECTOR} {whole} to {INTS}")
    return f.let("X", f"select i1 {rough}, {INTS} zeroinitializer, {INTS} {number}")


def _store_header(f: Function, form: Digits, unit: str, lift: str, whole: list[str]) -> None:
    f.do(f"store i32 {lift}, ptr {unit}, align 4")
    total = _store_sums(f, unit, whole, WHOLE_AT, HALVES_AT if form.halves else None)
    if form.top:
        top = [_digit(f, form, v, 0) for v in whole]
        wide = [f.let("wide", f"sext <16 x i8> {v} to {INTS}") for v in top]
        _store_sums(f, unit, wide, TOP_AT, TOP_HALVES_AT if form.halves else None)
    if form.floats:
        number = f.let("number", f"sitofp i32 {total} to float")
        power = f.let("power", f"add i32 {lift}, {127 << 23}")
        lifted = f.let("lifted", f"bitcast i32 {power} to float")
        value = f.let("value", f"fmul float {number}, {lifted}")
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
    carried = f.let("carried", f"add {INTS} {whole}, {splat('i32', str(_CARRY))}")
    bits = shift_right(f, carried, str(DIGIT_BITS * (form.limbs - 1 - limb)))
    low = f.let("low", f"trunc {INTS} {bits} to <16 x i8>")
    return f.let("digit", f"xor <16 x i8> {low}, {splat('i8', '-128')}")
