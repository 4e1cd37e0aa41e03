"""Write products with `w.T` in LLVM IR: y [M, N] times the transpose of w [K, N], as floats.

They read the layout `interleaved16` of `x @ w`, in which a vector lane is one column of w. So the
16 lanes of a product with a vector of y belong to one sum over N: each sum has a vector of its own,
whose lanes are added up at the end of a stretch of panels. A panel of the result is a chunk of K.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.fields import CHUNK, WORD, Fields, add_scaled, value_of
from q4jit.cpu.lanes import load_vector
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.long_sums import STRETCH_TERMS, add_to_long, read_long
from q4jit.cpu.schedule import sums_at_once
from q4jit.weights.layouts import LANES, Interleaved

_LONG_SUM: Final = f"[2 x {VECTOR}]"


@dataclass(frozen=True)
class TransposedProduct:
    """Rows of y times some rows of a weight.

    Attributes:
        weight: the layout of the weight.
        rows: rows of y.
        chunks: the most chunks of K that are multiplied.
        y_stride: floats between rows of y.
    """

    weight: Interleaved
    rows: int
    chunks: int
    y_stride: int

    @property
    def name(self) -> str:
        """The function's name."""
        weight = self.weight
        return f"{weight.fmt.name.lower()}_k{weight.k}_n{weight.n}_t_rows{self.rows}_{self.chunks}"

    @property
    def is_long(self) -> bool:
        """Whether sums are divided into stretches."""
        return self.weight.panels > STRETCH_TERMS


def add_transposed_product(module: Module, product: TransposedProduct) -> str:
    """Add the function `void (ptr y, ptr w, ptr tile, i64 chunk, i64 count)` and return its name.

    y: f32 rows, padded with zeros to whole panels; w: the weight; tile: f32 [rows, chunks · 16], of
    which `count` · 16 columns are overwritten; chunk: the first chunk of K.
    """
    if not module.knows(product.name):
        weight = product.weight
        rows = "1 row" if product.rows == 1 else f"{product.rows} rows"
        f = Function(
            f"internal void @{product.name}(ptr noalias %y, ptr noalias %w, ptr noalias %tile, "
            "i64 %chunk, i64 %count) #0",
            f"{rows} of y times %count · 16 rows of {weight.fmt.name}, from 16 · %chunk on;"
            f" N = {weight.n}.\n"
            f"{weight.panels} panels of {weight.panel_bytes} bytes; rows of y are"
            f" {product.y_stride} floats apart.",
        )
        _write_product(module, f, product)
        module.add(product.name, f)
    return f"@{product.name}"


def _write_product(module: Module, f: Function, product: TransposedProduct) -> None:
    rows, panels = product.rows, product.weight.panels
    chunk_sums = _add_chunk_sums(module, product)
    lanes = f.let("lanes", f"alloca [{rows * CHUNK} x {VECTOR}], align 64")
    sums = ""
    if product.is_long:
        sums = f.let("long_sums", f"alloca [{product.chunks * rows} x {_LONG_SUM}], align 64")
        with f.loop("i", 0, f.index("used", ("%count", rows))) as loop:
            at = f.at(sums, _LONG_SUM, loop.index, "sum_at")
            f.do(f"store {_LONG_SUM} zeroinitializer, ptr {at}, align 64")
    with f.loop("stretch", 0, panels, step=min(panels, STRETCH_TERMS)) as stretch:
        end = str(panels)
        if product.is_long:
            module.declare("declare i64 @llvm.smin.i64(i64, i64)")
            beyond = f.index("beyond", (stretch.index, 1), (STRETCH_TERMS, 1))
            end = f.let("stretch_end", f"call i64 @llvm.smin.i64(i64 {beyond}, i64 {panels})")
        with f.loop("c", 0, "%count") as c:
            number = f.index("number", ("%chunk", 1), (c.index, 1))
            where = f"i64 {stretch.index}, i64 {end}, i64 {number}"
            f.do(f"call void {chunk_sums}(ptr %y, ptr %w, ptr {lanes}, {where})")
            with f.loop("row", 0, rows) as row:
                at = f.at(lanes, VECTOR, f.index("lanes_offset", (row.index, CHUNK)), "lanes_at")
                part = f.let("part", f"call {VECTOR} {_add_sum_of_lanes(module)}(ptr {at})")
                if product.is_long:
                    sum_at = _long_sum_at(f, product, sums, c.index, row.index)
                    f.do(f"call void {add_to_long(module)}({VECTOR} {part}, ptr {sum_at})")
                else:
                    _store(f, product, part, c.index, row.index)
    if product.is_long:
        with f.loop("c", 0, "%count") as c, f.loop("row", 0, rows) as row:
            sum_at = _long_sum_at(f, product, sums, c.index, row.index)
            _store(f, product, read_long(module, f, sum_at), c.index, row.index)
    f.do("ret void")


def _long_sum_at(f: Function, product: TransposedProduct, sums: str, chunk: str, row: str) -> str:
    return f.at(sums, _LONG_SUM, f.index("position", (chunk, product.rows), (row, 1)), "sum_at")


def _store(f: Function, product: TransposedProduct, total: str, chunk: str, row: str) -> None:
    at = f.at("%tile", VECTOR, f.index("position", (row, product.chunks), (chunk, 1)), "tile_at")
    f.do(f"store {VECTOR} {total}, ptr {at}, align 64")


# --- a chunk of K, a stretch of panels -----------------------------------------------------------


