"""Write the sums of an integer product over a sub-block in LLVM IR: exact in int32, then floats."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.codes import CodeReader
from q4jit.cpu.digit_form import DIGIT_BITS, DigitForm, is_apart, load_field
from q4jit.cpu.dot_writer import DotWriter
from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.fields import CHUNK, WORD, Fields, add_scaled
from q4jit.cpu.lanes import broadcast
from q4jit.cpu.llvm_text import INTS, VECTOR, Function, Module, float_text, splat, splat_int
from q4jit.cpu.schedule import UNIT, Tile, zero_of
from q4jit.weights.formats import Format

# Sums that keep the dot products busy: with fewer, each would wait for the one before it.
_CHAINS: Final = 8

Sums = dict[tuple[int, int], list[str]]
"""Sums by panel and row: one, or that of the highest digit and that of the others."""


@dataclass(frozen=True)
class SubBlock:
    """Where a sub-block is read.

    Attributes:
        fields: the fields of its block, for each panel.
        number: its number in the block.
        units: the address of its unit in each row of x.
        half: the half of the unit, 0 or 1, if sub-blocks have 16 elements, else 0.
    """

    fields: list[Fields]
    number: str
    units: list[str]
    half: int


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
        form: DigitForm,
        tile: Tile,
    ) -> None:
        self._module, self._f, self._fmt = module, f, fmt
        self._instruction, self._dot = instruction, DotWriter(module, instruction)
        digits = self._digits = form.digits
        self._form, self._positions = form, tile.positions
        self._unit = form.unit
        self._codes = CodeReader(module, f, fmt, instruction)
        self._zero = zero_of(fmt, instruction)
        self._chunks = fmt.sub_block_elements // CHUNK
        numbers = list(range(digits))
        self._shared = [[0], numbers[1:]] if is_apart(fmt, digits) else [numbers]
        self._by_digit = digits > 1 and len(self._positions) < _CHAINS
        few = len(self._positions) * (digits if self._by_digit else 1) < _CHAINS
        # a chain of 16 bits has room for the products of a chunk
        self._by_chunk = few or instruction.pairs

    def write(self, at: SubBlock) -> Sums:
        """Return the sums by panel and row as floats, before any scale."""
        parts: Sums = {position: [] for position in self._positions}
        for digits in self._shared:
            chains = self._multiplied(at, digits)
            for panel, row in self._positions:
                total = self._total(chains, panel, row, digits)
                if self._zero and not self._begins_at_zeros(digits):
                    zeros = self._zeros(at, at.units[row], digits)
                    total = self._f.let("total", f"add {INTS} {total}, {zeros}")
                parts[panel, row].append(self._f.let("sum", f"sitofp {INTS} {total} to {VECTOR}"))
        return parts

    def with_all_digits(self, sums: list[str]) -> str:
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
        in_unit = at.half + chunk
        names = [self._chain(p, r, digit, chunk) for p, r in self._positions for digit in digits]
        carry = {n: (self._dot.chain, chains.get(n, "zeroinitializer")) for n in names}
        with f.loop("word", 0, CHUNK // WORD, carry=carry, unroll=True) as word:
            codes = [
                self._codes.read(fields, in_chunk, word.index)
                for fields, in_chunk in zip(at.fields, planes, strict=True)
            ]
            for digit in digits:
                for row, unit_at in enumerate(at.units):
                    start = digit, in_unit * CHUNK
                    x = broadcast(f, "i32", self._load_digits(unit_at, *start, word.index))
                    for panel, w in enumerate(codes):
                        name = self._chain(panel, row, digit, chunk)
                        word[name] = self._dot.add(f, word[name], w, x)
        return word.values

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
        stored = self.sum_of_x(unit_at, at.half, top=digits == [0] and self._digits > 1)
        if digits[0] > 0:  # all digits but the highest
            stored = self.low_sum_of_x(unit_at, at.half)
        factor = self._zero >> self._form.sums_log2
        if factor > 1:
            stored = f.let("zeros", f"mul i32 {stored}, {factor}")
        return broadcast(f, "i32", stored)

    def low_sum_of_x(self, unit_at: str, half: int) -> str:
        """Return the stored sum of X without its highest digit in a sub-block."""
        f = self._f
        both, top = (self.sum_of_x(unit_at, half, top=top) for top in (False, True))
        high = f.let("high", f"shl i32 {top}, {DIGIT_BITS * (self._digits - 1)}")
        return f.let("low_sum", f"sub i32 {both}, {high}")

    def sum_of_x(self, unit_at: str, half: int, top: bool) -> str:
        """Load the stored sum of X, or of its highest digit, in a sub-block."""
        f = self._f
        if self._fmt.sub_block_elements == UNIT:
            return load_field(f, unit_at, self._unit, "top_sum" if top else "whole_sum")
        return load_field(f, unit_at, self._unit, "top_half_sums" if top else "half_sums", half)

    def _load_digits(self, unit_at: str, digit: int, first: int, word: str) -> str:
        """Load four elements of a digit: those of a word, counted from element `first`.

        A single offset in bytes, not an index of the struct: LLVM then shares its arithmetic among
        the rows of a tile. By the struct, Q6_K on `sdot` had 2 % more instructions.
        """
        f = self._f
        start = self._unit.offset_bytes("digits", digit, first)
        offset = f.index("digits_offset", (word, WORD), (start, 1))
        at = f.at(unit_at, "i8", offset, "digits_at")
        return f.let("digits", f"load i32, ptr {at}, align 4", f"four elements of digit {digit}")
