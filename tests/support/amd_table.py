"""Estimate the kernels' needs on AMD's GPUs from code objects and published figures.

Nothing is measured and no AMD GPU is needed. The estimate compares two limits, the vector units and
the memory, and ignores all others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from q4jit.hip.kernel import HipKernel
from q4jit.plan.kernels import Source
from q4jit.targets import HIP_ARCHS

BLOCK_BYTES: Final = 18  # of Q4_0


@dataclass(frozen=True)
class Card:
    """Published figures of a card.

    Attributes:
        clock_ghz: the peak engine clock of an accelerator, the "game" clock of a graphics card.
        simds: vector units of a compute unit.
        issue_cycles: cycles in which a SIMD issues a vector instruction of a wave.
        registers: vector registers of a SIMD, with LLVM's wave size.
        granule: registers that are allocated together.
        most_waves: waves that a SIMD can hold.
        matrix_cycles: cycles of a matrix product of 16 × 16 × 16 in f16.
        overlaps: whether other waves use the vector unit during matrix instructions.
    """

    name: str
    compute_units: int
    clock_ghz: float
    gigabytes_s: float
    simds: int
    issue_cycles: int
    registers: int
    granule: int
    most_waves: int
    matrix_cycles: int = 0
    overlaps: bool = False


# Units, clocks, bandwidth: AMD's product pages. Registers: LLVM, AMDGPU, "VGPRs". Matrix cycles:
# FLOP per cycle and compute unit in AMD's CDNA 2, CDNA 3, RDNA 3, RDNA 4 white papers and slides.
CARDS: Final = {
    "gfx90a": Card("MI210", 104, 1.7, 1638, 4, 4, 512, 8, 8, 32, overlaps=True),
    "gfx942": Card("MI300X", 304, 2.1, 5300, 4, 4, 512, 8, 8, 16, overlaps=True),
    "gfx1030": Card("RX 6900 XT", 80, 2.015, 512, 2, 1, 1024, 8, 16),
    "gfx1100": Card("RX 7900 XTX", 96, 2.3, 960, 2, 1, 1536, 24, 16, 32),
    "gfx1201": Card("RX 9070 XT", 64, 2.4, 640, 2, 1, 1536, 24, 16, 16),
}
MATRIX: Final = re.compile(r"v_(mfma|wmma)_")
DOT: Final = re.compile(r"v_(dual_)?dot[24]")
LOAD_16: Final = re.compile(r"global_load_(dwordx4|b128)")
_BLOCK: Final = re.compile(r"(?:\.L(BB\d+_\d+)|; %bb\.\d+):")
_HEADER: Final = re.compile("=> *This (?:Inner )?Loop Header")
_INSIDE: Final = re.compile(r"in Loop: Header=(BB\d+_\d+)")
_INSTRUCTION: Final = re.compile(r"\t([a-z]\w*)")


@dataclass(frozen=True)
class Needs:
    """The needs of a kernel.

    Attributes:
        instructions, vector, matrix, dot: instructions in an iteration of the main loop: all,
            vector, matrix and dot instructions.
        blocks: the blocks of 18 bytes that a wave consumes in an iteration.
        waves: waves per SIMD.
    """

    instructions: int
    vector: int
    matrix: int
    dot: int
    blocks: int
    vgprs: int
    lds_bytes: int
    spills: int
    waves: int

    def ratio(self, card: Card) -> float:
        """Return memory time / vector issue time of the same bytes: above 1 memory is the limit."""
        matrix = self.matrix * card.matrix_cycles
        vector = (self.vector - self.matrix) * card.issue_cycles
        cycles = max(matrix, vector) if card.overlaps else matrix + vector
        issue_ns = cycles / (self.blocks * card.compute_units * card.simds * card.clock_ghz)
        return BLOCK_BYTES / card.gigabytes_s / issue_ns


def main_loop(assembly: str) -> list[str]:
    """Return the instructions of the smallest loop with matrix or dot instructions.

    Without such instructions it is the smallest loop that loads 16 bytes at a time.
    """
    loops = list(_loops(assembly))
    special = [b for b in loops if any(MATRIX.match(name) or DOT.match(name) for name in b)]
    candidates = special or [body for body in loops if any(map(LOAD_16.match, body))]
    if not candidates:
        raise ValueError("no loop of the kernel multiplies, or loads 16 bytes at a time")
    return min(candidates, key=len)


def _loops(assembly: str) -> Iterator[list[str]]:
    """Yield the instructions of each loop without those of inner loops.

    LLVM's comments name the innermost loop of each block, so a loop's blocks need not be adjacent.
    """
    loops: dict[str, list[str]] = {}
    label = header = ""
    for line in assembly.splitlines():
        block = _BLOCK.match(line)
        if block:
            label, header = block[1] or "", ""
        if _HEADER.search(line):
            header = label
        inside = _INSIDE.search(line)
        if inside:
            header = inside[1]
        instruction = _INSTRUCTION.match(line)
        if instruction and header:
            loops.setdefault(header, []).append(instruction[1])
    yield from loops.values()


def needs(source: Source, kernel: HipKernel, assembly: str) -> Needs:
    """Return the needs of a Q4_0 kernel from its assembly."""
    arch, card = HIP_ARCHS[source.target.arch], CARDS[source.target.arch]
    body = main_loop(assembly)
    vgprs = _stated(assembly, "vgpr_count")
    lds_bytes = _stated(assembly, "group_segment_fixed_size")
    by_registers = card.registers // (-(-max(vgprs, 1) // card.granule) * card.granule)
    per_block = kernel.block_size // arch.wave
    by_lds = arch.lds_bytes // max(lds_bytes, 1) * per_block // card.simds
    return Needs(
        instructions=len(body),
        vector=sum(name.startswith("v_") for name in body),
        matrix=sum(bool(MATRIX.match(name)) for name in body),
        dot=sum(bool(DOT.match(name)) for name in body),
        blocks=_blocks(kernel, arch.wave) * len(kernel.section.products),
        vgprs=vgprs,
        lds_bytes=lds_bytes,
        spills=_stated(assembly, "vgpr_spill_count") + _stated(assembly, "sgpr_spill_count"),
        waves=min(card.most_waves, by_registers, by_lds),
    )


def _blocks(kernel: HipKernel, wave: int) -> int:
    """Return the blocks of a weight that a wave consumes in an iteration of the main loop."""
    waves = kernel.block_size // wave
    match kernel.schedule:
        case "gemv_matrix":
            return 4 * 16 * kernel.ahead  # quads of 16 columns
        case "gemv" | "gemv_dot":
            return wave * kernel.columns * kernel.ahead
        case "tile_halves":
            return max(kernel.stage_units, 4) * kernel.columns // waves
    return kernel.columns // waves  # a unit of each


def _stated(assembly: str, name: str) -> int:
    (number,) = re.findall(rf"^ +\.{name}: +(\d+)$", assembly, re.MULTILINE)
    return int(number)
