"""Write x in digits, the form that integer products multiply, in LLVM IR.

Each unit of 32 elements of x becomes integers X = x / step. The step is a power of two. Each X is
one digit of int8 (`i8`), or three digits of base 256 from −128 to 127 (`f32`: 24 bits). A unit is
*rough* if digits cannot hold it: an element is not finite, or so large that the rounding errors of
the unit's other elements would show. The digits of a rough unit are 0, and a list names it.

Steps are stored relative to the smallest one, which is 2^50 below that of the row's largest unit: a
unit's *lift* is the exponent of its step less that of the smallest step.

A row of x is an array of units and then its end (`cpu.digit_form`).
"""

from typing import Final

from q4jit.cpu.digit_form import DIGIT_BITS, HALVES, LARGEST, ROW_END, DigitForm
from q4jit.cpu.fields import shift_right
from q4jit.cpu.lanes import (
    INFINITY,
    broadcast,
    largest_lane,
    magnitude_of,
    sum_lanes,
)
from q4jit.cpu.llvm_text import (
    EXPONENT_BIAS,
    EXPONENT_BITS,
    INTS,
    MAGNITUDE_BITS,
    MASK,
    VECTOR,
    Function,
    Module,
    exponent_bits,
    float_bits,
    float_text,
    int_text,
    splat,
    splat_int,
)
from q4jit.cpu.schedule import UNIT
from q4jit.weights.layouts import LANES

_DIGIT_SIGN: Final = -128  # the sign bit of an int8
_CARRY: Final = 0x808080  # 128 in each digit

_TIE: Final = 2.0**-20  # orders equal rounding errors

_LIFTS: Final = 50  # steps differ by at most 2^50: sums of K products stay finite
# A row whose largest unit is below this is multiplied as floats: 1/step would overflow.
_LEAST_ROW: Final = 2.0**-48
_LARGEST_FINITE: Final = EXPONENT_BITS - 1  # as bits

# The usual energy of a row is the sum of squares of all elements whose magnitude is at most this
# many times the mean magnitude of the elements that are not 0; by digits.
_USUAL: Final = {1: 4.0, 3: 2.0}
# `f32`: rounding may lose 1.4e-6 of the usual energy's root, whichever weights are zero or small.
# The 32 elements of a unit lose 0.29 steps each (a uniform error's rms, 1/√12), and a step is
# between 1/4.2e6 and 1/8.4e6 of the unit's largest element. If all units together lose more, each
# unit that loses more than half of its share is multiplied as floats.
_ALL_TOPS: Final = 25.6
_ONE_TOP: Final = 12.8
_ALL_TOPS_NOTE: Final = f"{_ALL_TOPS}: of a row that loses what it may"
_ONE_TOP_NOTE: Final = f"{_ONE_TOP}: of a unit that loses half of its share"
# `i8` has errors relative to each unit's energy, as llama.cpp has. A unit whose largest element is
# above this many times the root of the usual energy is multiplied as floats: a column may have
# zeros where a few huge elements of x are.
_BEYOND: Final = 1.9


def add_digits(module: Module, form: DigitForm) -> str:
    """Add the function `void (ptr x, ptr units, i64 count)` and return its name.

    x: f32, `count` units; units: room for as many units in digits, and for the row's end.
    """
    module.add_struct(form.unit)
    module.add_struct(ROW_END)
    f = Function(
        "internal void @write_digits(ptr noalias %x, ptr noalias %units, i64 %count) #0",
        f"x as integers of {8 * form.digits} bits in units of {UNIT} that share a step.",
    )
    for operation in ("smax", "smin"):
        module.declare(f"declare i32 @llvm.{operation}.i32(i32, i32)")
    module.declare(f"declare i32 @llvm.vector.reduce.add.v16i32({INTS})")
    end = f.at("%units", "%Unit", "%count", "end_at")
    list_at = f.field_at(end, ROW_END, "rough_units")
    limit, largest = _limits(module, f, form)
    f.comment("1/step of the row's largest unit")
    coarsest = _inverse_step(f, form, largest)
    with f.loop("unit", 0, "%count", carry={"rough_count": ("i64", "0")}) as loop:
        unit_at = f.at("%units", "%Unit", loop.index, "unit_at")
        lift_at = f.field_at(unit_at, form.unit, "lift")
        top = f.let("top", f"load i32, ptr {lift_at}, align 4")
        rough, inverse, lift = _step(f, form, top, limit, largest, coarsest)
        halves = [
            _integers(module, f, form, x, inverse, rough) for x in _halves_of_x(f, loop.index)
        ]
        f.do(f"store i32 {lift}, ptr {lift_at}, align 4")
        _store_header(f, form, unit_at, lift, halves)
        _store_digits(f, form, unit_at, halves)
        f.comment("every unit is written to the list's end, and stays there if it is rough")
        number = f.let("number", f"trunc i64 {loop.index} to i32")
        entry_at = f.at(list_at, "i32", loop["rough_count"], "entry_at")
        f.do(f"store i32 {number}, ptr {entry_at}, align 4")
        more = f.let("more", f"zext i1 {rough} to i64")
        loop["rough_count"] = f.let("rough_count", f"add i64 {loop['rough_count']}, {more}")
    count = f.let("count", f"trunc i64 {loop['rough_count']} to i32")
    f.do(f"store i32 {count}, ptr {f.field_at(end, ROW_END, 'rough_count')}, align 4")
    f.comment(f"the smallest step: the largest one times 2^-{_LIFTS}, by exponents")
    inverse_of_one = int_text(exponent_bits(2 * EXPONENT_BIAS - _LIFTS))
    step = f.let("smallest_step", f"sub i32 {inverse_of_one}, {coarsest}")
    f.do(f"store i32 {step}, ptr {f.field_at(end, ROW_END, 'smallest_step')}, align 4")
    f.do("ret void")
    module.add("write_digits", f)
    return "@write_digits"


