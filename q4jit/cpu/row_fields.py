"""Read the blocks of one column in LLVM IR, 16 elements at a time.

The column is a GGUF row, whose blocks are contiguous, or one of the 16 of a panel, which has the
same fields in words of four bytes. `BlockBytes` finds the bytes; `RowFields` decodes them.
"""

from dataclasses import dataclass
from typing import Protocol

from q4jit.cpu.fields import (
    CHUNK,
    FIELD_NAMES,
    WORD,
    Fields,
    field_loader,
    plane_position,
    shift_right,
    sum32,
    times32,
    times_factor,
)
from q4jit.cpu.lanes import ONE, broadcast
from q4jit.cpu.llvm_text import INTS, VECTOR, Function, Module, splat_int
from q4jit.cpu.numbers import byte_numbers, converts_bytes, quant_converter
from q4jit.weights.formats import SCALE_BYTES, FactorBits, Format, Plane, SubFactors
from q4jit.weights.layouts import LANES


class BlockBytes(Protocol):
    """Where the bytes of a block of one column are.

    Attributes:
        fmt: the format of the block as it is stored.
    """

    @property
    def fmt(self) -> Format:
        """The format of the block as it is stored."""
        ...

    def field_at(self, name: str, offset: int) -> str:
        """Return the address of field `d` or `m`, which a block has at `offset`."""
        ...

    def factor_at(self, hint: str, part: FactorBits, *terms: tuple[str, int]) -> str:
        """Return the address of the byte of a sub-factor that is at the sum of terms in a part."""
        ...

    def plane_bytes(self, plane: Plane, first: str, count: int) -> str:
        """Load bytes of a plane from `first` on, which is a multiple of 4 in a panel."""
        ...


@dataclass(frozen=True)
class GgufBlock:
    """A block of a GGUF row, at any alignment."""

    f: Function
    fmt: Format
    at: str

    def field_at(self, name: str, offset: int) -> str:
        """Return the address of a field."""
        return self.f.at(self.at, "i8", offset, f"{FIELD_NAMES[name]}_at")

    def factor_at(self, hint: str, part: FactorBits, *terms: tuple[str, int]) -> str:
        """Return the address of the byte of a sub-factor."""
        offset = self.f.index(f"{hint}_offset", *terms, (part.at, 1))
        return self.f.at(self.at, "i8", offset, f"sub_{hint}_at")

    def plane_bytes(self, plane: Plane, first: str, count: int) -> str:
        """Load bytes of a plane."""
        offset = self.f.index("chunk_offset", (first, 1), (plane.at, 1))
        at = self.f.at(self.at, "i8", offset, "chunk_at")
        return self.f.let("bytes", f"load <{count} x i8>, ptr {at}, align 1")


@dataclass(frozen=True)
class ColumnBlock:
    """A block of one column of a panel: words of a field are those of 16 columns apart.

    Attributes:
        fields: the block of all columns.
        column: the number of the column in the panel.
    """

    fields: Fields
    column: str

    @property
    def fmt(self) -> Format:
        """The repacked format."""
        return self.fields.weight.fmt

    def field_at(self, name: str, offset: int) -> str:
        """Return the address of a field."""
        kind = "i8" if name == "d" and SCALE_BYTES[self.fmt.scale_type] == 1 else "i16"
        hint = f"{FIELD_NAMES[name]}_at"
        return self.fields.f.at(self.fields.address(name), kind, self.column, hint)

    def factor_at(self, hint: str, part: FactorBits, *terms: tuple[str, int]) -> str:
        """Return the address of the byte of a sub-factor."""
        f, field = self.fields.f, self.fields.field_of(part)
        assert part.at == field.at  # a repacked format has its factors from the field's start on
        across = [(term, factor * LANES) for term, factor in terms]
        offset = f.index(f"{hint}_offset", *across, (self.column, 1))
        return f.at(self.fields.address(field.name), "i8", offset, f"sub_{hint}_at")

    def plane_bytes(self, plane: Plane, first: str, count: int) -> str:
        """Load bytes of a plane, word by word."""
        f, words = self.fields.f, count // WORD
        base = self.fields.address(f"quants{self.fmt.planes.index(plane)}")
        offset = f.index("chunk_offset", (first, LANES), (self.column, WORD))
        at, vector = f.at(base, "i8", offset, "chunk_at"), "poison"
        for i in range(words):
            word_at = f.at(at, "i32", i * LANES, "word_at")
            word = f.let("word", f"load i32, ptr {word_at}, align {WORD}")
            operands = f"<{words} x i32> {vector}, i32 {word}, i32 {i}"
            vector = f.let("words", f"insertelement {operands}")
        return f.let("bytes", f"bitcast <{words} x i32> {vector} to <{count} x i8>")


