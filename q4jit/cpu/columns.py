"""The columns phase of a CPU's kernels in LLVM IR: the products of a section, and the epilogue."""

from q4jit.cpu.gguf_rows import add_dot
from q4jit.cpu.integers import IntegerProduct, add_integer_product
from q4jit.cpu.lanes import ONE, SIXTEEN, Lanes, splat_value, tail_mask
from q4jit.cpu.llvm_text import VECTOR, Function
from q4jit.cpu.products import FloatProduct, add_product
from q4jit.cpu.schedule import (
    COLUMNS,
    digits_bytes,
    groups,
    interleaved,
    is_integer,
    padded_k,
    schedule_of,
)
from q4jit.cpu.values import Context, CpuValues
from q4jit.frontend.graph import Node
from q4jit.plan.kernels import Section, Slot
from q4jit.weights.layouts import GGUF, INTERLEAVED16, LANES


class SectionWriter:
    """Writes the function of a tile's columns of a section: products, then the epilogue on them."""

    def __init__(self, lowering: Context, number: int, section: Section) -> None:
        self._lowering = lowering
        self._kernel, self._section = lowering.kernel, section
        self._name = f"{self._kernel.work.symbol}.section{number}"
        self._padded_k = padded_k(lowering.plan, self._kernel)
        columns = self._kernel.tile.groups * LANES
        self._f = Function(
            f"internal void @{self._name}(ptr %args, i64 %task, i64 %first, i64 %end) #0",
            f"{columns} of {section.width} columns for rows %first … %end: "
            f"{len(section.products)} product(s) and the epilogue.",
        )

    def write(self) -> None:
        """Add the function to the module."""
        if schedule_of(self._section) == COLUMNS:
            self._columns()
        else:
            self._dots()
        self._f.do("ret void")
        self._lowering.module.add(self._name, self._f)

    def _columns(self) -> None:
        f, rows = self._f, self._kernel.tile.rows
        numbers = self._groups()
        tiles = [
            f.let("tile", f"alloca [{rows * len(numbers)} x {VECTOR}], align 64")
            for _ in self._products
        ]
        weights = [[self._weight_group(p, g) for g in numbers] for p in self._products]
        here = self._groups_here(len(numbers))
        with f.loop("m0", "%first", "%end", step=rows) as tile:
            first = tile.index
            if rows > 1:
                f.comment("the last tile overlaps the one before: it never leaves x")
                last = f.let("last", f"sub i64 %end, {rows}")
                over = f.let("over", f"icmp sgt i64 {first}, {last}")
                first = f.let("first", f"select i1 {over}, i64 {last}, i64 {first}")
            if self._kernel.tile.groups > 1:
                self._announce_results(first)
            for product, at, out in zip(self._products, weights, tiles, strict=True):
                self._product(product, first, at, out)
            with f.loop("g", 0, here) as group, f.loop("r", 0, rows) as loop:
                row = f.index("row", (first, 1), (loop.index, 1))
                place = f.index("place", (group.index, rows), (loop.index, 1))
                sums = [
                    f.let("sum", f"load {VECTOR}, ptr {f.at(t, VECTOR, place)}, align 64")
                    for t in tiles
                ]
                column = f.index("column", (numbers[0], LANES), (group.index, LANES))
                self._epilogue(SIXTEEN, row, column, sums)

    def _announce_results(self, first: str) -> None:
        """Fetch the lines of a tile's results meanwhile: stores wait in order for theirs."""
        f, tile = self._f, self._kernel.tile
        self._lowering.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        with f.loop("r", 0, tile.rows) as loop:
            row = f.index("row", (first, 1), (loop.index, 1))
            values = CpuValues(self._lowering, f, row, self._kernel.work.buffers)
            for store in self._section.stores:
                line = values.buffer_row(store)
                for g in range(tile.groups):
                    column = f.index("column", ("%task", tile.groups * LANES), (g * LANES, 1))
                    at = f.at(line, "float", column, "result_at")
                    f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 1, i32 3, i32 1) ; to write")

    def _groups(self) -> list[str]:
        """The numbers of the tile's groups; one that is beyond the last is the last."""
        f, count = self._f, self._kernel.tile.groups
        first = f.index("group", ("%task", count))
        if count == 1:
            return [first]
        self._lowering.module.declare("declare i64 @llvm.smin.i64(i64, i64)")
        last = groups(self._section) - 1
        numbers = [first]
        for g in range(1, count):
            next_ = f.index("group", (first, 1), (g, 1))
            numbers.append(f.let("group", f"call i64 @llvm.smin.i64(i64 {next_}, i64 {last})"))
        return numbers

    def _groups_here(self, count: int) -> int | str:
        """How many of a tile's groups there are."""
        total = groups(self._section)
        if total % count == 0:
            return count
        f = self._f
        first = f.index("group", ("%task", count))
        left = f.let("left", f"sub i64 {total}, {first}")
        return f.let("here", f"call i64 @llvm.smin.i64(i64 {left}, i64 {count})")

    def _product(self, product: Node, first: str, weights: list[str], out: str) -> None:
        """Write one product of a tile, whose first row is `first`, to out, [groups, rows, 16]."""
        f, module, kernel = self._f, self._lowering.module, self._kernel
        plan, rows = self._lowering.plan, kernel.tile.rows
        weight = interleaved(plan, product.arg)
        x = self._lowering.argument(f, Slot("x"))
        x_at = f.at(x, "float", f.index("x_off", (first, self._padded_k)), "x_at")
        if kernel.dot is not None and is_integer(plan, kernel, self._section, product):
            stride = digits_bytes(self._padded_k, kernel.limbs)
            integers = IntegerProduct(
                weight,
                kernel.dot.instruction,
                kernel.limbs,
                kernel.tile,
                self._padded_k,
                stride,
            )
            digits = self._lowering.argument(f, Slot("digits"))
            at = f.at(digits, "i8", f.index("digits_off", (first, stride)), "digits_at")
            pointers = ", ".join(f"ptr {p}" for p in [x_at, at, *weights, out])
            f.do(f"call void {add_integer_product(module, integers)}({pointers})")
            return
        finite = plan.weight(product.arg).finite
        function = add_product(module, FloatProduct(weight, rows, self._padded_k, not finite))
        for g, at in enumerate(weights):
            tile = f.at(out, VECTOR, g * rows, "tile_at")
            f.do(f"call void {function}(ptr {x_at}, ptr {at}, ptr {tile})")

    def _dots(self) -> None:
        f, width = self._f, self._section.width
        columns = self._kernel.tile.groups * LANES
        x = self._lowering.argument(f, Slot("x"))
        start = f.index("column", ("%task", columns))
        stop = f.let("stop", f"add i64 {start}, {columns}")
        over = f.let("over", f"icmp sgt i64 {stop}, {width}")
        stop = f.let("stop", f"select i1 {over}, i64 {width}, i64 {stop}")
        with f.loop("n", start, stop) as column, f.loop("row", "%first", "%end") as row:
            x_at = f.at(x, "float", f.index("x_off", (row.index, self._padded_k)), "x_at")
            sums = []
            for product in self._products:
                spec = self._lowering.plan.weight(product.arg)
                fmt = spec.block_format
                function = add_dot(self._lowering.module, fmt, spec.k, not spec.finite)
                base = self._lowering.argument(f, Slot("weight", product.arg, GGUF))
                number = f.index("number", (column.index, 1), (product.start, 1))
                offset = f.index("w_off", (number, fmt.column_bytes(spec.k)))
                w_at = f.at(base, "i8", offset, "w_at")
                sums.append(f.let("dot", f"call float {function}(ptr {x_at}, ptr {w_at})"))
            self._epilogue(ONE, row.index, column.index, sums)

    def _epilogue(self, lanes: Lanes, row: str, column: str, sums: list[str]) -> None:
        f, section = self._f, self._section
        values = CpuValues(self._lowering, f, row, self._kernel.work.buffers)
        mask = tail_mask(f, column, section.width) if lanes.count > 1 else None
        exponents = self._lowering.argument(f, Slot("exponent"))
        scale = f.let("scale", f"load float, ptr {f.at(exponents, 'float', row)}, align 4")
        if lanes.count > 1:
            scale = splat_value(f, "float", scale)
        products = {
            p.id: f.let("product", f"fmul {lanes.f32} {total}, {scale}")
            for p, total in zip(self._products, sums, strict=True)
        }
        # products of one column are scalars to the graph's eyes
        values.scalars.update({p.id: products[p.id] for p in self._products if p.width == 1})
        values.start(lanes, column, mask, products)
        for store in section.stores:
            values.store(store, values.buffer_row(store))

    @property
    def _products(self) -> tuple[Node, ...]:
        return self._section.products

    def _weight_group(self, product: Node, group: str) -> str:
        f = self._f
        base = self._lowering.argument(f, Slot("weight", product.arg, INTERLEAVED16))
        panel_bytes = interleaved(self._lowering.plan, product.arg).panel_bytes
        first = product.start // LANES * panel_bytes
        offset = f.index("w_off", (group, panel_bytes), (first, 1))
        return f.at(base, "i8", offset, "w_at")
