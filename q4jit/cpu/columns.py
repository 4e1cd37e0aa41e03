"""Write the columns phase of a CPU's kernels in LLVM IR: a section's products and epilogue."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from q4jit.cpu.digit_form import form_of
from q4jit.cpu.gguf_rows import add_dot
from q4jit.cpu.halves import STORED
from q4jit.cpu.integers import IntegerProduct, add_integer_product
from q4jit.cpu.lanes import ONE, SIXTEEN, Lanes, broadcast, tail_mask
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.products import FloatProduct, add_product
from q4jit.cpu.schedule import (
    COLUMNS,
    DOT,
    TRANSPOSED,
    Tile,
    band_rows,
    digits_bytes,
    interleaved,
    is_integer,
    padded_k,
    panels,
    schedule_of,
)
from q4jit.cpu.transposed import (
    LONG_SUM,
    StretchWriter,
    TransposedProduct,
    add_transposed_product,
)
from q4jit.cpu.transposed_few import FewRows
from q4jit.cpu.transposed_many import ManyRows
from q4jit.cpu.values import Context, CpuValues
from q4jit.frontend.graph import Node
from q4jit.plan.kernels import Section, Slot
from q4jit.weights.layouts import GGUF, INTERLEAVED16, LANES


class SectionWriter:
    """Writes the function of a task: for a tile's columns the products, then the epilogue."""

    _NUMBERS: ClassVar[str] = "i64 %task, i64 %first, i64 %end"  # parameters of the function

    def __init__(self, lowering: Context, number: int, section: Section) -> None:
        self._lowering = lowering
        self._kernel, self._section = lowering.kernel, section
        self._name = f"{self._kernel.work.symbol}.section{number}"
        self._padded_k = padded_k(lowering.plan, self._kernel)
        products = len(section.products)
        self._f = Function(
            f"internal void @{self._name}(ptr %args, {self._NUMBERS}) #0",
            f"{min(self._kernel.tile.columns, section.width)} of {section.width} "
            f"column{'s' * (section.width > 1)} for rows %first … %end: "
            f"{products} product{'s' * (products > 1)} and the epilogue.",
        )

    def write(self) -> None:
        """Add the function to the module."""
        write = {COLUMNS: self._columns, DOT: self._dots, TRANSPOSED: self._transposed}
        write[schedule_of(self._section)]()
        self._f.do("ret void")
        self._lowering.module.add(self._name, self._f)

    def _columns(self) -> None:
        f, rows = self._f, self._kernel.tile.rows
        numbers = self._panels()
        tiles = [
            f.let("tile", f"alloca [{rows * len(numbers)} x {VECTOR}], align 64")
            for _ in self._products
        ]
        weights = [[self._panel_at(p, number) for number in numbers] for p in self._products]
        count = self._panel_count(len(numbers))
        with self._row_tiles() as first:
            if self._kernel.tile.panels > 1:
                _prefetch_results(self._lowering, f, self._section, first)
            for product, panels_at, tile_at in zip(self._products, weights, tiles, strict=True):
                self._product(product, first, panels_at, tile_at, self._kernel.tile)
            with f.loop("panel", 0, count) as panel, f.loop("r", 0, rows) as loop:
                row = f.index("row", (first, 1), (loop.index, 1))
                position = f.index("position", (panel.index, rows), (loop.index, 1))
                sums = []
                for tile_at in tiles:
                    at = f.at(tile_at, VECTOR, position, "sums_at")
                    sums.append(f.let("sums", f"load {VECTOR}, ptr {at}, align 64"))
                column = f.index("column", (numbers[0], LANES), (panel.index, LANES))
                self._epilogue(SIXTEEN, row, column, sums)

    @contextmanager
    def _row_tiles(self) -> Iterator[str]:
        """Write the loop over tiles of rows; yield the first row of a tile."""
        f, rows = self._f, self._kernel.tile.rows
        with f.loop("tile_row", "%first", "%end", step=rows) as tile:
            first = tile.index
            if rows > 1:
                f.comment("the last tile overlaps the one before it, so that it ends where x does")
                last = f.let("last", f"sub i64 %end, {rows}")
                over = f.let("over", f"icmp sgt i64 {first}, {last}")
                first = f.let("first_row", f"select i1 {over}, i64 {last}, i64 {first}")
            yield first

    def _panels(self) -> list[str]:
        """Return the numbers of the tile's panels; each beyond the last is the last."""
        f, count = self._f, self._kernel.tile.panels
        first = f.index("first_panel", ("%task", count))
        if count == 1:
            return [first]
        self._lowering.module.declare("declare i64 @llvm.smin.i64(i64, i64)")
        last = panels(self._section) - 1
        numbers = [first]
        for panel in range(1, count):
            next_ = f.index("next_panel", (first, 1), (panel, 1))
            pair = f"i64 {next_}, i64 {last}"
            numbers.append(f.let("panel_number", f"call i64 @llvm.smin.i64({pair})"))
        return numbers

    def _panel_count(self, count: int) -> int | str:
        """Return how many of a tile's panels exist."""
        total = panels(self._section)
        if total % count == 0:
            return count
        f = self._f
        first = f.index("first_panel", ("%task", count))
        left = f.let("left", f"sub i64 {total}, {first}")
        return f.let("panel_count", f"call i64 @llvm.smin.i64(i64 {left}, i64 {count})")

    def _product(
        self, product: Node, first: str, panels_at: list[str], tile_at: str, tile: Tile
    ) -> None:
        """Write one product of a tile whose first row is `first`, to [panels, rows, 16]."""
        f, module, kernel = self._f, self._lowering.module, self._kernel
        plan, rows = self._lowering.plan, tile.rows
        weight = interleaved(plan, product.arg)
        x = self._lowering.argument(f, Slot("x"))
        x_at = f.at(x, "float", f.index("x_offset", (first, self._padded_k)), "x_at")
        if kernel.dot is not None and is_integer(plan, kernel, self._section, product):
            row_bytes = digits_bytes(self._padded_k, kernel.digits)
            integers = IntegerProduct(
                weight,
                kernel.dot.instruction,
                form_of(plan, kernel),
                tile,
                self._padded_k,
                row_bytes,
            )
            digits = self._lowering.argument(f, Slot("digits"))
            at = f.at(digits, "i8", f.index("digits_offset", (first, row_bytes)), "digits_at")
            pointers = ", ".join(f"ptr {p}" for p in [x_at, at, *panels_at, tile_at])
            f.do(f"call void {add_integer_product(module, integers)}({pointers})")
            return
        finite = plan.weight(product.arg).finite
        function = add_product(module, FloatProduct(weight, rows, self._padded_k, not finite))
        for panel, panel_at in enumerate(panels_at):
            at = f.at(tile_at, VECTOR, panel * rows, "sums_at")
            f.do(f"call void {function}(ptr {x_at}, ptr {panel_at}, ptr {at})")

    def _transposed(self) -> None:
        f, tile, products = self._f, self._kernel.tile, self._section.products
        most = band_rows(self._lowering.plan, self._kernel)
        writer = FewRows() if most is None else ManyRows(self._lowering.plan.target)
        # a slice that starts inside a chunk of K needs one chunk more
        chunks = tile.panels + any(p.start % LANES for p in products)
        capacity = -(-chunks // writer.chunks) * writer.chunks
        size = f"[{(most or tile.rows) * capacity} x {LONG_SUM}]"
        tiles = [f.let("tile", f"alloca {size}, align 64") for _ in products]

        def write(first: str, rows: int | str) -> None:
            for product, tile_at in zip(products, tiles, strict=True):
                plan, stride = self._lowering.plan, self._padded_k
                weight, early = interleaved(plan, product.arg), not plan.weight(product.arg).finite
                shape = TransposedProduct(
                    weight, tile.rows, capacity, stride, tile.panels, early, most
                )
                self._transposed_product(product, shape, writer, first, rows, tile_at)
            self._transposed_epilogue(first, rows, capacity, tiles)

        if most is None:
            with self._row_tiles() as first:
                write(first, tile.rows)
            return
        f.comment("fewer rows than a tile are multiplied again together with those before them")
        last = f.let("last", f"sub i64 %end, {tile.rows}")
        self._lowering.module.declare("declare i64 @llvm.smin.i64(i64, i64)")
        first = f.let("first_row", f"call i64 @llvm.smin.i64(i64 %first, i64 {last})")
        write(first, f.let("rows", f"sub i64 %end, {first}"))

    def _transposed_product(
        self,
        product: Node,
        shape: TransposedProduct,
        writer: StretchWriter,
        first: str,
        rows: int | str,
        tile_at: str,
    ) -> None:
        """Write one product of rows from `first` on, to [rows, capacity · 16]."""
        f, module, weight = self._f, self._lowering.module, shape.weight
        x = self._lowering.argument(f, Slot("x"))
        x_at = f.at(x, "float", f.index("x_offset", (first, self._padded_k)), "x_at")
        w = self._lowering.argument(f, Slot("weight", product.arg, INTERLEAVED16))
        panels, count = self._kernel.tile.panels, self._panel_count(self._kernel.tile.panels)
        chunk = f.index("chunk", ("%task", panels), (product.start // LANES, 1))
        if product.start % LANES:
            count = _with_one_more(module, f, count, chunk, weight.padded_k // LANES)
        function = add_transposed_product(module, shape, writer)
        pointers = f"ptr {x_at}, ptr {w}, ptr {tile_at}"
        f.do(f"call void {function}({pointers}, i64 {chunk}, i64 {count}, i64 {rows})")

    def _transposed_epilogue(
        self, first: str, rows: int | str, capacity: int, tiles: list[str]
    ) -> None:
        """Write the epilogue of products in [rows, capacity · 16]."""
        f, panels = self._f, self._kernel.tile.panels
        lanes = SIXTEEN if self._section.width > 1 else ONE
        count = self._panel_count(panels)
        with f.loop("panel", 0, count) as panel, f.loop("r", 0, rows) as loop:
            row = f.index("row", (first, 1), (loop.index, 1))
            column = f.index("column", ("%task", panels * LANES), (panel.index, LANES))
            start = f.index("start", (loop.index, capacity * LANES), (panel.index, LANES))
            sums = []
            for product, tile_at in zip(self._section.products, tiles, strict=True):
                position = f.index("position", (start, 1), (product.start % LANES, 1))
                at = f.at(tile_at, "float", position, "sums_at")
                sums.append(f.let("sums", f"load {lanes.f32}, ptr {at}, align 4"))
            self._epilogue(lanes, row, column, sums)

    def _dots(self) -> None:
        f, width = self._f, self._section.width
        columns = self._kernel.tile.columns
        x = self._lowering.argument(f, Slot("x"))
        start = f.index("start", ("%task", columns))
        stop = f.let("stop", f"add i64 {start}, {columns}")
        over = f.let("over", f"icmp sgt i64 {stop}, {width}")
        stop = f.let("stop", f"select i1 {over}, i64 {width}, i64 {stop}")
        with f.loop("column", start, stop) as column, f.loop("row", "%first", "%end") as row:
            x_at = f.at(x, "float", f.index("x_offset", (row.index, self._padded_k)), "x_at")
            sums = []
            for product in self._products:
                spec = self._lowering.plan.weight(product.arg)
                fmt = spec.block_format
                function = add_dot(self._lowering.module, fmt, spec.k, not spec.finite)
                base = self._lowering.argument(f, Slot("weight", product.arg, GGUF))
                number = f.index("w_column", (column.index, 1), (product.start, 1))
                of_expert = self._expert_offset(product, GGUF)
                offset = f.index("w_offset", (number, fmt.column_bytes(spec.k)), *of_expert)
                w_at = f.at(base, "i8", offset, "w_at")
                sums.append(f.let("dot", f"call float {function}(ptr {x_at}, ptr {w_at})"))
            self._epilogue(ONE, row.index, column.index, sums)

    def _epilogue(self, lanes: Lanes, place: str, column: str, sums: list[str]) -> None:
        f, section = self._f, self._section
        values = CpuValues(self._lowering, f, self._row_at(place), self._kernel.work.buffers)
        mask = tail_mask(f, column, section.width) if lanes.count > 1 else None
        factors = self._lowering.argument(f, Slot("row_factors"))
        factor_at = f.at(factors, "float", place, "row_factor_at")
        factor = f.let("row_factor", f"load float, ptr {factor_at}, align 4")
        if lanes.count > 1:
            factor = broadcast(f, "float", factor)
        products = {
            p.id: f.let("product", f"fmul {lanes.f32} {total}, {factor}")
            for p, total in zip(self._products, sums, strict=True)
        }
        # the graph treats products of one column as scalars
        values.scalars.update({p.id: products[p.id] for p in self._products if p.width == 1})
        values.start(lanes, column, mask, products)
        for store in section.stores:
            values.store(store, values.buffer_row(store))

    @property
    def _products(self) -> tuple[Node, ...]:
        return self._section.products

    def _panel_at(self, product: Node, number: str) -> str:
        """Return the address of a panel of a product's weight."""
        f = self._f
        base = self._lowering.argument(f, Slot("weight", product.arg, INTERLEAVED16))
        panel_bytes = interleaved(self._lowering.plan, product.arg).panel_bytes
        first_bytes = product.start // LANES * panel_bytes
        of_expert = self._expert_offset(product, INTERLEAVED16)
        offset = f.index("w_offset", (number, panel_bytes), (first_bytes, 1), *of_expert)
        return f.at(base, "i8", offset, "w_at")

    def _row_at(self, place: str) -> str:
        """Return the row of results whose x has a place among the rows of x: the same number."""
        return place

    def _expert_offset(self, product: Node, layout: str) -> list[tuple[str | int, int]]:
        """Return the terms of a weight's offset that its expert adds."""
        return []


def _prefetch_results(lowering: Context, f: Function, section: Section, first: str) -> None:
    """Prefetch the cache lines of a tile's results: stores would wait for them, in order."""
    work, tile = lowering.kernel.work, lowering.kernel.tile
    lowering.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    with f.loop("r", 0, tile.rows) as loop:
        row = f.index("row", (first, 1), (loop.index, 1))
        values = CpuValues(lowering, f, row, work.buffers)
        for store in section.stores:
            row_at = values.buffer_row(store)
            for panel in range(tile.panels):
                column = f.index("column", ("%task", tile.columns), (panel * LANES, 1))
                at = f.at(row_at, STORED[store.buffer.float_type], column, "result_at")
                f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 1, i32 3, i32 1)  ; to write")


def _with_one_more(module: Module, f: Function, count: int | str, chunk: str, chunks: int) -> str:
    """Return the chunks to multiply from `chunk` on: one more than `count`, if there is one."""
    module.declare("declare i64 @llvm.smin.i64(i64, i64)")
    left = f.let("left", f"sub i64 {chunks}, {chunk}")
    more = f.index("more", (count, 1), (1, 1))
    return f.let("chunk_count", f"call i64 @llvm.smin.i64(i64 {more}, i64 {left})")
