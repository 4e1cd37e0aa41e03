"""Read block formats in LLVM IR: the fields of a block, its quants, their values.

In the layout `interleaved16` a vector holds one element of 16 columns; in GGUF rows it holds 16
elements of one column. Weights are decoded in registers: no weight is ever stored as a float.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.halves import f16_loader
from q4jit.cpu.lanes import ONE, SIXTEEN, Lanes, broadcast
from q4jit.cpu.llvm_text import (
    INTS,
    VECTOR,
    Function,
    Module,
    float_text,
    splat,
    splat_int,
)
from q4jit.weights.formats import Format, Plane
from q4jit.weights.layouts import CACHE_LINE_BYTES, LANES, Interleaved

CHUNK: Final = 16  # elements along K that share one shift and one scale
WORD: Final = 4  # elements whose quants are loaded together, as the bytes of an i32
_EVERY_BYTE: Final = 0x01010101  # a byte times this is that byte four times
_TOP_BYTE_SHIFT: Final = 24  # moves the lowest byte of an i32 to where its sign is the i32's
_NAMES: Final = {"d": "block_scale", "m": "minimum"}  # of GGUF's fields, in the text
# far enough ahead to hide memory's latency
_BYTES_AHEAD: Final = 8192
_SPARSE_BYTES_AHEAD: Final = 4096


@dataclass(frozen=True)
class PlaneAt:
    """A plane's words of one chunk: their address, and the shift that brings them to bit 0."""

    address: str
    shift: str


