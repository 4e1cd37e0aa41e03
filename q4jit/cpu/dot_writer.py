"""Dot products of bytes in LLVM IR: `dot4`, one function for each instruction of `dots`."""

from typing import Final

from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.llvm_text import INTS, Function, Module, splat_int
from q4jit.weights.layouts import LANES

_BYTES: Final = "<64 x i8>"
_HALF_LANE_BITS: Final = 16  # where an instruction adds pairs, each half of a lane has a sum


class DotWriter:
    """Writes dot products of four bytes in each of 16 lanes.

    Attributes:
        chain: LLVM's type of the running sums in 16 lanes.
    """

    def __init__(self, module: Module, instruction: DotInstruction) -> None:
        self._module, self._instruction = module, instruction
        self.chain = instruction.sums_of(LANES)

    def add(self, f: Function, total: str, codes: str, x: str) -> str:
        """Add four more products in each lane to a chain."""
        arguments = f"{self.chain} {total}, {INTS} {codes}, {INTS} {x}"
        return f.let("chain", f"call {self.chain} {self._function()}({arguments})")

    def total(self, f: Function, chain: str) -> str:
        """Return the value of a chain in 32 bits."""
        if not self._instruction.pairs:
            return chain
        half_lane = splat_int(_HALF_LANE_BITS)
        both = f.let("both", f"bitcast {self.chain} {chain} to {INTS}")
        high = f.let("high", f"ashr {INTS} {both}, {half_lane}")
        low = f.let("low", f"shl {INTS} {both}, {half_lane}")
        low = f.let("low", f"ashr {INTS} {low}, {half_lane}", "with its sign")
        return f.let("total", f"add {INTS} {high}, {low}")

    def _function(self) -> str:
        name = "dot4"
        if not self._module.knows(name):
            f = Function(
                f"internal {self.chain} @{name}({self.chain} %sum, {INTS} %codes, {INTS} %x) #1",
                f"{self._instruction.name}: four products of bytes in each of 16 lanes.",
            )
            self._write(f)
            self._module.add(name, f)
        return f"@{name}"

    def _write(self, f: Function) -> None:
        """Cut 16 lanes into the instruction's vectors, and join its results again."""
        codes = f.let("code_bytes", f"bitcast {INTS} %codes to {_BYTES}")
        x = f.let("x_bytes", f"bitcast {INTS} %x to {_BYTES}")
        vectors = range(LANES // self._instruction.lanes)
        result = self._joined(f, [self._call(f, codes, x, i) for i in vectors])
        if self._instruction.pairs:
            result = f.let("total", f"add {self.chain} %sum, {result}")
        f.do(f"ret {self.chain} {result}")

    def _call(self, f: Function, codes: str, x: str, i: int) -> str:
        """Apply the instruction to vector i."""
        dot, count = self._instruction, 4 * self._instruction.lanes
        operands = [(dot.factors, self._vector(f, _BYTES, v, i, count)) for v in (codes, x)]
        if not dot.pairs:
            operands.insert(0, (dot.sums, self._vector(f, INTS, "%sum", i, dot.lanes)))
        kinds = ", ".join(kind for kind, _ in operands)
        self._module.declare(f"declare {dot.sums} @{dot.intrinsic}({kinds})")
        arguments = ", ".join(f"{kind} {value}" for kind, value in operands)
        hint = "pairs" if dot.pairs else "total"
        return f.let(hint, f"call {dot.sums} @{dot.intrinsic}({arguments})")

    def _vector(self, f: Function, kind: str, value: str, i: int, count: int) -> str:
        """Return elements i·count, … of 16 lanes."""
        if self._instruction.lanes == LANES:
            return value
        numbers = ", ".join(f"i32 {i * count + j}" for j in range(count))
        return f.let(
            "part", f"shufflevector {kind} {value}, {kind} poison, <{count} x i32> <{numbers}>"
        )

    def _joined(self, f: Function, parts: list[str]) -> str:
        """Join vectors of sums into one."""
        lanes = self._instruction.lanes
        while len(parts) > 1:
            kind, lanes = self._instruction.sums_of(lanes), 2 * lanes
            count = lanes * 32 // self._instruction.sum_bits
            numbers = ", ".join(f"i32 {j}" for j in range(count))
            parts = [
                f.let("both", f"shufflevector {kind} {a}, {kind} {b}, <{count} x i32> <{numbers}>")
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]
