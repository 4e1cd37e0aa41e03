"""The sizes of a `rows` kernel that splits x into f16 terms."""

from dataclasses import dataclass
from typing import Any, Final

from q4jit.hip.kernel import QUAD_ELEMENTS, QUAD_UNITS, ROWS, UNIT_ELEMENTS, HipKernel, HipPlan
from q4jit.hip.matrix_units import QUARTER_ELEMENTS, UNIT_QUARTERS, f16_unit

_MOST_KEPT_QUARTERS: Final = 8  # in the registers of a thread


@dataclass(frozen=True)
class RowsSizes:
    """How the threads of a block divide a row of x.

    Attributes:
        k: elements of a row.
        threads: threads of the block.
    """

    k: int
    threads: int

    @property
    def units(self) -> int:
        """Units of a row in whole quads; those beyond K are 0."""
        return -(-self.k // QUAD_ELEMENTS) * QUAD_UNITS

    @property
    def quarters(self) -> int:
        """Quarters of these units."""
        return self.units * UNIT_QUARTERS

    @property
    def thread_quarters(self) -> int:
        """Quarters that a thread splits."""
        return -(-self.quarters // self.threads)

    @property
    def are_kept(self) -> bool:
        """Whether a thread has registers for all its quarters, so that it loads them once."""
        return self.thread_quarters <= _MOST_KEPT_QUARTERS

    @property
    def are_even(self) -> bool:
        """Whether all threads have the same number of quarters."""
        return self.thread_quarters * self.threads == self.quarters

    @property
    def are_ragged(self) -> bool:
        """Whether the last unit has fewer elements than 32; the x of a product with `w.T` may."""
        return self.k % UNIT_ELEMENTS != 0

    @property
    def are_inside(self) -> bool:
        """Whether none of the threads' quarters is beyond K."""
        return self.thread_quarters * self.threads * QUARTER_ELEMENTS == self.k


def rows_variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables that only the templates of `rows` have."""
    x = kernel.work.x
    if kernel.schedule != ROWS or x is None:
        return {}
    variables: dict[str, Any] = {"sizes": RowsSizes(x.width, kernel.block_size)}
    if kernel.f16_terms:
        variables["tile_rows"] = f16_unit(plan.target.hip, kernel).tile_rows
    return variables
