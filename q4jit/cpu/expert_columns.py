"""Write the columns phase of products with chosen experts in LLVM IR: a task has one expert."""

from typing import ClassVar

from q4jit.cpu.columns import SectionWriter
from q4jit.cpu.lanes import SIXTEEN
from q4jit.cpu.llvm_text import VECTOR
from q4jit.cpu.schedule import Tile, expert_bytes
from q4jit.frontend.graph import Node
from q4jit.weights.layouts import LANES


class ExpertSectionWriter(SectionWriter):
    """Writes the function of a task: columns of an expert's matrix, for the vectors of a bucket."""

    _NUMBERS: ClassVar[str] = "i64 %task, i64 %first, i64 %end, i64 %expert"

    def _columns(self) -> None:
        """Write products of whole tiles, then of halves of tiles, then of single vectors."""
        f, start, most = self._f, "%first", self._kernel.tile.rows
        tiles = [f.let("tile", f"alloca [{most} x {VECTOR}], align 64") for _ in self._products]
        weights = [self._panel_at(p, "%task") for p in self._products]
        column = f.index("column", ("%task", LANES))
        for rows in dict.fromkeys([most, max(most // 2, 1), 1]):
            left = f.let("left", f"sub i64 %end, {start}")
            whole = f.let("whole", f"udiv i64 {left}, {rows}")
            stop = f.index("stop", (whole, rows), (start, 1))
            with f.loop("tile_row", start, stop, step=rows) as tile:
                for product, panel_at, tile_at in zip(self._products, weights, tiles, strict=True):
                    self._product(product, tile.index, [panel_at], tile_at, Tile(rows))
                with f.loop("r", 0, rows) as loop:
                    place = f.index("place", (tile.index, 1), (loop.index, 1))
                    sums = []
                    for tile_at in tiles:
                        at = f.at(tile_at, VECTOR, loop.index, "sums_at")
                        sums.append(f.let("sums", f"load {VECTOR}, ptr {at}, align 64"))
                    self._epilogue(SIXTEEN, place, column, sums)
            start = stop

    def _row_at(self, place: str) -> str:
        return self._lowering.vector_at(self._f, place)

    def _expert_offset(self, product: Node, layout: str) -> list[tuple[str | int, int]]:
        return [("%expert", expert_bytes(self._lowering.plan, product, layout))]
