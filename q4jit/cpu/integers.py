"""Integer products in LLVM IR: x in digits of int8 (`cpu.digits`), weights as the quants they are.

An instruction multiplies four quants with four digits in each lane; a sub-block's sum is exact.
What a step has in its exponent is added to that of the weight's scale: scaling costs no
multiplication.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.digits import LIFT_AT, STEP_AT, SUM_AT, load_word
from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.exact_sums import ExactSums, SubBlock
from q4jit.cpu.fields import Fields, add_scaled, prefetch
from q4jit.cpu.lanes import splat_value
from q4jit.cpu.llvm_text import INTS, MASK, VECTOR, Function, Loop, Module, float_text, splat
from q4jit.cpu.rough import add_rough
from q4jit.cpu.schedule import UNIT, Tile, unit_bytes
from q4jit.weights.layouts import LANES, Interleaved

# A scale of 0 has no exponent: lifted it counts as 2^(lift - 127). What such blocks sum up to stays
# below this (K up to 2^24), and other sums cannot: f16 scales are multiples of 2^-24.
_LEAST: Final = 2.0**-25


@dataclass(frozen=True)
class IntegerProduct:
    """A weight's columns times rows of x in digits, a tile of them.

    x_stride: floats between rows of x. units_stride: bytes between rows of digits.
    """

    weight: Interleaved
    instruction: DotInstruction
    limbs: int
    tile: Tile
    x_stride: int
    units_stride: int

    @property
    def name(self) -> str:
        """The function's name."""
        w, rows, groups = self.weight, self.tile.rows, self.tile.groups
        tile = f"rows{rows}" + (f"_groups{groups}" if groups > 1 else "")
        return f"{w.fmt.name.lower()}_k{w.k}_{tile}_digits{self.limbs}"


def add_integer_product(module: Module, product: IntegerProduct) -> str:
    """Add the function `void (ptr x, ptr units, ptr w0, …, ptr tile)` and return its name.

    x: f32 rows; units: the same rows in digits; w0, …: groups of 16 columns; tile: f32
    [groups, rows, 16], overwritten.
    """
    if not module.knows(product.name):
        weight, tile = product.weight, product.tile
        weights = ", ".join(f"ptr noalias %w{g}" for g in range(tile.groups))
        rows = "1 row" if tile.rows == 1 else f"{tile.rows} rows"
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %units, {weights}, "
            "ptr noalias %tile) #0",
            f"{LANES * tile.groups} columns of {weight.fmt.name}, one a lane, times {rows} of x"
            f" in {product.limbs} digit(s) of int8; K = {weight.k}.\n"
            f"{product.instruction.name} multiplies four quants with four digits in each lane.",
        )
        _ProductWriter(module, f, product).write()
        module.add(product.name, f)
    return f"@{product.name}"


