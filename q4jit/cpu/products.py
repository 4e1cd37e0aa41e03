"""Products of floats and dequantising in LLVM IR, from the description of a block format.

No weight is ever stored as a float: blocks of the `interleaved16` layout are decoded in registers,
one element of 16 columns at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from q4jit.cpu.fields import (
    CHUNK,
    WORD,
    Fields,
    add_scaled,
    prefetch,
    value_of,
)
from q4jit.cpu.lanes import (
    splat_value,
    store_vector,
    tail_mask,
)
from q4jit.cpu.llvm_text import (
    MASK,
    VECTOR,
    Function,
    Loop,
    Module,
)
from q4jit.weights.layouts import Interleaved

# sums that run side by side, so that few rows still fill the pipeline of the multiply-add units
_CHAINS: Final = 4


@dataclass(frozen=True)
class FloatProduct:
    """16 columns of a weight times `rows` rows of x that lie `x_stride` floats apart.

    `early_scale` multiplies every element by its scale before anything is summed. It serves weights
    with Inf or NaN among their scales: those then come out where IEEE arithmetic puts them.
    """

    weight: Interleaved
    rows: int
    x_stride: int
    early_scale: bool

    @property
    def name(self) -> str:
        """The function's name."""
        weight = self.weight
        early = "_early" if self.early_scale else ""
        return f"{weight.fmt.name.lower()}_k{weight.k}_rows{self.rows}{early}"


def add_product(module: Module, product: FloatProduct) -> str:
    """Add the function `void (ptr x, ptr w, ptr tile)` and return its name.

    x: f32 rows of padded_k floats; w: a group of 16 columns; tile: f32 [rows, 16], overwritten.
    """
    if not module.knows(product.name):
        rows = "1 row" if product.rows == 1 else f"{product.rows} rows"
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0",
            f"16 columns of {product.weight.fmt.name}, one a lane, times {rows} of x;"
            f" K = {product.weight.k}.\n"
            f"{_describe_tiles(product.weight)}; rows of x lie {product.x_stride} floats apart.",
        )
        _write_product(module, f, product)
        module.add(product.name, f)
    return f"@{product.name}"


def _describe_tiles(weight: Interleaved) -> str:
    blocks = "1 block" if weight.blocks_per_slab == 1 else f"{weight.blocks_per_slab} blocks"
    return (
        f"{weight.slabs} tiles of {weight.slab_bytes} bytes, each {blocks} of "
        f"{weight.block_elements} elements"
    )


