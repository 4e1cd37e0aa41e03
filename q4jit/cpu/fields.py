"""Read block formats in LLVM IR: the fields of a block, its quants, their values.

In the layout `interleaved16` a vector holds one element of 16 columns; in GGUF rows (`row_fields`)
it holds 16 elements of one column. Weights are decoded in registers: no weight is ever stored as a
float.
"""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.halves import e8m0_loader, half_loader
from q4jit.cpu.lanes import SIXTEEN, Lanes, broadcast
from q4jit.cpu.llvm_text import (
    INTS,
    VECTOR,
    Function,
    Module,
    splat,
    splat_int,
)
from q4jit.cpu.numbers import byte_numbers, converts_bytes, quant_converter
from q4jit.weights.formats import FactorBits, Format, Plane, SubFactors
from q4jit.weights.layouts import CACHE_LINE_BYTES, LANES, Field, Interleaved, fields

CHUNK: Final = 16  # elements along K that share one scale
WORD: Final = 4  # elements whose quants are loaded together, as the bytes of an i32
_EVERY_BYTE: Final = 0x01010101  # a byte times this is that byte four times
FIELD_NAMES: Final = {"d": "block_scale", "m": "minimum"}  # of GGUF's fields, in the text
# far enough ahead to hide memory's latency
_BYTES_AHEAD: Final = 8192
_SPARSE_BYTES_AHEAD: Final = 4096


