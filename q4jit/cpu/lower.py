"""Lowering to LLVM IR: one planned kernel becomes the text of one module. A pure function.

The module's entry is `void kernel(ptr args)`; args points to 8-byte slots in the order of
`CpuKernel.slots()`. It hands the rows phase, then the columns phase to the thread pool as ranges of
tasks: a row of x, and 16 columns of a section.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.integers import IntegerProduct, add_integer_product
from q4jit.cpu.llvm_text import (
    ONE,
    SIXTEEN,
    VECTOR,
    Function,
    Lanes,
    Module,
    splat_value,
    tail_mask,
)
from q4jit.cpu.products import Product, add_dequantize, add_dot, add_product, add_row
from q4jit.cpu.rows import RowWriter
from q4jit.cpu.schedule import (
    COLUMNS,
    CpuKernel,
    CpuPlan,
    digits_bytes,
    groups,
    interleaved,
    is_integer,
    padded_k,
    schedule_of,
)
from q4jit.cpu.values import Context, Values
from q4jit.frontend.graph import Node
from q4jit.plan.kernels import Section, Slot, Source, Store
from q4jit.weights.layouts import GGUF, INTERLEAVED16, LANES

# The work that is worth another thread's attention, about two microseconds: bytes of weights
# read once, and floats of a row.
_CHUNK_BYTES: Final = 32 << 10
_STREAM_BYTES: Final = 256 << 10
_FEW_CHUNKS: Final = 4
_CHUNK_FLOATS: Final = 8 << 10

# Many rows are multiplied in blocks whose x stays in a second-level cache (`i8` took 8 % less than
# all rows at once), but not so few that weights come from memory too often.
_BLOCK_BYTES: Final = 1 << 20
_BLOCK_ROWS: Final = 48


def lower(plan: CpuPlan, kernel: CpuKernel) -> Source:
    """The LLVM IR of a kernel: the same text for the same plan, whenever and wherever."""
    lowering = _Lowering(plan, kernel, Module(plan.target))
    return Source(kernel.work.symbol, plan.target, lowering.text(), ".ll")


@dataclass(frozen=True)
class _Phase:
    """Tasks of a function, `count` for each `rows` rows of x; None: whatever their number."""

    function: str
    count: int
    rows: int | None
    chunk: int


class _Lowering(Context):
    """Writes the phases of a kernel, and the entry that runs them."""

    def text(self) -> str:
        kernel, module = self.kernel, self.module
        phases: list[_Phase] = []
        if kernel.work.decoded is not None:
            whole = kernel.work.decoded.node.op == "dequantize"
            phase = self._dequantize_phase if whole else self._lookup_phase
            phases.append(phase(kernel.work.decoded))
        if kernel.work.rows or kernel.work.x is not None:
            phases.append(self._rows_phase())
        if kernel.work.sections:
            phases.append(self._columns_phase())
        self._entry(phases)
        return module.text(self._comment())

    def _comment(self) -> str:
        kernel = self.kernel
        slots = ", ".join(f"{i} {self.label(slot)}" for i, slot in enumerate(kernel.slots()))
        title = f"{kernel.work.name} for {self.plan.target}, {kernel.rows_class}, made by q4jit"
        return "\n".join([title, *self.plan.describe(kernel), f"args: {slots}"])

    # --- the entry and its phases -----------------------------------------------------------

    def _entry(self, phases: list[_Phase]) -> None:
        _add_parallel_for(self.module)
        f = Function(f"void @{self.kernel.work.symbol}(ptr %args) #0", "The kernel.")
        pool = self.argument(f, Slot("pool"))
        rows = self.argument(f, Slot("m"))
        for phase in phases:
            n = f.index("n", (self._blocks(f, rows, phase.rows), phase.count))
            f.do(
                f"call void @parallel_for(ptr {pool}, ptr {phase.function}, ptr %args, i64 {n}, "
                f"i64 {phase.chunk})"
            )
        f.do("ret void")
        self.module.add(self.kernel.work.symbol, f)

    def _blocks(self, f: Function, m: str, rows: int | None) -> str:
        """How many blocks of `rows` rows there are."""
        if rows is None or rows == 1:
            return m if rows == 1 else "1"
        more = f.index("more", (m, 1), (rows - 1, 1))
        return f.let("blocks", f"udiv i64 {more}, {rows}")

    def _dequantize_phase(self, store: Store) -> _Phase:
        arg = store.node.arg
        weight = interleaved(self.plan, arg)
        group = add_dequantize(self.module, weight)
        f = Function(
            f"internal void @{self.kernel.work.symbol}.columns(ptr %args, i64 %from, i64 %to) #0"
        )
        out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
        w = self.argument(f, Slot("weight", arg, INTERLEAVED16))
        with f.loop("group", "%from", "%to") as loop:
            at = f.at(w, "i8", f.index("group_at", (loop.index, weight.group_bytes)), "w_at")
            column = f.index("column", (loop.index, LANES))
            f.do(f"call void {group}(ptr {at}, ptr {out}, i64 {column})")
        f.do("ret void")
        self.module.add(f"{self.kernel.work.symbol}.columns", f)
        chunk = max(1, _CHUNK_BYTES // (4 * LANES * weight.k))
        return _Phase(f"@{self.kernel.work.symbol}.columns", weight.groups, None, chunk)

    def _lookup_phase(self, store: Store) -> _Phase:
        (ids_node,), arg = store.node.operands, store.node.arg
        spec = self.plan.weight(arg)
        fmt = spec.block_format
        decode = add_row(self.module, fmt, spec.k)
        name = f"{self.kernel.work.symbol}.rows"
        f = Function(
            f"internal void @{name}(ptr %args, i64 %from, i64 %to) #0",
            "One GGUF row for each id; whoever calls has checked the ids.",
        )
        ids = self.argument(f, Slot("ids", ids_node.arg))
        w = self.argument(f, Slot("weight", arg, GGUF))
        out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
        with f.loop("row", "%from", "%to") as loop:
            number = f.let("id", f"load i64, ptr {f.at(ids, 'i64', loop.index, 'id_at')}, align 8")
            w_at = f.at(w, "i8", f.index("w_off", (number, fmt.row_bytes(spec.k))), "w_at")
            out_at = f.at(out, "float", f.index("out_off", (loop.index, spec.k)), "out_at")
            f.do(f"call void {decode}(ptr {w_at}, ptr {out_at})")
        f.do("ret void")
        self.module.add(name, f)
        return _Phase(f"@{name}", 1, 1, max(1, _CHUNK_FLOATS // spec.k))

    def _rows_phase(self) -> _Phase:
        RowWriter(self).write()
        self._task("row", f"@{self.kernel.work.symbol}.row")
        widths = [s.node.width for s in self.kernel.work.rows]
        widths += [self.kernel.work.x.width] if self.kernel.work.x is not None else []
        chunk = max(1, _CHUNK_FLOATS // max(widths))
        return _Phase(f"@{self.kernel.work.symbol}.rows", 1, 1, chunk)

    def _task(self, what: str, function: str) -> None:
        name = f"{self.kernel.work.symbol}.{what}s"
        f = Function(f"internal void @{name}(ptr %args, i64 %from, i64 %to) #0")
        with f.loop(what, "%from", "%to") as loop:
            f.do(f"call void {function}(ptr %args, i64 {loop.index})")
        f.do("ret void")
        self.module.add(name, f)

    def _columns_phase(self) -> _Phase:
        for i, section in enumerate(self.kernel.work.sections):
            _SectionWriter(self, i, section).write()
        count, rows = sum(map(self._tasks, self.kernel.work.sections)), self._block_rows()
        name = f"{self.kernel.work.symbol}.columns"
        f = Function(
            f"internal void @{name}(ptr %args, i64 %from, i64 %to) #0",
            "Tasks are numbered through the sections"
            + ("." if rows is None else f", and again for each {rows} rows of x."),
        )
        m = self.argument(f, Slot("m"))
        with f.loop("number", "%from", "%to") as loop:
            task, first, end = loop.index, "0", m
            if rows is not None:
                self.module.declare("declare i64 @llvm.smin.i64(i64, i64)")
                block = f.let("block", f"udiv i64 {loop.index}, {count}")
                task = f.let("task", f"urem i64 {loop.index}, {count}")
                first = f.index("first", (block, rows))
                beyond = f.index("beyond", (first, 1), (rows, 1))
                end = f.let("end", f"call i64 @llvm.smin.i64(i64 {m}, i64 {beyond})")
            self._call_section(f, task, first, end)
        f.do("ret void")
        self.module.add(name, f)
        group_bytes = max(
            sum(interleaved(self.plan, p.arg).group_bytes for p in s.products)
            for s in self.kernel.work.sections
        )
        chunk = self._chunk(count, group_bytes * self.kernel.tile.groups)
        return _Phase(f"@{name}", count, rows, chunk)

    def _call_section(self, f: Function, task: str, first: str, end: str) -> None:
        """Call the function of the section that a task belongs to, for rows first … end."""
        done, before = f.fresh("next"), 0
        for i, section in enumerate(self.kernel.work.sections):
            mine = f.let("mine", f"sub i64 {task}, {before}") if before else task
            here, other = f.fresh("here"), f.fresh("other")
            inside = f.let("inside", f"icmp slt i64 {mine}, {self._tasks(section)}")
            f.do(f"br i1 {inside}, label %{here}, label %{other}")
            f.label(here)
            arguments = f"ptr %args, i64 {mine}, i64 {first}, i64 {end}"
            f.do(f"call void @{self.kernel.work.symbol}.section{i}({arguments})")
            f.do(f"br label %{done}")
            f.label(other)
            before += self._tasks(section)
        f.do(f"br label %{done}")
        f.label(done)

    def _block_rows(self) -> int | None:
        """Rows of x that go through all columns together; None: all rows."""
        tile = self.kernel.tile
        if tile.groups == 1:
            return None
        row_bytes = digits_bytes(padded_k(self.plan, self.kernel), self.kernel.limbs)
        return max(_BLOCK_BYTES // row_bytes, _BLOCK_ROWS) // tile.rows * tile.rows

    def _tasks(self, section: Section) -> int:
        """Parts of a section that one thread computes at a time: a tile's columns."""
        return -(-groups(section) // self.kernel.tile.groups)

    def _chunk(self, count: int, task_bytes: int) -> int:
        """Tasks that a thread takes at a time."""
        smallest = max(1, _CHUNK_BYTES // task_bytes)
        if self.kernel.tile.groups > 1:
            return smallest
        # few rows stream weights: what is prefetched beyond a chunk's end is lost on others
        largest = max(1, _STREAM_BYTES // task_bytes)
        return min(max(smallest, -(-count // _FEW_CHUNKS)), largest)


def _add_parallel_for(module: Module) -> None:
    f = Function(
        "internal void @parallel_for(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0",
        "task(args, from, to) over 0 … n, by the pool's threads where there is more than a chunk.\n"
        "A pool begins with the address of its own run(pool, task, args, n, chunk).",
    )
    alone = f.let("alone", "icmp eq ptr %pool, null")
    small = f.let("small", "icmp sle i64 %n, %chunk")
    here = f.let("here", f"or i1 {alone}, {small}")
    f.do(f"br i1 {here}, label %serial, label %threads")
    f.label("serial")
    f.do("call void %task(ptr %args, i64 0, i64 %n)")
    f.do("ret void")
    f.label("threads")
    run = f.let("run", "load ptr, ptr %pool, align 8")
    f.do(f"call void {run}(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk)")
    f.do("ret void")
    module.add("parallel_for", f)


# --- the columns phase ------------------------------------------------------------------------


class _SectionWriter:
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
            values = Values(self._lowering, f, row, self._kernel.work.buffers)
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
                weight, kernel.dot, kernel.limbs, rows, len(weights), self._padded_k, stride
            )
            digits = self._lowering.argument(f, Slot("digits"))
            at = f.at(digits, "i8", f.index("digits_off", (first, stride)), "digits_at")
            pointers = ", ".join(f"ptr {p}" for p in [x_at, at, *weights, out])
            f.do(f"call void {add_integer_product(module, integers)}({pointers})")
            return
        finite = plan.weight(product.arg).finite
        function = add_product(module, Product(weight, rows, self._padded_k, not finite))
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
                offset = f.index("w_off", (number, fmt.row_bytes(spec.k)))
                w_at = f.at(base, "i8", offset, "w_at")
                sums.append(f.let("dot", f"call float {function}(ptr {x_at}, ptr {w_at})"))
            self._epilogue(ONE, row.index, column.index, sums)

    def _epilogue(self, lanes: Lanes, row: str, column: str, sums: list[str]) -> None:
        f, section = self._f, self._section
        values = Values(self._lowering, f, row, self._kernel.work.buffers)
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
        group_bytes = interleaved(self._lowering.plan, product.arg).group_bytes
        first = product.start // LANES * group_bytes
        offset = f.index("w_off", (group, group_bytes), (first, 1))
        return f.at(base, "i8", offset, "w_at")
