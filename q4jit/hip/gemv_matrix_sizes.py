"""The sizes of a `gemv_matrix` that follow from its constants, shared memory included.

`limits` checks with them whether constants are possible, and the template prints them.
"""

from dataclasses import dataclass
from typing import Any, Final

from q4jit.frontend.graph import REDUCTIONS, Node, reachable
from q4jit.hip.kernel import (
    GEMV_MATRIX,
    MATRIX_COLUMNS,
    QUAD_ELEMENTS,
    QUAD_UNITS,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    HipKernel,
    HipPlan,
)
from q4jit.hip.matrix_units import UNIT_QUARTERS, MatrixUnit, f16_unit
from q4jit.plan.kernels import Kernel
from q4jit.targets import HipArch

RESERVE_BYTES: Final = 1024
"""Shared memory that matrix units leave free."""

_F32_BYTES: Final = 4
_MARK_BYTES: Final = 1  # whether a unit is rough
_ITEM_BYTES: Final = 16  # a quarter as one term, and what the compiler aligns shared memory to
# any_rough and arrived; a number of each of 32 waves, for a sum and for a maximum
_EXCHANGES_BYTES: Final = 2 * _ITEM_BYTES + 2 * 32 * _F32_BYTES
_WITHOUT_VARIABLE: Final = frozenset({"const", "scalar", "reshape"})


