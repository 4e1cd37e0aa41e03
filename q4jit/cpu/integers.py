"""Integer products in LLVM IR: x in digits of int8 (`cpu_digits`), weights as the quants they are.

An instruction multiplies four quants with four digits in each lane; a sub-block's sum is exact.
What a step has in its exponent is added to that of the weight's scale: scaling costs no
multiplication.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.digits import (
    DIGIT_BITS,
    HALVES_AT,
    LIFT_AT,
    LIST_AT,
    STEP_AT,
    SUM_AT,
    SUM_FACTOR_LOG2,
    TOP_AT,
    TOP_HALVES_AT,
    WHOLE_AT,
    fits,
)
from q4jit.cpu.fields import CHUNK, WORD, Fields, PlaneAt, add_scaled, prefetch, shift_right
from q4jit.cpu.lanes import splat_value
from q4jit.cpu.llvm_text import (
    INTS,
    MASK,
    VECTOR,
    Function,
    Loop,
    Module,
    float_text,
    splat,
)
from q4jit.cpu.products import walk_sub_block
from q4jit.cpu.schedule import HEADER_BYTES, UNIT, Dot, unit_bytes, zero_of
from q4jit.weights.layouts import LANES, Interleaved

# A scale of 0 has no exponent: lifted it counts as 2^(lift - 127). What such blocks sum up to stays
# below this (K up to 2^24), and other sums cannot: f16 scales are multiples of 2^-24.
_LEAST: Final = 2.0**-25
# accumulators that keep the dot products busy; fewer rows have one for each digit or each chunk
_CHAINS: Final = 8
_BYTES: Final = "<64 x i8>"
INTRINSICS: Final = {
    ("vpdpbusd", 16): "llvm.x86.avx512.vpdpbusd.512",
    ("vpdpbusd", 8): "llvm.x86.avx512.vpdpbusd.256",
    ("vpmaddubsw", 8): "llvm.x86.avx2.pmadd.ub.sw",
    ("sdot", 4): "llvm.aarch64.neon.sdot.v4i32.v16i8",
}
"""By instruction and lanes."""
_SIXTEEN_BITS: Final = "<32 x i16>"


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


@dataclass(frozen=True)
class _SubBlock:
    """Where a sub-block is read: a block's fields for each group, its number in there, units of x.

    half: of a unit, 0 or 1 where sub-blocks have 16 elements.
    """

    fields: list[Fields]
    number: str
    units: list[str]
    half: str


class _ProductWriter:
    """Writes the function of a product.

    A tile's sums are exact over a sub-block. Few of them would wait for each other, so that each
    digit, and each chunk of 16 elements, then has a chain of its own.
    """

    def __init__(self, module: Module, f: Function, product: IntegerProduct) -> None:
        self._module, self._f, self._product = module, f, product
        self._weight, self._fmt = product.weight, product.weight.fmt
        self._dot = _DotWriter(module, product.dot)
        self._zero = zero_of(self._fmt, product.dot)
        limbs = list(range(product.limbs))
        # digits that one int32 sums; the highest apart where all would overflow
        self._sums = [limbs] if fits(self._fmt, product.limbs) else [[0], limbs[1:]]
        self._tile = [(g, r) for g in range(product.groups) for r in range(product.rows)]
        self._by_limb = product.limbs > 1 and len(self._tile) < _CHAINS
        sums = len(self._tile) * (product.limbs if self._by_limb else 1)
        self._by_chunk = sums < _CHAINS

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
            if product.groups == 1:  # several groups serve many rows, whose weights are in cache
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
            sums = self._sub_block(_SubBlock(fields, sub.index, units, half))
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
            lift = splat_value(f, "i32", self._word(unit, LIFT_AT))
            up = f.let("up", f"add {INTS} {bits}, {lift}")
            step = f.let("d_step", f"bitcast {INTS} {up} to {VECTOR}")
            name = _total(g, r)
            sub[name] = add_scaled(self._module, f, name, sub[name], step, sums[g, r])
            if m is not None:
                x_sum = f.let("x_sum", f"load float, ptr {f.at(unit, 'i8', SUM_AT)}, align 4")
                x_sums = splat_value(f, "float", x_sum)
                sub[name] = add_scaled(self._module, f, name, sub[name], m, x_sums)

    def _word(self, unit: str, at: int | str) -> str:
        return self._f.let("word", f"load i32, ptr {self._f.at(unit, 'i8', at)}, align 4")

    # --- one sub-block ----------------------------------------------------------------------------

    def _sub_block(self, at: _SubBlock) -> dict[tuple[int, int], str]:
        """The exact sums of a sub-block as floats, before any scale."""
        f = self._f
        found: dict[tuple[int, int], list[str]] = {place: [] for place in self._tile}
        for limbs in self._sums:
            chains = self._first(at, limbs)
            for now in [limbs] if self._by_limb else [[limb] for limb in limbs]:
                if now[0] != limbs[0]:
                    up = splat("i32", str(DIGIT_BITS))
                    chains = {n: f.let("up", f"shl {INTS} {v}, {up}") for n, v in chains.items()}
                for chunk in range(self._fmt.scale_elements // CHUNK):
                    self._multiply(at, now, chunk, chains)
            for g, r in self._tile:
                total = self._collect(chains, g, r, limbs)
                if self._zero and not self._begins_at_zeros(limbs):
                    zeros = self._zeros(at, at.units[r], limbs)
                    total = f.let("total", f"add {INTS} {total}, {zeros}")
                found[g, r].append(f.let("sum", f"sitofp {INTS} {total} to {VECTOR}"))
        return {place: self._joined(sums) for place, sums in found.items()}

    def _chain(self, g: int, r: int, limb: int, chunk: int) -> str:
        """The name of the sum that a digit of a chunk goes to."""
        return f"s{g}.{r}.{limb if self._by_limb else 0}.{chunk if self._by_chunk else 0}"

    def _multiply(
        self, at: _SubBlock, limbs: list[int], chunk: int, chains: dict[str, str]
    ) -> None:
        """Multiply digits `limbs` of a chunk of 16 elements; `chains` are the sums so far."""
        f, chunks = self._f, self._fmt.scale_elements // CHUNK
        number = f.index("number", (at.number, chunks), (chunk, 1))
        planes = [each.planes(number) for each in at.fields]
        names = [self._chain(g, r, limb, chunk) for g, r in self._tile for limb in limbs]
        carry = {n: (self._dot.sums, chains.get(n, "zeroinitializer")) for n in names}
        with f.loop("word", 0, CHUNK // WORD, carry=carry, unroll=True) as word:
            quants = [
                self._quants(each, place, word.index)
                for each, place in zip(at.fields, planes, strict=True)
            ]
            for limb in limbs:
                first = HEADER_BYTES + limb * UNIT + chunk * CHUNK
                x_at = f.index("x_at", (at.half, CHUNK), (word.index, WORD), (first, 1))
                for r, unit in enumerate(at.units):
                    x = splat_value(f, "i32", self._word(unit, x_at))
                    for g, q in enumerate(quants):
                        name = self._chain(g, r, limb, chunk)
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

    def _collect(self, chains: dict[str, str], g: int, r: int, limbs: list[int]) -> str:
        """The sum of the chains of one place of the tile."""
        f, total = self._f, ""
        chunks = range(self._fmt.scale_elements // CHUNK)
        for limb in limbs if self._by_limb else limbs[:1]:
            if total:
                total = f.let("up", f"shl {INTS} {total}, {splat('i32', str(DIGIT_BITS))}")
            for name in dict.fromkeys(self._chain(g, r, limb, chunk) for chunk in chunks):
                part = self._dot.total(f, chains[name])
                total = f.let("total", f"add {INTS} {total}, {part}") if total else part
        return total

    def _begins_at_zeros(self, limbs: list[int]) -> bool:
        """Whether chains start at what the quants' zero adds: a load, not an addition."""
        return len(limbs) == 1 and not self._product.dot.pairs

    def _first(self, at: _SubBlock, limbs: list[int]) -> dict[str, str]:
        """What chains start with, unless it is 0."""
        if not self._zero or not self._begins_at_zeros(limbs):
            return {}
        self._f.comment("sums begin with what takes off the zero of the quants")
        zeros = [self._zeros(at, unit, limbs) for unit in at.units]
        return {self._chain(g, r, limbs[0], 0): zeros[r] for g, r in self._tile}

    def _zeros(self, at: _SubBlock, unit: str, limbs: list[int]) -> str:
        """What takes off the zero of quants in the sum of digits `limbs`."""
        f = self._f
        word = self._sum_of_x(unit, at.half, top=limbs == [0] and self._product.limbs > 1)
        if limbs[0] > 0:  # all digits but the highest
            top = self._sum_of_x(unit, at.half, top=True)
            high = f.let("high", f"shl i32 {top}, {DIGIT_BITS * len(limbs)}")
            word = f.let("low", f"sub i32 {word}, {high}")
        if self._zero != 1 << SUM_FACTOR_LOG2:
            word = f.let("word", f"mul i32 {word}, {self._zero >> SUM_FACTOR_LOG2}")
        return splat_value(f, "i32", word)

    def _sum_of_x(self, unit: str, half: str, top: bool) -> str:
        """−8 times the sum of X, or of its highest digit, in a sub-block."""
        if self._fmt.scale_elements == UNIT:
            return self._word(unit, TOP_AT if top else WHOLE_AT)
        first = TOP_HALVES_AT if top else HALVES_AT
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
        end_off = product.x_stride // UNIT * unit_bytes(product.limbs)
        assert units * UNIT <= product.x_stride
        least = splat("float", float_text(_LEAST))
        self._module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
        f.comment("by the smallest step of the row; what only scales of 0 have left is 0")
        with f.loop("r", 0, product.rows) as row:
            offset = f.index("end_off", (row.index, product.units_stride), (end_off, 1))
            end = f.at("%units", "i8", offset, "end")
            step = f.let("step", f"load float, ptr {f.at(end, 'i8', STEP_AT)}, align 4")
            steps = splat_value(f, "float", step)
            tiles = [
                f.at("%tile", VECTOR, f.index("i", (row.index, 1), (g * product.rows, 1)), "row_at")
                for g in range(product.groups)
            ]
            for at in tiles:
                value = f.let("value", f"load {VECTOR}, ptr {at}, align 64")
                size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {value})")
                some = f.let("some", f"fcmp oge {VECTOR} {size}, {least}")
                kept = f.let(
                    "kept", f"select {MASK} {some}, {VECTOR} {value}, {VECTOR} zeroinitializer"
                )
                scaled = f.let("scaled", f"fmul {VECTOR} {kept}, {steps}")
                f.do(f"store {VECTOR} {scaled}, ptr {at}, align 64")
            count = f.let("count", f"load i32, ptr {end}, align 4")
            none = f.let("none", f"icmp eq i32 {count}, 0")
            some, done = f.fresh("some"), f.fresh("next")
            f.do(f"br i1 {none}, label %{done}, label %{some}")
            f.label(some)
            x = f.at("%x", "float", f.index("x_off", (row.index, product.x_stride)), "x_row")
            for g, at in enumerate(tiles):
                f.do(f"call void {rough}(ptr {x}, ptr {end}, ptr %w{g}, ptr {at})")
            f.do(f"br label %{done}")
            f.label(done)


