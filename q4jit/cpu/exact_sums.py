"""Write the sums of an integer product over a sub-block in LLVM IR: exact in int32, then floats."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.digits import DIGIT_BITS, SUM_FACTOR_LOG2, fits, load_field, unit_struct
from q4jit.cpu.dot_writer import DotWriter
from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.fields import CHUNK, WORD, Fields, PlaneAt, add_scaled
from q4jit.cpu.lanes import broadcast
from q4jit.cpu.llvm_text import INTS, VECTOR, Function, Module, float_text, splat, splat_int
from q4jit.cpu.schedule import UNIT, Tile, zero_of
from q4jit.weights.formats import Format

# Sums that keep the dot products busy: with fewer, each would wait for the one before it.
_CHAINS: Final = 8
_BYTE_SIGNS: Final = 0x80808080  # the sign bit of each byte


@dataclass(frozen=True)
class SubBlock:
    """Where a sub-block is read.

    Attributes:
        fields: the fields of its block, for each panel.
        number: its number in the block.
        units: the address of its unit in each row of x.
        half: the half of the unit, 0 or 1, if sub-blocks have 16 elements.
    """

    fields: list[Fields]
    number: str
    units: list[str]
    half: str


class ExactSums:
    """Writes the sums of a register tile over a sub-block.

    A small tile has few sums, and each would wait for the one before it. Then each digit, and each
    chunk of 16 elements, has a chain of products of its own.
    """

    def __init__(
        self,
        module: Module,
        f: Function,
        fmt: Format,
        instruction: DotInstruction,
        digits: int,
        tile: Tile,
    ) -> None:
        self._module, self._f, self._fmt = module, f, fmt
        self._instruction, self._dot = instruction, DotWriter(module, instruction)
        self._digits, self._positions = digits, tile.positions
        self._unit = unit_struct(digits)
        self._zero = zero_of(fmt, instruction)
        self._chunks = fmt.sub_block_elements // CHUNK
        numbers = list(range(digits))
        # digits that share an int32 sum; the highest has one of its own if all would overflow
        self._shared = [numbers] if fits(fmt, digits) else [[0], numbers[1:]]
        self._by_digit = digits > 1 and len(self._positions) < _CHAINS
        self._by_chunk = len(self._positions) * (digits if self._by_digit else 1) < _CHAINS

    def write(self, at: SubBlock, apart: bool) -> dict[tuple[int, int], list[str]]:
        """Return the sums by panel and row as floats, before any scale.

        apart: return two sums if the highest digit has one of its own, which then comes first.
        """
        parts: dict[tuple[int, int], list[str]] = {position: [] for position in self._positions}
        for digits in self._shared:
            chains = self._multiplied(at, digits)
            for panel, row in self._positions:
                total = self._total(chains, panel, row, digits)
                if self._zero and not self._begins_at_zeros(digits):
                    zeros = self._zeros(at, at.units[row], digits)
                    total = self._f.let("total", f"add {INTS} {total}, {zeros}")
                parts[panel, row].append(self._f.let("sum", f"sitofp {INTS} {total} to {VECTOR}"))
        if apart:
            return parts
        return {position: [self._with_all_digits(sums)] for position, sums in parts.items()}

    def _with_all_digits(self, sums: list[str]) -> str:
        """Return the sum with all digits; a highest digit of its own counts 2^16 times."""
        if len(sums) == 1:
            return sums[0]
        high, low = sums
        factor = splat("float", float_text(2.0 ** (DIGIT_BITS * (self._digits - 1))))
        return add_scaled(self._module, self._f, "sum", low, factor, high)

    # --- chains of products ----------------------------------------------------------------------

    def _chain(self, panel: int, row: int, digit: int, chunk: int) -> str:
        """Return the name of the chain that the products of a digit of a chunk are added to."""
        name = f"chain{panel}.{row}"
        if self._by_digit:
            name += f".digit{digit}"
        return name + f".chunk{chunk}" * self._by_chunk

    def _multiplied(self, at: SubBlock, digits: list[int]) -> dict[str, str]:
        """Multiply `digits` of a sub-block; return the chains."""
        chains = self._begin(at, digits)
        for together in [digits] if self._by_digit else [[digit] for digit in digits]:
            if together[0] != digits[0]:
                chains = {name: self._next_digit(value) for name, value in chains.items()}
            for chunk in range(self._chunks):
                chains |= self._multiplied_chunk(at, together, chunk, chains)
        return chains

    def _next_digit(self, total: str) -> str:
        """Make room for the digit below (Horner's rule)."""
        return self._f.let("shifted", f"shl {INTS} {total}, {splat_int(DIGIT_BITS)}")

    def _multiplied_chunk(
        self, at: SubBlock, digits: list[int], chunk: int, chains: dict[str, str]
    ) -> dict[str, str]:
        """Multiply `digits` of a chunk of 16 elements; `chains` are the sums so far."""
        f = self._f
        number = f.index("chunk", (at.number, self._chunks), (chunk, 1))
        planes = [each.planes(number) for each in at.fields]
        names = [self._chain(p, r, digit, chunk) for p, r in self._positions for digit in digits]
        carry = {n: (self._dot.chain, chains.get(n, "zeroinitializer")) for n in names}
        with f.loop("word", 0, CHUNK // WORD, carry=carry, unroll=True) as word:
            codes = [
                self._codes(fields, in_chunk, word.index)
                for fields, in_chunk in zip(at.fields, planes, strict=True)
            ]
            ahead = (at.half, CHUNK), (word.index, WORD)
            for digit in digits:
                for row, unit_at in enumerate(at.units):
                    note = f"four elements of digit {digit}"
                    start = "digits", digit, chunk * CHUNK
                    x = broadcast(f, "i32", self._load_ahead(unit_at, *start, by=ahead, note=note))
                    for panel, w in enumerate(codes):
                        name = self._chain(panel, row, digit, chunk)
                        word[name] = self._dot.add(f, word[name], w, x)
        return word.values

    def _codes(self, fields: Fields, planes: list[PlaneAt], word: str) -> str:
        """Return four elements of 16 columns as the instruction takes them."""
        codes = fields.quant_bytes(planes, word)
        if self._fmt.signed and not self._instruction.signed:
            signs = splat_int(_BYTE_SIGNS)
            codes = self._f.let("codes", f"xor {INTS} {codes}, {signs}", "int8 + 128, unsigned")
        return codes

    def _total(self, chains: dict[str, str], panel: int, row: int, digits: list[int]) -> str:
        """Return the sum of the chains of one position of the tile."""
        total = ""
        for digit in digits if self._by_digit else digits[:1]:
            if total:
                total = self._next_digit(total)
            chunks = range(self._chunks)
            names = dict.fromkeys(self._chain(panel, row, digit, chunk) for chunk in chunks)
            for name in names:
                part = self._dot.total(self._f, chains[name])
                total = self._f.let("total", f"add {INTS} {total}, {part}") if total else part
        return total

    # --- the zero of the codes -------------------------------------------------------------------

    def _begins_at_zeros(self, digits: list[int]) -> bool:
        """Return whether chains start at the zero's part of the sum: a load, not an addition."""
        return len(digits) == 1 and not self._instruction.pairs

    def _begin(self, at: SubBlock, digits: list[int]) -> dict[str, str]:
        """Return the chains' first values, if they are not 0."""
        if not self._zero or not self._begins_at_zeros(digits):
            return {}
        self._f.comment("sums start at −zero · Σ X, which makes quants of the codes")
        zeros = [self._zeros(at, unit_at, digits) for unit_at in at.units]
        return {self._chain(p, r, digits[0], 0): zeros[r] for p, r in self._positions}

    def _zeros(self, at: SubBlock, unit_at: str, digits: list[int]) -> str:
        """Return −zero · Σ X for `digits` of X, in every lane."""
        f = self._f
        stored = self._sum_of_x(unit_at, at.half, top=digits == [0] and self._digits > 1)
        if digits[0] > 0:  # all digits but the highest
            top = self._sum_of_x(unit_at, at.half, top=True)
            high = f.let("high", f"shl i32 {top}, {DIGIT_BITS * len(digits)}")
            stored = f.let("low_sum", f"sub i32 {stored}, {high}")
        if self._zero != 1 << SUM_FACTOR_LOG2:
            stored = f.let("zeros", f"mul i32 {stored}, {self._zero >> SUM_FACTOR_LOG2}")
        return broadcast(f, "i32", stored)

    def _sum_of_x(self, unit_at: str, half: str, top: bool) -> str:
        """Load −8 times the sum of X, or of its highest digit, in a sub-block."""
        if self._fmt.sub_block_elements == UNIT:
            return load_field(self._f, unit_at, self._unit, "top_sum" if top else "whole_sum")
        name = "top_half_sums" if top else "half_sums"
        return self._load_ahead(unit_at, name, by=((half, 4),), note="of this half")

    def _load_ahead(
        self,
        unit_at: str,
        name: str,
        *indices: int,
        by: tuple[tuple[str, int], ...],
        note: str,
    ) -> str:
        """Load four bytes from some bytes ahead of a unit's field, or of its element at `indices`.

        by: (index, factor) products, whose sum is the number of bytes ahead.

        A single offset in bytes, not an index of the struct: LLVM then shares its arithmetic among
        the rows of a tile. By the struct, Q6_K on `sdot` had 2 % more instructions.
        """
        f = self._f
        offset = f.index(f"{name}_offset", *by, (self._unit.offset_bytes(name, *indices), 1))
        at = f.at(unit_at, "i8", offset, f"{name}_at")
        return f.let(name, f"load i32, ptr {at}, align 4", note)
