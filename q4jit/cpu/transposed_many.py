"""Write the sums of a product with `w.T` for many rows in LLVM IR.

Chunks of a few panels are decoded and transposed into a scratch tile that stays in the first-level
cache while all rows of a band are multiplied by it. A vector lane is then a column of the result,
and elements of y are broadcasts.
"""

from typing import Final

from q4jit.cpu.fields import CHUNK, WORD, add_scaled, value_of
from q4jit.cpu.lanes import broadcast
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.schedule import transposed_tiles
from q4jit.cpu.transposed import ChunkReader, TransposedProduct
from q4jit.targets import Target
from q4jit.weights.layouts import LANES

# A stretch of 128 columns: 16 KB of the scratch tile with two chunks. Longer plain sums would leave
# the bound of products of one sign at N = 256.
_PANELS: Final = 8


class ManyRows:
    """Writes the sums of a stretch for a band of rows."""

    panels = _PANELS

    def __init__(self, target: Target) -> None:
        self.chunks = transposed_tiles(target).chunks

    def add(self, module: Module, product: TransposedProduct) -> str:
        """Add the function of a stretch and return its name (see `StretchWriter`)."""
        name = f"{product.name}_stretch"
        f = Function(
            f"internal void @{name}(ptr noalias %y, ptr noalias %w, ptr noalias %parts, "
            "i64 %first, i64 %end, i64 %chunk, i64 %rows) #0",
            f"The sums over panels %first … %end of y times the rows of {self.chunks} chunks of K.",
        )
        columns = _PANELS * LANES
        decoded = f.let("decoded", f"alloca [{self.chunks * columns} x {VECTOR}], align 64")
        module.declare("declare i64 @llvm.smin.i64(i64, i64)")
        for i in range(self.chunks):
            self._decode(module, f, product, i, f.at(decoded, VECTOR, i * columns, "chunk_at"))
        width = f.let("panels", "sub i64 %end, %first")
        width = f.index("columns", (width, LANES))
        with f.loop("tile_row", 0, "%rows", step=product.rows) as tile:
            f.comment("the last tile overlaps the one before it")
            last = f.let("last", f"sub i64 %rows, {product.rows}")
            row = f.let("first_row", f"call i64 @llvm.smin.i64(i64 {tile.index}, i64 {last})")
            offset = f.index("y_offset", (row, product.y_stride), ("%first", LANES))
            y_at = f.at("%y", "float", offset, "y_at")
            parts_at = f.at("%parts", VECTOR, f.index("part", (row, self.chunks)), "parts_at")
            self._multiply(module, f, product, y_at, decoded, parts_at, width)
        f.do("ret void")
        module.add(name, f)
        return f"@{name}"

    def _decode(
        self, module: Module, f: Function, product: TransposedProduct, number: int, decoded: str
    ) -> None:
        """Write chunk %chunk + number of the stretch's panels to f32 [columns, 16]."""
        weight = product.weight
        chunk = f.index("chunk", ("%chunk", 1), (number, 1))
        if number:
            f.comment("a chunk beyond the last is the last")
            last = weight.padded_k // CHUNK - 1
            chunk = f.let("chunk", f"call i64 @llvm.smin.i64(i64 {chunk}, i64 {last})")
        reader = ChunkReader.of(module, f, weight, chunk)
        with f.loop("panel", "%first", "%end") as panel:
            fields = reader.fields(panel.index)
            scale, minimum = reader.factors(fields)
            planes = fields.planes(reader.chunk)
            reader.prefetch(f.index("later", (panel.index, 1), (_PANELS, 1)))
            values = [
                value_of(module, f, quant, scale, minimum)
                for word in range(CHUNK // WORD)
                for quant in fields.quants(planes, reader.chunk, str(word))
            ]
            in_stretch = f.let("in_stretch", f"sub i64 {panel.index}, %first")
            to = f.at(decoded, VECTOR, f.index("column", (in_stretch, LANES)), "decoded_at")
            for i, vector in enumerate(_transposed(f, values)):
                at = f.at(to, VECTOR, i, "decoded_at")
                f.do(f"store {VECTOR} {vector}, ptr {at}, align 64")

    def _multiply(
        self,
        module: Module,
        f: Function,
        product: TransposedProduct,
        y: str,
        decoded: str,
        parts: str,
        width: str,
    ) -> None:
        """Multiply a tile of rows by `width` columns of the decoded chunks."""
        names = [f"sum{row}.{i}" for row in range(product.rows) for i in range(self.chunks)]
        zeros = dict.fromkeys(names, (VECTOR, "zeroinitializer"))
        with f.loop("n", 0, width, carry=zeros) as n:
            weights = []
            for i in range(self.chunks):
                column = f.index("column", (n.index, 1), (i * _PANELS * LANES, 1))
                at = f.at(decoded, VECTOR, column, "decoded_at")
                weights.append(f.let("weight", f"load {VECTOR}, ptr {at}, align 64"))
            for row in range(product.rows):
                offset = f.index("y_offset", (n.index, 1), (row * product.y_stride, 1))
                at = f.at(y, "float", offset, "y_at")
                element = broadcast(f, "float", f.let("y", f"load float, ptr {at}, align 4"))
                for i, weight in enumerate(weights):
                    name = f"sum{row}.{i}"
                    n[name] = add_scaled(module, f, name, n[name], element, weight)
        for i, name in enumerate(names):
            at = f.at(parts, VECTOR, i, "part_at")
            f.do(f"store {VECTOR} {n[name]}, ptr {at}, align 64")


def _transposed(f: Function, vectors: list[str]) -> list[str]:
    """Return 16 vectors; vector i holds lane i of each of the given 16."""
    for distance in (8, 4, 2, 1):
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        swapped = list(vectors)
        for i in range(LANES):
            if not i & distance:
                pair = vectors[i], vectors[i + distance]
                swapped[i] = _shuffled(f, *pair, low)
                swapped[i + distance] = _shuffled(f, *pair, high)
        vectors = swapped
    return vectors


def _shuffled(f: Function, a: str, b: str, order: list[int]) -> str:
    lanes = ", ".join(f"i32 {i}" for i in order)
    return f.let("swapped", f"shufflevector {VECTOR} {a}, {VECTOR} {b}, <16 x i32> <{lanes}>")
