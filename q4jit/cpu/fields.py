"""Reading block formats in LLVM IR: the fields of a block, its quants, their values.

In the `interleaved16` layout a vector is one element of 16 columns, in GGUF rows it is 16 elements
of one column. Nothing here is more than a register: no weight is ever stored as a float.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.lanes import (
    ONE,
    SIXTEEN,
    Lanes,
    half_loader,
    splat_value,
)
from q4jit.cpu.llvm_text import (
    INTS,
    VECTOR,
    Function,
    Module,
    float_text,
    splat,
)
from q4jit.weights.formats import Format, Plane
from q4jit.weights.layouts import CACHE_LINE_BYTES, LANES, Interleaved

CHUNK: Final = 16  # elements along K that share one shift and one scale
WORD: Final = 4  # bytes of a quant word: elements that are decoded from one load
_EVERY_BYTE: Final = 0x01010101  # times a byte: that byte four times
# far enough ahead to hide memory's latency
_BYTES_AHEAD: Final = 8192
_SPARSE_BYTES_AHEAD: Final = 4096


@dataclass(frozen=True)
class PlaneAt:
    """A plane's words of one chunk: their address and how far to shift (0 where never)."""

    address: str
    shift: str


@dataclass(frozen=True)
class Fields:
    """Reads the fields of one block of 16 interleaved columns."""

    module: Module
    f: Function
    weight: Interleaved
    tile_at: str
    block: str

    def _address(self, name: str) -> str:
        start, stride = self.weight.field_at(name)
        return self.f.at(
            self.tile_at, "i8", self.f.index(f"{name}_at", (self.block, stride), (start, 1)), name
        )

    def halves(self, name: str) -> str | None:
        """The 16 columns' d or m; None where the format has none."""
        fmt = self.weight.fmt
        if (fmt.scale_at if name == "d" else fmt.minimum_at) is None:
            return None
        loader = half_loader(self.module, SIXTEEN)
        return self.f.let(f"{name}16", f"call {VECTOR} {loader}(ptr {self._address(name)})")

    def scale(self, d: str | None, sub: str) -> str | None:
        """d, or d times the scale of sub-block `sub` where the format has such scales."""
        if self.weight.fmt.sub_scales_at is None:
            return d
        f = self.f
        at = f.at(self._address("scales"), "i8", f.index("sub_at", (sub, LANES)), "scale_at")
        scale = f.let("s8", f"load <16 x i8>, ptr {at}, align 1")
        wide = f.let("s32", f"sext <16 x i8> {scale} to {INTS}")
        number = f.let("s", f"sitofp {INTS} {wide} to {VECTOR}")
        return f.let("scale", f"fmul {VECTOR} {d}, {number}")

    def planes(self, chunk: str) -> list[PlaneAt]:
        """Where the quants of chunk number `chunk` of the block lie, plane by plane."""
        found = []
        for i, plane in enumerate(self.weight.fmt.planes):
            byte, shift = _plane_position(self.f, plane, self.weight.block_elements, chunk)
            base = self._address(f"quants{i}")
            address = self.f.at(base, "i8", self.f.index("byte", (byte, LANES)), "plane")
            found.append(PlaneAt(address, shift))
        return found

    def quants(self, planes: list[PlaneAt], chunk: str, word: str) -> list[str]:
        """The four elements of a word as floats, each in 16 columns."""
        f = self.f
        if self.weight.fmt.float_dtype is not None:
            return self._floats(chunk, word)
        words = [shift_right(f, self._word(plane, word), plane.shift) for plane in planes]
        convert = quant_converter(self.module, self.weight.fmt)
        result = []
        for byte in range(WORD):
            shifted = [shift_right(f, bits, str(8 * byte)) for bits in words]
            operands = ", ".join(f"{INTS} {bits}" for bits in shifted)
            result.append(f.let(f"q{byte}", f"call {VECTOR} {convert}({operands})"))
        return result

    def quant_bytes(self, planes: list[PlaneAt], word: str) -> str:
        """Return the four elements of a word, a byte each, in 16 columns."""
        f, q = self.f, ""
        for plane, at in zip(self.weight.fmt.planes, planes, strict=True):
            bits = self._word(at, word)
            if plane.bits < 8:
                bits = shift_right(f, bits, at.shift)
                mask = ((1 << plane.bits) - 1) * _EVERY_BYTE
                bits = f.let("field", f"and {INTS} {bits}, {splat('i32', str(mask))}")
            if plane.lshift:
                bits = f.let("field", f"shl {INTS} {bits}, {splat('i32', str(plane.lshift))}")
            q = f.let("q", f"or {INTS} {q}, {bits}") if q else bits
        return q

    def _word(self, plane: PlaneAt, word: str) -> str:
        at = self.f.at(plane.address, INTS, word, "word_at")
        return self.f.let("bits", f"load {INTS}, ptr {at}, align 32")

    def _floats(self, chunk: str, word: str) -> list[str]:
        f, fmt = self.f, self.weight.fmt
        result = []
        for byte in range(WORD):
            number = f.index("number", (chunk, CHUNK), (word, WORD), (byte, 1))
            offset = f.index("value_at", (number, LANES * fmt.block_bytes))
            at = f.at(self._address("values"), "i8", offset, "at")
            result.append(load_floats(self.module, f, fmt, SIXTEEN, at, fmt.block_bytes))
        return result


