"""Write functions that read single columns, in LLVM IR: dot products with x, and columns as floats.

A column is a GGUF row, for narrow results, slices that start inside a panel, and look-ups, for
which the layout `interleaved16` is not made. Look-ups also read a weight that has only this layout.
"""

import functools
from collections.abc import Callable

from q4jit.cpu.fields import CHUNK, Fields, add_scaled, load_floats, value_of
from q4jit.cpu.halves import STORED, named, store_floats, type_suffix
from q4jit.cpu.lanes import ONE, SIXTEEN, Lanes, load_vector, sum_lanes
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.long_sums import write_long_sums
from q4jit.cpu.row_fields import BlockBytes, ColumnBlock, GgufBlock, RowFields
from q4jit.floats import FloatType
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES, Interleaved


def add_dot(module: Module, fmt: Format, k: int, early_scale: bool) -> str:
    """Add the function `float (ptr x, ptr row)` and return its name.

    x: K floats; row: the GGUF row of one column, at any alignment.
    """
    early = early_scale or fmt.minimum_at is not None
    name = f"{fmt.name.lower()}_k{k}_dot{'_early' if early_scale else ''}"
    if not module.knows(name):
        f = Function(
            f"internal float @{name}(ptr noalias %x, ptr noalias %row) #0",
            f"x times one column of {fmt.name} with K = {k}, 16 elements at a time.",
        )
        if fmt.float_type is not None:
            total = _float_dot(module, f, fmt, k)
        else:
            total = _block_dot(module, f, fmt, k, early)
        f.do(f"ret float {total}")
        module.add(name, f)
    return f"@{name}"


def _block_dot(module: Module, f: Function, fmt: Format, k: int, early: bool) -> str:
    blocks = functools.partial(_blocks_dot, module, f, fmt, early)
    count, terms = k // fmt.block_elements, fmt.block_elements // fmt.sub_block_elements
    sums = write_long_sums(module, f, count, terms, ["total"], blocks)
    return sum_lanes(module, f, sums["total"])


def _blocks_dot(
    module: Module, f: Function, fmt: Format, early: bool, first: str | int, end: str | int
) -> dict[str, str]:
    """Write the dot product over blocks; return its 16 sums as `total`."""
    zero = (VECTOR, "zeroinitializer")
    with f.loop("block", first, end, carry={"total": zero}) as block:
        fields = RowFields(module, f, _gguf_block(f, fmt, block.index))
        block_scale, block_minimum = fields.block_field("d"), fields.block_field("m")
        sub_blocks = fmt.block_elements // fmt.sub_block_elements
        chunks = fmt.sub_block_elements // CHUNK
        inner = {"total": (VECTOR, block["total"])}
        with f.loop("sub_block", 0, sub_blocks, carry=inner, unroll=True) as sub_block:
            scale = fields.scale(block_scale, sub_block.index)
            minimum = fields.minimum(block_minimum, sub_block.index)
            with f.loop("chunk", 0, chunks, carry={"part": zero}, unroll=True) as chunk:
                number = f.index("chunk_in_block", (sub_block.index, chunks), (chunk.index, 1))
                quants = fields.quants(number)
                value = value_of(module, f, quants, scale, minimum) if early else quants
                element = f.index("k", (block.index, fmt.block_elements), (number, CHUNK))
                x = load_vector(module, f, f.at("%x", "float", element, "x_at"), None, "x")
                chunk["part"] = add_scaled(module, f, "part", chunk["part"], x, value)
            late_scale = None if early else scale
            total = sub_block["total"]
            sub_block["total"] = add_scaled(module, f, "total", total, late_scale, chunk["part"])
        block["total"] = sub_block["total"]
    return block.values


def add_row(module: Module, fmt: Format, k: int, float_type: FloatType = "f32") -> str:
    """Add the function `void (ptr row, ptr out)` and return its name.

    row: a GGUF row, at any alignment; out: [K] of `float_type`, overwritten with its values.
    """
    name = f"{fmt.name.lower()}_k{k}_row{type_suffix(float_type)}"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %row, ptr noalias %out) #0",
            f"A row of {fmt.name} with K = {k} as {named(float_type)}, 16 elements at a time.",
        )
        if fmt.float_type is not None:
            whole = k // CHUNK * CHUNK
            _store_row(module, f, fmt, SIXTEEN, (0, whole), float_type)
            _store_row(module, f, fmt, ONE, (whole, k), float_type)
        else:
            block = functools.partial(_gguf_block, f, fmt)
            _store_blocks(module, f, fmt, k, block, float_type)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def add_column(module: Module, weight: Interleaved, float_type: FloatType = "f32") -> str:
    """Add the function `void (ptr row, i64 column, ptr out)` and return its name.

    row: a panel in the layout `interleaved16`; column: one of its 16; out: as in `add_row`.
    """
    fmt, k = weight.fmt, weight.k
    name = f"{fmt.name.lower()}_k{k}_column{type_suffix(float_type)}"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %row, i64 %column, ptr noalias %out) #0",
            f"A column of a panel of {fmt.name} with K = {k} as {named(float_type)}.",
        )
        if fmt.float_type is not None:
            # slabs of floats have no other field, so the elements of a column are evenly spaced
            first = f.index("first_offset", ("%column", fmt.block_bytes))
            _store_row(module, f, fmt, ONE, (0, k), float_type, LANES, first)
        else:
            block = functools.partial(_column_block, module, f, weight)
            _store_blocks(module, f, fmt, k, block, float_type)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _gguf_block(f: Function, fmt: Format, number: str) -> GgufBlock:
    """Return a block of the GGUF row at %row."""
    offset = f.index("block_offset", (number, fmt.block_bytes))
    return GgufBlock(f, fmt, f.at("%row", "i8", offset, "block_at"))


