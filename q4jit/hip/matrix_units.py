"""The f16 instructions of the matrix units: what a lane holds of x, of w and of their product.

An instruction multiplies rows of x by a panel. `templates/unit/f16_<name>.hip.j2` prints these
numbers, and draws them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from q4jit.hip.kernel import UNIT_ELEMENTS, HipKernel
from q4jit.targets import HipArch


@dataclass(frozen=True)
class MatrixUnit:
    """The lanes of an f16 instruction, or of several that multiply a unit together.

    Attributes:
        name: what its template is called.
        tile_rows: rows of x in an instruction.
        lane_columns: columns of a panel that a lane holds.
        lane_rows: rows of the result that a lane holds, in each of these columns.
        parts: lanes that share the elements of a unit.
    """

    name: str
    tile_rows: int
    lane_columns: int
    lane_rows: int
    parts: int

    @property
    def lane_quarters(self) -> int:
        """Return the quarters of a unit that a lane holds."""
        return UNIT_QUARTERS // self.parts


QUARTER_ELEMENTS: Final = 8
"""Elements of x that a lane splits into terms: 16 bytes of f16."""
UNIT_QUARTERS: Final = UNIT_ELEMENTS // QUARTER_ELEMENTS

_DOT2: Final = MatrixUnit("dot2", tile_rows=1, lane_columns=1, lane_rows=1, parts=2)
_BY_MATRIX: Final[Mapping[str | None, MatrixUnit]] = {
    "mfma": MatrixUnit("mfma", tile_rows=16, lane_columns=1, lane_rows=4, parts=4),
    "mma_sync": MatrixUnit("mma_sync", tile_rows=8, lane_columns=2, lane_rows=2, parts=4),
    "wmma": MatrixUnit("wmma", tile_rows=16, lane_columns=1, lane_rows=8, parts=1),
    "wmma_gfx12": MatrixUnit("wmma_gfx12", tile_rows=16, lane_columns=1, lane_rows=8, parts=2),
}


def f16_unit(arch: HipArch, kernel: HipKernel) -> MatrixUnit:
    """Return the instruction that multiplies the f16 terms of a kernel."""
    return _DOT2 if kernel.pairs else _BY_MATRIX[arch.matrix]
