"""The sizes of a `tile_halves` kernel: the limits count with them, and its text prints them."""

from dataclasses import dataclass
from typing import Any, Final

from q4jit.hip.kernel import (
    MATRIX_COLUMNS,
    QUAD_ELEMENTS,
    QUAD_UNITS,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    UNIT_ELEMENTS,
    HipKernel,
    HipPlan,
)
from q4jit.hip.matrix_units import UNIT_QUARTERS, f16_unit
from q4jit.targets import HipArch

ITEM_BYTES: Final = 16
"""What a thread copies at a time: a quarter of a unit of x in one term."""

_PAIR: Final = 2  # blocks of a cluster
_F32_BYTES: Final = 4
_F16_BYTES: Final = 2
_MOST_COPIERS: Final = 512
_FLAG_BYTES: Final = 16  # the flag of rough rows, in the room that alignment gives it
_BARRIER_BYTES: Final = 16  # the same of a cluster's barrier


@dataclass(frozen=True)
class TileHalvesSizes:
    """What the constants of a `tile_halves` kernel imply, on an arch.

    x is counted in items of 16 bytes, each a quarter of a unit in one term.

    Attributes:
        arch: the GPU.
        kernel: the kernel with its constants.
    """

    arch: HipArch
    kernel: HipKernel

    # --- the tile and its waves ---

    @property
    def products(self) -> int:
        """Products that are computed together."""
        return len(self.kernel.section.products)

    @property
    def steps(self) -> int:
        """Matrix instructions for all rows of the tile."""
        return self.kernel.rows_per_tile // f16_unit(self.arch, self.kernel).tile_rows

    @property
    def waves_n(self) -> int:
        """Waves that compute different columns."""
        return self.kernel.columns // (MATRIX_COLUMNS * self.kernel.wave_panels)

    @property
    def waves_k(self) -> int:
        """Waves that compute the same columns, each from other quads of K."""
        return self.kernel.waves_k(self.arch.wave)

    @property
    def last_panel(self) -> int:
        """The last panel of the result."""
        return (self.kernel.section.width - 1) // MATRIX_COLUMNS

    @property
    def panels_are_whole(self) -> bool:
        """Whether every panel of every tile is one of the result."""
        return self.kernel.section.width % self.kernel.columns == 0

    # --- K: quads, splits, stages, turns ---

    @property
    def quads(self) -> int:
        """Quads of a column."""
        return -(-self._k // QUAD_ELEMENTS)

    @property
    def split_quads(self) -> int:
        """Quads of a split."""
        return -(-self.quads // self.kernel.splits)

    @property
    def quad_stages(self) -> int:
        """Stages that a quad takes, where a stage is only a part of one."""
        return max(QUAD_UNITS // self.kernel.stage_units, 1)

    @property
    def stage_quads(self) -> int:
        """Quads that a stage has a part of, or has."""
        return max(self.kernel.stage_units // QUAD_UNITS, 1)

    @property
    def turn_units(self) -> int:
        """Units of a quad that a wave multiplies in a stage."""
        return min(self.kernel.stage_units, QUAD_UNITS)

    @property
    def turns(self) -> int:
        """Quads of a stage that a wave multiplies."""
        return self.stage_quads // self.waves_k

    # --- x in shared memory ---

    @property
    def term_items(self) -> int:
        """Items of a unit in one term, for the rows of a matrix instruction."""
        return f16_unit(self.arch, self.kernel).tile_rows * UNIT_QUARTERS

    @property
    def unit_items(self) -> int:
        """Items of a unit in all terms, for the rows of a matrix instruction."""
        return self.kernel.f16_terms * self.term_items

    @property
    def run_items(self) -> int:
        """Items of a stage for the rows of a matrix instruction, adjacent in memory."""
        return self.kernel.stage_units * self.unit_items

    @property
    def row_items(self) -> int:
        """Items of all of K for the rows of a matrix instruction."""
        return self.quads * QUAD_UNITS * self.unit_items

    @property
    def stage_items(self) -> int:
        """Items of a stage."""
        return self.steps * self.run_items

    @property
    def copiers(self) -> int:
        """Threads that copy x: a power of two, so that they share runs evenly."""
        return 1 << min(self.kernel.block_size, _MOST_COPIERS).bit_length() - 1

    @property
    def copies(self) -> int:
        """Items of a stage that a thread copies."""
        return -(-self.stage_items // self.copiers)

    @property
    def copies_are_whole(self) -> bool:
        """Whether all copiers have the same number of items."""
        return self.stage_items % self.copiers == 0

    # --- partial sums, and the bytes of it all ---

    @property
    def partial_sums(self) -> int:
        """Sums of different waves that add up to one result."""
        return self.kernel.splits * self.waves_k

    @property
    def owned_rows(self) -> int:
        """Rows whose results a thread block of a cluster stores."""
        return self.kernel.rows_per_tile // self.kernel.splits

    @property
    def received_bytes(self) -> int:
        """Partial sums that the other thread blocks of a cluster send."""
        splits = self.kernel.splits
        return self._owned_bytes * self.waves_k * (splits - 1)

    @property
    def stages_bytes(self) -> int:
        """All stages of x."""
        return self.kernel.stages * self.stage_items * ITEM_BYTES

    @property
    def sums_bytes(self) -> int:
        """The partial sums that waves or thread blocks share; 0 if there are none."""
        return self._owned_bytes * self.partial_sums if self.partial_sums > 1 else 0

    @property
    def room_bytes(self) -> int:
        """Room for the stages of x, and after them for the partial sums."""
        return max(self.stages_bytes, self.sums_bytes)

    @property
    def staged_bytes(self) -> int:
        """All shared memory of a thread block."""
        barrier_bytes = _BARRIER_BYTES if self.kernel.splits > 1 else 0
        scales_bytes = self.kernel.rows_per_tile * _F32_BYTES
        return self.room_bytes + scales_bytes + _FLAG_BYTES + barrier_bytes

    @property
    def _k(self) -> int:
        return self.kernel.section.products[0].operands[0].width

    @property
    def _owned_bytes(self) -> int:
        """One sum of each result that a thread block stores."""
        return self.products * self.owned_rows * self.kernel.columns * _F32_BYTES


@dataclass(frozen=True)
class TransposedSizes(TileHalvesSizes):
    """The same for a `tile_halves_transposed`, which stages weights beside x.

    A unit of x is 32 columns of w. A tile has whole quads of each of them.
    """

    @property
    def tile_quads(self) -> int:
        """Quads of a column of w in a tile."""
        return self.kernel.columns // QUAD_ELEMENTS

    @property
    def tiles_are_whole(self) -> bool:
        """Whether every tile has only columns of the result's quads."""
        return (self.last_quad + 1) % self.tile_quads == 0

    @property
    def last_quad(self) -> int:
        """The last quad of the result."""
        return (self.kernel.section.width - 1) // QUAD_ELEMENTS

    @property
    def quad_quants_items(self) -> int:
        """Items with the quants of a quad of a panel: 4 bits each."""
        return MATRIX_COLUMNS * QUAD_ELEMENTS // 2 // ITEM_BYTES

    @property
    def quad_scales_items(self) -> int:
        """Items with the scales of a quad of a panel: f16, one for each unit."""
        return MATRIX_COLUMNS * QUAD_UNITS * _F16_BYTES // ITEM_BYTES

    @property
    def quants_items(self) -> int:
        """Items with the quants of a stage."""
        return self._stage_quads * self.quad_quants_items

    @property
    def weight_items(self) -> int:
        """Items of a stage: quants, then scales."""
        return self._stage_quads * (self.quad_quants_items + self.quad_scales_items)

    @property
    def last_weight_panel(self) -> int:
        """The last panel of w."""
        return (self._k - 1) // MATRIX_COLUMNS

    @property
    def weight_panels_are_whole(self) -> bool:
        """Whether w has all panels of the last quad of x."""
        return self.last_weight_panel + 1 == self.quads * QUAD_ELEMENTS // MATRIX_COLUMNS

    @property
    def meet_in_lanes(self) -> bool:
        """Whether the sums of two blocks meet in the lanes of one, not in shared memory.

        Tall tiles have no room there for both. With two terms each sum is checked, and a loop over
        a tile in shared memory is less code.
        """
        return self.kernel.splits == _PAIR and self.kernel.folded

    @property
    def sums_bytes(self) -> int:
        """The sums that thread blocks send each other."""
        return self.received_bytes if self.meet_in_lanes else super().sums_bytes

    @property
    def staged_bytes(self) -> int:
        """All shared memory of a thread block."""
        return super().staged_bytes + self.weights_bytes

    @property
    def weights_bytes(self) -> int:
        """All stages of w."""
        return self.products * self.kernel.stages * self.weight_items * ITEM_BYTES

    @property
    def _stage_quads(self) -> int:
        """Quads of panels of w in a stage."""
        return self.kernel.stage_units * UNIT_ELEMENTS // MATRIX_COLUMNS * self.tile_quads


def tile_halves_sizes(arch: HipArch, kernel: HipKernel) -> TileHalvesSizes:
    """Return the sizes of a tile on matrix units."""
    is_transposed = kernel.schedule == TILE_HALVES_TRANSPOSED
    return (TransposedSizes if is_transposed else TileHalvesSizes)(arch, kernel)


def tile_halves_variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables that only the templates of such tiles have."""
    if kernel.schedule not in {TILE_HALVES, TILE_HALVES_TRANSPOSED}:
        return {}
    return {"sizes": tile_halves_sizes(plan.target.hip, kernel)}
