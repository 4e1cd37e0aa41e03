"""Write integer products in LLVM IR: x in digits of int8 (`cpu.digits`) times the weights' codes.

An instruction multiplies four codes with four digits in each lane; the sum of a sub-block is exact.
The lift of a unit's step is added to the exponent of the weights' scale, so that scaling by the
step takes no multiplication.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.digit_form import DIGIT_BITS, ROW_END, DigitForm, load_field
from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.exact_sums import ExactSums, SubBlock, Sums
from q4jit.cpu.fields import Fields, add_scaled, prefetch
from q4jit.cpu.lanes import SIXTEEN, broadcast, magnitude_of
from q4jit.cpu.llvm_text import (
    EXPONENT_SHIFT,
    INTS,
    MASK,
    VECTOR,
    Function,
    Loop,
    Module,
    float_bits,
    float_text,
    splat,
    splat_int,
)
from q4jit.cpu.long_sums import slab_terms, write_long_sums
from q4jit.cpu.rough import add_rough
from q4jit.cpu.schedule import UNIT, Tile
from q4jit.weights.layouts import Interleaved

# A scale of 0 has no exponent to add to: with a lift it becomes 2^(lift - 127), not 0. The sums of
# such blocks stay below this bound (K up to 2^24). Other sums are 0 or not below it, because f16
# scales are multiples of 2^-24.
_LEAST: Final = 2.0**-25
# A scale in E8M0 may be denormal, which has no exponent to add to either: all are multiplied by 4.
_E8M0_FACTOR: Final = 4.0


@dataclass(frozen=True)
class IntegerProduct:
    """A register tile of rows of x in digits times columns of a weight.

    Attributes:
        weight: the layout of the weight.
        instruction: what multiplies.
        form: the form of x in digits.
        tile: the register tile.
        x_stride: floats between rows of x.
        row_bytes: bytes between rows of x in digits.
    """

    weight: Interleaved
    instruction: DotInstruction
    form: DigitForm
    tile: Tile
    x_stride: int
    row_bytes: int

    @property
    def digits(self) -> int:
        """The digits of each element of x."""
        return self.form.digits

    @property
    def name(self) -> str:
        """The function's name."""
        w, rows, panels = self.weight, self.tile.rows, self.tile.panels
        tile = f"rows{rows}" + (f"_panels{panels}" if panels > 1 else "")
        return f"{w.fmt.name.lower()}_k{w.k}_{tile}_digits{self.digits}"


def add_integer_product(module: Module, product: IntegerProduct) -> str:
    """Add the function `void (ptr x, ptr units, ptr w0, …, ptr tile)` and return its name.

    x: f32 rows; units: the same rows in digits; w0, …: panels of 16 columns; tile: f32
    [panels, rows, 16], overwritten.
    """
    if not module.knows(product.name):
        weight, tile = product.weight, product.tile
        panels = ", ".join(f"ptr noalias %w{panel}" for panel in range(tile.panels))
        rows = "1 row" if tile.rows == 1 else f"{tile.rows} rows"
        digits = "1 digit" if product.digits == 1 else f"{product.digits} digits"
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %units, {panels}, "
            "ptr noalias %tile) #0",
            f"{tile.columns} columns of {weight.fmt.name}, one a lane, times {rows} of x"
            f" in {digits} of int8; K = {weight.k}.\n"
            f"{product.instruction.name} multiplies four codes with four digits in each lane.",
        )
        _ProductWriter(module, f, product).write()
        module.add(product.name, f)
    return f"@{product.name}"