def _halves_of_x(f: Function, unit: str) -> list[str]:
    """Load the two halves of a unit of x."""
    offset = f.index("x_offset", (unit, UNIT))
    x_at = f.at("%x", "float", offset, "x_at")
    addresses = [f.at(x_at, "float", half * LANES, "second_half_at") for half in range(HALVES)]
    return [f.let("x", f"load {VECTOR}, ptr {at}, align 4") for at in addresses]


# --- the size of a row's elements -----------------------------------------------------------------


def _limits(module: Module, f: Function, form: DigitForm) -> tuple[str, str]:
    """Return two magnitudes, as bits: the largest that digits may hold, and the row's largest.

    Leaves the bits of each unit's largest magnitude in its header, in place of the lift.
    """
    module.declare("declare float @llvm.sqrt.f32(float)")
    f.comment("the mean magnitude of the elements that are finite and not 0")
    mean = _mean(module, f)
    usual = f.let("usual", f"fmul float {mean}, {float_text(_USUAL[form.digits])}")
    f.comment("the usual energy, and each unit's largest magnitude, which waits in its header")
    energy, squared_tops, largest = _energy(module, f, form, broadcast(f, "float", usual))
    if form.digits == 1:
        share = f.let("share", f"fmul float {energy}, {float_text(_BEYOND**2)}", f"{_BEYOND}²")
    else:
        count = f.let("float_count", "sitofp i64 %count to float")
        mean_energy = f.let("mean_energy", f"fdiv float {energy}, {count}")
        factor = float_text(_ONE_TOP)
        share = f.let("share", f"fmul float {mean_energy}, {factor}", _ONE_TOP_NOTE)
    root = f.let("root", f"call float @llvm.sqrt.f32(float {share})")
    limit = f.let("limit", f"bitcast float {root} to i32")
    finite = int_text(_LARGEST_FINITE)
    if form.digits > 1:
        most = f.let("most", f"fmul float {energy}, {float_text(_ALL_TOPS)}", _ALL_TOPS_NOTE)
        little = f.let("loses_little", f"fcmp ole float {squared_tops}, {most}")
        limit = f.let("limit", f"select i1 {little}, i32 {finite}, i32 {limit}", "finite: no limit")
    limit = f.let("limit", f"call i32 @llvm.smin.i32(i32 {limit}, i32 {finite})")
    largest = f.let("largest", f"call i32 @llvm.smin.i32(i32 {largest}, i32 {limit})")
    least = int_text(float_bits(_LEAST_ROW))
    tiny = f.let("tiny", f"icmp slt i32 {largest}, {least}", "below 2^-48 1/step overflows")
    limit = f.let("limit", f"select i1 {tiny}, i32 0, i32 {limit}")
    pair = f"i32 {largest}, i32 {least}"
    return limit, f.let("largest", f"call i32 @llvm.smax.i32({pair})")


