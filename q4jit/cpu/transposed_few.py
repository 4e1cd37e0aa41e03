"""Write the sums of a product with `w.T` for few rows in LLVM IR.

A vector lane is a column of w, so the 16 lanes of a product with a vector of y belong to one sum:
each sum has a vector of its own, whose lanes are added up at the end of a stretch.
"""

from collections.abc import Mapping
from typing import Final

from q4jit.cpu.fields import CHUNK, WORD, add_scaled, value_of
from q4jit.cpu.lanes import load_vector
from q4jit.cpu.llvm_text import VECTOR, Function, Loop, Module
from q4jit.cpu.long_sums import STRETCH_TERMS
from q4jit.cpu.schedule import transposed_tiles
from q4jit.cpu.transposed import ChunkReader, TransposedProduct
from q4jit.weights.layouts import LANES

# Enough to hide memory's latency; at 16, M = 1 took 1.2 times as long on a Zen 4.
_PANELS_AHEAD: Final = 48


class FewRows:
    """Writes the sums of a stretch for the rows of one register tile."""

    panels = STRETCH_TERMS
    chunks = 1

    def add(self, module: Module, product: TransposedProduct) -> str:
        """Add the function of a stretch and return its name (see `StretchWriter`)."""
        name = f"{product.name}_stretch"
        f = Function(
            f"internal void @{name}(ptr noalias %y, ptr noalias %w, ptr noalias %parts, "
            "i64 %first, i64 %end, i64 %chunk, i64 %rows) #0",
            "The sums over panels %first … %end of y times the 16 rows of a chunk of K.",
        )
        lanes = f.let("lanes", f"alloca [{product.rows * CHUNK} x {VECTOR}], align 64")
        reader = ChunkReader.of(module, f, product.weight, "%chunk")
        step = transposed_tiles(module.target).sums_at_once(product.rows)
        for first in range(0, CHUNK, step):
            elements = range(first, first + step)
            f.comment(f"elements {first} … {elements[-1]} of the chunk")
            for position, total in _sums(reader, product, elements).items():
                at = f.at(lanes, VECTOR, position, "lanes_at")
                f.do(f"store {VECTOR} {total}, ptr {at}, align 64")
        with f.loop("row", 0, product.rows) as row:
            at = f.at(lanes, VECTOR, f.index("lanes_offset", (row.index, CHUNK)), "lanes_at")
            part = f.let("part", f"call {VECTOR} {_add_sum_of_lanes(module)}(ptr {at})")
            at = f.at("%parts", VECTOR, row.index, "part_at")
            f.do(f"store {VECTOR} {part}, ptr {at}, align 64")
        f.do("ret void")
        module.add(name, f)
        return f"@{name}"


def _sums(
    reader: ChunkReader, product: TransposedProduct, elements: range
) -> Mapping[int, str]:
    """Write the sums of some elements of a chunk for all rows; return them by row · 16 + element."""
    f = reader.f
    names = {row * CHUNK + k: f"sum{row}.{k}" for row in range(product.rows) for k in elements}
    zeros = {name: (VECTOR, "zeroinitializer") for name in names.values()}
    with f.loop("panel", "%first", "%end", carry=zeros) as panel:
        _add_panel(reader, product, elements, panel)
    return {position: panel[name] for position, name in names.items()}


def _add_panel(
    reader: ChunkReader, product: TransposedProduct, elements: range, panel: Loop
) -> None:
    """Add the products of a panel with elements of a chunk to the sums of the loop."""
    module, f, fmt = reader.module, reader.f, product.weight.fmt
    fields = reader.fields(panel.index)
    scale, minimum = reader.scale(fields), fields.f16_field("m")
    # y · scale takes fewer instructions if there are fewer rows than elements
    is_late = scale is not None and minimum is None and product.rows < len(elements)
    ys = []
    for row in range(product.rows):
        offset = f.index("y_offset", (panel.index, LANES), (row * product.y_stride, 1))
        y = load_vector(module, f, f.at("%y", "float", offset, "y_at"), None, "y")
        ys.append(f.let("y_scaled", f"fmul {VECTOR} {y}, {scale}") if is_late else y)
    planes = fields.planes(reader.chunk)
    if elements[0] == 0:
        reader.prefetch(fields, planes, _PANELS_AHEAD)
    for word in sorted({k // WORD for k in elements}):
        for byte, quant in enumerate(fields.quants(planes, reader.chunk, str(word))):
            k = word * WORD + byte
            if k not in elements:
                continue
            value = quant if is_late else value_of(module, f, quant, scale, minimum)
            for row, y in enumerate(ys):
                name = f"sum{row}.{k}"
                panel[name] = add_scaled(module, f, name, panel[name], y, value)


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
        lanes = ", ".join(f"i32 {i}" for i in order)
        sides.append(
            f.let("side", f"shufflevector {VECTOR} {a}, {VECTOR} {b}, <16 x i32> <{lanes}>")
        )
    return f.let("folded", f"fadd {VECTOR} {sides[0]}, {sides[1]}")
