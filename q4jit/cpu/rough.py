"""Rough units in LLVM IR: the parts of x that digits cannot hold, multiplied in floats."""

from q4jit.cpu.digits import LIST_AT
from q4jit.cpu.fields import Fields, add_scaled
from q4jit.cpu.lanes import splat_value
from q4jit.cpu.llvm_text import VECTOR, Function, Loop, Module
from q4jit.cpu.products import walk_sub_block
from q4jit.cpu.schedule import UNIT
from q4jit.weights.layouts import Interleaved


def add_rough(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr x, ptr end, ptr w, ptr sums)` and return its name.

    x: a row of floats; end: the data after its units; w: a group of 16 columns; sums: f32 [16],
    to which the products of the row's rough units are added.
    """
    name = f"{weight.fmt.name.lower()}_k{weight.k}_rough"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %x, ptr noalias %end, ptr noalias %w, "
            "ptr noalias %sums) #0",
            "16 columns times the rough units of a row of x, in floats, added to 16 sums.",
        )
        _write(module, f, weight)
        module.add(name, f)
    return f"@{name}"


def _write(module: Module, f: Function, weight: Interleaved) -> None:
    total = f.let("total", f"load {VECTOR}, ptr %sums, align 64")
    count32 = f.let("count32", "load i32, ptr %end, align 4")
    list_at = f.at("%end", "i8", LIST_AT, "list")
    count = f.let("count", f"sext i32 {count32} to i64")
    with f.loop("i", 0, count, carry={"total": (VECTOR, total)}) as entry:
        unit32 = f.let("unit32", f"load i32, ptr {f.at(list_at, 'i32', entry.index)}, align 4")
        unit = f.let("unit", f"sext i32 {unit32} to i64")
        entry["total"] = _add_unit(module, f, weight, unit, entry["total"])
    f.do(f"store {VECTOR} {entry['total']}, ptr %sums, align 64")
    f.do("ret void")


def _add_unit(module: Module, f: Function, weight: Interleaved, unit: str, total: str) -> str:
    """Add 16 columns times unit number `unit` of x to a total."""
    number, within = _split(f, unit, weight.block_elements // UNIT)
    tile, block = _split(f, number, weight.blocks_per_slab)
    tile_at = f.at("%w", "i8", f.index("w_off", (tile, weight.slab_bytes)), "tile_at")
    fields = Fields(module, f, weight, tile_at, block)
    first = f.index("k", (number, weight.block_elements))
    d, m = fields.halves("d"), fields.halves("m")

    def element(k: str, byte: int, value: str, parts: Loop) -> None:
        at = f.at("%x", "float", f.index("k", (k, 1), (byte, 1)), "xk")
        x = splat_value(f, "float", f.let("x0", f"load float, ptr {at}, align 4"))
        parts["part"] = add_scaled(module, f, "part", parts["part"], x, value)

    subs = UNIT // weight.fmt.sub_block_elements
    with f.loop("sub", 0, subs, carry={"total": (VECTOR, total)}) as sub:
        here = f.index("sub_number", (within, subs), (sub.index, 1))
        scale = fields.scale(d, here)
        decode = (scale, m) if m is not None else None
        zero = {"part": "zeroinitializer"}
        parts = walk_sub_block(f, fields, first, here, decode, zero, element)
        late = None if decode else scale
        sub["total"] = add_scaled(module, f, "total", sub["total"], late, parts["part"])
    return sub["total"]


def _split(f: Function, index: str, count: int) -> tuple[str, str]:
    """Return which of the runs of `count` an index is in, and where in it."""
    if count == 1:
        return index, "0"
    return f.let("run", f"udiv i64 {index}, {count}"), f.let("within", f"urem i64 {index}, {count}")
