"""Write products with `w.T` in LLVM IR: y [M, N] times the transpose of w [K, N], as floats.

They read the layout `interleaved16` of `x @ w`, so a panel of w holds 16 elements of each sum over
N, and a panel of the result is a chunk of K. Sums are divided into stretches of panels, whose sums
a writer computes: `transposed_few` for few rows, `transposed_many` for many.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from q4jit.cpu.fields import CHUNK, Fields
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.long_sums import read_long, write_add
from q4jit.weights.layouts import CACHE_LINE_BYTES, Interleaved

LONG_SUM: Final = f"[2 x {VECTOR}]"
"""LLVM's type of a sum: its total, and what rounding took from it."""


@dataclass(frozen=True)
class TransposedProduct:
    """Rows of y times some rows of a weight.

    Attributes:
        weight: the layout of the weight.
        rows: rows of y in a register tile.
        capacity: the most chunks of K, a multiple of the writer's.
        y_stride: floats between rows of y.
        task_chunks: chunks of K from one task to the next.
        early_scale: whether each element is multiplied by its scale first (see `FloatProduct`).
        most_rows: the most rows of y; None if it is always `rows`.
    """

    weight: Interleaved
    rows: int
    capacity: int
    y_stride: int
    task_chunks: int
    early_scale: bool
    most_rows: int | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        weight, early = self.weight, "_early" if self.early_scale else ""
        shape = f"k{weight.k}_n{weight.n}_rows{self.rows}_chunks{self.capacity}"
        return f"{weight.fmt.name.lower()}_t_{shape}{early}"


class StretchWriter(Protocol):
    """Writes the sums of a stretch of panels.

    Attributes:
        panels: the most panels of a stretch.
        chunks: the chunks of K that are multiplied together.
    """

    panels: int
    chunks: int

    def add(self, module: Module, product: TransposedProduct) -> str:
        """Add the function of a stretch and return its name.

        It is `void (ptr y, ptr w, ptr parts, i64 first, i64 end, i64 chunk, i64 rows)`. parts: f32
        [rows, chunks, 16], overwritten with the sums over panels first … end - 1.
        """
        ...


def add_transposed_product(
    module: Module, product: TransposedProduct, writer: StretchWriter
) -> str:
    """Add the function `void (ptr y, ptr w, ptr tile, i64 chunk, i64 count, i64 rows)`.

    y: f32 rows, padded with zeros to whole panels; w: the weight; chunk, count: the chunks of K.
    tile: memory for [rows, capacity] long sums; f32 [rows, capacity · 16] when the function ends.
    Returns its name.
    """
    if not module.knows(product.name):
        weight = product.weight
        f = Function(
            f"internal void @{product.name}(ptr noalias %y, ptr noalias %w, ptr noalias %tile, "
            "i64 %chunk, i64 %count, i64 %rows) #0",
            f"%rows of y times 16 · %count rows of {weight.fmt.name} from 16 · %chunk on;"
            f" N = {weight.n}.\n"
            f"{weight.panels} panels of {weight.panel_bytes} bytes; rows of y are"
            f" {product.y_stride} floats apart.",
        )
        _write_product(module, f, product, writer)
        module.add(product.name, f)
    return f"@{product.name}"


