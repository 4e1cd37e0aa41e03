"""What AMD's GPUs would need for the kernels: from their code objects and published figures.

No AMD GPU is needed, and nothing here is a measurement: an estimate says which of two limits is
nearer, the vector units or the memory, if everything else goes well.
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
    """Published figures of the card that an estimate is made for.

    clock_ghz: peak engine clock for accelerators, `game` clock for graphics cards. simds: vector
    units of a compute unit. issue_cycles: of a vector instruction of a wave on one of them.
    registers, granule, most_waves: of a SIMD, for LLVM's wave size. matrix_cycles: of 16 × 16 × 16
    on f16. overlaps: matrix instructions leave the vector unit to other waves.
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
# FLOP a cycle and compute unit in AMD's CDNA 2, CDNA 3, RDNA 3 and RDNA 4 white papers and slides.
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
    """What one kernel needs.

    instructions, vector, matrix, dot: in a round of its main loop, in which a wave consumes
    `blocks` blocks of 18 bytes.
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
        """Memory time by vector issue time of the same bytes: above 1 memory is the limit."""
        matrix = self.matrix * card.matrix_cycles
        vector = (self.vector - self.matrix) * card.issue_cycles
        cycles = max(matrix, vector) if card.overlaps else matrix + vector
        issue_ns = cycles / (self.blocks * card.compute_units * card.simds * card.clock_ghz)
        return BLOCK_BYTES / card.gigabytes_s / issue_ns


def main_loop(assembly: str) -> list[str]:
    """The instructions of the smallest loop with matrix or dot instructions.

    Without any, of the smallest one that loads 16 bytes at a time.
    """
    loops = list(_loops(assembly))
    special = [b for b in loops if any(MATRIX.match(name) or DOT.match(name) for name in b)]
    found = special or [body for body in loops if any(map(LOAD_16.match, body))]
    if not found:
        raise ValueError("no loop of the kernel multiplies, or loads 16 bytes at a time")
    return min(found, key=len)


def _loops(assembly: str) -> Iterator[list[str]]:
    """The instructions of each loop without those of loops inside it.

    LLVM names each block's innermost loop: a loop's blocks need not stand beside each other.
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
    """What a Q4_0 kernel's assembly says."""
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
    """What a wave consumes of a weight in a round of the main loop."""
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
