"""Write functions that read GGUF rows, in LLVM IR: dot products with x, and rows as floats.

They serve narrow results, slices that start inside a panel, and row lookups, for which the layout
`interleaved16` is not made.
"""

import functools

from q4jit.cpu.fields import CHUNK, add_scaled, load_floats, value_of
from q4jit.cpu.halves import STORED, named, store_floats, type_suffix
from q4jit.cpu.lanes import ONE, SIXTEEN, load_vector, sum_lanes
from q4jit.cpu.llvm_text import VECTOR, Function, Module
from q4jit.cpu.long_sums import write_long_sums
from q4jit.cpu.row_fields import RowFields
from q4jit.floats import FloatType
from q4jit.weights.formats import Format


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
        at = f.at("%row", "i8", f.index("block_offset", (block.index, fmt.block_bytes)), "block_at")
        fields = RowFields(module, f, fmt, at)
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
            _float_row(module, f, fmt, k, float_type)
        else:
            _block_row(module, f, fmt, k, float_type)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _block_row(module: Module, f: Function, fmt: Format, k: int, float_type: FloatType) -> None:
    with f.loop("block", 0, k // fmt.block_elements) as block:
        at = f.at("%row", "i8", f.index("block_offset", (block.index, fmt.block_bytes)), "block_at")
        fields = RowFields(module, f, fmt, at)
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


def _float_row(module: Module, f: Function, fmt: Format, k: int, float_type: FloatType) -> None:
    whole = k // CHUNK * CHUNK
    with f.loop("k", 0, whole, step=CHUNK) as loop:
        offset = f.index("w_offset", (loop.index, fmt.block_bytes))
        w = load_floats(module, f, fmt, SIXTEEN, f.at("%row", "i8", offset, "w_at"), align_bytes=1)
        at = f.at("%out", STORED[float_type], loop.index, "out_at")
        store_floats(module, f, SIXTEEN, float_type, w, at, None)
    with f.loop("rest", whole, k) as rest:
        offset = f.index("w_offset", (rest.index, fmt.block_bytes))
        w = load_floats(module, f, fmt, ONE, f.at("%row", "i8", offset, "w_at"), align_bytes=1)
        at = f.at("%out", STORED[float_type], rest.index, "out_at")
        store_floats(module, f, ONE, float_type, w, at, None)


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