def _mean(module: Module, f: Function) -> str:
    zeros = dict.fromkeys(("number", "sum"), (VECTOR, "zeroinitializer"))
    end = f.index("elements", ("%count", UNIT))
    with f.loop("element", 0, end, step=LANES, carry=zeros) as loop:
        x = f.let("x", f"load {VECTOR}, ptr {f.at('%x', 'float', loop.index, 'x_at')}, align 4")
        magnitude = magnitude_of(module, f, x)
        not_zero = f.let("not_zero", f"fcmp ogt {VECTOR} {magnitude}, zeroinitializer")
        finite = f.let("finite", f"fcmp olt {VECTOR} {magnitude}, {INFINITY}", "Inf")
        counted = f.let("counted", f"and {MASK} {not_zero}, {finite}")
        for name, value in (("number", splat("float", "1.0")), ("sum", magnitude)):
            loop[name] = _add_where(f, loop[name], counted, value, name)
    total, number = (sum_lanes(module, f, loop[name], name) for name in ("sum", "number"))
    return f.let("mean", f"fdiv float {total}, {number}")


def _add_where(f: Function, total: str, mask: str, value: str, hint: str) -> str:
    kept = f.let("kept", f"select {MASK} {mask}, {VECTOR} {value}, {VECTOR} zeroinitializer")
    return f.let(hint, f"fadd {VECTOR} {total}, {kept}")


def _energy(module: Module, f: Function, form: DigitForm, usual: str) -> tuple[str, str, str]:
    """Return the usual energy, the sum of the units' squared tops, and the row's largest as bits.

    A unit's top is its largest magnitude.
    """
    module.declare(f"declare {INTS} @llvm.smax.v16i32({INTS}, {INTS})")
    carry = {
        "energy": (VECTOR, "zeroinitializer"),
        "squared_tops": ("float", "0.0"),
        "largest": ("i32", "0"),
    }
    with f.loop("unit", 0, "%count", carry=carry) as loop:
        sizes = []
        for x in _halves_of_x(f, loop.index):
            bits = f.let("bits", f"bitcast {VECTOR} {x} to {INTS}")
            size = f.let(
                "size", f"and {INTS} {bits}, {splat_int(MAGNITUDE_BITS)}", "all but the sign"
            )
            sizes.append(size)
            magnitude = f.let("magnitude", f"bitcast {INTS} {size} to {VECTOR}")
            inside = f.let("inside", f"fcmp ole {VECTOR} {magnitude}, {usual}")
            square = f.let("square", f"fmul {VECTOR} {x}, {x}")
            loop["energy"] = _add_where(f, loop["energy"], inside, square, "energy")
        f.comment("magnitudes compare like their bits as integers; Inf and NaN are the largest")
        both = f"{INTS} {sizes[0]}, {INTS} {sizes[1]}"
        larger = f.let("larger", f"call {INTS} @llvm.smax.v16i32({both})")
        top = largest_lane(module, f, larger, "top")
        unit_at = f.at("%units", "%Unit", loop.index, "unit_at")
        f.do(f"store i32 {top}, ptr {f.field_at(unit_at, form.unit, 'lift')}, align 4")
        finite = f.let("finite", f"icmp slt i32 {top}, {int_text(EXPONENT_BITS)}", "Inf")
        counted = f.let("counted", f"select i1 {finite}, i32 {top}, i32 0")
        value = f.let("top_float", f"bitcast i32 {counted} to float")
        square = f.let("square", f"fmul float {value}, {value}")
        tops = f.let("squared_tops", f"fadd float {loop['squared_tops']}, {square}")
        loop["squared_tops"] = tops
        pair = f"i32 {loop['largest']}, i32 {counted}"
        loop["largest"] = f.let("largest", f"call i32 @llvm.smax.i32({pair})")
    return sum_lanes(module, f, loop["energy"], "energy"), loop["squared_tops"], loop["largest"]


# --- a unit ---------------------------------------------------------------------------------------


def _inverse_step(f: Function, form: DigitForm, top: str) -> str:
    """Return the bits of 1/step, the largest power of two that brings `top` into the digits."""
    size = f.let("size", f"bitcast i32 {top} to float")
    most = f.let("most", f"fdiv float {float_text(LARGEST[form.digits])}, {size}")
    bits = f.let("most_bits", f"bitcast float {most} to i32")
    exponent = int_text(EXPONENT_BITS)
    return f.let("inverse_step", f"and i32 {bits}, {exponent}", "the exponent: a power of two")


