"""Lowering to LLVM IR: one planned kernel becomes the text of one module. A pure function.

The module's entry is `void kernel(ptr args)`; args points to 8-byte slots in the order of
`CpuKernel.slots()`. It hands the rows phase, then the columns phase to the thread pool as ranges of
tasks: a row of x, and 16 columns of a section.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from q4jit.cpu.columns import SectionWriter
from q4jit.cpu.gguf_rows import add_row
from q4jit.cpu.llvm_text import Function, Module
from q4jit.cpu.products import add_dequantize
from q4jit.cpu.rows import RowWriter
from q4jit.cpu.schedule import CpuKernel, CpuPlan, digits_bytes, groups, interleaved, padded_k
from q4jit.cpu.values import Context
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
    """Tasks of the function `name`, `count` for each `rows` rows of x; None: however many.

    chunk: tasks that a thread takes at a time.
    """

    name: str
    count: int
    rows: int | None
    chunk: int


class _Lowering(Context):
    """Writes the phases of a kernel, and the entry that runs them."""

    def text(self) -> str:
        work = self.kernel.work
        phases: list[_Phase] = []
        if work.decoded is not None:
            whole = work.decoded.node.op == "dequantize"
            phase = self._dequantize_phase if whole else self._lookup_phase
            phases.append(phase(work.decoded))
        if work.rows or work.x is not None:
            phases.append(self._rows_phase())
        if work.sections:
            phases.append(self._columns_phase())
        self._entry(phases)
        return self.module.text(self._comment())

    def _comment(self) -> str:
        kernel = self.kernel
        slots = ", ".join(f"{i} {self.label(slot)}" for i, slot in enumerate(kernel.slots()))
        title = f"{kernel.work.name} for {self.plan.target}, {kernel.rows_class}, made by q4jit"
        return "\n".join([title, *self.plan.describe(kernel), f"args: {slots}"])

    # --- the entry and its phases -----------------------------------------------------------

    def _entry(self, phases: list[_Phase]) -> None:
        _add_parallel_for(self.module)
        symbol = self.kernel.work.symbol
        f = Function(f"void @{symbol}(ptr %args) #0", "The kernel.")
        pool = self.argument(f, Slot("pool"))
        rows = self.argument(f, Slot("m"))
        for phase in phases:
            n = f.index("n", (self._blocks(f, rows, phase.rows), phase.count))
            f.do(
                f"call void @parallel_for(ptr {pool}, ptr @{symbol}.{phase.name}, ptr %args, "
                f"i64 {n}, i64 {phase.chunk})"
            )
        f.do("ret void")
        self.module.add(symbol, f)

    def _blocks(self, f: Function, m: str, rows: int | None) -> str:
        """How many blocks of `rows` rows there are."""
        if rows is None or rows == 1:
            return m if rows == 1 else "1"
        more = f.index("more", (m, 1), (rows - 1, 1))
        return f.let("blocks", f"udiv i64 {more}, {rows}")

    @contextmanager
    def _tasks_of(self, phase: str, doc: str = "") -> Iterator[Function]:
        """Write the function of a phase's tasks %from … %to."""
        name = f"{self.kernel.work.symbol}.{phase}"
        f = Function(f"internal void @{name}(ptr %args, i64 %from, i64 %to) #0", doc)
        yield f
        f.do("ret void")
        self.module.add(name, f)

    def _dequantize_phase(self, store: Store) -> _Phase:
        weight = interleaved(self.plan, store.node.arg)
        group = add_dequantize(self.module, weight)
        with self._tasks_of("columns") as f:
            out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
            w = self.argument(f, Slot("weight", store.node.arg, INTERLEAVED16))
            with f.loop("group", "%from", "%to") as loop:
                at = f.at(w, "i8", f.index("group_at", (loop.index, weight.panel_bytes)), "w_at")
                column = f.index("column", (loop.index, LANES))
                f.do(f"call void {group}(ptr {at}, ptr {out}, i64 {column})")
        chunk = max(1, _CHUNK_BYTES // (4 * LANES * weight.k))
        return _Phase("columns", weight.panels, None, chunk)

    def _lookup_phase(self, store: Store) -> _Phase:
        (ids_node,), arg = store.node.operands, store.node.arg
        k, fmt = self.plan.weight(arg).k, self.plan.weight(arg).block_format
        decode = add_row(self.module, fmt, k)
        doc = "One GGUF row for each id; whoever calls has checked the ids."
        with self._tasks_of("rows", doc) as f:
            ids = self.argument(f, Slot("ids", ids_node.arg))
            w = self.argument(f, Slot("weight", arg, GGUF))
            out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
            with f.loop("row", "%from", "%to") as loop:
                id_at = f.at(ids, "i64", loop.index, "id_at")
                number = f.let("id", f"load i64, ptr {id_at}, align 8")
                w_at = f.at(w, "i8", f.index("w_off", (number, fmt.column_bytes(k))), "w_at")
                out_at = f.at(out, "float", f.index("out_off", (loop.index, k)), "out_at")
                f.do(f"call void {decode}(ptr {w_at}, ptr {out_at})")
        return _Phase("rows", 1, 1, max(1, _CHUNK_FLOATS // k))

    def _rows_phase(self) -> _Phase:
        work = self.kernel.work
        RowWriter(self).write()
        with self._tasks_of("rows") as f, f.loop("row", "%from", "%to") as loop:
            f.do(f"call void @{work.symbol}.row(ptr %args, i64 {loop.index})")
        widths = [s.node.width for s in work.rows]
        widths += [work.x.width] if work.x is not None else []
        return _Phase("rows", 1, 1, max(1, _CHUNK_FLOATS // max(widths)))

    def _columns_phase(self) -> _Phase:
        sections = self.kernel.work.sections
        for i, section in enumerate(sections):
            SectionWriter(self, i, section).write()
        count, rows = sum(map(self._tasks, sections)), self._block_rows()
        doc = "Tasks are numbered through the sections"
        doc += "." if rows is None else f", and again for each {rows} rows of x."
        with self._tasks_of("columns", doc) as f:
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
        panel_bytes = max(
            sum(interleaved(self.plan, p.arg).panel_bytes for p in s.products) for s in sections
        )
        chunk = self._chunk(count, panel_bytes * self.kernel.tile.groups)
        return _Phase("columns", count, rows, chunk)

    def _call_section(self, f: Function, task: str, first: str, end: str) -> None:
        """Call the function of the section that a task belongs to, for rows first … end."""
        work, done, before = self.kernel.work, f.fresh("next"), 0
        for i, section in enumerate(work.sections):
            mine = f.let("mine", f"sub i64 {task}, {before}") if before else task
            here, other = f.fresh("here"), f.fresh("other")
            inside = f.let("inside", f"icmp slt i64 {mine}, {self._tasks(section)}")
            f.do(f"br i1 {inside}, label %{here}, label %{other}")
            f.label(here)
            arguments = f"ptr %args, i64 {mine}, i64 {first}, i64 {end}"
            f.do(f"call void @{work.symbol}.section{i}({arguments})")
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
