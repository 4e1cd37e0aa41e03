"""What is measured, and what is measured where nothing else is asked for."""

from dataclasses import dataclass
from typing import Final

from q4jit.precision import BOUNDS


@dataclass(frozen=True)
class BenchRequest:
    """What is measured; None: what suits the target.

    rows: numbers of rows M of x. fused: also what a bias and SiLU gating cost.
    """

    format: str = "Q4_0"
    shapes: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    precisions: tuple[str, ...] | None = None
    fused: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of target where nothing else is asked for."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    precisions: tuple[str, ...]


GPU: Final = Defaults(
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)),
    rows=(1, 8, 64, 512),
    precisions=tuple(BOUNDS),
)
CPU: Final = Defaults(
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (576, 1536), (576, 576)),
    rows=(1, 4, 8, 512),
    precisions=("f32", "i8"),
)
