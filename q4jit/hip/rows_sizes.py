"""The sizes of a `rows` kernel that splits x into f16 terms."""

from dataclasses import dataclass
from typing import Any, Final

from q4jit.hip.kernel import QUAD_ELEMENTS, ROWS, UNIT_ELEMENTS, HipKernel, HipPlan
from q4jit.hip.tile_halves_sizes import matrix_rows

QUARTER_ELEMENTS: Final = 8
"""Elements of x that a thread splits at a time."""

_UNIT_QUARTERS: Final = UNIT_ELEMENTS // QUARTER_ELEMENTS
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
        return -(-self.k // QUAD_ELEMENTS) * (QUAD_ELEMENTS // UNIT_ELEMENTS)

    @property
    def quarters(self) -> int:
        """Quarters of these units."""
        return self.units * _UNIT_QUARTERS

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
    def are_inside(self) -> bool:
        """Whether none of the threads' quarters is beyond K."""
        return self.thread_quarters * self.threads * QUARTER_ELEMENTS == self.k


def rows_variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables that only the templates of `rows` have."""
    x = kernel.work.x
    if kernel.schedule != ROWS or x is None:
        return {}
    return {
        "sizes": RowsSizes(x.width, kernel.block_size),
        "tile_rows": matrix_rows(plan.target.hip),
        "unit_elements": UNIT_ELEMENTS,
        "unit_quarters": _UNIT_QUARTERS,
        "quarter_elements": QUARTER_ELEMENTS,
    }