def _write_product(
    module: Module, f: Function, product: TransposedProduct, writer: StretchWriter
) -> None:
    panels, together = product.weight.panels, writer.chunks
    stretch_sums = writer.add(module, product)
    most = (product.most_rows or product.rows) * together
    parts = f.let("parts", f"alloca [{most} x {VECTOR}], align 64")
    module.declare("declare i64 @llvm.smin.i64(i64, i64)")
    with f.loop("stretch", 0, panels, step=min(panels, writer.panels)) as stretch:
        beyond = f.index("beyond", (stretch.index, 1), (writer.panels, 1))
        is_first = f.let("is_first", f"icmp eq i64 {stretch.index}, 0")
        end = f.let("stretch_end", f"call i64 @llvm.smin.i64(i64 {beyond}, i64 {panels})")
        with f.loop("c", 0, "%count", step=together) as c:
            number = f.index("number", ("%chunk", 1), (c.index, 1))
            where = f"i64 {stretch.index}, i64 {end}, i64 {number}, i64 %rows"
            f.do(f"call void {stretch_sums}(ptr %y, ptr %w, ptr {parts}, {where})")
            with f.loop("row", 0, "%rows") as row, f.loop("own", 0, together, unroll=True) as own:
                number = f.index("number", (row.index, together), (own.index, 1))
                at = f.at(parts, VECTOR, number, "part_at")
                part = f.let("part", f"load {VECTOR}, ptr {at}, align 64")
                position = f.index(
                    "position", (row.index, product.capacity), (c.index, 1), (own.index, 1)
                )
                write_add(f, part, f.at("%tile", LONG_SUM, position, "sum_at"), is_first)
    f.comment("each sum moves to the front, behind those that have moved")
    used = f.index("used", ("%rows", product.capacity))
    with f.loop("i", 0, used) as loop:
        total = read_long(module, f, f.at("%tile", LONG_SUM, loop.index, "sum_at"))
        at = f.at("%tile", VECTOR, loop.index, "total_at")
        f.do(f"store {VECTOR} {total}, ptr {at}, align 64")
    f.do("ret void")


@dataclass(frozen=True)
class ChunkReader:
    """Reads a chunk of K from the panels of a weight.

    Attributes:
        chunk: its number within its block.
        block: the number of that block within its slab.
        slabs_at: where that slab is in panel 0.
    """

    module: Module
    f: Function
    weight: Interleaved
    chunk: str
    block: str
    slabs_at: str

    @classmethod
    def of(cls, module: Module, f: Function, weight: Interleaved, chunk: str) -> "ChunkReader":
        """Return the reader of a chunk of the weight at %w."""
        chunks, blocks = weight.block_elements // CHUNK, weight.blocks_per_slab
        block = f.let("block", f"udiv i64 {chunk}, {chunks}")
        within = f.let("chunk_in_block", f"urem i64 {chunk}, {chunks}")
        slab, in_slab = block, "0"
        if blocks > 1:
            slab = f.let("slab", f"udiv i64 {block}, {blocks}")
            in_slab = f.let("block_in_slab", f"urem i64 {block}, {blocks}")
        at = f.at("%w", "i8", f.index("slab_offset", (slab, weight.slab_bytes)), "slabs_at")
        return cls(module, f, weight, within, in_slab, at)

    def fields(self, panel: str) -> Fields:
        """Return the fields of the chunk's block in a panel."""
        offset = self.f.index("panel_offset", (panel, self.weight.panel_bytes))
        at = self.f.at(self.slabs_at, "i8", offset, "slab_at")
        return Fields(self.module, self.f, self.weight, at, self.block)

    def factors(self, fields: Fields) -> tuple[str | None, str | None]:
        """Return the scale and the minimum of the chunk in 16 columns; None without one."""
        fmt, sub_block = self.weight.fmt, "0"
        if fmt.sub_scales is not None or fmt.sub_minima is not None:
            chunks = fmt.sub_block_elements // CHUNK
            sub_block, _ = self.f.divided(self.chunk, chunks, "sub_block", "chunk_in_sub_block")
        scale = fields.scale(fields.block_field("d"), sub_block)
        return scale, fields.minimum(fields.block_field("m"), sub_block)

    def prefetch(self, panel: str) -> None:
        """Prefetch the chunk of a later panel: panels are far apart in memory."""
        f, fields = self.f, self.fields(panel)
        self.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        f.comment("prefetch a later panel")
        for start, size_bytes in fields.parts_to_prefetch(fields.planes(self.chunk), self.chunk):
            lines = list(range(0, size_bytes, CACHE_LINE_BYTES))
            if self.weight.blocks_per_slab == 1 and size_bytes > 1:
                lines.append(size_bytes - 1)  # slabs of one block end inside a cache line
            for line in lines:
                at = f.at(start, "i8", line, "ahead_at")
                hint = "i32 0, i32 2, i32 1)  ; read, second level"
                f.do(f"call void @llvm.prefetch.p0(ptr {at}, {hint}")