@dataclass(frozen=True)
class RowFields:
    """Decodes one block of a column, 16 elements at a time."""

    module: Module
    f: Function
    block: BlockBytes

    @property
    def fmt(self) -> Format:
        """The format of the block as it is stored."""
        return self.block.fmt

    def block_field(self, name: str) -> str | None:
        """Load the block's `d` or `m` into every lane; None if the format has no such field."""
        offset = self.fmt.scale_at if name == "d" else self.fmt.minimum_at
        if offset is None:
            return None
        f, hint = self.f, FIELD_NAMES[name]
        loader = field_loader(self.module, ONE, self.fmt, name, align_bytes=1)
        at = self.block.field_at(name, offset)
        return broadcast(f, "float", f.let(hint, f"call float {loader}(ptr {at})"))

    def scale(self, block_scale: str | None, sub_block: str) -> str | None:
        """Return the scale of a sub-block: the block's, times its own if the format has such."""
        return self._of_sub_block("scale", block_scale, self.fmt.sub_scales, sub_block)

    def minimum(self, block_minimum: str | None, sub_block: str) -> str | None:
        """Return the minimum of a sub-block: the block's, times its own if the format has such."""
        return self._of_sub_block("minimum", block_minimum, self.fmt.sub_minima, sub_block)

    def _of_sub_block(
        self, hint: str, of_block: str | None, sub: SubFactors | None, sub_block: str
    ) -> str | None:
        """Return a block's field times the factor of a sub-block."""
        if sub is None or of_block is None:
            return of_block
        f, stored = self.f, ""
        for part in sub.parts:
            bits = self._factor_bits(hint, part, sub_block)
            stored = f.let(f"{hint}_bits", f"or i32 {stored}, {bits}") if stored else bits
        if sub.signed:
            byte = f.let(f"{hint}_byte", f"trunc i32 {stored} to i8")
            stored = f.let(f"{hint}_int", f"sext i8 {byte} to i32")
        return times_factor(f, hint, of_block, sub, broadcast(f, "i32", stored))

    def _factor_bits(self, hint: str, part: FactorBits, sub_block: str) -> str:
        """Return a sub-block's part of its factor as an i32 (see `FactorBits.position`)."""
        f, row, column = self.f, "0", sub_block
        if part.columns < self.fmt.sub_blocks:
            row, column = f.divided(sub_block, part.columns, "factor_row", "factor_column")
        column_step, row_step = part.byte_steps
        at = self.block.factor_at(hint, part, (column, column_step), (row, row_step))
        byte = f.let(f"{hint}_byte", f"load i8, ptr {at}")
        bits = f.let(f"{hint}_bits", f"zext i8 {byte} to i32")
        shift = sum32(f, "shift", times32(f, "shift", column, part.shift_steps[0]), str(part.shift))
        shift = sum32(f, "shift", shift, times32(f, "shift", row, part.shift_steps[1]))
        if shift != "0":
            bits = f.let(f"{hint}_bits", f"lshr i32 {bits}, {shift}")
        if part.bits < 8:
            bits = f.let(f"{hint}_bits", f"and i32 {bits}, {(1 << part.bits) - 1}")
        return f.let(f"{hint}_bits", f"shl i32 {bits}, {part.lshift}") if part.lshift else bits

    def quants(self, chunk: str) -> str:
        """Return the 16 quants of a chunk of the block."""
        f, codes = self.f, ""
        planes = self.fmt.planes
        for plane in planes:
            bits = self._plane_bits(plane, chunk)
            if len(planes) > 1 or converts_bytes(self.module, self.fmt):
                bits = f.let("code", f"and {INTS} {bits}, {splat_int((1 << plane.bits) - 1)}")
            if plane.lshift:
                bits = f.let("code", f"shl {INTS} {bits}, {splat_int(plane.lshift)}")
            codes = f.let("code", f"or {INTS} {codes}, {bits}") if codes else bits
        if converts_bytes(self.module, self.fmt):
            codes = byte_numbers(self.module, f, self.fmt, codes)
        convert = quant_converter(self.module, self.fmt)
        return f.let("quant", f"call {VECTOR} {convert}({INTS} {codes})")

    def _plane_bits(self, plane: Plane, chunk: str) -> str:
        """Return a plane's part of 16 elements, in the lowest bits of each lane."""
        if plane.width_bytes < CHUNK:
            return self._narrow_plane_bits(plane, chunk)
        f = self.f
        byte, shift = plane_position(f, plane, self.fmt.block_elements, chunk)
        bits = self._loaded(plane, byte, range(CHUNK))
        return shift_right(f, bits, shift)

    def _narrow_plane_bits(self, plane: Plane, chunk: str) -> str:
        """Return them of a plane whose bytes hold elements that are less than 16 apart.

        The lanes have shifts of their own. A chunk is whole runs, or a part of one.
        """
        f = self.f
        places = [plane.position(lane) for lane in range(CHUNK)]
        if plane.run_elements <= CHUNK:
            byte, chunk_shift = f.index("plane_byte", (chunk, CHUNK * plane.bits // 8)), "0"
        else:
            byte, chunk_shift = plane_position(f, plane, self.fmt.block_elements, chunk)
        bits = self._loaded(plane, byte, [byte for byte, _ in places])
        shifts = ", ".join(f"i32 {shift}" for _, shift in places)
        bits = f.let("shifted", f"lshr {INTS} {bits}, <{shifts}>", "to each lane's bits")
        return shift_right(f, bits, chunk_shift)

    def _loaded(self, plane: Plane, first: str, order: range | list[int]) -> str:
        """Load bytes of a plane from `first` on; lane i has the one at `order[i]`."""
        f, count = self.f, max(order) + 1
        narrow = self.block.plane_bytes(plane, first, count)
        if list(order) != list(range(CHUNK)):
            lanes = ", ".join(f"i32 {i}" for i in order)
            operands = f"<{count} x i8> {narrow}, <{count} x i8> poison"
            narrow = f.let("bytes", f"shufflevector {operands}, <{CHUNK} x i32> <{lanes}>")
        return f.let("bits", f"zext <{CHUNK} x i8> {narrow} to {INTS}")
