"""Write the products of rough units in LLVM IR: units of x that digits cannot hold, as floats."""

from q4jit.cpu.digit_form import ROW_END, load_field
from q4jit.cpu.fields import Fields, add_scaled
from q4jit.cpu.lanes import broadcast
from q4jit.cpu.llvm_text import VECTOR, Function, Loop, Module
from q4jit.cpu.products import walk_sub_block
from q4jit.cpu.schedule import UNIT
from q4jit.weights.layouts import Interleaved


def add_rough(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr x, ptr end, ptr w, ptr sums)` and return its name.

    x: a row of floats; end: the end of the same row in digits; w: a panel of 16 columns; sums: f32
    [16], to which the products of the row's rough units are added.
    """
    name = f"{weight.fmt.name.lower()}_k{weight.k}_rough"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %x, ptr noalias %end, ptr noalias %w, "
            "ptr noalias %sums) #0",
            "16 columns times the rough units of a row of x, as floats, added to 16 sums.",
        )
        _write(module, f, weight)
        module.add(name, f)
    return f"@{name}"


def _write(module: Module, f: Function, weight: Interleaved) -> None:
    total = f.let("total", f"load {VECTOR}, ptr %sums, align 64")
    count32 = load_field(f, "%end", ROW_END, "rough_count")
    list_at = f.field_at("%end", ROW_END, "rough_units")
    count = f.let("count", f"sext i32 {count32} to i64")
    with f.loop("i", 0, count, carry={"total": (VECTOR, total)}) as entry:
        entry_at = f.at(list_at, "i32", entry.index, "entry_at")
        unit32 = f.let("unit32", f"load i32, ptr {entry_at}, align 4")
        unit = f.let("unit", f"sext i32 {unit32} to i64")
        entry["total"] = _add_unit(module, f, weight, unit, entry["total"])
    f.do(f"store {VECTOR} {entry['total']}, ptr %sums, align 64")
    f.do("ret void")


def _add_unit(module: Module, f: Function, weight: Interleaved, unit: str, total: str) -> str:
    """Add 16 columns times a unit of x to a total."""
    block, unit_in_block = f.divided(unit, weight.block_elements // UNIT, "block", "unit_in_block")
    slab, block_in_slab = f.divided(block, weight.blocks_per_slab, "slab", "block_in_slab")
    slab_at = f.at("%w", "i8", f.index("slab_offset", (slab, weight.slab_bytes)), "slab_at")
    fields = Fields(module, f, weight, slab_at, block_in_slab)
    first = f.index("first", (block, weight.block_elements))
    block_scale, block_minimum = fields.block_field("d"), fields.block_field("m")

    def element(k: str, byte: int, value: str, parts: Loop) -> None:
        at = f.at("%x", "float", f.index("k", (k, 1), (byte, 1)), "x_at")
        x = broadcast(f, "float", f.let("x", f"load float, ptr {at}, align 4"))
        parts["part"] = add_scaled(module, f, "part", parts["part"], x, value)

    sub_blocks = UNIT // weight.fmt.sub_block_elements
    with f.loop("sub_block", 0, sub_blocks, carry={"total": (VECTOR, total)}) as sub_block:
        number = f.index("sub_block_in_block", (unit_in_block, sub_blocks), (sub_block.index, 1))
        scale = fields.scale(block_scale, number)
        minimum = fields.minimum(block_minimum, number)
        decode = (scale, minimum) if minimum is not None else None
        zero = {"part": "zeroinitializer"}
        parts = walk_sub_block(f, fields, first, number, decode, zero, element)
        late_scale = None if decode else scale
        sub_block["total"] = add_scaled(
            module, f, "total", sub_block["total"], late_scale, parts["part"]
        )
    return sub_block["total"]