class _ProductWriter:
    """Writes the function of a product: the loops over blocks, the scales, the rough units."""

    def __init__(self, module: Module, f: Function, product: IntegerProduct) -> None:
        self._module, self._f, self._product = module, f, product
        self._weight, self._fmt, self._tile = product.weight, product.weight.fmt, product.tile
        self._sums = ExactSums(
            module, f, self._fmt, product.instruction, product.limbs, product.tile
        )

    def write(self) -> None:
        f, weight = self._f, self._weight
        names = [_total(g, r) for g, r in self._tile.places]
        zeros = dict.fromkeys(names, (VECTOR, "zeroinitializer"))
        block_units = weight.block_elements // UNIT
        with f.loop("tile", 0, weight.slabs, carry=zeros) as tile:
            offset = f.index("offset", (tile.index, weight.slab_bytes))
            tiles_at = [f.at(f"%w{g}", "i8", offset, "tile_at") for g in range(self._tile.groups)]
            outer = {n: (VECTOR, tile[n]) for n in names}
            with f.loop(
                "block", 0, weight.blocks_per_slab, carry=outer, unroll=self._tile.groups == 1
            ) as block:
                fields = [Fields(self._module, f, weight, at, block.index) for at in tiles_at]
                first = f.index(
                    "unit",
                    (tile.index, weight.blocks_per_slab * block_units),
                    (block.index, block_units),
                )
                self._block(fields, first, block)
            tile.values = dict(block.values)
        for i, (g, r) in enumerate(self._tile.places):
            at = f.at("%tile", VECTOR, i, "tile_row")
            f.do(f"store {VECTOR} {tile[_total(g, r)]}, ptr {at}, align 64")
        self._finish()
        f.do("ret void")

    # --- a block ---------------------------------------------------------------------------------

    def _block(self, fields: list[Fields], first: str, block: Loop) -> None:
        """Add the sub-blocks of a block, whose first unit of x is `first`."""
        f = self._f
        ds, ms = ([each.halves(name) for each in fields] for name in ("d", "m"))
        subs = self._weight.block_elements // self._fmt.sub_block_elements
        inner = {n: (VECTOR, v) for n, v in block.values.items()}
        with f.loop("sub", 0, subs, carry=inner) as sub:
            if self._tile.groups == 1:  # several groups serve many rows: their weights are in cache
                sparse = self._tile.rows * self._product.limbs == 1
                for each in fields:
                    place = (each.tile_at, block.index, sub.index)
                    prefetch(self._module, f, self._weight, *place, sparse)
            at = self._sub_block(fields, first, sub.index)
            sums = self._sums.write(at)
            scales = [e.scale(d, sub.index) for e, d in zip(fields, ds, strict=True)]
            f.comment("a step is a power of two: its exponent goes to the scale")
            for g, scale in enumerate(scales):
                self._add(sub, g, scale, ms[g], at.units, sums)
        block.values = dict(sub.values)

    def _sub_block(self, fields: list[Fields], first: str, number: str) -> SubBlock:
        """Find the unit of each row of x that belongs to a sub-block."""
        f, product = self._f, self._product
        per_unit = UNIT // self._fmt.sub_block_elements
        unit, half = f.index("unit", (first, 1), (number, 1)), "0"
        if per_unit > 1:
            within = f.let("within", f"udiv i64 {number}, {per_unit}")
            unit = f.index("unit", (first, 1), (within, 1))
            half = f.let("half", f"urem i64 {number}, {per_unit}")
        at = f.at("%units", "i8", f.index("at", (unit, unit_bytes(product.limbs))), "unit_at")
        rows = range(self._tile.rows)
        units = [f.at(at, "i8", r * product.units_stride, "unit_at") for r in rows]
        return SubBlock(fields, number, units, half)

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
            lift = splat_value(f, "i32", load_word(f, unit, LIFT_AT))
            up = f.let("up", f"add {INTS} {bits}, {lift}")
            step = f.let("d_step", f"bitcast {INTS} {up} to {VECTOR}")
            name = _total(g, r)
            sub[name] = add_scaled(self._module, f, name, sub[name], step, sums[g, r])
            if m is not None:
                x_sum = f.let("x_sum", f"load float, ptr {f.at(unit, 'i8', SUM_AT)}, align 4")
                x_sums = splat_value(f, "float", x_sum)
                sub[name] = add_scaled(self._module, f, name, sub[name], m, x_sums)

    # --- behind the last block --------------------------------------------------------------------

    def _finish(self) -> None:
        """Bring the tile to its scale, and add the units that digits could not hold."""
        f, product = self._f, self._product
        rough = add_rough(self._module, self._weight)
        end_off = product.x_stride // UNIT * unit_bytes(product.limbs)
        assert self._weight.padded_k <= product.x_stride
        self._module.declare(f"declare {VECTOR} @llvm.fabs.v16f32({VECTOR})")
        f.comment("by the smallest step of the row; what only scales of 0 have left is 0")
        with f.loop("r", 0, self._tile.rows) as row:
            offset = f.index("end_off", (row.index, product.units_stride), (end_off, 1))
            end = f.at("%units", "i8", offset, "end")
            step = f.let("step", f"load float, ptr {f.at(end, 'i8', STEP_AT)}, align 4")
            steps = splat_value(f, "float", step)
            tiles = [self._sums_at(row.index, g) for g in range(self._tile.groups)]
            for at in tiles:
                self._scale(at, steps)
            self._add_rough_units(rough, row.index, end, tiles)

    def _sums_at(self, row: str, g: int) -> str:
        """Return the address of a row's sums in group g."""
        place = self._f.index("i", (row, 1), (g * self._tile.rows, 1))
        return self._f.at("%tile", VECTOR, place, "row_at")

    def _scale(self, at: str, steps: str) -> None:
        """Multiply 16 sums by the smallest step."""
        f, least = self._f, splat("float", float_text(_LEAST))
        value = f.let("value", f"load {VECTOR}, ptr {at}, align 64")
        size = f.let("size", f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {value})")
        some = f.let("some", f"fcmp oge {VECTOR} {size}, {least}")
        kept = f.let("kept", f"select {MASK} {some}, {VECTOR} {value}, {VECTOR} zeroinitializer")
        scaled = f.let("scaled", f"fmul {VECTOR} {kept}, {steps}")
        f.do(f"store {VECTOR} {scaled}, ptr {at}, align 64")

    def _add_rough_units(self, rough: str, row: str, end: str, tiles: list[str]) -> None:
        """Add a row's rough units, if it has any, to its sums in each group."""
        f = self._f
        count = f.let("count", f"load i32, ptr {end}, align 4")
        none = f.let("none", f"icmp eq i32 {count}, 0")
        some, done = f.fresh("some"), f.fresh("next")
        f.do(f"br i1 {none}, label %{done}, label %{some}")
        f.label(some)
        x = f.at("%x", "float", f.index("x_off", (row, self._product.x_stride)), "x_row")
        for g, at in enumerate(tiles):
            f.do(f"call void {rough}(ptr {x}, ptr {end}, ptr %w{g}, ptr {at})")
        f.do(f"br label %{done}")
        f.label(done)


def _total(g: int, r: int) -> str:
    """The name of the total of a place of the tile."""
    return f"acc{g}.{r}"
