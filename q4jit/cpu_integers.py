"""Integer products in LLVM IR: x as digits of int8, weights as the quants that they are.

Each unit of 32 elements of x becomes integers X = x / step, the step a power of two, and each X one
digit (`i8`) or three (`f32`: 24 bits, digits of base 256 from −128 to 127, the highest first). An
instruction multiplies four quants with four digits in each lane; a sub-block's sum is exact. What a
step has in its exponent is added to that of the weight's scale, so scaling costs no multiplication.

A row of x is a run of units, then the list of those that digits cannot hold: their elements are not
finite or too large or small, or most of them are small beside the largest. Their digits are zero,
and multiply-adds of floats come after all others. A unit:

     0 i32 step's exponent + STEP_BIAS, where a float has it     4 f32 sum of X·step·2^STEP_BIAS
     8 i32 −8·sum of X of the first and of the second 16        16 i32 the same of the highest digit
    24 i32 −8·sum of all X                                      28 i32 the same of the highest digit
    32 i8  the highest digit of 32 elements                     64 i8  the next digit, 96 the last

The list: i32 number of units, i32 each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from q4jit.cpu_fields import CHUNK, WORD, Fields, PlaneAt, add_scaled, prefetch, shift_right
from q4jit.cpu_products import walk_sub_block
from q4jit.formats import Format
from q4jit.layouts import LANES, Interleaved
from q4jit.llvm_text import (
    INTS,
    MASK,
    VECTOR,
    Function,
    Loop,
    Module,
    float_text,
    splat,
    splat_value,
)
from q4jit.schedule_cpu import HEADER_BYTES, UNIT, Dot, unit_bytes, zero_of

# The largest X: three digits of at most 127, or one. A product of 32 quants of 4 bits fits int32.
_LARGEST: Final = {1: 127.0, 3: 8355700.0}
STEP_BIAS: Final = 50  # the smallest step is 2^-50
# The largest element of a unit: steps are 2^-50 to 2^20 or 2^10, and sums of products stay finite.
_HIGHEST: Final = {1: 2.0**26, 3: 2.0**32}
_LOWEST: Final = {1: 2.0**-43, 3: 2.0**-27}
# A scale of 0 has no exponent: with a step's it counts as 2^-127. What such blocks sum up to stays
# below this (K up to 2^16). Other sums cannot: f16 scales are multiples of 2^-24, steps of 2^-50.
_LEAST: Final = 2.0**-75
# A unit is left to floats where more than so many elements are below such a part of the largest: a
# column may have zeros where the few large ones are, and must then be as exact as promised.
_SMALL: Final = {1: 16, 3: 8}
_SMALL_PART_LOG2: Final = {1: 4, 3: 5}

_EXPONENT_AT, _SUM_AT, _HALVES_AT, _TOP_HALVES_AT, _WHOLE_AT, _TOP_AT = 0, 4, 8, 16, 24, 28
_SUM_FACTOR_LOG2: Final = 3  # sums of X are kept times −8: each format's zero is a multiple of 8
_DIGIT_BITS: Final = 8
# accumulators that keep the dot products busy; fewer rows have one for each digit or each chunk
_CHAINS: Final = 8
_BYTES: Final = "<64 x i8>"
_INTRINSICS: Final = {  # by instruction and lanes
    ("vpdpbusd", 16): "llvm.x86.avx512.vpdpbusd.512",
    ("vpdpbusd", 8): "llvm.x86.avx512.vpdpbusd.256",
    ("vpmaddubsw", 8): "llvm.x86.avx2.pmadd.ub.sw",
    ("sdot", 4): "llvm.aarch64.neon.sdot.v4i32.v16i8",
}
_SIXTEEN_BITS: Final = "<32 x i16>"


# --- x ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """What products need of x: how many digits, and which sums beside that of all X."""

    limbs: int
    halves: bool
    top: bool
    floats: bool


def digits_for(formats: Sequence[Format], dot: Dot, limbs: int) -> Digits:
    """The form of x that serves products with weights of these formats."""
    return Digits(
        limbs,
        any(fmt.scale_elements < UNIT for fmt in formats),
        any(not _fits(fmt, dot, limbs) for fmt in formats),
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
    with f.loop("unit", 0, "%count", carry={"rough": ("i64", "0")}) as loop:
        x_at = f.at("%x", "float", f.index("x_off", (loop.index, UNIT)), "x_at")
        unit = f.at("%units", "i8", f.index("unit_off", (loop.index, size)), "unit_at")
        x = [
            f.let("x", f"load {VECTOR}, ptr {f.at(x_at, 'float', half * LANES)}, align 4")
            for half in range(2)
        ]
        top, rough = _inspect(module, f, form, x)
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


def _inspect(module: Module, f: Function, form: Digits, x: list[str]) -> tuple[str, str]:
    """The bits of the largest magnitude, and whether the unit is left to floats."""
    module.declare(f"declare {INTS} @llvm.smax.v16i32({INTS}, {INTS})")
    f.comment("magnitudes compare as integers do, and Inf and NaN are the largest")
    sizes = []
    for v in x:
        bits = f.let("bits", f"bitcast {VECTOR} {v} to {INTS}")
        sizes.append(f.let("size", f"and {INTS} {bits}, {splat('i32', str(0x7FFFFFFF))}"))
    larger = f.let("larger", f"call {INTS} @llvm.smax.v16i32({INTS} {sizes[0]}, {INTS} {sizes[1]})")
    top = f.let("top", f"call i32 @llvm.vector.reduce.smax.v16i32({INTS} {larger})")
    high = f.let("high", f"icmp sgt i32 {top}, {_bits_of(_HIGHEST[form.limbs])}")
    low = f.let("low", f"icmp slt i32 {top}, {_bits_of(_LOWEST[form.limbs])}")
    some = f.let("some", f"icmp ne i32 {top}, 0")
    tiny = f.let("tiny", f"and i1 {low}, {some}")
    part = f.let("part", f"sub i32 {top}, {_SMALL_PART_LOG2[form.limbs] << 23}")
    small = _count_below(module, f, sizes, part)
    many = f.let("many", f"icmp ugt i16 {small}, {_SMALL[form.limbs]}")
    outside = f.let("outside", f"or i1 {high}, {tiny}")
    return top, f.let("is_rough", f"or i1 {outside}, {many}")


def _count_below(module: Module, f: Function, sizes: list[str], limit: str) -> str:
    """How many elements are below a limit, but not zero."""
    module.declare("declare i16 @llvm.ctpop.i16(i16)")
    limits = splat_value(f, "i32", limit)
    counts = []
    for size in sizes:
        below = f.let("below", f"icmp slt {INTS} {size}, {limits}")
        some = f.let("some", f"icmp ne {INTS} {size}, zeroinitializer")
        both = f.let("both", f"and {MASK} {below}, {some}")
        mask = f.let("mask", f"bitcast {MASK} {both} to i16")
        counts.append(f.let("small", f"call i16 @llvm.ctpop.i16(i16 {mask})"))
    return f.let("small", f"add i16 {counts[0]}, {counts[1]}")


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
    total = _store_sums(f, unit, whole, _WHOLE_AT, _HALVES_AT if form.halves else None)
    if form.top:
        top = [_digit(f, form, v, 0) for v in whole]
        wide = [f.let("wide", f"sext <16 x i8> {v} to {INTS}") for v in top]
        _store_sums(f, unit, wide, _TOP_AT, _TOP_HALVES_AT if form.halves else None)
    if form.floats:
        number = f.let("number", f"sitofp i32 {total} to float")
        power = f.let("power", f"add i32 {exponent}, {127 << 23}")
        step = f.let("step", f"bitcast i32 {power} to float")
        value = f.let("value", f"fmul float {number}, {step}")
        f.do(f"store float {value}, ptr {f.at(unit, 'i8', _SUM_AT)}, align 4")


def _store_sums(f: Function, unit: str, v: list[str], at: int, halves_at: int | None) -> str:
    """Store −8 times the sum, and that of each half where asked for; returns the sum."""

    def reduce(value: str) -> str:
        return f.let("sum", f"call i32 @llvm.vector.reduce.add.v16i32({INTS} {value})")

    def store(total: str, where: int) -> None:
        many = f.let("many", f"mul i32 {total}, {-1 << _SUM_FACTOR_LOG2}")
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
    bits = shift_right(f, carried, str(_DIGIT_BITS * (form.limbs - 1 - limb)))
    low = f.let("low", f"trunc {INTS} {bits} to <16 x i8>")
    return f.let("digit", f"xor <16 x i8> {low}, {splat('i8', '-128')}")


# --- products -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntegerProduct:
    """16 columns of each of `groups` groups of a weight times `rows` rows of x in digits.

    x_stride: floats between rows of x. units_stride: bytes between rows of digits.
    """

    weight: Interleaved
    dot: Dot
    limbs: int
    rows: int
    groups: int
    x_stride: int
    units_stride: int

    @property
    def name(self) -> str:
        """The function's name."""
        w = self.weight
        tile = f"rows{self.rows}" + (f"_groups{self.groups}" if self.groups > 1 else "")
        return f"{w.fmt.name.lower()}_k{w.k}_{tile}_digits{self.limbs}"


