"""Lower a planned kernel to the text of one LLVM module. A pure function.

The module's entry is `void kernel(ptr args)`; args points to 8-byte slots in the order of
`CpuKernel.slots()`. The entry hands the rows phase, then the columns phase to the thread pool as
ranges of tasks. A task is a row of x, or the columns of a register tile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from q4jit.cpu.columns import SectionWriter
from q4jit.cpu.expert_columns import ExpertSectionWriter
from q4jit.cpu.gguf_rows import add_column, add_row
from q4jit.cpu.halves import STORED
from q4jit.cpu.llvm_text import Function, Module
from q4jit.cpu.products import add_dequantize
from q4jit.cpu.rows import RowWriter
from q4jit.cpu.schedule import (
    BUCKET_WORDS,
    CpuKernel,
    CpuPlan,
    band_rows,
    interleaved,
    panels,
)
from q4jit.cpu.values import Context
from q4jit.floats import FloatType
from q4jit.frontend.graph import Node
from q4jit.plan.kernels import Section, Slot, Source, Store
from q4jit.weights.layouts import GGUF, INTERLEAVED16, LANES

# Work of about two microseconds, the least that is worth handing to another thread: bytes of
# weights that are read once, and floats of a row.
_CHUNK_BYTES: Final = 32 << 10
_CHUNK_FLOATS: Final = 8 << 10
# Few rows read weights in long runs, up to this many bytes, but in at least this many chunks.
_STREAM_BYTES: Final = 256 << 10
_FEW_CHUNKS: Final = 4


def lower(plan: CpuPlan, kernel: CpuKernel) -> Source:
    """Return the LLVM IR of a kernel. The same plan gives the same text in every process."""
    lowering = _Lowering(plan, kernel, Module(plan.target))
    return Source(kernel.work.symbol, plan.target, lowering.text(), ".ll")


@dataclass(frozen=True)
class _Phase:
    """The tasks of a phase.

    Attributes:
        name: the function that runs a range of them, after the kernel's symbol.
        count: the number of tasks per band of rows.
        rows: rows of x in a band; None if one band has all rows.
        chunk: tasks that a thread takes at a time.
    """

    name: str
    count: int
    rows: int | None
    chunk: int


class _Lowering(Context):
    """Writes the phases of a kernel, and the entry that runs them."""

    def text(self) -> str:
        self.module.add_struct(self.slots_struct())
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
        title = f"{kernel.work.name} for {self.plan.target}, {kernel.rows_class}, made by q4jit"
        return "\n".join([title, *self.plan.describe(kernel)])

    # --- the entry and its phases -----------------------------------------------------------

    def _entry(self, phases: list[_Phase]) -> None:
        _add_parallel_for(self.module)
        symbol = self.kernel.work.symbol
        f = Function(f"void @{symbol}(ptr %args) #0", "The kernel.")
        pool = self.argument(f, Slot("pool"))
        rows = self.argument(f, Slot("m"))
        for phase in phases:
            if phase.name == "columns" and self.kernel.work.chosen is not None:
                bands = self.expert_argument(f, "buckets")
            else:
                bands = self._bands(f, rows, phase.rows)
            n = f.index("task_count", (bands, phase.count))
            f.do(
                f"call void @parallel_for(ptr {pool}, ptr @{symbol}.{phase.name}, ptr %args, "
                f"i64 {n}, i64 {phase.chunk})"
            )
        f.do("ret void")
        self.module.add(symbol, f)

    def _bands(self, f: Function, m: str, rows: int | None) -> str:
        """Return how many bands of `rows` rows there are."""
        if rows is None or rows == 1:
            return m if rows == 1 else "1"
        rounded = f.index("rounded_up", (m, 1), (rows - 1, 1))
        return f.let("bands", f"udiv i64 {rounded}, {rows}")

    @contextmanager
    def _tasks_of(self, phase: str, doc: str = "") -> Iterator[Function]:
        """Write the function that runs a phase's tasks %from … %to."""
        name = f"{self.kernel.work.symbol}.{phase}"
        f = Function(f"internal void @{name}(ptr %args, i64 %from, i64 %to) #0", doc)
        yield f
        f.do("ret void")
        self.module.add(name, f)

    def _dequantize_phase(self, store: Store) -> _Phase:
        weight = interleaved(self.plan, store.node.arg)
        dequantize = add_dequantize(self.module, weight, store.buffer.float_type)
        with self._tasks_of("columns") as f:
            out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
            w = self.argument(f, Slot("weight", store.node.arg, INTERLEAVED16))
            with f.loop("panel", "%from", "%to") as loop:
                at = f.at(w, "i8", f.index("w_offset", (loop.index, weight.panel_bytes)), "w_at")
                column = f.index("column", (loop.index, LANES))
                f.do(f"call void {dequantize}(ptr {at}, ptr {out}, i64 {column})")
        chunk = max(1, _CHUNK_BYTES // (4 * LANES * weight.k))
        return _Phase("columns", weight.panels, None, chunk)

    def _lookup_phase(self, store: Store) -> _Phase:
        (ids_node,), arg = store.node.operands, store.node.arg
        k, float_type = self.plan.weight(arg).k, store.buffer.float_type
        what = "GGUF row" if self.kernel.decoded_layout == GGUF else "column of a panel"
        doc = f"One {what} for each id. The caller has checked the ids."
        with self._tasks_of("rows", doc) as f:
            ids = self.argument(f, Slot("ids", ids_node.arg))
            w = self.argument(f, Slot("weight", arg, self.kernel.decoded_layout))
            out = self.argument(f, Slot(store.buffer.kind, store.buffer.index))
            with f.loop("row", "%from", "%to") as loop:
                id_at = f.at(ids, "i64", loop.index, "id_at")
                number = f.let("id", f"load i64, ptr {id_at}, align 8")
                decode, arguments = self._row_decoder(f, arg, w, number, float_type)
                offset = f.index("out_offset", (loop.index, k))
                out_at = f.at(out, STORED[float_type], offset, "out_at")
                f.do(f"call void {decode}({arguments}, ptr {out_at})")
        return _Phase("rows", 1, 1, max(1, _CHUNK_FLOATS // k))

    def _row_decoder(
        self, f: Function, arg: int, w: str, number: str, float_type: FloatType
    ) -> tuple[str, str]:
        """Return the function that decodes a row of the weight at w, and its first arguments."""
        spec = self.plan.weight(arg)
        if self.kernel.decoded_layout == GGUF:
            fmt = spec.block_format
            decode = add_row(self.module, fmt, spec.k, float_type)
            offset = f.index("w_offset", (number, fmt.column_bytes(spec.k)))
            return decode, f"ptr {f.at(w, 'i8', offset, 'w_at')}"
        weight = interleaved(self.plan, arg)
        decode = add_column(self.module, weight, float_type)
        panel, column = f.divided(number, LANES, "panel", "column")
        w_at = f.at(w, "i8", f.index("w_offset", (panel, weight.panel_bytes)), "w_at")
        return decode, f"ptr {w_at}, i64 {column}"

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
            writer = SectionWriter if self.kernel.work.chosen is None else ExpertSectionWriter
            writer(self, i, section).write()
        count, rows = sum(map(self._tasks, sections)), band_rows(self.plan, self.kernel)
        doc = "Tasks are numbered through all sections"
        doc += "." if rows is None else f", and again for each band of {rows} rows of x."
        if self.kernel.work.chosen is not None:
            doc = doc.removesuffix(".") + ", and again for each bucket of rows of one expert."
        with self._tasks_of("columns", doc) as f:
            m = self.argument(f, Slot("m"))
            with f.loop("number", "%from", "%to") as loop:
                task, first, end, more = loop.index, "0", m, ""
                if self.kernel.work.chosen is not None:
                    task, first, end, more = self._bucket_of(f, loop.index, count)
                if rows is not None:
                    self.module.declare("declare i64 @llvm.smin.i64(i64, i64)")
                    band = f.let("band", f"udiv i64 {loop.index}, {count}")
                    task = f.let("task", f"urem i64 {loop.index}, {count}")
                    first = f.index("first", (band, rows))
                    beyond = f.index("beyond", (first, 1), (rows, 1))
                    end = f.let("end", f"call i64 @llvm.smin.i64(i64 {m}, i64 {beyond})")
                self._call_section(f, task, f"i64 {first}, i64 {end}{more}")
        task_bytes = max(sum(map(self._panel_bytes, s.products)) for s in sections)
        chunk = self._chunk(count, task_bytes * self.kernel.tile.panels)
        return _Phase("columns", count, rows, chunk)

    def _bucket_of(self, f: Function, number: str, count: int) -> tuple[str, str, str, str]:
        """Return the task of a number, the first row of its bucket, its end, and its expert."""
        bucket = f.let("bucket", f"udiv i64 {number}, {count}")
        task = f.let("task", f"urem i64 {number}, {count}")
        buckets, words = self.expert_argument(f, "bucket_list"), []
        for i, hint in enumerate(("expert", "first", "end")):
            at = f.at(buckets, "i64", f.index("word", (bucket, BUCKET_WORDS), (i, 1)), f"{hint}_at")
            words.append(f.let(hint, f"load i64, ptr {at}, align 8"))
        expert, first, end = words
        return task, first, end, f", i64 {expert}"

    def _call_section(self, f: Function, task: str, rows: str) -> None:
        """Call the function of the section that a task belongs to. rows: its other arguments."""
        work, done, before = self.kernel.work, f.fresh("next"), 0
        for i, section in enumerate(work.sections):
            own = f.let("own_task", f"sub i64 {task}, {before}") if before else task
            inside, after = f.fresh(f"section{i}"), f.fresh(f"after{i}")
            below = f.let("below", f"icmp slt i64 {own}, {self._tasks(section)}")
            f.do(f"br i1 {below}, label %{inside}, label %{after}")
            f.label(inside)
            arguments = f"ptr %args, i64 {own}, {rows}"
            f.do(f"call void @{work.symbol}.section{i}({arguments})")
            f.do(f"br label %{done}")
            f.label(after)
            before += self._tasks(section)
        f.do(f"br label %{done}")
        f.label(done)

    def _panel_bytes(self, product: Node) -> int:
        """Return the bytes of the weights that a panel of the result reads."""
        weight = interleaved(self.plan, product.arg)
        if not product.transposed:
            return weight.panel_bytes
        return weight.panels * weight.panel_bytes * LANES // weight.padded_k

    def _tasks(self, section: Section) -> int:
        """Return the number of a section's tasks; each has the columns of a tile."""
        return -(-panels(section) // self.kernel.tile.panels)

    def _chunk(self, count: int, task_bytes: int) -> int:
        """Return how many tasks a thread takes at a time."""
        smallest = max(1, _CHUNK_BYTES // task_bytes)
        if self.kernel.tile.panels > 1:
            return smallest
        # few rows stream weights, and what a thread prefetches beyond its chunk's end is wasted
        largest = max(1, _STREAM_BYTES // task_bytes)
        return min(max(smallest, -(-count // _FEW_CHUNKS)), largest)


def _add_parallel_for(module: Module) -> None:
    f = Function(
        "internal void @parallel_for(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0",
        "Run task(args, from, to) over 0 … n, on the pool's threads if n is above a chunk.\n"
        "The pool's first field is the address of its function run(pool, task, args, n, chunk).",
    )
    alone = f.let("alone", "icmp eq ptr %pool, null")
    small = f.let("small", "icmp sle i64 %n, %chunk")
    serial = f.let("is_serial", f"or i1 {alone}, {small}")
    f.do(f"br i1 {serial}, label %serial, label %threads")
    f.label("serial")
    f.do("call void %task(ptr %args, i64 0, i64 %n)")
    f.do("ret void")
    f.label("threads")
    run = f.let("run", "load ptr, ptr %pool, align 8")
    f.do(f"call void {run}(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk)")
    f.do("ret void")
    module.add("parallel_for", f)
