"""Write products of floats, and dequantising, in LLVM IR from the description of a block format.

No weight is ever stored as a float: blocks of the layout `interleaved16` are decoded in registers,
one element of 16 columns at a time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from q4jit.cpu.fields import CHUNK, WORD, Fields, add_scaled, prefetch, value_of
from q4jit.cpu.halves import STORED, named, store_floats, type_suffix
from q4jit.cpu.lanes import SIXTEEN, broadcast, tail_mask
from q4jit.cpu.llvm_text import MASK, VECTOR, Function, Loop, Module
from q4jit.cpu.long_sums import slab_terms, write_long_sums
from q4jit.floats import FloatType
from q4jit.weights.layouts import Interleaved

# Sums that are computed side by side, so that few rows still fill the multiply-add units' pipeline.
_CHAINS: Final = 4


@dataclass(frozen=True)
class FloatProduct:
    """A panel of a weight times rows of x.

    Attributes:
        weight: the layout of the weight.
        rows: rows of x.
        x_stride: floats between rows of x.
        early_scale: whether each element is multiplied by its scale before anything is summed.
            Weights with Inf or NaN among their scales need it: Inf and NaN then come out where IEEE
            arithmetic puts them.
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

    x: f32 rows of padded_k floats; w: a panel of 16 columns; tile: f32 [rows, 16], overwritten.
    """
    if not module.knows(product.name):
        rows = "1 row" if product.rows == 1 else f"{product.rows} rows"
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0",
            f"16 columns of {product.weight.fmt.name}, one a lane, times {rows} of x;"
            f" K = {product.weight.k}.\n"
            f"{_describe_slabs(product.weight)}; rows of x are {product.x_stride} floats apart.",
        )
        _write_product(module, f, product)
        module.add(product.name, f)
    return f"@{product.name}"


def _describe_slabs(weight: Interleaved) -> str:
    slabs = "1 slab" if weight.slabs == 1 else f"{weight.slabs} slabs"
    blocks = "1 block" if weight.blocks_per_slab == 1 else f"{weight.blocks_per_slab} blocks"
    return f"{slabs} of {weight.slab_bytes} bytes: {blocks} of {weight.block_elements} elements"


def _write_product(module: Module, f: Function, product: FloatProduct) -> None:
    rows, chains = range(product.rows), max(1, _CHAINS // product.rows)
    early = product.early_scale or product.weight.fmt.minimum_at is not None
    multiply_add = _multiply_add(module)

    def element(k: str, byte: int, value: str, parts: Loop) -> None:
        if byte == 0:
            f.comment("x[k … k+3] times four weights of every column")
        for row in rows:
            name = f"part{row}.{byte % chains}"
            offset = f.index("x_offset", (k, 1), (row * product.x_stride + byte, 1))
            at = f.at("%x", "float", offset, "x_at")
            parts[name] = f.let(
                name,
                f"call {VECTOR} {multiply_add}({VECTOR} {parts[name]}, ptr {at}, {VECTOR} {value})",
            )

    def fold(scale: str | None, parts: Loop, totals: Loop) -> None:
        f.comment("one sum per sub-block: short sums keep the rounding error small")
        for row in rows:
            part = parts[f"part{row}.0"]
            for chain in range(1, chains):
                part = f.let("part", f"fadd {VECTOR} {part}, {parts[f'part{row}.{chain}']}")
            name, late_scale = f"total{row}", None if early else scale
            totals[name] = add_scaled(module, f, name, totals[name], late_scale, part)

    weight, names = product.weight, [f"total{row}" for row in rows]
    parts = [f"part{row}.{chain}" for row in rows for chain in range(chains)]
    walk = functools.partial(_walk_panel, module, f, weight, early, names, parts, element, fold)
    totals = write_long_sums(module, f, weight.slabs, slab_terms(weight), names, walk)
    for row in rows:
        at = f.at("%tile", VECTOR, row, "sums_at")
        f.do(f"store {VECTOR} {totals[f'total{row}']}, ptr {at}, align 64")
    f.do("ret void")


def _multiply_add(module: Module) -> str:
    name = "multiply_add"
    if not module.knows(name):
        f = Function(
            f"internal {VECTOR} @{name}({VECTOR} %sum, ptr %x_at, {VECTOR} %weights) #1",
            "sum + x·weights, one x for all 16 columns.",
        )
        x = broadcast(f, "float", f.let("x", "load float, ptr %x_at, align 4"))
        total = add_scaled(module, f, "total", "%sum", x, "%weights")
        f.do(f"ret {VECTOR} {total}")
        module.add(name, f)
    return f"@{name}"


def add_dequantize(module: Module, weight: Interleaved, float_type: FloatType = "f32") -> str:
    """Add the function `void (ptr w, ptr out, i64 column)` and return its name.

    w: a panel of 16 columns; out: [K, N] of `float_type`, whose columns `column`, … are written.
    """
    name = f"{weight.fmt.name.lower()}_dequantize{type_suffix(float_type)}"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %w, ptr noalias %out, i64 %column) #0",
            f"16 columns of {weight.fmt.name} [{weight.k}, {weight.n}] as {named(float_type)}.",
        )
        mask = tail_mask(f, "%column", weight.n)

        def element(k: str, byte: int, value: str, parts: Loop) -> None:
            row = f.index("row", (k, 1), (byte, 1))
            offset = f.index("out_offset", (row, weight.n), ("%column", 1))
            at = f.at("%out", STORED[float_type], offset, "out_at")
            inside = mask
            if weight.padded_k != weight.k:
                is_row = f.let("is_row", f"icmp slt i64 {row}, {weight.k}")
                lanes = broadcast(f, "i1", is_row)
                inside = lanes if mask is None else f.let("both", f"and {MASK} {mask}, {lanes}")
            store_floats(module, f, SIXTEEN, float_type, value, at, inside)

        def fold(scale: str | None, parts: Loop, totals: Loop) -> None:
            """Add up nothing."""

        _walk_panel(module, f, weight, True, [], [], element, fold, 0, weight.slabs)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _walk_panel(
    module: Module,
    f: Function,
    weight: Interleaved,
    early: bool,
    totals: list[str],
    parts: list[str],
    element: Callable[[str, int, str, Loop], None],
    fold: Callable[[str | None, Loop, Loop], None],
    first_slab: str | int,
    end_slab: str | int,
) -> dict[str, str]:
    """Write the loops over slabs of a panel at %w: slab, block, sub-block, chunk, word.

    element(k, byte, value, parts) is called for each of the four elements of a word; the value is
    the decoded weight if `early`, else the quant. fold(scale, parts, totals) is called at the end
    of a sub-block. totals and parts name vectors that start at zero. Returns the totals.
    """
    fmt, block_elements = weight.fmt, weight.block_elements
    zeros = dict.fromkeys(totals, (VECTOR, "zeroinitializer"))
    with f.loop("slab", first_slab, end_slab, carry=zeros) as slab:
        offset = f.index("slab_offset", (slab.index, weight.slab_bytes))
        slab_at = f.at("%w", "i8", offset, "slab_at")
        outer = {name: (VECTOR, slab[name]) for name in totals}
        with f.loop("block", 0, weight.blocks_per_slab, carry=outer, unroll=True) as block:
            fields = Fields(module, f, weight, slab_at, block.index)
            block_scale, block_minimum = fields.block_field("d"), fields.block_field("m")
            inner = {name: (VECTOR, block[name]) for name in totals}
            # not unrolled: Q6_K has 16 sub-blocks, and would compile for seconds
            sub_blocks = block_elements // fmt.sub_block_elements
            with f.loop("sub_block", 0, sub_blocks, carry=inner) as sub_block:
                elements = fmt.sub_block_elements
                prefetch(module, f, weight, slab_at, block.index, sub_block.index, elements)
                scale = fields.scale(block_scale, sub_block.index)
                minimum = fields.minimum(block_minimum, sub_block.index)
                first = f.index(
                    "k",
                    (slab.index, weight.blocks_per_slab * block_elements),
                    (block.index, block_elements),
                )
                decode = (scale, minimum) if early else None
                fresh = dict.fromkeys(parts, "zeroinitializer")
                done = walk_sub_block(f, fields, first, sub_block.index, decode, fresh, element)
                fold(scale, done, sub_block)
            block.values = dict(sub_block.values)
        slab.values = dict(block.values)
    return slab.values


def walk_sub_block(
    f: Function,
    fields: Fields,
    first: str,
    sub_block: str,
    decode: tuple[str | None, str | None] | None,
    parts: dict[str, str],
    element: Callable[[str, int, str, Loop], None],
) -> Loop:
    """Write the loops over a sub-block of a block whose first element is `first` along K.

    element(k, byte, value, parts) is called for each of the four elements of a word; the value is
    the decoded weight if `decode` gives a scale and a minimum, else the quant. parts: vectors and
    their first values.
    """
    chunks = fields.weight.fmt.sub_block_elements // CHUNK
    fresh = {name: (VECTOR, value) for name, value in parts.items()}
    with f.loop("chunk", 0, chunks, carry=fresh, unroll=True) as chunk:
        number = f.index("chunk_in_block", (sub_block, chunks), (chunk.index, 1))
        words = {name: (VECTOR, chunk[name]) for name in parts}
        planes = fields.planes(number)
        with f.loop("word", 0, CHUNK // WORD, carry=words, unroll=True) as word:
            k = f.index("k", (first, 1), (number, CHUNK), (word.index, WORD))
            for byte, quant in enumerate(fields.quants(planes, number, word.index)):
                value = value_of(fields.module, f, quant, *decode) if decode else quant
                element(k, byte, value, word)
        chunk.values = dict(word.values)
    return chunk