@dataclass(frozen=True)
class Fields:
    """Reads the fields of one block of a panel, in the layout `interleaved16`."""

    module: Module
    f: Function
    weight: Interleaved
    slab_at: str
    block: str

    def _address(self, name: str) -> str:
        start, stride = self.weight.field_at(name)
        offset = self.f.index(f"{_NAMES.get(name, name)}_offset", (self.block, stride), (start, 1))
        return self.f.at(self.slab_at, "i8", offset, f"{_NAMES.get(name, name)}_at")

    def f16_field(self, name: str) -> str | None:
        """Load field `d` or `m` of 16 columns as f32; None if the format has no such field."""
        fmt = self.weight.fmt
        if (fmt.scale_at if name == "d" else fmt.minimum_at) is None:
            return None
        loader = f16_loader(self.module, SIXTEEN)
        return self.f.let(_NAMES[name], f"call {VECTOR} {loader}(ptr {self._address(name)})")

    def scale(self, block_scale: str | None, sub_block: str) -> str | None:
        """Return the scale of a sub-block: the block's, times its own if the format has such."""
        if self.weight.fmt.sub_scales is None:
            return block_scale
        f = self.f
        offset = f.index("scale_offset", (sub_block, LANES))
        at = f.at(self._address("scales"), "i8", offset, "sub_scale_at")
        narrow = f.let("scale_bytes", f"load <16 x i8>, ptr {at}, align 1")
        wide = f.let("scale_ints", f"sext <16 x i8> {narrow} to {INTS}")
        own = f.let("sub_scale", f"sitofp {INTS} {wide} to {VECTOR}")
        return f.let("scale", f"fmul {VECTOR} {block_scale}, {own}")

    def planes(self, chunk: str) -> list[PlaneAt]:
        """Return for each plane where the quants of a chunk of the block are."""
        planes = []
        for i, plane in enumerate(self.weight.fmt.planes):
            byte, shift = _plane_position(self.f, plane, self.weight.block_elements, chunk)
            base = self._address(f"quants{i}")
            offset = self.f.index("chunk_offset", (byte, LANES))
            planes.append(PlaneAt(self.f.at(base, "i8", offset, "chunk_at"), shift))
        return planes

    def parts_to_prefetch(self, planes: list[PlaneAt], chunk: str) -> list[tuple[str, int]]:
        """Return the addresses and sizes in bytes of what to prefetch for a chunk.

        Chunks that share the bytes of a plane prefetch a part of them each.
        """
        f, fmt = self.f, self.weight.fmt
        if fmt.float_type is not None:
            size_bytes = CHUNK * LANES * fmt.block_bytes
            offset = f.index("chunk_offset", (chunk, size_bytes))
            return [(f.at(self._address("values"), "i8", offset, "chunk_at"), size_bytes)]
        names = {"d": fmt.scale_at, "m": fmt.minimum_at}
        parts = [(self._address(name), 1) for name, at in names.items() if at is not None]
        if fmt.sub_scales is not None:
            offset = f.index("scale_offset", (chunk, LANES * CHUNK // fmt.sub_block_elements))
            parts.append((f.at(self._address("scales"), "i8", offset, "scale_at"), 1))
        for plane, at in zip(fmt.planes, planes, strict=True):
            per_bit = CHUNK * LANES // 8
            shift = at.shift if at.shift.isdigit() else f.let("bit", f"zext i32 {at.shift} to i64")
            start = f.at(at.address, "i8", f.index("own_offset", (shift, per_bit)), "own_at")
            parts.append((start, plane.bits * per_bit))
        return parts

    def quants(self, planes: list[PlaneAt], chunk: str, word: str) -> list[str]:
        """Return the four elements of a word as floats, each in 16 columns."""
        f = self.f
        if self.weight.fmt.float_type is not None:
            return self._floats(chunk, word)
        words = [shift_right(f, self._word(plane, word), plane.shift) for plane in planes]
        convert = quant_converter(self.module, self.weight.fmt)
        quants = []
        for byte in range(WORD):
            shifted = [shift_right(f, bits, str(8 * byte)) for bits in words]
            operands = ", ".join(f"{INTS} {bits}" for bits in shifted)
            quants.append(f.let(f"quant{byte}", f"call {VECTOR} {convert}({operands})"))
        return quants

    def quant_bytes(self, planes: list[PlaneAt], word: str) -> str:
        """Return the codes of a word, a byte each, in 16 columns."""
        f, codes = self.f, ""
        for plane, at in zip(self.weight.fmt.planes, planes, strict=True):
            bits = self._word(at, word)
            if plane.bits < 8:
                bits = shift_right(f, bits, at.shift)
                mask = splat_int(((1 << plane.bits) - 1) * _EVERY_BYTE)
                note = f"the lowest {plane.bits} bits of each byte"
                bits = f.let("codes", f"and {INTS} {bits}, {mask}", note)
            if plane.lshift:
                bits = f.let("codes", f"shl {INTS} {bits}, {splat_int(plane.lshift)}")
            codes = f.let("codes", f"or {INTS} {codes}, {bits}") if codes else bits
        return codes

    def _word(self, plane: PlaneAt, word: str) -> str:
        at = self.f.at(plane.address, INTS, word, "word_at")
        return self.f.let("word_bits", f"load {INTS}, ptr {at}, align 32")

    def _floats(self, chunk: str, word: str) -> list[str]:
        f, fmt, floats = self.f, self.weight.fmt, []
        values_at = self._address("values")
        first = f.index("element", (chunk, CHUNK), (word, WORD))
        for i in range(WORD):
            element = f.index("element", (first, 1), (i, 1))
            offset = f.index("w_offset", (element, LANES * fmt.block_bytes))
            at = f.at(values_at, "i8", offset, "w_at")
            floats.append(load_floats(self.module, f, fmt, SIXTEEN, at, fmt.block_bytes))
        return floats


# --- quants and their values ---------------------------------------------------------------------


def _plane_position(f: Function, plane: Plane, block_elements: int, chunk: str) -> tuple[str, str]:
    """Return the first byte of a chunk in a plane, and its shift (see `Plane.position`)."""
    if chunk.isdigit():
        byte, shift = map(str, plane.position(int(chunk) * CHUNK))
        return byte, shift
    per_run, per_width = plane.run_elements // CHUNK, plane.width_bytes // CHUNK
    runs = block_elements // plane.run_elements
    run = f.let("run", f"udiv i64 {chunk}, {per_run}") if runs > 1 else "0"
    within = f.let("in_run", f"urem i64 {chunk}, {per_run}") if runs > 1 else chunk
    column = f.let("in_width", f"urem i64 {within}, {per_width}") if per_width > 1 else "0"
    at = f.index("plane_byte", (run, plane.width_bytes), (column, CHUNK))
    if per_run == per_width:
        return at, "0"
    layer = f.let("layer", f"udiv i64 {within}, {per_width}") if per_width > 1 else within
    layer32 = f.let("layer32", f"trunc i64 {layer} to i32")
    return at, f.let("shift", f"mul i32 {layer32}, {plane.bits}")


def shift_right(f: Function, bits: str, shift: str) -> str:
    """Shift 16 lanes by the same number or value."""
    if shift == "0":
        return bits
    lanes = splat("i32", shift) if shift.isdigit() else broadcast(f, "i32", shift)
    return f.let("shifted", f"lshr {INTS} {bits}, {lanes}")


def quant_converter(module: Module, fmt: Format) -> str:
    """Return the function from the planes' bits to the quant as a float.

    The function ignores all bits above those of an element.
    """
    name = f"quant_{fmt.name.lower()}"
    if not module.knows(name):
        operands = ", ".join(f"{INTS} %bits{i}" for i in range(len(fmt.planes)))
        doc = f"{fmt.name}: the quant in the lowest bits of each lane, as a float."
        f = Function(f"internal {VECTOR} @{name}({operands}) #1", doc)
        if converts_by_table(module, fmt):
            _convert_by_table(module, f, fmt)
        else:
            _convert_by_arithmetic(f, fmt)
        module.add(name, f)
    return f"@{name}"


def converts_by_table(module: Module, fmt: Format) -> bool:
    """Return whether one instruction converts the lowest four bits of each lane."""
    one_nibble = len(fmt.planes) == 1 and fmt.planes[0].bits == 4
    return one_nibble and module.target.has("avx512f")


def _convert_by_table(module: Module, f: Function, fmt: Format) -> None:
    f.comment("vpermps reads only the low four bits of a lane: it masks, subtracts and converts")
    table = ", ".join(f"float {float_text(code - fmt.zero)}" for code in range(16))
    permute = "llvm.x86.avx512.permvar.sf.512"
    module.declare(f"declare {VECTOR} @{permute}({VECTOR}, {INTS})")
    quant = f.let("quant", f"call {VECTOR} @{permute}({VECTOR} <{table}>, {INTS} %bits0)")
    f.do(f"ret {VECTOR} {quant}")


def _convert_by_arithmetic(f: Function, fmt: Format) -> None:
    quant = ""
    if fmt.signed:
        shift = splat_int(_TOP_BYTE_SHIFT)
        top = f.let("top", f"shl {INTS} %bits0, {shift}")
        quant = f.let("int", f"ashr {INTS} {top}, {shift}", "the lowest byte with its sign")
    else:
        for i, plane in enumerate(fmt.planes):
            code = f.let("code", f"and {INTS} %bits{i}, {splat_int((1 << plane.bits) - 1)}")
            if plane.lshift:
                code = f.let("code", f"shl {INTS} {code}, {splat_int(plane.lshift)}")
            quant = f.let("code", f"or {INTS} {quant}, {code}") if quant else code
        if fmt.zero:
            quant = f.let("int", f"sub {INTS} {quant}, {splat_int(fmt.zero)}")
    f.do(f"ret {VECTOR} {f.let('quant', f'sitofp {INTS} {quant} to {VECTOR}')}")


def value_of(
    module: Module, f: Function, quant: str, scale: str | None, minimum: str | None
) -> str:
    """Return scale·quant + minimum; without a scale the quant is the value."""
    if scale is None:
        return quant
    if minimum is None:
        return f.let("value", f"fmul {VECTOR} {scale}, {quant}")
    return add_scaled(module, f, "value", minimum, scale, quant)


def add_scaled(
    module: Module, f: Function, hint: str, total: str, scale: str | None, part: str
) -> str:
    """Return total + scale·part; scale is None if `part` has been multiplied by it."""
    if scale is None:
        return f.let(hint, f"fadd {VECTOR} {total}, {part}")
    fma = module.fma()
    return f.let(hint, f"call {VECTOR} {fma}({VECTOR} {scale}, {VECTOR} {part}, {VECTOR} {total})")


def load_floats(
    module: Module, f: Function, fmt: Format, lanes: Lanes, at: str, align_bytes: int
) -> str:
    """Load weights of a float format as f32."""
    if fmt.float_type == "f32":
        return f.let("weight", f"load {lanes.f32}, ptr {at}, align {align_bytes}")
    loader = f16_loader(module, lanes, align_bytes)
    return f.let("weight", f"call {lanes.f32} {loader}(ptr {at})")


# --- GGUF rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFields:
    """Reads the fields of one block of a GGUF row, 16 elements at a time."""

    module: Module
    f: Function
    fmt: Format
    block_at: str

    def f16_field(self, name: str) -> str | None:
        """Load the block's `d` or `m` into every lane; None if the format has no such field."""
        offset = self.fmt.scale_at if name == "d" else self.fmt.minimum_at
        if offset is None:
            return None
        f = self.f
        loader = f16_loader(self.module, ONE, align_bytes=1)
        at = f.at(self.block_at, "i8", offset, f"{_NAMES[name]}_at")
        return broadcast(f, "float", f.let(_NAMES[name], f"call float {loader}(ptr {at})"))

    def scale(self, block_scale: str | None, sub_block: str) -> str | None:
        """Return the scale of a sub-block: the block's, times its own if the format has such."""
        if self.fmt.sub_scales is None:
            return block_scale
        f = self.f
        offset = f.index("scale_offset", (sub_block, 1), (self.fmt.sub_scales.parts[0].at, 1))
        at = f.at(self.block_at, "i8", offset, "sub_scale_at")
        byte = f.let("scale_byte", f"load i8, ptr {at}")
        own = f.let("sub_scale", f"sitofp i8 {byte} to float")
        return f.let("scale", f"fmul {VECTOR} {block_scale}, {broadcast(f, 'float', own)}")

    def quants(self, chunk: str) -> str:
        """Return the 16 quants of a chunk of the block."""
        f, operands = self.f, []
        for plane in self.fmt.planes:
            byte, shift = _plane_position(f, plane, self.fmt.block_elements, chunk)
            offset = f.index("chunk_offset", (byte, 1), (plane.at, 1))
            at = f.at(self.block_at, "i8", offset, "chunk_at")
            narrow = f.let("bytes", f"load <16 x i8>, ptr {at}, align 1")
            bits = f.let("bits", f"zext <16 x i8> {narrow} to {INTS}")
            operands.append(f"{INTS} {shift_right(f, bits, shift)}")
        convert = quant_converter(self.module, self.fmt)
        return f.let("quant", f"call {VECTOR} {convert}({', '.join(operands)})")


def prefetch(
    module: Module,
    f: Function,
    weight: Interleaved,
    slab_at: str,
    block: str,
    sub_block: str,
    sparse: bool = False,
) -> None:
    """Prefetch what the sub-block at the prefetch distance will read, into the second-level cache.

    The first-level cache has some 20 lines on their way at a time, too few for memory's latency
    (M = 4 took 1.8 times as long on a Zen 4).

    sparse: prefetch one line per sub-block. The CPU's own prefetching, which ends with each page,
    continues from there. This serves kernels that load faster than memory delivers: prefetching all
    their lines would only come late.
    """
    block_bytes = weight.slab_bytes // weight.blocks_per_slab
    sub_blocks = weight.block_elements // weight.fmt.sub_block_elements
    lines = -(-block_bytes // (sub_blocks * CACHE_LINE_BYTES))
    distance_bytes = _SPARSE_BYTES_AHEAD if sparse else _BYTES_AHEAD
    module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.comment(f"prefetch {distance_bytes} bytes ahead")
    with f.loop("line", 0, 1 if sparse else lines, unroll=True) as line:
        ahead = f.index(
            "ahead",
            (block, block_bytes),
            (sub_block, lines * CACHE_LINE_BYTES),
            (line.index, CACHE_LINE_BYTES),
            (distance_bytes, 1),
        )
        at = f.at(slab_at, "i8", ahead, "ahead_at")
        f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 2, i32 1)  ; read, second level")
