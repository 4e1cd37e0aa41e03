"""The products to measure, and those that are measured by default."""

from dataclasses import dataclass
from typing import Final

from q4jit.floats import FloatType
from q4jit.precision import BOUNDS


@dataclass(frozen=True)
class BenchRequest:
    """The products to measure; None selects the default of the target.

    Attributes:
        format: the block format of the weights.
        shapes: (K, N) of each weight.
        rows: numbers of rows M of x.
        precisions: precisions of q4jit.
        fused: whether to measure bias and SiLU gating too.
        quick: whether to measure less: one shape, M = 1 and 8, few rounds.
        dtype: the float type of x, of the other arrays and of the results.
    """

    format: str = "Q4_0"
    shapes: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    precisions: tuple[str, ...] | None = None
    fused: bool = False
    quick: bool = False
    dtype: FloatType = "f32"


@dataclass(frozen=True)
class Defaults:
    """What is measured by default on a kind of target."""

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
