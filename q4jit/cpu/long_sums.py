"""Write long sums in LLVM IR: stretches of terms are summed apart, then added without loss.

A plain sum of n terms of one sign errs by about 0.24·2^-24·√n of itself. Here only the terms of a
stretch are summed plainly. Each stretch's sum is added to a total by TwoSum (Knuth, The Art of
Computer Programming 2, 4.2.2), which gives the rounding error of an addition; these errors have a
total of their own.
"""

from collections.abc import Callable, Mapping
from typing import Final

from q4jit.cpu.lanes import INFINITY, magnitude_of
from q4jit.cpu.llvm_text import MASK, VECTOR, Function, Module
from q4jit.weights.layouts import Interleaved

# A stretch's sum is added by some 10 instructions, a term of a product by 30 to 150.
STRETCH_TERMS: Final = 64


def slab_terms(weight: Interleaved) -> int:
    """Return the terms that a slab adds to each sum: two for a sub-block with a minimum."""
    fmt = weight.fmt
    sub_blocks = weight.blocks_per_slab * weight.block_elements // fmt.sub_block_elements
    return sub_blocks * (1 if fmt.minimum_at is None else 2)


def write_long_sums(
    module: Module,
    f: Function,
    count: int,
    terms: int,
    names: list[str],
    write: Callable[[str | int, str | int], Mapping[str, str]],
) -> dict[str, str]:
    """Write sums over `count` steps of `terms` terms each; return the sums by name.

    write(first, end) writes the sums over the steps first … end - 1 and returns them.
    """
    stretch = max(1, STRETCH_TERMS // terms)
    if count <= stretch:
        return dict(write(0, count))
    memory = f.let_at_entry("long_sums", f"alloca [{len(names)} x [2 x {VECTOR}]], align 64")
    sums_at = {name: f.at(memory, f"[2 x {VECTOR}]", i, "sum_at") for i, name in enumerate(names)}
    for at in sums_at.values():
        f.do(f"store [2 x {VECTOR}] zeroinitializer, ptr {at}, align 64")
    with f.loop("stretch", 0, count, step=stretch) as loop:
        end = f.let("stretch_end", f"add i64 {loop.index}, {stretch}")
        if count % stretch:
            module.declare("declare i64 @llvm.smin.i64(i64, i64)")
            end = f.let("stretch_end", f"call i64 @llvm.smin.i64(i64 {end}, i64 {count})")
        sums = write(loop.index, end)
        f.comment("the stretch's sums are added with what rounding takes from them")
        for name, at in sums_at.items():
            f.do(f"call void {_add_to_long(module)}({VECTOR} {sums[name]}, ptr {at})")
    return {name: read_long(module, f, at) for name, at in sums_at.items()}


def _add_to_long(module: Module) -> str:
    """Add the function `void (vector part, ptr sum)` and return its name.

    sum: a total and the total of its rounding errors, both updated.

    The function is not inlined: its registers would be missing in the loops around it. On AVX2 the
    products of 8 rows then took 1.15 times as long.
    """
    name = "add_to_long"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}({VECTOR} %part, ptr %sum) noinline #0",
            "Add to a total, and what rounding takes from it to the total after it.",
        )
        write_add(f, "%part", "%sum")
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def write_add(f: Function, part: str, sum_at: str, is_first: str | None = None) -> None:
    """Add a vector to a total, and what rounding takes from it to the total after it.

    is_first: a truth value; if it is true, both count as 0, whatever the memory holds.
    """
    lost_at = f.at(sum_at, VECTOR, 1, "lost_at")
    total = f.let("total", f"load {VECTOR}, ptr {sum_at}, align 64")
    lost = f.let("lost", f"load {VECTOR}, ptr {lost_at}, align 64")
    if is_first is not None:
        zero = f"{VECTOR} zeroinitializer"
        total = f.let("total", f"select i1 {is_first}, {zero}, {VECTOR} {total}")
        lost = f.let("lost", f"select i1 {is_first}, {zero}, {VECTOR} {lost}")
    new = f.let("new", f"fadd {VECTOR} {total}, {part}")
    added = f.let("added", f"fsub {VECTOR} {new}, {total}")
    before = f.let("before", f"fsub {VECTOR} {new}, {added}")
    of_total = f.let("lost_of_total", f"fsub {VECTOR} {total}, {before}")
    of_part = f.let("lost_of_part", f"fsub {VECTOR} {part}, {added}")
    both = f.let("lost_now", f"fadd {VECTOR} {of_total}, {of_part}")
    lost = f.let("lost", f"fadd {VECTOR} {lost}, {both}")
    f.do(f"store {VECTOR} {new}, ptr {sum_at}, align 64")
    f.do(f"store {VECTOR} {lost}, ptr {lost_at}, align 64")


def read_long(module: Module, f: Function, sum_at: str) -> str:
    """Return a total with its rounding errors."""
    total = f.let("total", f"load {VECTOR}, ptr {sum_at}, align 64")
    lost = f.let("lost", f"load {VECTOR}, ptr {f.at(sum_at, VECTOR, 1, 'lost_at')}, align 64")
    magnitude = magnitude_of(module, f, lost)
    finite = f.let("finite", f"fcmp olt {VECTOR} {magnitude}, {INFINITY}", "not Inf − Inf")
    kept = f.let("kept", f"select {MASK} {finite}, {VECTOR} {lost}, {VECTOR} zeroinitializer")
    return f.let("total", f"fadd {VECTOR} {total}, {kept}")