def add_integer_product(module: Module, product: IntegerProduct) -> str:
    """Add the function `void (ptr x, ptr units, ptr w0, …, ptr tile)` and return its name.

    x: f32 rows; units: the same rows in digits; w0, …: groups of 16 columns; tile: f32
    [groups, rows, 16], overwritten.
    """
    if not module.knows(product.name):
        weights = ", ".join(f"ptr noalias %w{g}" for g in range(product.groups))
        rows = "1 row" if product.rows == 1 else f"{product.rows} rows"
        weight = product.weight
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %units, {weights}, "
            "ptr noalias %tile) #0",
            f"{LANES * product.groups} columns of {weight.fmt.name}, one a lane, times {rows} of x"
            f" in {product.limbs} digit(s) of int8; K = {weight.k}.\n"
            f"{product.dot.instruction} multiplies four quants with four digits in each lane.",
        )
        _ProductWriter(module, f, product).write()
        module.add(product.name, f)
    return f"@{product.name}"


def _fits(fmt: Format, dot: Dot, limbs: int) -> bool:
    """Whether the exact sum of a sub-block with all digits of X fits int32."""
    bits = max(plane.bits + plane.lshift for plane in fmt.planes)
    zero = 1 << bits - 1 if fmt.signed else fmt.zero
    most = max(zero, (1 << bits) - 1 - zero)
    return fmt.scale_elements * most * _LARGEST[limbs] < 1 << 31