@dataclass(frozen=True)
class PlaneAt:
    """A plane's words of one chunk: their address, and the shift that brings the first to bit 0.

    Planes of less than 16 bytes a unit have the later words of a chunk at greater shifts.
    """

    plane: Plane
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

    def address(self, name: str) -> str:
        """Return where a field of the 16 columns begins."""
        start, stride = self.weight.field_at(name)
        offset = self.f.index(
            f"{FIELD_NAMES.get(name, name)}_offset", (self.block, stride), (start, 1)
        )
        return self.f.at(self.slab_at, "i8", offset, f"{FIELD_NAMES.get(name, name)}_at")

    def block_field(self, name: str) -> str | None:
        """Load field `d` or `m` of 16 columns as f32; None if the format has no such field."""
        fmt = self.weight.fmt
        if (fmt.scale_at if name == "d" else fmt.minimum_at) is None:
            return None
        loader = field_loader(self.module, SIXTEEN, fmt, name)
        return self.f.let(FIELD_NAMES[name], f"call {VECTOR} {loader}(ptr {self.address(name)})")

    def exponents(self) -> str:
        """Load field `d` in E8M0 of 16 columns, as integers."""
        at = self.address("d")
        stored = self.f.let("exponent_bytes", f"load <{LANES} x i8>, ptr {at}, align 1")
        return self.f.let("exponents", f"zext <{LANES} x i8> {stored} to {INTS}")

    def scale(self, block_scale: str | None, sub_block: str) -> str | None:
        """Return the scale of a sub-block: the block's, times its own if the format has such."""
        return self._of_sub_block("scale", block_scale, self.weight.fmt.sub_scales, sub_block)

    def minimum(self, block_minimum: str | None, sub_block: str) -> str | None:
        """Return the minimum of a sub-block: the block's, times its own if the format has such."""
        return self._of_sub_block("minimum", block_minimum, self.weight.fmt.sub_minima, sub_block)

    def _of_sub_block(
        self, hint: str, of_block: str | None, sub: SubFactors | None, sub_block: str
    ) -> str | None:
        """Return a block's field times the factor of a sub-block."""
        if sub is None or of_block is None:
            return of_block
        f, (part,) = self.f, sub.parts
        offset = f.index(f"{hint}_offset", (sub_block, LANES))
        at = f.at(self.address(self.field_of(part).name), "i8", offset, f"sub_{hint}_at")
        narrow = f.let(f"{hint}_bytes", f"load <{LANES} x i8>, ptr {at}, align 1")
        extend = "sext" if sub.signed else "zext"
        stored = f.let(f"{hint}_ints", f"{extend} <{LANES} x i8> {narrow} to {INTS}")
        if part.bits < 8:
            stored = shift_right(f, stored, str(part.shift))
            mask = splat_int((1 << part.bits) - 1)
            stored = f.let(f"{hint}_ints", f"and {INTS} {stored}, {mask}")
        return times_factor(f, hint, of_block, sub, stored)

    def field_of(self, part: FactorBits) -> Field:
        """Return the field that has the sub-blocks' factors."""
        return next(
            each
            for each in fields(self.weight.fmt)
            if each.at <= part.at < each.at + each.size_bytes
        )

    def planes(self, chunk: str) -> list[PlaneAt]:
        """Return for each plane where the quants of a chunk of the block are."""
        planes = []
        for i, plane in enumerate(self.weight.fmt.planes):
            byte, shift = plane_position(self.f, plane, self.weight.block_elements, chunk)
            base = self.address(f"quants{i}")
            offset = self.f.index("chunk_offset", (byte, LANES))
            planes.append(PlaneAt(plane, self.f.at(base, "i8", offset, "chunk_at"), shift))
        return planes

    def parts_to_prefetch(self, planes: list[PlaneAt], chunk: str) -> list[tuple[str, int]]:
        """Return the addresses and sizes in bytes of what to prefetch for a chunk.

        Chunks that share the bytes of a plane prefetch a part of them each.
        """
        f, fmt = self.f, self.weight.fmt
        if fmt.float_type is not None:
            size_bytes = CHUNK * LANES * fmt.block_bytes
            offset = f.index("chunk_offset", (chunk, size_bytes))
            return [(f.at(self.address("values"), "i8", offset, "chunk_at"), size_bytes)]
        names = {"d": fmt.scale_at, "m": fmt.minimum_at}
        parts = [(self.address(name), 1) for name, at in names.items() if at is not None]
        factors = [each.parts[0] for each in (fmt.sub_scales, fmt.sub_minima) if each is not None]
        for name in dict.fromkeys(self.field_of(part).name for part in factors):
            offset = f.index("scale_offset", (chunk, LANES * CHUNK // fmt.sub_block_elements))
            parts.append((f.at(self.address(name), "i8", offset, "scale_at"), 1))
        for at in planes:
            plane = at.plane
            per_bit = min(plane.width_bytes, CHUNK) * LANES // 8
            shift = at.shift if at.shift.isdigit() else f.let("bit", f"zext i32 {at.shift} to i64")
            start = f.at(at.address, "i8", f.index("own_offset", (shift, per_bit)), "own_at")
            parts.append((start, plane.bits * CHUNK * LANES // 8))
        return parts

    def quants(self, planes: list[PlaneAt], chunk: str, word: str) -> list[str]:
        """Return the four elements of a word as floats, each in 16 columns."""
        f = self.f
        if self.weight.fmt.float_type is not None:
            return self._floats(chunk, word)
        convert = quant_converter(self.module, self.weight.fmt)
        bits = self._bits(planes, word)
        quants = []
        for byte in range(WORD):
            shifted = shift_right(f, bits, str(8 * byte))
            quants.append(f.let(f"quant{byte}", f"call {VECTOR} {convert}({INTS} {shifted})"))
        return quants

    def _bits(self, planes: list[PlaneAt], word: str) -> str:
        """Return what `quant_converter` takes: a byte for each element of a word."""
        fmt = self.weight.fmt
        if converts_bytes(self.module, fmt):
            return byte_numbers(self.module, self.f, fmt, self.quant_bytes(planes, word))
        return self.quant_bytes(planes, word) if len(planes) > 1 else self._word(planes[0], word)

    def quant_bytes(self, planes: list[PlaneAt], word: str, masked: bool = True) -> str:
        """Return the codes of a word, a byte each, in 16 columns.

        masked: whether the bits above a code are 0; otherwise those of a single plane are any.
        """
        f, codes = self.f, ""
        for at in planes:
            plane, bits = at.plane, self._word(at, word)
            if plane.bits < 8 and (masked or len(planes) > 1):
                mask = splat_int(((1 << plane.bits) - 1) * _EVERY_BYTE)
                note = f"the lowest {plane.bits} bits of each byte"
                bits = f.let("codes", f"and {INTS} {bits}, {mask}", note)
            if plane.lshift:
                bits = f.let("codes", f"shl {INTS} {bits}, {splat_int(plane.lshift)}")
            codes = f.let("codes", f"or {INTS} {codes}, {bits}") if codes else bits
        return codes

    def _word(self, at: PlaneAt, word: str) -> str:
        """Return a plane's part of a word, in the lowest bits of each byte."""
        f, shift, words = self.f, at.shift, at.plane.width_bytes // WORD
        if words < CHUNK // WORD:
            layer, word = f.divided(word, words, "layer", "word_in_width")
            shift = sum32(f, "word_shift", shift, times32(f, "word_shift", layer, at.plane.bits))
        word_at = f.at(at.address, INTS, word, "word_at")
        aligned = 32 if self.weight.slab_bytes % 32 == 0 else LANES
        bits = f.let("word_bits", f"load {INTS}, ptr {word_at}, align {aligned}")
        return shift_right(f, bits, shift)

    def _floats(self, chunk: str, word: str) -> list[str]:
        f, fmt, floats = self.f, self.weight.fmt, []
        values_at = self.address("values")
        first = f.index("element", (chunk, CHUNK), (word, WORD))
        for i in range(WORD):
            element = f.index("element", (first, 1), (i, 1))
            offset = f.index("w_offset", (element, LANES * fmt.block_bytes))
            at = f.at(values_at, "i8", offset, "w_at")
            floats.append(load_floats(self.module, f, fmt, SIXTEEN, at, fmt.block_bytes))
        return floats


# --- quants and their values ---------------------------------------------------------------------


def plane_position(f: Function, plane: Plane, block_elements: int, chunk: str) -> tuple[str, str]:
    """Return the first byte of a chunk in a plane, and its shift (see `Plane.position`).

    The plane has runs of whole chunks.
    """
    if chunk.isdigit():
        byte, shift = map(str, plane.position(int(chunk) * CHUNK))
        return byte, shift
    per_run, per_width = plane.run_elements // CHUNK, max(plane.width_bytes // CHUNK, 1)
    runs = block_elements // plane.run_elements
    run = f.let("run", f"udiv i64 {chunk}, {per_run}") if runs > 1 and per_run > 1 else "0"
    within = f.let("in_run", f"urem i64 {chunk}, {per_run}") if runs > 1 else chunk
    column = f.let("in_width", f"urem i64 {within}, {per_width}") if per_width > 1 else "0"
    at = f.index("plane_byte", (run, plane.width_bytes), (column, CHUNK))
    if per_run == per_width:
        return at, "0"
    layer = f.let("layer", f"udiv i64 {within}, {per_width}") if per_width > 1 else within
    return at, times32(f, "shift", layer, plane.bits * max(CHUNK // plane.width_bytes, 1))


def times32(f: Function, hint: str, index: str, factor: int) -> str:
    """Return an index times a factor as an i32."""
    if index.isdigit():
        return str(int(index) * factor)
    index32 = f.let("layer32", f"trunc i64 {index} to i32")
    return f.let(hint, f"mul i32 {index32}, {factor}")


def sum32(f: Function, hint: str, a: str, b: str) -> str:
    """Return the sum of two shifts."""
    if a.isdigit() and b.isdigit():
        return str(int(a) + int(b))
    return a if b == "0" else b if a == "0" else f.let(hint, f"add i32 {a}, {b}")


def shift_right(f: Function, bits: str, shift: str) -> str:
    """Shift 16 lanes by the same number or value."""
    if shift == "0":
        return bits
    lanes = splat("i32", shift) if shift.isdigit() else broadcast(f, "i32", shift)
    return f.let("shifted", f"lshr {INTS} {bits}, {lanes}")


def times_factor(f: Function, hint: str, of_block: str, sub: SubFactors, stored: str) -> str:
    """Return a block's field times a sub-block's factor, given the stored integer in 16 lanes."""
    if sub.zero:
        stored = f.let(f"{hint}_ints", f"sub {INTS} {stored}, {splat_int(sub.zero)}")
    own = f.let(f"sub_{hint}", f"sitofp {INTS} {stored} to {VECTOR}")
    product = f.let(hint, f"fmul {VECTOR} {of_block}, {own}")
    return f.let(hint, f"fneg {VECTOR} {product}") if sub.negative else product


def field_loader(module: Module, lanes: Lanes, fmt: Format, name: str, align_bytes: int = 2) -> str:
    """Return the function that loads field `d` or `m` as f32."""
    if name == "d" and fmt.scale_type == "e8m0":
        return e8m0_loader(module, lanes)
    return half_loader(module, lanes, "f16", align_bytes)


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
    assert fmt.float_type is not None
    loader = half_loader(module, lanes, fmt.float_type, align_bytes)
    return f.let("weight", f"call {lanes.f32} {loader}(ptr {at})")


# --- prefetching ---------------------------------------------------------------------------------


def prefetch(
    module: Module,
    f: Function,
    weight: Interleaved,
    slab_at: str,
    block: str,
    part: str,
    part_elements: int,
    sparse: bool = False,
) -> None:
    """Prefetch what a part of a block, ahead by a distance, will read, into the second-level cache.

    A loop that takes `part_elements` elements at a time calls this for each part of a block.

    The first-level cache has some 20 lines on their way at a time, too few for memory's latency
    (M = 4 took 1.8 times as long on a Zen 4).

    sparse: prefetch one line per part. The CPU's own prefetching, which ends with each page,
    continues from there. This serves kernels that load faster than memory delivers: prefetching all
    their lines would only come late.
    """
    block_bytes = weight.slab_bytes // weight.blocks_per_slab
    parts = weight.block_elements // part_elements
    lines = -(-block_bytes // (parts * CACHE_LINE_BYTES))
    distance_bytes = _SPARSE_BYTES_AHEAD if sparse else _BYTES_AHEAD
    module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.comment(f"prefetch {distance_bytes} bytes ahead")
    with f.loop("line", 0, 1 if sparse else lines, unroll=True) as line:
        ahead = f.index(
            "ahead",
            (block, block_bytes),
            (part, lines * CACHE_LINE_BYTES),
            (line.index, CACHE_LINE_BYTES),
            (distance_bytes, 1),
        )
        at = f.at(slab_at, "i8", ahead, "ahead_at")
        f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 2, i32 1)  ; read, second level")
