"""Read the codes of block formats in LLVM IR as instructions for integers take them: bytes."""

from dataclasses import replace
from typing import Final

from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.fields import Fields, PlaneAt
from q4jit.cpu.llvm_text import INTS, Function, Module, splat_int
from q4jit.cpu.numbers import byte_numbers
from q4jit.cpu.schedule import zero_of
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES

_EVERY_BYTE: Final = 0x01010101  # a byte times this is that byte four times
_BYTES: Final = 4 * LANES  # of 16 lanes
# Looks up bytes in a table of 64. It ignores the two bits above an index, and the table is repeated
# as often as it fits, so that the next bits do not matter either: codes need no mask.
_VBMI: Final = "avx512vbmi"
_VPERMB: Final = "llvm.x86.avx512.permvar.qi.512"


class CodeReader:
    """Reads four codes of 16 columns, as bytes that a dot product multiplies.

    An entry of a table, or an int8, is an instruction's code less `zero_of`.
    """

    def __init__(
        self, module: Module, f: Function, fmt: Format, instruction: DotInstruction
    ) -> None:
        self._module, self._f, self._fmt = module, f, fmt
        self._zero = zero_of(fmt, instruction)

    def read(self, fields: Fields, planes: list[PlaneAt], word: str) -> str:
        """Return the codes of a word of a chunk, given the chunk's planes."""
        f, fmt = self._f, self._fmt
        if fmt.table is not None:
            has_vpermb = self._module.target.has(_VBMI)
            codes = fields.quant_bytes(planes, word, masked=not has_vpermb)
            return self._permuted(codes) if has_vpermb else self._looked_up(codes)
        codes = fields.quant_bytes(planes, word)
        if fmt.signed and self._zero:
            signs = splat_int(self._zero * _EVERY_BYTE)
            codes = f.let("codes", f"xor {INTS} {codes}, {signs}", "int8 + 128, unsigned")
        return codes

    def _entries(self) -> tuple[int, ...]:
        """Return the entries of the table, plus the zero."""
        return tuple(number + self._zero for number in self._fmt.numbers)

    def _looked_up(self, codes: str) -> str:
        fmt, zero = self._fmt, self._zero
        name = f"{fmt.name}_plus{zero}" if zero else fmt.name
        shifted = replace(fmt, name=name, table=self._entries())
        return byte_numbers(self._module, self._f, shifted, codes)

    def _permuted(self, codes: str) -> str:
        f, kind, entries = self._f, f"<{_BYTES} x i8>", self._entries()
        table = ", ".join(f"i8 {entry}" for entry in entries * (_BYTES // len(entries)))
        self._module.declare(f"declare {kind} @{_VPERMB}({kind}, {kind})")
        codes = f.let("code_bytes", f"bitcast {INTS} {codes} to {kind}")
        found = f.let("found", f"call {kind} @{_VPERMB}({kind} <{table}>, {kind} {codes})")
        return f.let("codes", f"bitcast {kind} {found} to {INTS}")