class _ProductWriter:
    def __init__(self, module: Module, f: Function, product: IntegerProduct) -> None:
        self._module, self._f, self._product = module, f, product
        self._weight, self._fmt = product.weight, product.weight.fmt
        self._dot = _DotWriter(module, product.dot)
        self._zero = zero_of(self._fmt, product.dot)
        limbs = range(product.limbs)
        # digits that one int32 sums; the highest apart where all would overflow
        together = _fits(self._fmt, product.dot, product.limbs)
        self._sums = [list(limbs)] if together else [[0], list(limbs[1:])]
        self._tile = [(g, r) for g in range(product.groups) for r in range(product.rows)]

    def write(self) -> None:
        f, weight, product = self._f, self._weight, self._product
        names = [_total(g, r) for g, r in self._tile]
        zeros = dict.fromkeys(names, (VECTOR, "zeroinitializer"))
        block_units = weight.block_elements // UNIT
        with f.loop("tile", 0, weight.tiles, carry=zeros) as tile:
            offset = f.index("offset", (tile.index, weight.tile_bytes))
            tiles_at = [f.at(f"%w{g}", "i8", offset, "tile_at") for g in range(product.groups)]
            outer = {n: (VECTOR, tile[n]) for n in names}
            with f.loop(
                "block", 0, weight.blocks_per_tile, carry=outer, unroll=product.groups == 1
            ) as block:
                fields = [Fields(self._module, f, weight, at, block.index) for at in tiles_at]
                first = f.index(
                    "unit",
                    (tile.index, weight.blocks_per_tile * block_units),
                    (block.index, block_units),
                )
                self._block(fields, first, block)
            tile.values = dict(block.values)
        for i, (g, r) in enumerate(self._tile):
            at = f.at("%tile", VECTOR, i, "tile_row")
            f.do(f"store {VECTOR} {tile[_total(g, r)]}, ptr {at}, align 64")
        self._finish()
        f.do("ret void")

    def _block(self, fields: list[Fields], first: str, block: Loop) -> None:
        """Add the sub-blocks of a block, whose first unit of x is `first`."""
        f, fmt, product = self._f, self._fmt, self._product
        ds, ms = ([each.halves(name) for each in fields] for name in ("d", "m"))
        subs = self._weight.block_elements // fmt.scale_elements
        inner = {n: (VECTOR, v) for n, v in block.values.items()}
        per_unit = UNIT // fmt.scale_elements
        with f.loop("sub", 0, subs, carry=inner) as sub:
            if product.groups == 1:  # more rows than one group's find their weights in cache
                sparse = product.rows * product.limbs == 1
                for each in fields:
                    place = (each.tile_at, block.index, sub.index)
                    prefetch(self._module, f, self._weight, *place, sparse)
            unit, half = f.index("unit", (first, 1), (sub.index, 1)), "0"
            if per_unit > 1:
                within = f.let("within", f"udiv i64 {sub.index}, {per_unit}")
                unit = f.index("unit", (first, 1), (within, 1))
                half = f.let("half", f"urem i64 {sub.index}, {per_unit}")
            at = f.at("%units", "i8", f.index("at", (unit, unit_bytes(product.limbs))), "unit_at")
            units = [
                f.at(at, "i8", r * product.units_stride, "unit_at") for r in range(product.rows)
            ]
            sums = self._sub_block(fields, sub.index, units, half)
            scales = [e.scale(d, sub.index) for e, d in zip(fields, ds, strict=True)]
            f.comment("a step is a power of two: its exponent goes to the scale")
            for g, scale in enumerate(scales):
                self._add(sub, g, scale, ms[g], units, sums)
        block.values = dict(sub.values)

    def _add(
        self,
        sub: Loop,
        g: int,
        scale: str | None,
        m: str | None,
        units: list[str],
        sums: dict[tuple[int, int], str],
    ) -> None:
        """Add the scaled sums of group g, and what m adds to each weight."""
        f = self._f
        bits = f.let("d_bits", f"bitcast {VECTOR} {scale} to {INTS}")
        for r, unit in enumerate(units):
            exponent = splat_value(f, "i32", self._word(unit, _EXPONENT_AT))
            up = f.let("up", f"add {INTS} {bits}, {exponent}")
            step = f.let("d_step", f"bitcast {INTS} {up} to {VECTOR}")
            name = _total(g, r)
            sub[name] = add_scaled(self._module, f, name, sub[name], step, sums[g, r])
            if m is not None:
                x_sum = f.let("x_sum", f"load float, ptr {f.at(unit, 'i8', _SUM_AT)}, align 4")
                x_sums = splat_value(f, "float", x_sum)
                sub[name] = add_scaled(self._module, f, name, sub[name], m, x_sums)

    def _word(self, unit: str, at: int | str) -> str:
        return self._f.let("word", f"load i32, ptr {self._f.at(unit, 'i8', at)}, align 4")

    # --- one sub-block ----------------------------------------------------------------------------

    def _sub_block(
        self, fields: list[Fields], sub: str, units: list[str], half: str
    ) -> dict[tuple[int, int], str]:
        """The exact sums of a sub-block as floats, before any scale."""
        f, product = self._f, self._product
        chunks = range(self._fmt.scale_elements // CHUNK)
        by_limb = product.limbs > 1 and len(self._tile) < _CHAINS
        by_chunk = len(self._tile) * (product.limbs if by_limb else 1) < _CHAINS
        found: dict[tuple[int, int], list[str]] = {place: [] for place in self._tile}
        for limbs in self._sums:
            totals: dict[tuple[int, int], str] = {}
            passes = [limbs] if by_limb or len(limbs) == 1 else [[limb] for limb in limbs]
            chains = self._first(units, half, limbs)
            for now in passes:
                if now[0] != limbs[0]:
                    chains = {n: self._dot.times_256(f, v) for n, v in chains.items()}
                for c in chunks:
                    self._multiply(fields, sub, units, half, now, c, by_limb, by_chunk, chains)
            for g, r in self._tile:
                totals[g, r] = self._collect(chains, g, r, limbs if by_limb else [0])
                if not self._begins_without_zero(limbs):
                    zeros = self._zeros(units[r], half, limbs)
                    totals[g, r] = (
                        f.let("total", f"add {INTS} {totals[g, r]}, {zeros}")
                        if zeros
                        else totals[g, r]
                    )
                found[g, r].append(f.let("sum", f"sitofp {INTS} {totals[g, r]} to {VECTOR}"))
        return {place: self._joined(sums) for place, sums in found.items()}

    def _multiply(
        self,
        fields: list[Fields],
        sub: str,
        units: list[str],
        half: str,
        limbs: list[int],
        chunk: int,
        by_limb: bool,
        by_chunk: bool,
        chains: dict[str, str],
    ) -> None:
        """Multiply digits `limbs` of a chunk of 16 elements; `chains` are the sums so far."""
        f, chunks = self._f, self._fmt.scale_elements // CHUNK
        number = f.index("number", (sub, chunks), (chunk, 1))
        planes = [each.planes(number) for each in fields]
        names = {
            (g, r, limb): f"s{g}.{r}.{limb if by_limb else 0}.{chunk if by_chunk else 0}"
            for g, r in self._tile
            for limb in limbs
        }
        carry = {n: (self._dot.sums, chains.get(n, "zeroinitializer")) for n in names.values()}
        with f.loop("word", 0, CHUNK // WORD, carry=carry, unroll=True) as word:
            quants = [
                self._quants(each, at, word.index) for each, at in zip(fields, planes, strict=True)
            ]
            for limb in limbs:
                at = f.index(
                    "x_at",
                    (half, CHUNK),
                    (word.index, WORD),
                    (HEADER_BYTES + limb * UNIT + chunk * CHUNK, 1),
                )
                for r, unit in enumerate(units):
                    x = splat_value(f, "i32", self._word(unit, at))
                    for g, q in enumerate(quants):
                        name = names[g, r, limb]
                        word[name] = self._dot.add(f, word[name], q, x)
        chains.update(word.values)

    def _quants(self, fields: Fields, planes: list[PlaneAt], word: str) -> str:
        """Four elements of 16 columns, a byte each."""
        f, q = self._f, ""
        for plane, place in zip(self._fmt.planes, planes, strict=True):
            at = f.at(place.address, INTS, word, "word_at")
            bits = f.let("bits", f"load {INTS}, ptr {at}, align 32")
            if plane.bits < 8:
                bits = shift_right(f, bits, place.shift)
                mask = ((1 << plane.bits) - 1) * 0x01010101
                bits = f.let("field", f"and {INTS} {bits}, {splat('i32', str(mask))}")
            if plane.lshift:
                bits = f.let("field", f"shl {INTS} {bits}, {splat('i32', str(plane.lshift))}")
            q = f.let("q", f"or {INTS} {q}, {bits}") if q else bits
        if self._fmt.signed and not self._product.dot.signed:
            q = f.let("q", f"xor {INTS} {q}, {splat('i32', str(-0x7F7F7F80))}")
        return q

    def _collect(self, chains: dict[str, str], g: int, r: int, limbs: Sequence[int]) -> str:
        """The sum of the chains of one place of the tile."""
        f, total = self._f, ""
        for limb in limbs:
            if total:
                total = f.let("up", f"shl {INTS} {total}, {splat('i32', str(_DIGIT_BITS))}")
            for name in (n for n in chains if n.startswith(f"s{g}.{r}.{limb}.")):
                part = self._dot.total(f, chains[name])
                total = f.let("total", f"add {INTS} {total}, {part}") if total else part
        return total

    def _begins_without_zero(self, limbs: list[int]) -> bool:
        """Whether chains start at what the quants' zero adds: a load, not an addition."""
        return len(limbs) == 1 and not self._product.dot.pairs

    def _first(self, units: list[str], half: str, limbs: list[int]) -> dict[str, str]:
        """What chains start with, unless it is 0."""
        if not self._zero or not self._begins_without_zero(limbs):
            return {}
        zeros = [self._zeros(unit, half, limbs) for unit in units]
        return {f"s{g}.{r}.{limbs[0]}.0": zeros[r] for g, r in self._tile}

    def _zeros(self, unit: str, half: str, limbs: list[int]) -> str:
        """What takes off the zero of quants in the sum of digits `limbs`; empty where it is 0."""
        if not self._zero:
            return ""
        f = self._f
        word = self._sum_of_x(unit, half, top=limbs == [0] and self._product.limbs > 1)
        if limbs[0] > 0:  # all digits but the highest
            top = self._sum_of_x(unit, half, top=True)
            high = f.let("high", f"shl i32 {top}, {_DIGIT_BITS * len(limbs)}")
            word = f.let("low", f"sub i32 {word}, {high}")
        if self._zero != 1 << _SUM_FACTOR_LOG2:
            word = f.let("word", f"mul i32 {word}, {self._zero >> _SUM_FACTOR_LOG2}")
        return splat_value(f, "i32", word)

    def _sum_of_x(self, unit: str, half: str, top: bool) -> str:
        """−8 times the sum of X, or of its highest digit, in a sub-block."""
        if self._fmt.scale_elements == UNIT:
            return self._word(unit, _TOP_AT if top else _WHOLE_AT)
        first = _TOP_HALVES_AT if top else _HALVES_AT
        return self._word(unit, self._f.index("sum_at", (half, 4), (first, 1)))

    def _joined(self, sums: list[str]) -> str:
        """The sum with all digits: the highest apart stands 2^16 above the others."""
        if len(sums) == 1:
            return sums[0]
        high, low = sums
        return add_scaled(
            self._module, self._f, "sum", low, splat("float", float_text(2.0**16)), high
        )

    # --- behind the last block --------------------------------------------------------------------

    def _finish(self) -> None:
        """Bring the tile to its scale, and add the units that digits could not hold."""
        f, product = self._f, self._product
        units = self._weight.padded_k // UNIT
        rough = _add_rough(self._module, self._weight)
        list_off = product.x_stride // UNIT * unit_bytes(product.limbs)
        assert units * UNIT <= product.x_stride
        down = splat("float", float_text(2.0**-STEP_BIAS))
        least = splat("float", float_text(_LEAST))
        self._module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
        f.comment(f"steps were kept times 2^{STEP_BIAS}; what only scales of 0 have left is 0")
        with f.loop("r", 0, product.rows) as row:
            tiles = [
                f.at("%tile", VECTOR, f.index("i", (row.index, 1), (g * product.rows, 1)), "row_at")
                for g in range(product.groups)
            ]
            for at in tiles:
                value = f.let("value", f"load {VECTOR}, ptr {at}, align 64")
                scaled = f.let("scaled", f"fmul {VECTOR} {value}, {down}")
                size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {scaled})")
                some = f.let("some", f"fcmp oge {VECTOR} {size}, {least}")
                kept = f.let(
                    "kept", f"select {MASK} {some}, {VECTOR} {scaled}, {VECTOR} zeroinitializer"
                )
                f.do(f"store {VECTOR} {kept}, ptr {at}, align 64")
            offset = f.index("list_off", (row.index, product.units_stride), (list_off, 1))
            list_at = f.at("%units", "i8", offset, "list")
            count = f.let("count", f"load i32, ptr {list_at}, align 4")
            none = f.let("none", f"icmp eq i32 {count}, 0")
            some, done = f.fresh("some"), f.fresh("next")
            f.do(f"br i1 {none}, label %{done}, label %{some}")
            f.label(some)
            x = f.at("%x", "float", f.index("x_off", (row.index, product.x_stride)), "x_row")
            for g, at in enumerate(tiles):
                f.do(f"call void {rough}(ptr {x}, ptr {list_at}, ptr %w{g}, ptr {at})")
            f.do(f"br label %{done}")
            f.label(done)


def _total(g: int, r: int) -> str:
    return f"acc{g}.{r}"


def _add_rough(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr x, ptr list, ptr w, ptr sums)` and return its name."""
    name = f"{weight.fmt.name.lower()}_k{weight.k}_rough"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %x, ptr noalias %list, ptr noalias %w, "
            "ptr noalias %sums) #0",
            "16 columns times the listed units of a row of x, in floats, added to 16 sums.",
        )
        _write_rough(module, f, weight)
        module.add(name, f)
    return f"@{name}"


def _write_rough(module: Module, f: Function, weight: Interleaved) -> None:
    fmt = weight.fmt
    total = f.let("total", f"load {VECTOR}, ptr %sums, align 64")
    count32 = f.let("count32", "load i32, ptr %list, align 4")
    count = f.let("count", f"sext i32 {count32} to i64")
    end = f.index("end", (count, 1), (1, 1))
    # another weight that meets this x may have a longer K
    last = weight.padded_k // UNIT
    with f.loop("entry", 1, end, carry={"total": (VECTOR, total)}) as entry:
        unit32 = f.let("unit32", f"load i32, ptr {f.at('%list', 'i32', entry.index)}, align 4")
        unit = f.let("unit", f"sext i32 {unit32} to i64")
        inside = f.let("inside", f"icmp slt i64 {unit}, {last}")
        stop = f.let("stop", f"select i1 {inside}, i64 1, i64 0")
        per_block = weight.block_elements // UNIT
        number = f.let("number", f"udiv i64 {unit}, {per_block}") if per_block > 1 else unit
        within = f.let("within", f"urem i64 {unit}, {per_block}") if per_block > 1 else "0"
        per_tile = weight.blocks_per_tile
        tile = f.let("tile", f"udiv i64 {number}, {per_tile}") if per_tile > 1 else number
        block = f.let("block", f"urem i64 {number}, {per_tile}") if per_tile > 1 else "0"
        with f.loop("once", 0, stop, carry={"total": (VECTOR, entry["total"])}) as once:
            tile_at = f.at("%w", "i8", f.index("w_off", (tile, weight.tile_bytes)), "tile_at")
            fields = Fields(module, f, weight, tile_at, block)
            d, m = fields.halves("d"), fields.halves("m")
            subs = UNIT // fmt.scale_elements
            inner = {"total": (VECTOR, once["total"])}
            with f.loop("sub", 0, subs, carry=inner) as sub:
                here = f.index("sub_number", (within, subs), (sub.index, 1))
                scale = fields.scale(d, here)
                first = f.index("k", (number, weight.block_elements))

                def element(k: str, byte: int, value: str, parts: Loop) -> None:
                    at = f.at("%x", "float", f.index("k", (k, 1), (byte, 1)), "xk")
                    x = splat_value(f, "float", f.let("x0", f"load float, ptr {at}, align 4"))
                    parts["part"] = add_scaled(module, f, "part", parts["part"], x, value)

                decode = (scale, m) if m is not None else None
                parts = walk_sub_block(
                    f, fields, first, here, decode, {"part": "zeroinitializer"}, element
                )
                late = None if decode else scale
                sub["total"] = add_scaled(module, f, "total", sub["total"], late, parts["part"])
            once.values = dict(sub.values)
        entry.values = dict(once.values)
    f.do(f"store {VECTOR} {entry['total']}, ptr %sums, align 64")
    f.do("ret void")


# --- the instruction ------------------------------------------------------------------------------


class _DotWriter:
    """A dot product of bytes in each of 16 lanes, as an instruction set has it."""

    def __init__(self, module: Module, dot: Dot) -> None:
        self._module, self._dot = module, dot
        self.sums = _SIXTEEN_BITS if dot.pairs else INTS

    def add(self, f: Function, total: str, quants: str, x: str) -> str:
        """A chain's sum with four more products a lane."""
        kind = self.sums
        return f.let(
            "s", f"call {kind} {self._function()}({kind} {total}, {INTS} {quants}, {INTS} {x})"
        )

    def times_256(self, f: Function, total: str) -> str:
        """A chain's sum where the next digit is added to it."""
        return f.let("up", f"shl {INTS} {total}, {splat('i32', str(_DIGIT_BITS))}")

    def total(self, f: Function, chain: str) -> str:
        """What a chain has found, in 32 bits."""
        if not self._dot.pairs:
            return chain
        even = f.let("even", f"bitcast {_SIXTEEN_BITS} {chain} to {INTS}")
        top = f.let("top", f"ashr {INTS} {even}, {splat('i32', '16')}")
        low = f.let("low", f"shl {INTS} {even}, {splat('i32', '16')}")
        low = f.let("low", f"ashr {INTS} {low}, {splat('i32', '16')}")
        return f.let("total", f"add {INTS} {top}, {low}")

    def _function(self) -> str:
        name = "dot4"
        if not self._module.knows(name):
            f = Function(
                f"internal {self.sums} @{name}({self.sums} %sum, {INTS} %quants, {INTS} %x) #1",
                f"{self._dot.instruction}: four products of bytes in each of 16 lanes.",
            )
            self._write(f)
            self._module.add(name, f)
        return f"@{name}"

    def _write(self, f: Function) -> None:
        dot, lanes = self._dot, self._dot.lanes
        count = LANES // lanes
        intrinsic = _INTRINSICS[dot.instruction, lanes]
        source = f"<{2 * lanes} x i16>" if dot.pairs else f"<{lanes} x i32>"
        piece = f"<{4 * lanes} x i8>"
        q = f.let("q8", f"bitcast {INTS} %quants to {_BYTES}")
        x = f.let("x8", f"bitcast {INTS} %x to {_BYTES}")
        found = []
        for i in range(count):
            qs, xs = (self._part(f, _BYTES, v, i, 4 * lanes) for v in (q, x))
            if dot.pairs:
                self._module.declare(f"declare {source} @{intrinsic}({piece}, {piece})")
                found.append(
                    f.let("pairs", f"call {source} @{intrinsic}({piece} {qs}, {piece} {xs})")
                )
                continue
            total = self._part(f, INTS, "%sum", i, lanes)
            operands = f"{source}, {piece}, {piece}"
            self._module.declare(f"declare {source} @{intrinsic}({operands})")
            found.append(
                f.let(
                    "s",
                    f"call {source} @{intrinsic}({source} {total}, {piece} {qs}, {piece} {xs})",
                )
            )
        result = self._joined(f, found, source)
        if dot.pairs:
            result = f.let("s", f"add {self.sums} %sum, {result}")
        f.do(f"ret {self.sums} {result}")

    def _part(self, f: Function, kind: str, value: str, i: int, count: int) -> str:
        """Elements i·count, … of a vector."""
        if self._dot.lanes == LANES:
            return value
        places = ", ".join(f"i32 {i * count + j}" for j in range(count))
        return f.let(
            "part", f"shufflevector {kind} {value}, {kind} poison, <{count} x i32> <{places}>"
        )

    def _joined(self, f: Function, parts: list[str], kind: str) -> str:
        """Vectors behind each other."""
        count = int(kind[1:].partition(" ")[0])
        element = kind.rpartition(" ")[2][:-1]
        while len(parts) > 1:
            places = ", ".join(f"i32 {j}" for j in range(2 * count))
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [
                f.let(
                    "both",
                    f"shufflevector <{count} x {element}> {a}, <{count} x {element}> {b}, "
                    f"<{2 * count} x i32> <{places}>",
                )
                for a, b in pairs
            ]
            count *= 2
        return parts[0]
