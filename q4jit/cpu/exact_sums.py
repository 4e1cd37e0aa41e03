"""The sums of an integer product over one sub-block, in LLVM IR: exact in int32, then floats."""

from dataclasses import dataclass
from typing import Final

from q4jit.cpu.digits import (
    DIGIT_BITS,
    HALVES_AT,
    SUM_FACTOR_LOG2,
    TOP_AT,
    TOP_HALVES_AT,
    WHOLE_AT,
    fits,
    load_word,
)
from q4jit.cpu.dot_writer import DotWriter
from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.fields import CHUNK, WORD, Fields, PlaneAt, add_scaled
from q4jit.cpu.lanes import splat_value
from q4jit.cpu.llvm_text import INTS, VECTOR, Function, Module, float_text, splat
from q4jit.cpu.schedule import HEADER_BYTES, UNIT, Tile, zero_of
from q4jit.weights.formats import Format

# accumulators that keep the dot products busy; fewer rows have one for each digit or each chunk
_CHAINS: Final = 8
_SIGN_BITS: Final = -0x7F7F7F80
"""0x80808080 as an i32: the sign bit of each byte."""


@dataclass(frozen=True)
class SubBlock:
    """Where a sub-block is read: a block's fields for each group, its number in there, units of x.

    half: of a unit, 0 or 1 where sub-blocks have 16 elements.
    """

    fields: list[Fields]
    number: str
    units: list[str]
    half: str


