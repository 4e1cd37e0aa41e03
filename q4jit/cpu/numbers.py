"""Make numbers of a format's codes in LLVM IR: floats in every lane, or bytes by a table."""

from typing import Final

from q4jit.cpu.llvm_text import (
    INTS,
    VECTOR,
    Function,
    Module,
    float_text,
    splat,
    splat_int,
)
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES

_TOP_BYTE_SHIFT: Final = 24  # moves the lowest byte of an i32 to where its sign is the i32's
_BYTES: Final = 4 * LANES  # of 16 lanes
_TABLE_BITS: Final = 4  # of the codes that one look-up in 16 entries converts


def quant_converter(module: Module, fmt: Format) -> str:
    """Return the function from a code, or what `byte_numbers` made of it, to its number as a float.

    The function ignores all bits above those of an element.
    """
    name = f"quant_{fmt.name.lower()}"
    if not module.knows(name):
        doc = f"{fmt.name}: the quant in the lowest bits of each lane, as a float."
        f = Function(f"internal {VECTOR} @{name}({INTS} %bits0) #1", doc)
        if converts_by_table(module, fmt):
            _convert_by_table(module, f, fmt)
        else:
            _convert_by_arithmetic(f, fmt)
        module.add(name, f)
    return f"@{name}"


def converts_by_table(module: Module, fmt: Format) -> bool:
    """Return whether one instruction converts the lowest bits of each lane."""
    return 0 < fmt.quant_bits <= _TABLE_BITS + 1 and module.target.has("avx512f")


def converts_bytes(module: Module, fmt: Format) -> bool:
    """Return whether codes become numbers by `byte_numbers` first."""
    return fmt.table is not None and not converts_by_table(module, fmt)


def _convert_by_table(module: Module, f: Function, fmt: Format) -> None:
    wide = fmt.quant_bits > _TABLE_BITS
    bits, permute = ("five", "vpermi2ps") if wide else ("four", "vpermps")
    f.comment(
        f"{permute} reads only the low {bits} bits of a lane: it masks, subtracts and converts"
    )
    numbers = fmt.numbers
    entries = [numbers[i % len(numbers)] for i in range(LANES * (1 + wide))]
    texts = [f"float {float_text(number)}" for number in entries]
    low, high = (", ".join(part) for part in (texts[:LANES], texts[LANES:]))
    if wide:
        intrinsic = "llvm.x86.avx512.vpermi2var.ps.512"
        module.declare(f"declare {VECTOR} @{intrinsic}({VECTOR}, {INTS}, {VECTOR})")
        arguments = f"{VECTOR} <{low}>, {INTS} %bits0, {VECTOR} <{high}>"
    else:
        intrinsic = "llvm.x86.avx512.permvar.sf.512"
        module.declare(f"declare {VECTOR} @{intrinsic}({VECTOR}, {INTS})")
        arguments = f"{VECTOR} <{low}>, {INTS} %bits0"
    quant = f.let("quant", f"call {VECTOR} @{intrinsic}({arguments})")
    f.do(f"ret {VECTOR} {quant}")


def _convert_by_arithmetic(f: Function, fmt: Format) -> None:
    if fmt.signed or fmt.table is not None:
        shift = splat_int(_TOP_BYTE_SHIFT)
        top = f.let("top", f"shl {INTS} %bits0, {shift}")
        quant = f.let("int", f"ashr {INTS} {top}, {shift}", "the lowest byte with its sign")
    else:
        quant = f.let("code", f"and {INTS} %bits0, {splat_int((1 << fmt.quant_bits) - 1)}")
        if fmt.zero:
            quant = f.let("int", f"sub {INTS} {quant}, {splat_int(fmt.zero)}")
    f.do(f"ret {VECTOR} {f.let('quant', f'sitofp {INTS} {quant} to {VECTOR}')}")


# --- tables of bytes ------------------------------------------------------------------------------


