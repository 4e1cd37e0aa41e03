"""The instructions that multiply bytes, and what a schedule must know about each."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class DotInstruction:
    """An instruction that multiplies bytes and adds neighbouring products.

    Attributes:
        name: the instruction's name in assembly.
        intrinsic: LLVM's name for it.
        lanes: lanes of 32 bits in its vectors.
        largest_code: the largest code that it multiplies, or whose sums over 16 elements it holds.
        signed: whether it takes signed codes.
        pairs: whether it adds two products in 16 bits (too few for `f32`) instead of adding four
            products to a sum of 32 bits.
    """

    name: str
    intrinsic: str
    lanes: int
    largest_code: int
    signed: bool = False
    pairs: bool = False

    @property
    def factors(self) -> str:
        """LLVM's type of its factors."""
        return f"<{4 * self.lanes} x i8>"

    @property
    def sums(self) -> str:
        """LLVM's type of its result."""
        return self.sums_of(self.lanes)

    @property
    def sum_bits(self) -> int:
        """Bits of a sum."""
        return 16 if self.pairs else 32

    def sums_of(self, lanes: int) -> str:
        """Return LLVM's type of the sums in `lanes` lanes of 32 bits."""
        return f"<{lanes * 32 // self.sum_bits} x i{self.sum_bits}>"


VPDPBUSD_512: Final = DotInstruction("vpdpbusd", "llvm.x86.avx512.vpdpbusd.512", 16, 255)
VPDPBUSD_256: Final = DotInstruction("vpdpbusd", "llvm.x86.avx512.vpdpbusd.256", 8, 255)
# eight products with digits up to 127 fit 16 bits
VPMADDUBSW: Final = DotInstruction("vpmaddubsw", "llvm.x86.avx2.pmadd.ub.sw", 8, 32, pairs=True)
SDOT: Final = DotInstruction("sdot", "llvm.aarch64.neon.sdot.v4i32.v16i8", 4, 127, signed=True)