class _ProductWriter:
    """Writes the function of a product: the loops over blocks, the scales, the rough units."""

    def __init__(self, module: Module, f: Function, product: IntegerProduct) -> None:
        self._module, self._f, self._product = module, f, product
        self._weight, self._fmt, self._tile = product.weight, product.weight.fmt, product.tile
        self._unit = product.form.unit
        self._sums = ExactSums(
            module, f, self._fmt, product.instruction, product.form, product.tile
        )

    def write(self) -> None:
        f, weight = self._f, self._weight
        names = [_total(*position) for position in self._tile.positions]
        if self._product.digits > 1:
            terms = slab_terms(weight)
            totals = write_long_sums(self._module, f, weight.slabs, terms, names, self._slabs)
        else:  # one digit errs by more than a long sum does
            totals = self._slabs(0, weight.slabs)
        for i, name in enumerate(names):
            at = f.at("%tile", VECTOR, i, "sums_at")
            f.do(f"store {VECTOR} {totals[name]}, ptr {at}, align 64")
        self._finish()
        f.do("ret void")

    def _slabs(self, first_slab: str | int, end_slab: str | int) -> dict[str, str]:
        """Return the sums of the tile over slabs, by the names of the totals."""
        f, weight = self._f, self._weight
        names = [_total(*position) for position in self._tile.positions]
        zeros = dict.fromkeys(names, (VECTOR, "zeroinitializer"))
        block_units = weight.block_elements // UNIT
        with f.loop("slab", first_slab, end_slab, carry=zeros) as slab:
            offset = f.index("slab_offset", (slab.index, weight.slab_bytes))
            slabs_at = [f.at(f"%w{p}", "i8", offset, "slab_at") for p in range(self._tile.panels)]
            outer = {n: (VECTOR, slab[n]) for n in names}
            with f.loop(
                "block", 0, weight.blocks_per_slab, carry=outer, unroll=self._tile.panels == 1
            ) as block:
                fields = [Fields(self._module, f, weight, at, block.index) for at in slabs_at]
                first = f.index(
                    "unit",
                    (slab.index, weight.blocks_per_slab * block_units),
                    (block.index, block_units),
                )
                self._block(fields, first, block)
            slab.values = dict(block.values)
        return slab.values

    # --- a block ---------------------------------------------------------------------------------

    def _block(self, fields: list[Fields], first: str, block: Loop) -> None:
        """Add the sub-blocks of a block; `first` is the number of the first unit of x."""
        f = self._f
        scales, minima = (
            [self._block_scale(each) for each in fields],
            [each.block_field("m") for each in fields],
        )
        units = self._weight.block_elements // UNIT
        per_unit = UNIT // self._fmt.sub_block_elements
        inner = {n: (VECTOR, v) for n, v in block.values.items()}
        with f.loop(
            "sub_block" if per_unit == 1 else "unit_in_block", 0, units, carry=inner
        ) as unit:
            if self._tile.panels == 1:  # several panels serve many rows: their weights are in cache
                sparse = self._tile.rows * self._product.digits == 1
                for each in fields:
                    position = (each.slab_at, block.index, unit.index, UNIT)
                    prefetch(self._module, f, self._weight, *position, sparse)
            at = f.at("%units", "%Unit", f.index("unit", (first, 1), (unit.index, 1)), "unit_at")
            rows = range(self._tile.rows)
            units_at = [
                f.at(at, "i8", row * self._product.row_bytes, f"unit_at.row{row}") for row in rows
            ]
            for half in range(per_unit):
                number = f.index("sub_block", (unit.index, per_unit), (half, 1))
                self._sub_block(unit, SubBlock(fields, number, units_at, half), scales, minima)
        block.values = dict(unit.values)

    def _block_scale(self, fields: Fields) -> str:
        """Load the scale of a block; one in E8M0 is multiplied by `_E8M0_FACTOR`."""
        f = self._f
        if self._fmt.scale_type == "e8m0":
            e = fields.exponents()
            biased = f.let(
                "biased", f"add {INTS} {e}, {splat_int(1)}", f"2^(e - 128) · {_E8M0_FACTOR:g}"
            )
            bits = f.let("scale_bits", f"shl {INTS} {biased}, {splat_int(EXPONENT_SHIFT)}")
            return f.let("block_scale", f"bitcast {INTS} {bits} to {VECTOR}")
        scale = fields.block_field("d")
        assert scale is not None, "a block format without a scale"
        return scale

    def _sub_block(
        self, totals: Loop, at: SubBlock, scales: list[str], minima: list[str | None]
    ) -> None:
        """Add the scaled sums of a sub-block, and its minima times the sums of x."""
        f = self._f
        sums = self._sums.write(at)
        factors = []
        for fields, scale, minimum in zip(at.fields, scales, minima, strict=True):
            scale_of_it = fields.scale(scale, at.number)
            assert scale_of_it is not None
            factors.append((scale_of_it, fields.minimum(minimum, at.number)))
        f.comment("times scale and step: a step is a power of two, its lift adds to exponents")
        for panel, (scale, minimum) in enumerate(factors):
            if minimum is None:
                self._add_scaled(totals, panel, scale, at, sums)
            elif self._product.digits == 1:
                self._add_with_minimum(totals, panel, scale, minimum, at, sums)
            else:
                self._add_exactly(totals, panel, scale, minimum, at, sums)

    def _add_scaled(self, totals: Loop, panel: int, scale: str, at: SubBlock, sums: Sums) -> None:
        """Add the scaled sums of a panel."""
        bits = self._f.let("scale_bits", f"bitcast {VECTOR} {scale} to {INTS}")
        for row, unit_at in enumerate(at.units):
            name, dot = _total(panel, row), self._sums.with_all_digits(sums[panel, row])
            factor = self._lifted(bits, unit_at, "scale_step")
            totals[name] = add_scaled(self._module, self._f, name, totals[name], factor, dot)

    def _add_with_minimum(
        self, totals: Loop, panel: int, scale: str, minimum: str, at: SubBlock, sums: Sums
    ) -> None:
        """Add the scaled sums of one digit, and the minimum times the sum of X.

        They may cancel each other. The product of an f16 and the sum of X has 23 bits: it is exact,
        and rounding follows the addition. With a sub-minimum it has 29 bits; its rounding error is
        far below that of one digit.
        """
        f, module = self._f, self._module
        bits = f.let("scale_bits", f"bitcast {VECTOR} {scale} to {INTS}")
        for row, unit_at in enumerate(at.units):
            name, (dot,) = _total(panel, row), sums[panel, row]
            factor = self._lifted(bits, unit_at, "scale_step")
            x_sums = self._scaled_sums_of_x(unit_at, at.half)
            if self._fmt.sub_minima is not None:
                total = add_scaled(module, f, "with_minimum", totals[name], minimum, x_sums)
                totals[name] = add_scaled(module, f, name, total, factor, dot)
                continue
            least = f.let("least", f"fmul {VECTOR} {minimum}, {x_sums}", "exact: 23 bits")
            both = add_scaled(module, f, "both", least, factor, dot)
            totals[name] = add_scaled(module, f, name, totals[name], None, both)

    def _add_exactly(
        self, totals: Loop, panel: int, scale: str, minimum: str, at: SubBlock, sums: Sums
    ) -> None:
        """Add scale · sum and minimum · Σ X of a panel, rounded only after they are added.

        They may cancel each other: the rounding error of either would be all that is left. The
        highest digit's minimum · Σ X has 23 bits, and is exact if the block has one minimum. Of
        other products, `rest` is what rounding took off.
        """
        f, module = self._f, self._module
        high_factor = splat_int(float_bits(2.0 ** (DIGIT_BITS * (self._product.digits - 1))))
        low_factor = splat_int(float_bits(1.0))
        stored_factor = splat("float", float_text(-(2.0**-self._product.form.sums_log2)))
        stored = f.let("stored_minimum", f"fmul {VECTOR} {minimum}, {stored_factor}")
        for row, unit_at in enumerate(at.units):
            name, (high, low) = _total(panel, row), sums[panel, row]
            top = broadcast(f, "i32", self._sums.sum_of_x(unit_at, at.half, top=True))
            top = f.let("top_sums", f"sitofp {INTS} {top} to {VECTOR}")
            if self._fmt.sub_block_elements == UNIT:
                of_low, x_low = minimum, self._sums_of_x(unit_at, "low_sum")
            else:
                of_low = stored
                x_low = broadcast(f, "i32", self._sums.low_sum_of_x(unit_at, at.half))
                x_low = f.let("low_sums", f"sitofp {INTS} {x_low} to {VECTOR}")
            least = f.let("least", f"fmul {VECTOR} {stored}, {top}")
            with_least = add_scaled(module, f, "high", least, scale, high)
            if self._fmt.sub_minima is not None:
                rest = self._rest(least, stored, top)
                with_least = add_scaled(module, f, "high", with_least, None, rest)
            high = with_least
            least = f.let("least", f"fmul {VECTOR} {of_low}, {x_low}")
            rest = self._rest(least, of_low, x_low)
            low = add_scaled(module, f, "low", least, scale, low)
            low = add_scaled(module, f, "low", low, None, rest)
            for factor, part in ((high_factor, high), (low_factor, low)):
                step = self._lifted(factor, unit_at, "step")
                totals[name] = add_scaled(module, f, name, totals[name], step, part)

    def _rest(self, product: str, a: str, b: str) -> str:
        """Return what rounding took off the product of a and b."""
        f = self._f
        negative = f.let("negative", f"fneg {VECTOR} {product}")
        return add_scaled(self._module, f, "rest", negative, a, b)

    def _lifted(self, bits: str, unit_at: str, hint: str) -> str:
        """Multiply floats, given as bits, by the step of a unit: add its lift to the exponents."""
        f = self._f
        lift = broadcast(f, "i32", load_field(f, unit_at, self._unit, "lift"))
        lifted = f.let("lifted", f"add {INTS} {bits}, {lift}")
        return f.let(hint, f"bitcast {INTS} {lifted} to {VECTOR}")

    def _scaled_sums_of_x(self, unit_at: str, half: int) -> str:
        """Load the sum of X · 2^lift in a sub-block into every lane."""
        if self._fmt.sub_block_elements == UNIT:
            return self._sums_of_x(unit_at, "sum")
        return self._sums_of_x(unit_at, "scaled_half_sums", half)

    def _sums_of_x(self, unit_at: str, field: str, *indices: int) -> str:
        """Load a sum of X as a float into every lane."""
        value = load_field(self._f, unit_at, self._unit, field, *indices, kind="float")
        return broadcast(self._f, "float", value)

    # --- after the last block ---------------------------------------------------------------------

    def _finish(self) -> None:
        """Multiply the tile by the smallest steps, and add the rough units."""
        f, product = self._f, self._product
        rough = add_rough(self._module, self._weight)
        units = product.x_stride // UNIT
        assert self._weight.padded_k <= product.x_stride
        if self._fmt.scale_type == "f16":
            zero = "; a scale of 0 plus a lift is tiny, and becomes 0"
        else:
            zero = ""
        f.comment(f"times the row's smallest step{zero}")
        with f.loop("row", 0, self._tile.rows) as row:
            offset = f.index("row_offset", (row.index, product.row_bytes))
            row_at = f.at("%units", "i8", offset, "row_at")
            end = f.at(row_at, "%Unit", units, "end_at")
            step = load_field(f, end, ROW_END, "smallest_step", kind="float")
            steps = broadcast(f, "float", step)
            addresses = [self._sums_at(row.index, panel) for panel in range(self._tile.panels)]
            for at in addresses:
                self._scale(at, steps)
            self._add_rough_units(rough, row.index, end, addresses)

    def _sums_at(self, row: str, panel: int) -> str:
        """Return the address of a row's sums in a panel."""
        position = self._f.index("position", (row, 1), (panel * self._tile.rows, 1))
        return self._f.at("%tile", VECTOR, position, "sums_at")

    def _scale(self, at: str, steps: str) -> None:
        """Multiply 16 sums by the smallest step."""
        f = self._f
        sums = f.let("sums", f"load {VECTOR}, ptr {at}, align 64")
        if self._fmt.scale_type == "e8m0":
            inverse = SIXTEEN.constant(1 / _E8M0_FACTOR)
            kept = f.let(
                "sums",
                f"fmul {VECTOR} {sums}, {inverse}",
                f"scales are {_E8M0_FACTOR:g} times too large",
            )
        else:
            magnitude = magnitude_of(self._module, f, sums)
            least = SIXTEEN.constant(_LEAST)
            some = f.let("some", f"fcmp oge {VECTOR} {magnitude}, {least}", "2^-25")
            kept = f.let("kept", f"select {MASK} {some}, {VECTOR} {sums}, {VECTOR} zeroinitializer")
        scaled = f.let("scaled", f"fmul {VECTOR} {kept}, {steps}")
        f.do(f"store {VECTOR} {scaled}, ptr {at}, align 64")

    def _add_rough_units(self, rough: str, row: str, end: str, addresses: list[str]) -> None:
        """Add a row's rough units, if it has any, to its sums in each panel."""
        f = self._f
        count = load_field(f, end, ROW_END, "rough_count")
        none = f.let("none", f"icmp eq i32 {count}, 0")
        some, done = f.fresh("add_rough"), f.fresh("done")
        f.do(f"br i1 {none}, label %{done}, label %{some}")
        f.label(some)
        offset = f.index("x_offset", (row, self._product.x_stride))
        x_at = f.at("%x", "float", offset, "x_at")
        for panel, at in enumerate(addresses):
            f.do(f"call void {rough}(ptr {x_at}, ptr {end}, ptr %w{panel}, ptr {at})")
        f.do(f"br label %{done}")
        f.label(done)


def _total(panel: int, row: int) -> str:
    """Return the name of the total of a position of the tile."""
    return f"total{panel}.{row}"