def _add_chunk_sums(module: Module, product: TransposedProduct) -> str:
    """Add the function `void (y, w, lanes, i64 first, i64 end, i64 chunk)` and return its name.

    lanes: f32 [rows, 16, 16], overwritten: for each row and element of the chunk the 16 lanes of
    the sum over panels first … end - 1.
    """
    name = f"{product.name}_chunk"
    f = Function(
        f"internal void @{name}(ptr noalias %y, ptr noalias %w, ptr noalias %lanes, "
        "i64 %first, i64 %end, i64 %chunk) #0",
        "The products with one chunk of K, summed over panels %first … %end, but not over lanes.",
    )
    step = sums_at_once(module.target, product.rows)
    weight = product.weight
    chunks = weight.block_elements // CHUNK
    block = f.let("block", f"udiv i64 %chunk, {chunks}")
    number = f.let("chunk_in_block", f"urem i64 %chunk, {chunks}")
    slab = f.let("slab", f"udiv i64 {block}, {weight.blocks_per_slab}")
    block_in_slab = "0"
    if weight.blocks_per_slab > 1:
        block_in_slab = f.let("block_in_slab", f"urem i64 {block}, {weight.blocks_per_slab}")
    slabs_at = f.at("%w", "i8", f.index("slab_offset", (slab, weight.slab_bytes)), "slabs_at")
    for first in range(0, CHUNK, step):
        elements = range(first, first + step)
        f.comment(f"elements {first} … {first + step - 1} of the chunk")
        zeros = {
            f"sum{row}.{k}": (VECTOR, "zeroinitializer")
            for row in range(product.rows)
            for k in elements
        }
        with f.loop("panel", "%first", "%end", carry=zeros) as panel:
            offset = f.index("panel_offset", (panel.index, weight.panel_bytes))
            at = f.at(slabs_at, "i8", offset, "slab_at")
            fields = Fields(module, f, weight, at, block_in_slab)
            _add_panel(f, product, fields, panel.index, number, elements, panel.values)
        for row in range(product.rows):
            for k in elements:
                at = f.at("%lanes", VECTOR, row * CHUNK + k, "lanes_at")
                f.do(f"store {VECTOR} {panel[f'sum{row}.{k}']}, ptr {at}, align 64")
    f.do("ret void")
    module.add(name, f)
    return f"@{name}"


def _add_panel(
    f: Function,
    product: TransposedProduct,
    fields: Fields,
    panel: str,
    chunk: str,
    elements: range,
    sums: dict[str, str],
) -> None:
    """Add the products of a panel with elements of a chunk to `sums`."""
    module, fmt = fields.module, product.weight.fmt
    sub_block = "0"
    if fmt.sub_scales_at is not None:
        chunks = fmt.sub_block_elements // CHUNK
        sub_block = chunk if chunks == 1 else f.let("sub_block", f"udiv i64 {chunk}, {chunks}")
    scale = fields.scale(fields.f16_field("d"), sub_block)
    minimum = fields.f16_field("m")
    # y · scale rounds once more, and takes fewer instructions if there are fewer rows than elements
    is_late = scale is not None and minimum is None and product.rows < len(elements)
    ys = []
    for row in range(product.rows):
        offset = f.index("y_offset", (panel, LANES), (row * product.y_stride, 1))
        y = load_vector(module, f, f.at("%y", "float", offset, "y_at"), None, "y")
        ys.append(f.let("y_scaled", f"fmul {VECTOR} {y}, {scale}") if is_late else y)
    planes = fields.planes(chunk)
    for word in sorted({k // WORD for k in elements}):
        for byte, quant in enumerate(fields.quants(planes, chunk, str(word))):
            k = word * WORD + byte
            if k not in elements:
                continue
            value = quant if is_late else value_of(module, f, quant, scale, minimum)
            for row, y in enumerate(ys):
                name = f"sum{row}.{k}"
                sums[name] = add_scaled(module, f, name, sums[name], y, value)


def _add_sum_of_lanes(module: Module) -> str:
    """Add the function `vector (ptr vectors)` and return its name.

    vectors: f32 [16, 16]; the result is the sum of each. It is not inlined, so that it takes no
    registers from the loops around it.
    """
    name = "sum_of_lanes"
    if not module.knows(name):
        f = Function(
            f"internal {VECTOR} @{name}(ptr %vectors) noinline #0",
            "The sums of the lanes of 16 vectors: each step halves the vectors.",
        )
        vectors = []
        for i in range(LANES):
            at = f.at("%vectors", VECTOR, i, "vector_at")
            vectors.append(f.let("vector", f"load {VECTOR}, ptr {at}, align 64"))
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [_folded(f, vectors[i], vectors[i + half], half) for i in range(half)]
        f.do(f"ret {VECTOR} {vectors[0]}")
        module.add(name, f)
    return f"@{name}"


def _folded(f: Function, a: str, b: str, distance: int) -> str:
    """Add up pairs of lanes that are `distance` apart: of `a` in the lower of each, else of `b`."""
    own = [lane + LANES * bool(lane & distance) for lane in range(LANES)]
    sides = []
    for order in (own, [i ^ distance for i in own]):
        text = ", ".join(f"i32 {i}" for i in order)
        order_text = f"<16 x i32> <{text}>"
        sides.append(f.let("side", f"shufflevector {VECTOR} {a}, {VECTOR} {b}, {order_text}"))
    return f.let("folded", f"fadd {VECTOR} {sides[0]}, {sides[1]}")
