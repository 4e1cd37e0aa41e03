"""Write the sums of a product with `w.T` for few rows in LLVM IR.

A vector lane is a column of w, so the 16 lanes of a product with a vector of y belong to one sum:
each sum has a vector of its own, whose lanes are added up at the end of a stretch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from q4jit.cpu.fields import (
    CHUNK,
    WORD,
    Fields,
    PlaneAt,
    add_scaled,
    shift_right,
    value_of,
)
from q4jit.cpu.lanes import load_vector
from q4jit.cpu.llvm_text import (
    INTS,
    VECTOR,
    Function,
    Loop,
    Module,
    float_bits,
    float_text,
    splat,
    splat_int,
)
from q4jit.cpu.long_sums import STRETCH_TERMS
from q4jit.cpu.numbers import converts_by_table
from q4jit.cpu.schedule import transposed_tiles
from q4jit.cpu.transposed import ChunkReader, TransposedProduct
from q4jit.weights.layouts import LANES

_TOP: Final = 2.0**23  # its last bit is 1, so integers below 2^23 fit behind its exponent


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
        ahead = _Ahead.of(reader, product)
        step = transposed_tiles(module.target).sums_at_once(product.rows)
        for first in range(0, CHUNK, step):
            elements = range(first, first + step)
            f.comment(f"elements {first} … {elements[-1]} of the chunk")
            for position, total in _sums(reader, product, elements, ahead).items():
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
    reader: ChunkReader, product: TransposedProduct, elements: range, ahead: "_Ahead"
) -> Mapping[int, str]:
    """Write the sums of some elements of a chunk; return them by row · 16 + element."""
    f = reader.f
    names = {row * CHUNK + k: f"sum{row}.{k}" for row in range(product.rows) for k in elements}
    zeros = dict.fromkeys(names.values(), (VECTOR, "zeroinitializer"))
    with f.loop("panel", "%first", "%end", carry=zeros) as panel:
        if elements[0] == 0:
            ahead.prefetch(panel.index)
        _add_panel(reader, product, elements, panel)
    return {position: panel[name] for position, name in names.items()}


def _add_panel(
    reader: ChunkReader, product: TransposedProduct, elements: range, panel: Loop
) -> None:
    """Add the products of a panel with elements of a chunk to the sums of the loop."""
    module, f = reader.module, reader.f
    fields = reader.fields(panel.index)
    scale, minimum = reader.factors(fields)
    # y · scale takes fewer instructions if there are fewer rows than elements
    is_late = scale is not None and minimum is None and product.rows < len(elements)
    is_late = is_late and not product.early_scale
    ys = []
    for row in range(product.rows):
        offset = f.index("y_offset", (panel.index, LANES), (row * product.y_stride, 1))
        y = load_vector(module, f, f.at("%y", "float", offset, "y_at"), None, "y")
        ys.append(f.let("y_scaled", f"fmul {VECTOR} {y}, {scale}") if is_late else y)
    scaled_ys, scales = _Scaled(f, ys), _Scaled(f, [scale] if scale else [])
    planes = fields.planes(reader.chunk)
    for word in sorted({k // WORD for k in elements}):
        quants = _quants(fields, planes, reader.chunk, word)
        for k, (quant, shift) in enumerate(quants, word * WORD):
            if k not in elements:
                continue
            if is_late or scale is None:
                value, factors = quant, scaled_ys.by(shift)
            else:
                (own_scale,) = scales.by(shift)
                value, factors = value_of(module, f, quant, own_scale, minimum), ys
            for row, y in enumerate(factors):
                name = f"sum{row}.{k}"
                panel[name] = add_scaled(module, f, name, panel[name], y, value)


@dataclass(frozen=True)
class _Ahead:
    """Prefetches the next stretch, or the first of the next task: each line of it once.

    Prefetches that follow each other faster than memory delivers would stall: half of the chunks of
    Q4_0 need no new lines, but prefetch half of what two of them need.
    """

    reader: ChunkReader
    distance: str

    @classmethod
    def of(cls, reader: ChunkReader, product: TransposedProduct) -> "_Ahead":
        """Return what is ahead of panels %first … %end of chunk %chunk."""
        f, weight = reader.f, product.weight
        is_last = f.let("is_last", f"icmp eq i64 %end, {weight.panels}")
        next_ = f.index("next", ("%chunk", 1), (product.task_chunks, 1))
        chunk = f.let("chunk_ahead", f"select i1 {is_last}, i64 {next_}, i64 %chunk")
        back = f.let("back", "sub i64 0, %first")
        distance = f.let("distance", f"select i1 {is_last}, i64 {back}, i64 {STRETCH_TERMS}")
        return cls(ChunkReader.of(reader.module, f, weight, chunk), distance)

    def prefetch(self, panel: str) -> None:
        """Prefetch the panel that follows `panel` at the distance."""
        self.reader.prefetch(self.reader.f.index("panel_ahead", (panel, 1), (self.distance, 1)))


@dataclass
class _Scaled:
    """Vectors, and what is left of them after a multiplication by 2^-shift, which is exact."""

    f: Function
    vectors: list[str]
    _by_shift: dict[int, list[str]] = field(default_factory=dict)

    def by(self, shift: int) -> list[str]:
        """Return the vectors times 2^-shift."""
        if shift and shift not in self._by_shift:
            factor = splat("float", float_text(2.0**-shift))
            self._by_shift[shift] = [
                self.f.let("lowered", f"fmul {VECTOR} {vector}, {factor}", f"2^-{shift}")
                for vector in self.vectors
            ]
        return self._by_shift[shift] if shift else self.vectors


def _quants(fields: Fields, planes: list[PlaneAt], chunk: str, word: int) -> list[tuple[str, int]]:
    """Return the four elements of a word: floats, and by which shift each is too large.

    If no instruction converts codes at once, those of the three lowest bytes become floats where
    they are: behind the exponent of 2^23, which a subtraction takes off together with the format's
    zero. That takes fewer instructions than to convert integers (Q6_K took 1.35 times as long on a
    Zen 4).
    """
    f, fmt = fields.f, fields.weight.fmt
    is_counted = 0 < fmt.quant_bits < 8 and fmt.table is None
    if not is_counted or converts_by_table(fields.module, fmt):
        return [(quant, 0) for quant in fields.quants(planes, chunk, str(word))]
    codes, quants = fields.quant_bytes(planes, str(word)), []
    for byte, shift in enumerate((0, 8, 16, 0)):
        bits = shift_right(f, codes, "0" if byte < WORD - 1 else str(8 * byte))
        if byte < WORD - 1:
            mask = splat_int(((1 << fmt.quant_bits) - 1) << shift)
            bits = f.let("code", f"and {INTS} {bits}, {mask}")
        bits = f.let("bits", f"or {INTS} {bits}, {splat_int(float_bits(_TOP))}")
        number = f.let("number", f"bitcast {INTS} {bits} to {VECTOR}")
        zero = splat("float", float_text(_TOP + (fmt.zero << shift)))
        quants.append((f.let("quant", f"fsub {VECTOR} {number}, {zero}"), shift))
    return quants


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