def _write_product(module: Module, f: Function, product: FloatProduct) -> None:
    rows, chains = range(product.rows), max(1, _CHAINS // product.rows)
    early = product.early_scale or product.weight.fmt.minimum_at is not None
    multiply_add = _multiply_add(module)

    def element(k: str, byte: int, value: str, parts: Loop) -> None:
        if byte == 0:
            f.comment("x[k … k+3] times four weights of every column")
        for r in rows:
            name = f"part{r}.{byte % chains}"
            at = f.at("%x", "float", f.index("k", (k, 1), (r * product.x_stride + byte, 1)), "xk")
            parts[name] = f.let(
                name,
                f"call {VECTOR} {multiply_add}({VECTOR} {parts[name]}, ptr {at}, {VECTOR} {value})",
            )

    def fold(scale: str | None, parts: Loop, totals: Loop) -> None:
        f.comment("sum by blocks: short sums keep the rounding error small")
        for r in rows:
            part = parts[f"part{r}.0"]
            for c in range(1, chains):
                part = f.let("part", f"fadd {VECTOR} {part}, {parts[f'part{r}.{c}']}")
            name, late = f"acc{r}", None if early else scale
            totals[name] = add_scaled(module, f, name, totals[name], late, part)

    totals = _walk_group(
        module,
        f,
        product.weight,
        early=early,
        totals=[f"acc{r}" for r in rows],
        parts=[f"part{r}.{c}" for r in rows for c in range(chains)],
        element=element,
        fold=fold,
    )
    for r in rows:
        row = f.at("%tile", VECTOR, r, "tile_row")
        f.do(f"store {VECTOR} {totals[f'acc{r}']}, ptr {row}, align 64")
    f.do("ret void")


def _multiply_add(module: Module) -> str:
    name = "multiply_add"
    if not module.knows(name):
        f = Function(
            f"internal {VECTOR} @{name}({VECTOR} %sum, ptr %x, {VECTOR} %weights) #1",
            "sum + x·weights, one x for all 16 columns.",
        )
        x = splat_value(f, "float", f.let("x0", "load float, ptr %x, align 4"))
        total = add_scaled(module, f, "total", "%sum", x, "%weights")
        f.do(f"ret {VECTOR} {total}")
        module.add(name, f)
    return f"@{name}"


def add_dequantize(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr w, ptr out, i64 column)` and return its name.

    w: a group of 16 columns; out: f32 [K, N], of which columns `column`, … are written.
    """
    name = f"{weight.fmt.name.lower()}_dequantize"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %w, ptr noalias %out, i64 %column) #0",
            f"16 columns of {weight.fmt.name} [{weight.k}, {weight.n}] as floats.",
        )
        mask = tail_mask(f, "%column", weight.n)

        def element(k: str, byte: int, value: str, parts: Loop) -> None:
            row = f.index("k", (k, 1), (byte, 1))
            at = f.at("%out", "float", f.index("at", (row, weight.n), ("%column", 1)))
            inside = mask
            if weight.padded_k != weight.k:
                known = f.let("known", f"icmp slt i64 {row}, {weight.k}")
                lanes = splat_value(f, "i1", known)
                inside = lanes if mask is None else f.let("both", f"and {MASK} {mask}, {lanes}")
            store_vector(module, f, value, at, inside)

        _walk_group(module, f, weight, True, [], [], element, lambda scale, parts, totals: None)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _walk_group(
    module: Module,
    f: Function,
    weight: Interleaved,
    early: bool,
    totals: list[str],
    parts: list[str],
    element: Callable[[str, int, str, Loop], None],
    fold: Callable[[str | None, Loop, Loop], None],
) -> Loop:
    """Write the loops over a group of 16 columns at %w: tile, block, sub-block, chunk, word.

    element(k, byte, value, parts) is called for each of the four elements of a word, value being
    the decoded weight where `early`, else the quant without its scale; fold(scale, parts, totals)
    at the end of a sub-block. totals and parts name vectors that start at zero.
    """
    fmt, block_elements = weight.fmt, weight.block_elements
    zeros = dict.fromkeys(totals, (VECTOR, "zeroinitializer"))
    with f.loop("tile", 0, weight.slabs, carry=zeros) as tile:
        tile_at = f.at("%w", "i8", f.index("offset", (tile.index, weight.slab_bytes)), "tile_at")
        outer = {name: (VECTOR, tile[name]) for name in totals}
        with f.loop("block", 0, weight.blocks_per_slab, carry=outer, unroll=True) as block:
            fields = Fields(module, f, weight, tile_at, block.index)
            d, m = fields.halves("d"), fields.halves("m")  # one load: a lane is a column
            inner = {name: (VECTOR, block[name]) for name in totals}
            # a format with many sub-blocks stays a loop: unrolled, Q6_K compiles for seconds
            with f.loop("sub", 0, block_elements // fmt.sub_block_elements, carry=inner) as sub:
                prefetch(module, f, weight, tile_at, block.index, sub.index)
                scale = fields.scale(d, sub.index)
                first = f.index(
                    "k",
                    (tile.index, weight.blocks_per_slab * block_elements),
                    (block.index, block_elements),
                )
                decode = (scale, m) if early else None
                fresh = dict.fromkeys(parts, "zeroinitializer")
                done = walk_sub_block(f, fields, first, sub.index, decode, fresh, element)
                fold(scale, done, sub)
            block.values = dict(sub.values)
        tile.values = dict(block.values)
    return tile


def walk_sub_block(
    f: Function,
    fields: Fields,
    first: str,
    sub: str,
    decode: tuple[str | None, str | None] | None,
    parts: dict[str, str],
    element: Callable[[str, int, str, Loop], None],
) -> Loop:
    """Write the loops over sub-block `sub` of a block whose first element is `first` along K.

    element(k, byte, value, parts) is called for each of the four elements of a word, value being
    the decoded weight where `decode` gives scale and m, else the quant. parts: vectors and their
    first values.
    """
    chunks = fields.weight.fmt.sub_block_elements // CHUNK
    fresh = {name: (VECTOR, value) for name, value in parts.items()}
    with f.loop("chunk", 0, chunks, carry=fresh, unroll=True) as chunk:
        number = f.index("number", (sub, chunks), (chunk.index, 1))
        words = {name: (VECTOR, chunk[name]) for name in parts}
        planes = fields.planes(number)
        with f.loop("word", 0, CHUNK // WORD, carry=words, unroll=True) as word:
            k = f.index("k", (first, 1), (number, CHUNK), (word.index, WORD))
            for byte, quant in enumerate(fields.quants(planes, number, word.index)):
                value = value_of(fields.module, f, quant, *decode) if decode else quant
                element(k, byte, value, word)
        chunk.values = dict(word.values)
    return chunk