def _step(
    f: Function, form: DigitForm, top: str, limit: str, largest: str, coarsest: str
) -> tuple[str, str, str]:
    """Return whether a unit is rough, its 1/step, and its lift.

    All steps are at most `_LIFTS` powers of two below the row's largest, so a unit whose elements
    are all smaller than that is rough, too.
    """
    lifts = int_text(exponent_bits(_LIFTS))
    high = f.let("high", f"icmp sgt i32 {top}, {limit}")
    least = f.let("least", f"sub i32 {largest}, {lifts}", f"2^-{_LIFTS} of it, by its exponent")
    not_zero = f.let("not_zero", f"icmp ne i32 {top}, 0")
    below = f.let("below", f"icmp slt i32 {top}, {least}")
    low = f.let("low", f"and i1 {not_zero}, {below}")
    rough = f.let("rough", f"or i1 {high}, {low}")
    held = f.let("held", f"call i32 @llvm.smax.i32(i32 {top}, i32 {least})")
    held = f.let("held", f"call i32 @llvm.smin.i32(i32 {held}, i32 {largest})")
    inverse_bits = _inverse_step(f, form, held)
    inverse = f.let("inverse", f"bitcast i32 {inverse_bits} to float")
    depth = f.let("depth", f"sub i32 {inverse_bits}, {coarsest}")
    lift = f.let("lift", f"sub i32 {lifts}, {depth}")
    return rough, inverse, f.let("lift", f"select i1 {rough}, i32 0, i32 {lift}")


def _integers(
    module: Module, f: Function, form: DigitForm, x: str, inverse: str, rough: str
) -> str:
    """Return 16 integers X = x / step; 0 in a rough unit."""
    module.declare(f"declare {VECTOR} @llvm.rint.v16f32({VECTOR})")
    scaled = f.let("scaled", f"fmul {VECTOR} {x}, {broadcast(f, 'float', inverse)}")
    if form.balanced:
        number = f.let("X", f"call {INTS} {_add_balance(module)}({VECTOR} {scaled})")
    else:
        whole = f.let("whole", f"call {VECTOR} @llvm.rint.v16f32({VECTOR} {scaled})")
        number = f.let("X", f"fptosi {VECTOR} {whole} to {INTS}")
    return f.let("X", f"select i1 {rough}, {INTS} zeroinitializer, {INTS} {number}")


def _add_balance(module: Module) -> str:
    """Add the function from 16 numbers to integers whose sum is nearest to theirs; return its name.

    Where minima outweigh scales, all weights of a sub-block are about the same: a product errs by
    that weight times the sum of the rounding errors, in every column, and a sum of errors may be
    far above its rms. So it is kept at 1/2 at most: of the numbers that were rounded down (or up),
    those nearest to the other integer are rounded to that one, as many as it takes.
    """
    name = "round_balanced"
    if module.knows(name):
        return f"@{name}"
    f = Function(
        f"internal {INTS} @{name}({VECTOR} %scaled) #0",
        "Integers near 16 numbers: each is off by less than 1, and their sum by at most 1/2.",
    )
    module.declare("declare float @llvm.rint.f32(float)")
    module.declare("declare float @llvm.copysign.f32(float, float)")
    module.declare("declare float @llvm.fabs.f32(float)")
    whole = f.let("whole", f"call {VECTOR} @llvm.rint.v16f32({VECTOR} %scaled)")
    lost = f.let("lost", f"fsub {VECTOR} %scaled, {whole}")
    total = sum_lanes(module, f, lost, "total_lost")
    count = f.let("count", f"call float @llvm.rint.f32(float {total})")
    sign = f.let("sign", f"call float @llvm.copysign.f32(float 1.0, float {total})")
    signs = broadcast(f, "float", sign)
    f.comment("rank the lanes by what rounding takes from them; equal ones by their numbers")
    toward = f.let("toward", f"fmul {VECTOR} {lost}, {signs}")
    ties = ", ".join(f"float {float_text(lane * _TIE)}" for lane in range(LANES))
    key = f.let("key", f"fadd {VECTOR} {toward}, <{ties}>")
    rank = "zeroinitializer"
    for step in range(1, LANES):
        order = ", ".join(f"i32 {(lane + step) % LANES}" for lane in range(LANES))
        other = f.let(
            "other", f"shufflevector {VECTOR} {key}, {VECTOR} poison, <{LANES} x i32> <{order}>"
        )
        before = f.let("before", f"fcmp ogt {VECTOR} {other}, {key}")
        one = f.let("one", f"zext {MASK} {before} to {INTS}")
        rank = f.let("rank", f"add {INTS} {rank}, {one}")
    size = f.let("size", f"call float @llvm.fabs.f32(float {count})")
    size = f.let("size", f"fptosi float {size} to i32")
    chosen = f.let("chosen", f"icmp slt {INTS} {rank}, {broadcast(f, 'i32', size)}")
    more = f.let("more", f"select {MASK} {chosen}, {VECTOR} {signs}, {VECTOR} zeroinitializer")
    whole = f.let("whole", f"fadd {VECTOR} {whole}, {more}")
    f.do(f"ret {INTS} {f.let('X', f'fptosi {VECTOR} {whole} to {INTS}')}")
    module.add(name, f)
    return f"@{name}"