def byte_numbers(module: Module, f: Function, fmt: Format, codes: str) -> str:
    """Return the numbers of codes by the format's table: an int8 for each byte of 16 lanes."""
    name = f"numbers_{fmt.name.lower()}"
    if not module.knows(name):
        doc = f"{fmt.name}: the int8 that the table has for the code in each byte."
        g = Function(f"internal {INTS} @{name}({INTS} %codes) #1", doc)
        g.do(f"ret {INTS} {_looked_up(module, g, fmt)}")
        module.add(name, g)
    return f.let("numbers", f"call {INTS} @{name}({INTS} {codes})")


def _looked_up(module: Module, f: Function, fmt: Format) -> str:
    kind = f"<{_BYTES} x i8>"
    codes = f.let("bytes", f"bitcast {INTS} %codes to {kind}")
    instruction = _byte_shuffle(module)
    if instruction is None:
        found = _selected(f, fmt, codes)
    else:
        found = _shuffled(module, f, fmt, codes, *instruction)
    return f.let("numbers", f"bitcast {kind} {found} to {INTS}")


def _byte_shuffle(module: Module) -> tuple[str, int] | None:
    """Return LLVM's name of the instruction that looks up bytes in 16 others, and its bytes."""
    target = module.target
    if target.family == "aarch64":
        return "llvm.aarch64.neon.tbl1.v16i8", 16
    if target.has("avx512bw"):
        return "llvm.x86.avx512.pshuf.b.512", 64
    if target.has("avx2"):
        return "llvm.x86.avx2.pshuf.b", 32
    return ("llvm.x86.ssse3.pshuf.b.128", 16) if target.has("ssse3") else None


def _shuffled(
    module: Module, f: Function, fmt: Format, codes: str, intrinsic: str, width: int
) -> str:
    assert len(fmt.numbers) == 1 << _TABLE_BITS, fmt.name
    kind = f"<{width} x i8>"
    module.declare(f"declare {kind} @{intrinsic}({kind}, {kind})")
    entries = ", ".join(f"i8 {number}" for number in fmt.numbers * (width // LANES))
    parts = []
    for first in range(0, _BYTES, width):
        part = _bytes_of(f, codes, range(first, first + width), _BYTES)
        call = f"call {kind} @{intrinsic}({kind} <{entries}>, {kind} {part})"
        parts.append(f.let("found", call))
    while len(parts) > 1:
        width *= 2
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_joined(f, low, high, width) for low, high in pairs]
    return parts[0]


def _bytes_of(f: Function, vector: str, numbers: range, count: int) -> str:
    """Return some of a vector's `count` bytes."""
    if len(numbers) == count:
        return vector
    order = ", ".join(f"i32 {i}" for i in numbers)
    kind, mask = f"<{count} x i8>", f"<{len(numbers)} x i32> <{order}>"
    return f.let("part", f"shufflevector {kind} {vector}, {kind} poison, {mask}")


def _joined(f: Function, low: str, high: str, width: int) -> str:
    """Return two vectors as one of `width` bytes."""
    order = ", ".join(f"i32 {i}" for i in range(width))
    half = f"<{width // 2} x i8>"
    return f.let("joined", f"shufflevector {half} {low}, {half} {high}, <{width} x i32> <{order}>")


def _selected(f: Function, fmt: Format, codes: str) -> str:
    """Return the entries by a tree of selections, from the codes' lowest bit up."""
    kind = f"<{_BYTES} x i8>"
    entries = [splat("i8", str(number)) for number in fmt.numbers]
    for bit in range(fmt.quant_bits):
        own = f.let("own", f"and {kind} {codes}, {splat('i8', str(1 << bit))}", f"bit {bit}")
        is_set = f.let("is_set", f"icmp ne {kind} {own}, zeroinitializer")
        entries = [
            f.let("entry", f"select <{_BYTES} x i1> {is_set}, {kind} {high}, {kind} {low}")
            for low, high in zip(entries[::2], entries[1::2], strict=True)
        ]
    return entries[0]
