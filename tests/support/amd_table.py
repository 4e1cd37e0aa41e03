"""Estimate the kernels' needs on AMD's GPUs from code objects and published figures.

Nothing is measured and no AMD GPU is needed. The estimate compares two limits, the vector units and
the memory, and ignores all others.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Final

from q4jit.hip.gemv_matrix_sizes import sizes_of
from q4jit.hip.kernel import UNIT_ELEMENTS, HipKernel, HipPlan, grid
from q4jit.plan.kernels import Source
from q4jit.targets import HIP_ARCHS, HipArch

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
_PARENT: Final = re.compile(r"Parent Loop (BB\d+_\d+)")
_INSIDE: Final = re.compile(r"in Loop: Header=(BB\d+_\d+)")
_INSTRUCTION: Final = re.compile(r"\t([a-z]\w*)")
_STORE: Final = re.compile(r"ds_(write|store)")
_FMA: Final = re.compile(r"v_(dual_)?(pk_)?(fma|fmac|mac|mad)_")


@dataclass
class Loop:
    """A loop of an assembly; the code outside loops is one, too.

    Attributes:
        header: its label; empty for the code outside loops.
        parent: the label of the loop around it.
        body: its instructions without those of inner loops.
    """

    header: str
    parent: str | None
    body: list[str] = field(default_factory=list)

    def has(self, pattern: re.Pattern[str]) -> bool:
        """Whether an instruction of the body matches."""
        return any(map(pattern.match, self.body))

    @property
    def multiplies(self) -> bool:
        """Whether it has matrix or dot instructions."""
        return self.has(MATRIX) or self.has(DOT)


@dataclass(frozen=True)
class Counts:
    """Instructions of a lane: all, vector, matrix and dot instructions."""

    instructions: float
    vector: float
    matrix: float
    dot: float

    @classmethod
    def of(cls, names: list[str]) -> "Counts":
        """Count the instructions of a list."""
        return cls(
            len(names),
            sum(name.startswith("v_") for name in names),
            sum(bool(MATRIX.match(name)) for name in names),
            sum(bool(DOT.match(name)) for name in names),
        )

    def plus(self, other: "Counts", times: float) -> "Counts":
        """Return these counts and `times` the other ones."""
        return Counts(
            self.instructions + times * other.instructions,
            self.vector + times * other.vector,
            self.matrix + times * other.matrix,
            self.dot + times * other.dot,
        )


@dataclass(frozen=True)
class Needs:
    """The needs of a kernel.

    Attributes:
        loop: the instructions of an iteration of the main loop.
        loop_blocks: the blocks of 18 bytes that a lane's share of an iteration stands for.
        whole: the instructions of a lane from the first to the last, without the path of rough x.
        blocks: the blocks of 18 bytes that a thread block multiplies.
        threads: of a thread block.
        grid: thread blocks of the launch.
        waves: waves per SIMD.
    """

    loop: Counts
    loop_blocks: float
    whole: Counts
    blocks: int
    threads: int
    grid: int
    vgprs: int
    lds_bytes: int
    spills: int
    waves: int

    @property
    def per_block(self) -> float:
        """Factor from instructions of a lane to those of all lanes per block of 18 bytes."""
        return self.threads / self.blocks

    def ratio(self, card: Card, wave: int) -> float:
        """Return memory time / issue time of the launch: above 1 memory is the limit.

        The issue time is that of the compute units with most thread blocks.
        """
        matrix = self.whole.matrix * card.matrix_cycles
        vector = (self.whole.vector - self.whole.matrix) * card.issue_cycles
        cycles = max(matrix, vector) if card.overlaps else matrix + vector
        unit_blocks = -(-self.grid // card.compute_units)
        simd_waves = -(-unit_blocks * self.threads // (wave * card.simds))
        issue_ns = simd_waves * cycles / card.clock_ghz
        return self.grid * self.blocks * BLOCK_BYTES / card.gigabytes_s / issue_ns


def main_loop(assembly: str) -> Loop:
    """Return the smallest loop with matrix or dot instructions.

    Without such instructions it is the smallest loop that loads 16 bytes at a time.
    """
    return _main(loops_of(assembly))


def _main(loops: list[Loop]) -> Loop:
    outside, *inside = loops
    candidates = [loop for loop in inside if loop.multiplies] or [
        loop for loop in inside if loop.has(LOAD_16) and not outside.multiplies
    ]
    if not candidates and outside.multiplies:  # each wave has a single turn
        return outside
    if not candidates:
        raise ValueError("no loop of the kernel multiplies, or loads 16 bytes at a time")
    return min(candidates, key=lambda loop: len(loop.body))


def loops_of(assembly: str) -> list[Loop]:
    """Return the code outside loops, and each loop; a loop comes after the one around it.

    LLVM's comments name the innermost loop of each block, so a loop's blocks need not be adjacent.
    """
    loops: dict[str, Loop] = {"": Loop("", None)}
    label = header = parent = ""
    for line in assembly.splitlines():
        block = _BLOCK.match(line)
        if block:
            label, header, parent = block[1] or "", "", ""
        around = _PARENT.search(line)
        if around:
            parent = around[1]
        if _HEADER.search(line):
            header = label
            loops.setdefault(header, Loop(header, None)).parent = parent
        inside = _INSIDE.search(line)
        if inside:
            header = inside[1]
        instruction = _INSTRUCTION.match(line)
        if instruction:
            loops.setdefault(header, Loop(header, None)).body.append(instruction[1])
    return list(loops.values())


def whole_block(arch: HipArch, kernel: HipKernel, assembly: str) -> Counts:
    """Count the instructions of a lane from the first to the last: of each loop, times its turns.

    Both sides of a branch count, except the loops for rough x, which normal x never enters.
    """
    loops = loops_of(assembly)
    main, by_header = _main(loops), {loop.header: loop for loop in loops}
    around, header = set[str](), main.parent
    while header:
        around.add(header)
        header = by_header[header].parent
    turns: dict[str, float] = {main.header: _main_turns(arch, kernel, main)} | {"": 1}
    turns |= {header: sizes_of(arch, kernel).stages for header in around}  # of `gemv_matrix`
    counts = Counts(0, 0, 0, 0)
    for loop in sorted(loops, key=lambda loop: loop.header not in turns):
        if loop.header not in turns:
            turns[loop.header] = turns.get(loop.parent or "", 0) * _inner_turns(arch, kernel, loop)
        counts = counts.plus(Counts.of(loop.body), turns[loop.header])
    return counts


def _main_turns(arch: HipArch, kernel: HipKernel, main: Loop) -> float:
    """Return how often a wave runs the main loop: the mean, where waves differ."""
    if kernel.schedule == "gemv_matrix" and main.has(_STORE):  # the loop over stages
        return sizes_of(arch, kernel).stages
    if kernel.schedule == "gemv_matrix":
        sizes = sizes_of(arch, kernel)
        return sizes.quads / sizes.round_quads
    waves = kernel.block_size // arch.wave
    return -(-_columns(kernel) * _units(kernel) // (waves * _blocks(kernel, arch.wave)))


def _inner_turns(arch: HipArch, kernel: HipKernel, loop: Loop) -> int:
    """Return how often a loop other than these runs, each time its parent does; 0 for rough x."""
    match kernel.schedule:
        case "gemv_matrix" if loop.has(_STORE):  # x is split
            return sizes_of(arch, kernel).split_turns
        case "gemv" if loop.has(_STORE):  # a row of x is staged
            return -(-kernel.ahead * kernel.lanes * UNIT_ELEMENTS // kernel.block_size)
        case "tile_fma" if loop.has(_FMA):  # elements of a unit are multiplied
            fmas = sum(bool(_FMA.match(name)) for name in loop.body)
            thread_results = kernel.rows_per_tile * kernel.columns // kernel.block_size
            return UNIT_ELEMENTS * thread_results // fmas
    return 0


def needs(source: Source, plan: HipPlan, kernel: HipKernel, m: int, assembly: str) -> Needs:
    """Return the needs of a Q4_0 kernel for m rows from its assembly."""
    arch, card = HIP_ARCHS[source.target.arch], CARDS[source.target.arch]
    vgprs = _stated(assembly, "vgpr_count")
    lds_bytes = _stated(assembly, "group_segment_fixed_size")
    by_registers = card.registers // (-(-max(vgprs, 1) // card.granule) * card.granule)
    per_block = kernel.block_size // arch.wave
    by_lds = arch.lds_bytes // max(lds_bytes, 1) * per_block // card.simds
    products = len(kernel.section.products)
    return Needs(
        loop=Counts.of(main_loop(assembly).body),
        loop_blocks=_blocks(kernel, arch.wave) * products / arch.wave,
        whole=whole_block(arch, kernel, assembly),
        blocks=_columns(kernel) * _units(kernel) * products,
        threads=kernel.block_size,
        grid=math.prod(grid(plan, kernel).blocks(m)),
        vgprs=vgprs,
        lds_bytes=lds_bytes,
        spills=_stated(assembly, "vgpr_spill_count") + _stated(assembly, "sgpr_spill_count"),
        waves=min(card.most_waves, by_registers, by_lds),
    )


def _units(kernel: HipKernel) -> int:
    """Return the units of a column."""
    return -(-kernel.section.products[0].operands[0].width // UNIT_ELEMENTS)


def _columns(kernel: HipKernel) -> int:
    """Return the columns of a thread block."""
    if kernel.schedule in {"gemv", "gemv_dot"}:
        return kernel.columns * kernel.block_size // kernel.lanes
    return kernel.columns


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