# --- quants and their values ---------------------------------------------------------------------


def _plane_position(f: Function, plane: Plane, block_elements: int, chunk: str) -> tuple[str, str]:
    """The first byte of chunk number `chunk` in a plane, and its shift (see `Plane.position`)."""
    if chunk.isdigit():
        byte, shift = map(str, plane.position(int(chunk) * CHUNK))
        return byte, shift
    per_run, per_width = plane.run_elements // CHUNK, plane.width_bytes // CHUNK
    runs = block_elements // plane.run_elements
    run = f.let("run", f"udiv i64 {chunk}, {per_run}") if runs > 1 else "0"
    within = f.let("within", f"urem i64 {chunk}, {per_run}") if runs > 1 else chunk
    column = f.let("column", f"urem i64 {within}, {per_width}") if per_width > 1 else "0"
    at = f.index("byte", (run, plane.width_bytes), (column, CHUNK))
    if per_run == per_width:
        return at, "0"
    pile = f.let("pile", f"udiv i64 {within}, {per_width}") if per_width > 1 else within
    narrow = f.let("pile32", f"trunc i64 {pile} to i32")
    return at, f.let("shift", f"mul i32 {narrow}, {plane.bits}")


def shift_right(f: Function, bits: str, shift: str) -> str:
    """Bits shifted by a number or a value, the same in all lanes."""
    if shift == "0":
        return bits
    lanes = splat("i32", shift) if shift.isdigit() else splat_value(f, "i32", shift)
    return f.let("bits", f"lshr {INTS} {bits}, {lanes}")


def quant_converter(module: Module, fmt: Format) -> str:
    """The function from the planes' bits (what stands above an element is ignored) to q − zero."""
    name = f"quant_{fmt.name.lower()}"
    if not module.knows(name):
        operands = ", ".join(f"{INTS} %bits{i}" for i in range(len(fmt.planes)))
        f = Function(f"internal {VECTOR} @{name}({operands}) #1", f"{fmt.name}: bits to q − zero.")
        one_nibble = len(fmt.planes) == 1 and fmt.planes[0].bits == 4
        if one_nibble and module.target.has("avx512f"):
            _convert_by_table(module, f, fmt)
        else:
            _convert_by_arithmetic(f, fmt)
        module.add(name, f)
    return f"@{name}"


def _convert_by_table(module: Module, f: Function, fmt: Format) -> None:
    # vpermps looks at the low four bits of a lane only: mask, subtraction and conversion in one
    table = ", ".join(f"float {float_text(q - fmt.zero)}" for q in range(16))
    permute = "llvm.x86.avx512.permvar.sf.512"
    module.declare(f"declare {VECTOR} @{permute}({VECTOR}, {INTS})")
    q = f.let("q", f"call {VECTOR} @{permute}({VECTOR} <{table}>, {INTS} %bits0)")
    f.do(f"ret {VECTOR} {q}")


def _convert_by_arithmetic(f: Function, fmt: Format) -> None:
    q = ""
    if fmt.signed:
        top = f.let("top", f"shl {INTS} %bits0, {splat('i32', '24')}")
        q = f.let("q", f"ashr {INTS} {top}, {splat('i32', '24')}")
    else:
        for i, plane in enumerate(fmt.planes):
            mask = splat("i32", str((1 << plane.bits) - 1))
            field = f.let("field", f"and {INTS} %bits{i}, {mask}")
            if plane.lshift:
                field = f.let("field", f"shl {INTS} {field}, {splat('i32', str(plane.lshift))}")
            q = f.let("q", f"or {INTS} {q}, {field}") if q else field
        if fmt.zero:
            q = f.let("q", f"sub {INTS} {q}, {splat('i32', str(fmt.zero))}")
    f.do(f"ret {VECTOR} {f.let('value', f'sitofp {INTS} {q} to {VECTOR}')}")