@dataclass(frozen=True)
class GemvMatrixTile:
    """What a thread block of a `gemv_matrix` computes.

    Attributes:
        unit: the matrix instruction.
        k: elements of a column.
        width: columns of the whole result.
        rows: rows of x that a thread block computes.
        columns: columns of the result that a thread block computes.
        products: products of the kernel.
        terms: f16 numbers that make up one x.
        threads: of a thread block.
        waves_k: waves that share a panel, each with quads of its own.
        ahead: quads that a wave loads before their turn.
        splits: thread blocks that share columns, each with its own part of K.
        lds_bytes: shared memory that a thread block may have.
        most_quarters_ahead: quarters of x that the registers of a thread may hold.
        keeps_stage_loop: whether a single stage is written as a loop, too.
        x_sums: sums of a unit of x, of each row.
        units_beside: the units of a quad are multiplied side by side.
        row_values_bytes: shared memory for the values of each row of x that the prologue needs.
    """

    unit: MatrixUnit
    k: int
    width: int
    rows: int
    columns: int
    products: int
    terms: int
    threads: int
    waves_k: int
    ahead: int
    splits: int
    lds_bytes: int
    most_quarters_ahead: int
    keeps_stage_loop: bool
    x_sums: int
    units_beside: bool
    row_values_bytes: int

    # --- the waves, along N and along K ---

    @property
    def waves_n(self) -> int:
        """Return the waves beside each other: each has a panel."""
        return self.columns // MATRIX_COLUMNS

    @property
    def panels(self) -> int:
        """Return the panels of the whole result."""
        return -(-self.width // MATRIX_COLUMNS)

    @property
    def has_whole_blocks(self) -> bool:
        """Whether the columns of the last thread block are all in the result."""
        return self.width % self.columns == 0

    @property
    def has_whole_panels(self) -> bool:
        """Whether the columns of the last panel are all in the result."""
        return self.width % MATRIX_COLUMNS == 0

    @property
    def quads(self) -> int:
        """Return the quads of a column."""
        return -(-self.k // QUAD_ELEMENTS)

    @property
    def split_quads(self) -> int:
        """Return the quads of a column that a thread block multiplies."""
        return -(-self.quads // self.splits)

    @property
    def round_quads(self) -> int:
        """Return the quads that the waves of a thread block load at a time."""
        return self.waves_k * self.ahead

    # --- the rows of an instruction ---

    @property
    def is_beside(self) -> bool:
        """Whether the terms of a row are rows of one instruction; otherwise they take turns."""
        return self.terms > 1 and self.rows * self.terms <= self.unit.tile_rows

    @property
    def turns(self) -> int:
        """Return how many instructions, one after the other, multiply the terms of a row."""
        return 1 if self.is_beside else self.terms

    @property
    def row_terms(self) -> int:
        """Return the rows of an instruction that a row of x takes."""
        return self.terms if self.is_beside else 1

    @property
    def unit_items(self) -> int:
        """Return the quarters of a unit in terms, all rows of x."""
        return self.rows * self.terms * UNIT_QUARTERS

    @property
    def steps(self) -> int:
        """Return the instructions that all rows take."""
        return -(-self.rows * self.row_terms // self.unit.tile_rows)

    @property
    def used_rows(self) -> int:
        """Return the rows of an instruction that are rows of x; the others repeat them."""
        return self.unit.tile_rows if self.steps > 1 else self.rows * self.row_terms

    @property
    def has_full_instructions(self) -> bool:
        """Whether each row of an instruction is one of x."""
        return self.used_rows == self.unit.tile_rows

    @property
    def values(self) -> int:
        """Return the results of a lane in a column, from one instruction.

        Of few rows the first ones are all that any lane stores.
        """
        return min(self.unit.lane_rows, self.used_rows) // self.row_terms


class GemvMatrixSizes(GemvMatrixTile):
    """How the thread block divides its shared memory."""

    # --- the stages of x ---

    @property
    def unit_bytes(self) -> int:
        """Return the bytes of a unit of x: the terms, a scale, sums and a mark of each row."""
        terms_bytes = self.unit_items * _ITEM_BYTES
        return terms_bytes + self.rows * ((1 + self.x_sums) * _F32_BYTES + _MARK_BYTES)

    @property
    def suffices(self) -> bool:
        """Whether shared memory holds what the waves load at a time, and their sums."""
        least_quads = min(self.split_quads, self.round_quads)
        x_bytes = least_quads * QUAD_UNITS * self.unit_bytes
        return max(x_bytes, self.sums_bytes) <= self._budget_bytes

    @property
    def stage_quads(self) -> int:
        """Return the quads of x in shared memory: all that are needed, or whole rounds."""
        room_quads = self._budget_bytes // (QUAD_UNITS * self.unit_bytes)
        if room_quads >= self.split_quads:
            return self.split_quads
        return room_quads // self.round_quads * self.round_quads

    @property
    def stages(self) -> int:
        """Return how often a thread block stages x."""
        return -(-self.split_quads // self.stage_quads)

    @property
    def has_stage_loop(self) -> bool:
        """Whether the text has a loop over the stages."""
        return self.stages > 1 or self.keeps_stage_loop

    @property
    def stage_units(self) -> int:
        """Return the units of x in shared memory."""
        return QUAD_UNITS * self.stage_quads

    @property
    def rounds(self) -> int:
        """Return how often the waves take quads of a stage."""
        return -(-self.stage_quads // self.round_quads)

    @property
    def are_rounds_full(self) -> bool:
        """Whether every wave has a quad each time."""
        return self.has_whole_quads and self.rounds * self.round_quads == self.stage_quads

    @property
    def are_stages_full(self) -> bool:
        """Whether every stage of every thread block has x for all its units."""
        staged_quads = self.splits * self.stages * self.stage_quads
        return staged_quads * QUAD_ELEMENTS == self.k

    @property
    def has_whole_quads(self) -> bool:
        """Whether every stage of every thread block has all its quads."""
        return self.splits * self.stages * self.stage_quads == self.quads

    @property
    def stage_quarters(self) -> int:
        """Return the quarters of x in a stage, which the threads share."""
        return self.rows * self.stage_units * UNIT_QUARTERS

    @property
    def quarters_ahead(self) -> int:
        """Return the quarters of x that a thread loads before it splits the first."""
        return min(-(-self.stage_quarters // self.threads), self.most_quarters_ahead)

    @property
    def split_turns(self) -> int:
        """Return how often a thread loads and splits x in a stage."""
        return -(-self.stage_quarters // (self.threads * self.quarters_ahead))

    @property
    def are_turns_full(self) -> bool:
        """Whether every thread has a quarter each time."""
        return self.split_turns * self.quarters_ahead * self.threads == self.stage_quarters

    # --- shared memory ---

    @property
    def scales_at(self) -> int:
        """Return where the scales of x begin: after its terms."""
        return self.stage_units * self.unit_items * _ITEM_BYTES

    @property
    def x_sums_at(self) -> int:
        """Return where the sums of x begin: after the scales."""
        return self.scales_at + self.stage_units * self.rows * _F32_BYTES

    @property
    def rough_at(self) -> int:
        """Return where the marks of rough units begin: after the scales, and the sums of x."""
        return self.x_sums_at + self.stage_units * self.rows * self.x_sums * _F32_BYTES

    @property
    def stage_bytes(self) -> int:
        """Return the bytes of a stage."""
        return self.stage_units * self.unit_bytes

    @property
    def sums_bytes(self) -> int:
        """Return the bytes of the sums of all waves."""
        return self.waves_k * self._results_bytes

    @property
    def room_bytes(self) -> int:
        """Return the bytes that first x and then the sums occupy."""
        return -(-max(self.stage_bytes, self.sums_bytes) // _ITEM_BYTES) * _ITEM_BYTES

    @property
    def owned(self) -> int:
        """Return the results of each product that a thread block of a cluster stores."""
        return self.rows * self.columns // self.splits

    @property
    def received_bytes(self) -> int:
        """Return the bytes of the sums from all thread blocks of a cluster."""
        return self._results_bytes if self.splits > 1 else 0

    @property
    def used_bytes(self) -> int:
        """Return the shared memory of a thread block."""
        # any_rough, arrived, and zeros
        flags_bytes = _ITEM_BYTES * (1 + (self.splits > 1) + self.units_beside)
        return self.room_bytes + self.received_bytes + flags_bytes + self.row_values_bytes

    @property
    def _results_bytes(self) -> int:
        return self.products * self.rows * self.columns * _F32_BYTES

    @property
    def _budget_bytes(self) -> int:
        reserve_bytes = max(RESERVE_BYTES, self.row_values_bytes + _EXCHANGES_BYTES)
        return self.lds_bytes - reserve_bytes - self.received_bytes


def sizes_of(arch: HipArch, kernel: HipKernel) -> GemvMatrixSizes:
    """Return the sizes of a `gemv_matrix` on an arch."""
    return GemvMatrixSizes(
        unit=f16_unit(arch, kernel),
        k=kernel.section.products[0].operands[0].width,
        width=kernel.section.width,
        rows=kernel.rows_per_tile,
        columns=kernel.columns,
        products=len(kernel.section.products),
        terms=kernel.f16_terms,
        threads=kernel.block_size,
        waves_k=kernel.waves_k(arch.wave),
        ahead=kernel.ahead,
        splits=kernel.splits,
        lds_bytes=arch.lds_bytes,
        # AMD: more would take registers that other waves need
        most_quarters_ahead=4 if arch.is_nvidia else 2,
        # measured on an H200: without it fewer loads of x are in flight, and a row of K = 14336 in
        # f16 took 1.27 times as long
        keeps_stage_loop=arch.is_nvidia,
        x_sums=kernel.x_sums,
        units_beside=kernel.units_beside,
        row_values_bytes=_row_values_bytes(arch, kernel),
    )


def _row_values_bytes(arch: HipArch, kernel: HipKernel) -> int:
    """Return the shared memory for the values of rows, 0 if registers hold them.

    A thread finds the row of its x at run time, and registers have no such index. They hold the
    values of a single row.
    """
    values, rows = row_values(kernel.work), kernel.rows_per_tile
    # counted for sm_90: with 72 registers a thread ptxas spills up to twice as much of a LayerNorm
    # (K = 4096, N = 14336, f16) if the values of two rows are shared
    if rows == 1 or (arch.is_nvidia and rows == 2 and values > 1):
        return 0
    return -(-values * rows * _F32_BYTES // _ITEM_BYTES) * _ITEM_BYTES


def row_values(work: Kernel) -> int:
    """Return how many values of a row a text's `RowValues` holds: none without a reduction."""
    x, stored = work.x, {s.node.id for s in work.loads}
    if x is None or not any(map(_reduces, reachable((x,), stored))):
        return 0
    held = {node.id for node in reachable((x,)) if _is_held(node)}
    at_column = reachable((x,), held | stored)
    return len({operand.id for node in at_column for operand in node.operands} & held)


def _reduces(node: Node) -> bool:
    return node.op in REDUCTIONS and node.operands[0].width > 1


def _is_held(node: Node) -> bool:
    is_number = node.width == 1 and not node.is_bool and node.op not in _WITHOUT_VARIABLE
    return is_number and (node.op not in REDUCTIONS or _reduces(node))


def matrix_variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables of the templates that multiply f16 terms on matrix units."""
    arch = plan.target.hip
    if kernel.schedule not in {GEMV_MATRIX, TILE_HALVES, TILE_HALVES_TRANSPOSED}:
        return {}
    variables: dict[str, Any] = {"matrix_unit": f16_unit(arch, kernel)}
    if kernel.schedule == GEMV_MATRIX:
        sizes = sizes_of(arch, kernel)
        assert sizes.suffices, "limits.can_run_gemv_matrix refuses such constants"
        variables |= {
            "sizes": sizes,
        }
    return variables