def _store_header(f: Function, form: DigitForm, unit_at: str, lift: str, halves: list[str]) -> None:
    """Store the sums of a unit."""
    total, of_halves = _store_sums(f, form, unit_at, halves, "whole_sum", "half_sums")
    if form.top_sums and form.digits > 1:
        narrow = [_digit(f, form, X, 0) for X in halves]
        top = [f.let("top_digit", f"sext <16 x i8> {digit} to {INTS}") for digit in narrow]
        of_top, _ = _store_sums(f, form, unit_at, top, "top_sum", "top_half_sums")
        if form.float_sums and form.digits > 1:
            high = f.let("high_sum", f"shl i32 {of_top}, {DIGIT_BITS * (form.digits - 1)}")
            low = f.let("low_sum", f"sub i32 {total}, {high}")
            value = f.let("float_sum", f"sitofp i32 {low} to float", "exact: 21 bits")
            at = f.field_at(unit_at, form.unit, "low_sum")
            f.do(f"store float {value}, ptr {at}, align 4")
    if form.float_sums and form.digits == 1:
        number = f.let("float_sum", f"sitofp i32 {total} to float")
        one = int_text(exponent_bits(EXPONENT_BIAS))
        power = f.let("power_bits", f"add i32 {lift}, {one}", "2^lift: the bits of 1.0 and more")
        factor = f.let("power", f"bitcast i32 {power} to float")
        value = f.let("sum", f"fmul float {number}, {factor}")
        f.do(f"store float {value}, ptr {f.field_at(unit_at, form.unit, 'sum')}, align 4")
        for half, of_half in enumerate(of_halves):
            number = f.let("float_sum", f"sitofp i32 {of_half} to float")
            value = f.let("sum", f"fmul float {number}, {factor}")
            at = f.field_at(unit_at, form.unit, "scaled_half_sums", half)
            f.do(f"store float {value}, ptr {at}, align 4")


def _store_sums(
    f: Function, form: DigitForm, unit_at: str, halves: list[str], name: str, halves_name: str
) -> tuple[str, list[str]]:
    """Store the sum times the form's factor, and those of halves if it asks for them.

    Returns the sum and those of halves, without a factor.
    """

    def reduce(value: str) -> str:
        return f.let("sum", f"call i32 @llvm.vector.reduce.add.v16i32({INTS} {value})")

    def store(total: str, field: str, *index: int) -> None:
        stored = f.let("stored_sum", f"mul i32 {total}, {-1 << form.sums_log2}")
        f.do(f"store i32 {stored}, ptr {f.field_at(unit_at, form.unit, field, *index)}, align 4")

    sums: list[str] = []
    if form.half_sums:
        sums = [reduce(value) for value in halves]
        for half, one in enumerate(sums):
            store(one, halves_name, half)
        total = f.let("sum", f"add i32 {sums[0]}, {sums[1]}")
    else:
        total = reduce(f.let("both_halves", f"add {INTS} {halves[0]}, {halves[1]}"))
    store(total, name)
    return total, sums


def _store_digits(f: Function, form: DigitForm, unit_at: str, halves: list[str]) -> None:
    if form.digits > 1:
        f.comment("adding 128 to each digit carries above 127; flipping the sign bit takes 128 off")
    for number in range(form.digits):
        for half, X in enumerate(halves):
            digit = _digit(f, form, X, number)
            at = f.field_at(unit_at, form.unit, "digits", number, LANES * half)
            f.do(f"store <16 x i8> {digit}, ptr {at}, align 16")


def _digit(f: Function, form: DigitForm, X: str, number: int) -> str:
    """Return a digit of X as int8, by its number from the highest.

    Adding 128 to each digit carries into the next one where a digit is above 127; flipping the sign
    bit takes the 128 off again.
    """
    if form.digits == 1:
        return f.let("digit", f"trunc {INTS} {X} to <16 x i8>")
    carried = f.let("carried", f"add {INTS} {X}, {splat_int(_CARRY)}")
    bits = shift_right(f, carried, str(DIGIT_BITS * (form.digits - 1 - number)))
    low = f.let("low_byte", f"trunc {INTS} {bits} to <16 x i8>")
    return f.let("digit", f"xor <16 x i8> {low}, {splat('i8', str(_DIGIT_SIGN))}", "less the 128")