class ExactSums:
    """Writes the sums of a tile over a sub-block.

    Few of them would wait for each other, so that each digit, and each chunk of 16 elements, then
    has a chain of its own.
    """

    def __init__(
        self,
        module: Module,
        f: Function,
        fmt: Format,
        instruction: DotInstruction,
        limbs: int,
        tile: Tile,
    ) -> None:
        self._module, self._f, self._fmt = module, f, fmt
        self._instruction, self._dot = instruction, DotWriter(module, instruction)
        self._limbs, self._places = limbs, tile.places
        self._zero = zero_of(fmt, instruction)
        self._chunks = fmt.sub_block_elements // CHUNK
        numbers = list(range(limbs))
        # digits that one int32 sums; the highest apart where all would overflow
        self._sums = [numbers] if fits(fmt, limbs) else [[0], numbers[1:]]
        self._by_limb = limbs > 1 and len(self._places) < _CHAINS
        self._by_chunk = len(self._places) * (limbs if self._by_limb else 1) < _CHAINS

    def write(self, at: SubBlock) -> dict[tuple[int, int], str]:
        """Return the sums by group and row as floats, before any scale."""
        sums: dict[tuple[int, int], list[str]] = {place: [] for place in self._places}
        for limbs in self._sums:
            chains = self._multiplied(at, limbs)
            for g, r in self._places:
                total = self._total(chains, g, r, limbs)
                if self._zero and not self._begins_at_zeros(limbs):
                    zeros = self._zeros(at, at.units[r], limbs)
                    total = self._f.let("total", f"add {INTS} {total}, {zeros}")
                sums[g, r].append(self._f.let("sum", f"sitofp {INTS} {total} to {VECTOR}"))
        return {place: self._with_all_digits(parts) for place, parts in sums.items()}

    def _with_all_digits(self, sums: list[str]) -> str:
        """Return the sum with all digits: the highest apart stands 2^16 above the others."""
        if len(sums) == 1:
            return sums[0]
        high, low = sums
        factor = splat("float", float_text(2.0**16))
        return add_scaled(self._module, self._f, "sum", low, factor, high)

    # --- chains of products ----------------------------------------------------------------------

    def _chain(self, g: int, r: int, limb: int, chunk: int) -> str:
        """The name of the sum that a digit of a chunk goes to."""
        return f"s{g}.{r}.{limb if self._by_limb else 0}.{chunk if self._by_chunk else 0}"

    def _multiplied(self, at: SubBlock, limbs: list[int]) -> dict[str, str]:
        """Multiply digits `limbs` of a sub-block; returns the chains."""
        chains = self._begin(at, limbs)
        for now in [limbs] if self._by_limb else [[limb] for limb in limbs]:
            if now[0] != limbs[0]:
                chains = {name: self._next_digit(value) for name, value in chains.items()}
            for chunk in range(self._chunks):
                chains |= self._multiplied_chunk(at, now, chunk, chains)
        return chains

    def _next_digit(self, total: str) -> str:
        """Make room for the digit below (Horner's rule)."""
        return self._f.let("up", f"shl {INTS} {total}, {splat('i32', str(DIGIT_BITS))}")

    def _multiplied_chunk(
        self, at: SubBlock, limbs: list[int], chunk: int, chains: dict[str, str]
    ) -> dict[str, str]:
        """Multiply digits `limbs` of a chunk of 16 elements; `chains` are the sums so far."""
        f = self._f
        number = f.index("number", (at.number, self._chunks), (chunk, 1))
        planes = [each.planes(number) for each in at.fields]
        names = [self._chain(g, r, limb, chunk) for g, r in self._places for limb in limbs]
        carry = {n: (self._dot.chain, chains.get(n, "zeroinitializer")) for n in names}
        with f.loop("word", 0, CHUNK // WORD, carry=carry, unroll=True) as word:
            quants = [
                self._quants(each, place, word.index)
                for each, place in zip(at.fields, planes, strict=True)
            ]
            for limb in limbs:
                first = HEADER_BYTES + limb * UNIT + chunk * CHUNK
                x_at = f.index("x_at", (at.half, CHUNK), (word.index, WORD), (first, 1))
                for r, unit in enumerate(at.units):
                    x = splat_value(f, "i32", load_word(f, unit, x_at))
                    for g, q in enumerate(quants):
                        name = self._chain(g, r, limb, chunk)
                        word[name] = self._dot.add(f, word[name], q, x)
        return word.values

    def _quants(self, fields: Fields, planes: list[PlaneAt], word: str) -> str:
        """Return four elements of 16 columns as the instruction takes them."""
        q = fields.quant_bytes(planes, word)
        if self._fmt.signed and not self._instruction.signed:
            q = self._f.let("q", f"xor {INTS} {q}, {splat('i32', str(_SIGN_BITS))}")
        return q

    def _total(self, chains: dict[str, str], g: int, r: int, limbs: list[int]) -> str:
        """Return the sum of the chains of one place of the tile."""
        total = ""
        for limb in limbs if self._by_limb else limbs[:1]:
            if total:
                total = self._next_digit(total)
            names = dict.fromkeys(self._chain(g, r, limb, chunk) for chunk in range(self._chunks))
            for name in names:
                part = self._dot.total(self._f, chains[name])
                total = self._f.let("total", f"add {INTS} {total}, {part}") if total else part
        return total

    # --- the zero of the quants ------------------------------------------------------------------

    def _begins_at_zeros(self, limbs: list[int]) -> bool:
        """Whether chains start at what the quants' zero adds: a load, not an addition."""
        return len(limbs) == 1 and not self._instruction.pairs

    def _begin(self, at: SubBlock, limbs: list[int]) -> dict[str, str]:
        """Return what chains start with, unless it is 0."""
        if not self._zero or not self._begins_at_zeros(limbs):
            return {}
        self._f.comment("sums begin with what takes off the zero of the quants")
        zeros = [self._zeros(at, unit, limbs) for unit in at.units]
        return {self._chain(g, r, limbs[0], 0): zeros[r] for g, r in self._places}

    def _zeros(self, at: SubBlock, unit: str, limbs: list[int]) -> str:
        """Return what takes off the zero of quants in the sum of digits `limbs`."""
        f = self._f
        word = self._sum_of_x(unit, at.half, top=limbs == [0] and self._limbs > 1)
        if limbs[0] > 0:  # all digits but the highest
            top = self._sum_of_x(unit, at.half, top=True)
            high = f.let("high", f"shl i32 {top}, {DIGIT_BITS * len(limbs)}")
            word = f.let("low", f"sub i32 {word}, {high}")
        if self._zero != 1 << SUM_FACTOR_LOG2:
            word = f.let("word", f"mul i32 {word}, {self._zero >> SUM_FACTOR_LOG2}")
        return splat_value(f, "i32", word)

    def _sum_of_x(self, unit: str, half: str, top: bool) -> str:
        """−8 times the sum of X, or of its highest digit, in a sub-block."""
        if self._fmt.sub_block_elements == UNIT:
            return load_word(self._f, unit, TOP_AT if top else WHOLE_AT)
        first = TOP_HALVES_AT if top else HALVES_AT
        return load_word(self._f, unit, self._f.index("sum_at", (half, 4), (first, 1)))
