"""The classes of M: numbers of rows that share kernels.

Few rows (M = 1, 2, 3…4, 5…8, 9…16) have a class each, which is named by the largest number in it.
All others are one class of tiles, or four (M = 17…32, 33…64, 65…512, ≥ 513) where `tile_halves` may
compute them.
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
"""Rows of the largest tile: weights are read half as often, if registers have room for its sums."""
HALVES_TILE_ROWS: Final = (32, 64)
"""Rows that are one tile of `tile_halves`; beyond them there are several."""
MANY_ROWS: Final = 512
_LAST_CLASS: Final = 1024  # of more rows: there are tiles enough, whatever N is


def m_class(target: Target, m: int, plan_options: PlanOptions) -> int:
    """The class of a number of rows: the largest in it, but for the last class."""
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
    """The largest number of rows in a class; None in the last one."""
    return None if m_class(target, rows_class + 1, plan_options) == rows_class else rows_class