def _column_block(module: Module, f: Function, weight: Interleaved, number: str) -> ColumnBlock:
    """Return a block of column %column of the panel at %row."""
    slab, block = f.divided(number, weight.blocks_per_slab, "slab", "block_in_slab")
    offset = f.index("slab_offset", (slab, weight.slab_bytes))
    at = f.at("%row", "i8", offset, "slab_at")
    return ColumnBlock(Fields(module, f, weight, at, block), "%column")


def _store_blocks(
    module: Module,
    f: Function,
    fmt: Format,
    k: int,
    block_of: Callable[[str], BlockBytes],
    float_type: FloatType,
) -> None:
    """Write the loop that decodes blocks to %out. block_of: returns the block of a number."""
    with f.loop("block", 0, k // fmt.block_elements) as block:
        fields = RowFields(module, f, block_of(block.index))
        block_scale, block_minimum = fields.block_field("d"), fields.block_field("m")
        sub_blocks = fmt.block_elements // fmt.sub_block_elements
        chunks = fmt.sub_block_elements // CHUNK
        with f.loop("sub_block", 0, sub_blocks) as sub_block:
            scale = fields.scale(block_scale, sub_block.index)
            minimum = fields.minimum(block_minimum, sub_block.index)
            with f.loop("chunk", 0, chunks, unroll=True) as chunk:
                number = f.index("chunk_in_block", (sub_block.index, chunks), (chunk.index, 1))
                value = value_of(module, f, fields.quants(number), scale, minimum)
                element = f.index("k", (block.index, fmt.block_elements), (number, CHUNK))
                at = f.at("%out", STORED[float_type], element, "out_at")
                store_floats(module, f, SIXTEEN, float_type, value, at, None)


def _store_row(
    module: Module,
    f: Function,
    fmt: Format,
    lanes: Lanes,
    span: tuple[int, int],
    float_type: FloatType,
    step: int = 1,
    first: str = "0",
) -> None:
    """Write the loop that converts the elements of a span, `step` apart in %row, to %out.

    first: where element 0 is, in bytes.
    """
    hint = "k" if lanes.count > 1 else "rest"
    with f.loop(hint, *span, step=lanes.count) as loop:
        offset = f.index("w_offset", (loop.index, step * fmt.block_bytes), (first, 1))
        w = load_floats(module, f, fmt, lanes, f.at("%row", "i8", offset, "w_at"), align_bytes=1)
        at = f.at("%out", STORED[float_type], loop.index, "out_at")
        store_floats(module, f, lanes, float_type, w, at, None)


def _float_dot(module: Module, f: Function, fmt: Format, k: int) -> str:
    whole = k // CHUNK
    chunks = functools.partial(_chunks_dot, module, f, fmt)
    sums = write_long_sums(module, f, whole, 1, ["total"], chunks)
    total, fma = sum_lanes(module, f, sums["total"]), module.fma("float")
    with f.loop("rest", whole * CHUNK, k, carry={"total": ("float", total)}) as rest:
        at = f.at("%row", "i8", f.index("w_offset", (rest.index, fmt.block_bytes)), "w_at")
        w = load_floats(module, f, fmt, ONE, at, align_bytes=1)
        x = f.let("x", f"load float, ptr {f.at('%x', 'float', rest.index, 'x_at')}, align 4")
        so_far = rest["total"]
        rest["total"] = f.let("total", f"call float {fma}(float {x}, float {w}, float {so_far})")
    return rest["total"]


def _chunks_dot(
    module: Module, f: Function, fmt: Format, first: str | int, end: str | int
) -> dict[str, str]:
    """Write the dot product over chunks of 16 elements; return its 16 sums as `total`."""
    zero = (VECTOR, "zeroinitializer")
    with f.loop("chunk", first, end, carry={"total": zero}) as loop:
        k = f.index("k", (loop.index, CHUNK))
        at = f.at("%row", "i8", f.index("w_offset", (k, fmt.block_bytes)), "w_at")
        w = load_floats(module, f, fmt, SIXTEEN, at, align_bytes=1)
        x = load_vector(module, f, f.at("%x", "float", k, "x_at"), None, "x")
        loop["total"] = add_scaled(module, f, "total", loop["total"], x, w)
    return loop.values
