"""The classes of M: numbers of rows that one set of kernels serves.

Few rows have the classes M = 1, 2, 3…4, 5…8 and 9…16, each named by its largest M. More rows have
four classes if `tile_halves` can compute them (M = 17…32, 33…64, 65…512, ≥ 513), and otherwise one.
"""

from typing import Final

from q4jit.hip.kernel import ELEMENT, TILE_HALVES
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target
from q4jit.weights.layouts import TILES16

FEW_ROWS: Final = (1, 2, 4, 8, 16)
MOST_FEW_ROWS: Final = FEW_ROWS[-1]
TILE_ROWS: Final = 64
TALL_TILE_ROWS: Final = 128
"""Rows of the largest tile. It reads weights half as often, but its sums need more registers."""
HALVES_TILE_ROWS: Final = (32, 64)
"""Classes of M that are a single tile of `tile_halves`; more rows have several tiles."""
MANY_ROWS: Final = 512
_LAST_CLASS: Final = 1024  # more than 512 rows: enough tiles to fill any GPU, whatever N is


def m_class(target: Target, m: int, plan_options: PlanOptions) -> int:
    """Return the class of a number of rows: its largest M; 1024 for the last class."""
    if plan_options.schedule == ELEMENT:
        return 1
    if m <= MOST_FEW_ROWS:
        return next(rows for rows in FEW_ROWS if m <= rows)
    in_halves = (
        target.hip.matrix is not None
        and plan_options.schedule in {None, TILE_HALVES}
        and plan_options.layout in {None, TILES16}
    )
    if not in_halves:
        return TILE_ROWS
    return next((rows for rows in (*HALVES_TILE_ROWS, MANY_ROWS) if m <= rows), _LAST_CLASS)


def most_rows(target: Target, rows_class: int, plan_options: PlanOptions) -> int | None:
    """Return the largest number of rows in a class; None for the last class."""
    return None if m_class(target, rows_class + 1, plan_options) == rows_class else rows_class