def value_of(module: Module, f: Function, quant: str, scale: str | None, m: str | None) -> str:
    """scale·quant + m, of which scale and m may be None."""
    if scale is None:
        return quant
    if m is None:
        return f.let("value", f"fmul {VECTOR} {scale}, {quant}")
    return add_scaled(module, f, "value", m, scale, quant)


def add_scaled(
    module: Module, f: Function, hint: str, total: str, scale: str | None, part: str
) -> str:
    """total + scale·part; scale is None where there is none or `part` carries it already."""
    if scale is None:
        return f.let(hint, f"fadd {VECTOR} {total}, {part}")
    fma = module.fma()
    return f.let(hint, f"call {VECTOR} {fma}({VECTOR} {scale}, {VECTOR} {part}, {VECTOR} {total})")


def load_floats(
    module: Module, f: Function, fmt: Format, lanes: Lanes, at: str, align_bytes: int
) -> str:
    """Weights of a float format as f32."""
    if fmt.float_dtype == "<f4":
        return f.let("weight", f"load {lanes.f32}, ptr {at}, align {align_bytes}")
    loader = half_loader(module, lanes, align_bytes)
    return f.let("weight", f"call {lanes.f32} {loader}(ptr {at})")


# --- GGUF rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFields:
    """Reads the fields of one block of a GGUF row, 16 elements at a time."""

    module: Module
    f: Function
    fmt: Format
    block_at: str

    def half(self, name: str, offset_bytes: int | None) -> str | None:
        """The block's d or m in every lane; None where the format has none."""
        if offset_bytes is None:
            return None
        f = self.f
        loader = half_loader(self.module, ONE, align_bytes=1)
        at = f.at(self.block_at, "i8", offset_bytes, f"{name}_at")
        return splat_value(f, "float", f.let(name, f"call float {loader}(ptr {at})"))

    def scale(self, d: str | None, sub: str) -> str | None:
        """d, or d times the scale of sub-block `sub` where the format has such scales."""
        if self.fmt.sub_scales_at is None:
            return d
        f = self.f
        offset = f.index("sub_at", (sub, 1), (self.fmt.sub_scales_at, 1))
        s8 = f.let("s8", f"load i8, ptr {f.at(self.block_at, 'i8', offset, 'scale_at')}")
        s = f.let("s", f"sitofp i8 {s8} to float")
        return f.let("scale", f"fmul {VECTOR} {d}, {splat_value(f, 'float', s)}")

    def quants(self, chunk: str) -> str:
        """The 16 elements of chunk number `chunk` of the block, without their scale."""
        f, operands = self.f, []
        for plane in self.fmt.planes:
            byte, shift = _plane_position(f, plane, self.fmt.block_elements, chunk)
            offset = f.index("bytes_at", (byte, 1), (plane.at, 1))
            at = f.at(self.block_at, "i8", offset, "plane")
            narrow = f.let("bytes", f"load <16 x i8>, ptr {at}, align 1")
            bits = f.let("bits", f"zext <16 x i8> {narrow} to {INTS}")
            operands.append(f"{INTS} {shift_right(f, bits, shift)}")
        convert = quant_converter(self.module, self.fmt)
        return f.let("q", f"call {VECTOR} {convert}({', '.join(operands)})")


def prefetch(
    module: Module,
    f: Function,
    weight: Interleaved,
    tile_at: str,
    block: str,
    sub: str,
    sparse: bool = False,
) -> None:
    """Announce what a sub-block some way on will read.

    To the second level: the first one keeps some 20 lines on their way at a time, too few for
    memory's latency (M = 4 took 1.8 times as long on a Zen 4). sparse: a line of each sub-block,
    which a CPU's own prefetching goes on from, as it ends with a page; for kernels that load faster
    than memory delivers, so that announcements of all lines would only come late.
    """
    block_bytes = weight.slab_bytes // weight.blocks_per_slab
    subs = weight.block_elements // weight.fmt.sub_block_elements
    lines = -(-block_bytes // (subs * CACHE_LINE_BYTES))
    bytes_ahead = _SPARSE_BYTES_AHEAD if sparse else _BYTES_AHEAD
    module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.comment(f"the same place {bytes_ahead} bytes ahead")
    with f.loop("line", 0, 1 if sparse else lines, unroll=True) as line:
        ahead = f.index(
            "ahead",
            (block, block_bytes),
            (sub, lines * CACHE_LINE_BYTES),
            (line.index, CACHE_LINE_BYTES),
            (bytes_ahead, 1),
        )
        at = f.at(tile_at, "i8", ahead, "ahead_at")
        f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 2, i32 1) ; read, second level")