def _total(g: int, r: int) -> str:
    return f"acc{g}.{r}"


def _add_rough(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr x, ptr end, ptr w, ptr sums)` and return its name."""
    name = f"{weight.fmt.name.lower()}_k{weight.k}_rough"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %x, ptr noalias %end, ptr noalias %w, "
            "ptr noalias %sums) #0",
            "16 columns times the rough units of a row of x, in floats, added to 16 sums.",
        )
        _write_rough(module, f, weight)
        module.add(name, f)
    return f"@{name}"


def _write_rough(module: Module, f: Function, weight: Interleaved) -> None:
    fmt = weight.fmt
    total = f.let("total", f"load {VECTOR}, ptr %sums, align 64")
    count32 = f.let("count32", "load i32, ptr %end, align 4")
    list_at = f.at("%end", "i8", LIST_AT, "list")
    count = f.let("count", f"sext i32 {count32} to i64")
    with f.loop("i", 0, count, carry={"total": (VECTOR, total)}) as entry:
        unit32 = f.let("unit32", f"load i32, ptr {f.at(list_at, 'i32', entry.index)}, align 4")
        unit = f.let("unit", f"sext i32 {unit32} to i64")
        number, within = _split(f, unit, weight.block_elements // UNIT)
        tile, block = _split(f, number, weight.blocks_per_tile)
        tile_at = f.at("%w", "i8", f.index("w_off", (tile, weight.tile_bytes)), "tile_at")
        fields = Fields(module, f, weight, tile_at, block)
        first = f.index("k", (number, weight.block_elements))
        d, m = fields.halves("d"), fields.halves("m")

        def element(k: str, byte: int, value: str, parts: Loop) -> None:
            at = f.at("%x", "float", f.index("k", (k, 1), (byte, 1)), "xk")
            x = splat_value(f, "float", f.let("x0", f"load float, ptr {at}, align 4"))
            parts["part"] = add_scaled(module, f, "part", parts["part"], x, value)

        subs = UNIT // fmt.scale_elements
        with f.loop("sub", 0, subs, carry={"total": (VECTOR, entry["total"])}) as sub:
            here = f.index("sub_number", (within, subs), (sub.index, 1))
            scale = fields.scale(d, here)
            decode = (scale, m) if m is not None else None
            zero = {"part": "zeroinitializer"}
            parts = walk_sub_block(f, fields, first, here, decode, zero, element)
            late = None if decode else scale
            sub["total"] = add_scaled(module, f, "total", sub["total"], late, parts["part"])
        entry.values = dict(sub.values)
    f.do(f"store {VECTOR} {entry['total']}, ptr %sums, align 64")
    f.do("ret void")


def _split(f: Function, index: str, count: int) -> tuple[str, str]:
    """Which of the runs of `count` an index is in, and where in it."""
    if count == 1:
        return index, "0"
    return f.let("run", f"udiv i64 {index}, {count}"), f.let("within", f"urem i64 {index}, {count}")


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
        intrinsic = INTRINSICS[dot.instruction, lanes]
        sums, element = (2 * lanes, "i16") if dot.pairs else (lanes, "i32")
        source = f"<{sums} x {element}>"
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
        result = self._concatenated(f, found, sums, element)
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

    def _concatenated(self, f: Function, parts: list[str], count: int, element: str) -> str:
        """Vectors of `count` elements behind each other."""
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
