"""Cases of products with `w.T`: every schedule with each of its formats, and numbers at limits."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, numpy_dtype
from q4jit.hip.kernel import ELEMENT_TRANSPOSED, GEMV_TRANSPOSED, TILE_TRANSPOSED
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.tools.selftest.cases import Case
from q4jit.tools.selftest.halves import present_halves
from q4jit.tools.selftest.measures import special_error
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR
from q4jit.weights.reference import random_weight, random_x

COLUMNS: Final = 300
"""N, over which `w.T` sums: several splits, and parts of a panel and of a quad of panels."""
_UNITS: Final = 160
"""K of most weights: a quad and a unit."""
# M by schedule; formats take turns
_FORCED: Final = {
    ELEMENT_TRANSPOSED: (5,),
    GEMV_TRANSPOSED: (1, 2, 4, 8, 16),
    TILE_TRANSPOSED: (33, 128),
}
# a class of M each: other kernels on some arch
_BY_RULE: Final = {"f32": (1, 2, 4, 8, 16, 33, 128, 600), "f16": (2, 8, 20, 600)}
_QUICK_ROWS: Final = (1, 8, 33)
_HALVES_ROWS: Final[dict[FloatType, tuple[int, ...]]] = {"f16": (1, 8), "bf16": (2, 33)}
_CPU_ROWS: Final = (1, 33, 2, 128, 4, 600, 8, 33, 16, 128)  # few and many
_LARGE: Final[dict[FloatType, float]] = {"f32": 1e38, "f16": 65504.0, "bf16": 1e38}


def product_with_transpose(y: Any, w: Any) -> Any:
    """Return a product with the transpose of a weight."""
    return y @ w.T


@dataclass(frozen=True)
class _TransposedWay:
    """How a product with `w.T` is computed; no schedule: as in a call."""

    rows: int
    format: str = "Q4_0"
    precision: str = "f32"
    schedule: str | None = None
    layout: str | None = None
    dtype: FloatType = "f32"

    def cases(self) -> Iterator[Case]:
        """Yield a case whose last rows hold the special numbers, or a case for each of them."""
        special = (np.inf, np.nan, _LARGE[self.dtype])
        if self.rows > len(special):
            yield self._case(special)
        else:
            yield self._case(())
            if (self.format, self.rows, self.dtype) == ("Q4_0", 1, "f32"):
                yield from (self._case((value,)) for value in special)

    def _case(self, values: tuple[float, ...]) -> Case:
        y = special_rows(self.rows, values, self.dtype)
        w = random_weight(self.format, max(FORMATS[self.format].block_elements, _UNITS), COLUMNS)
        options = PlanOptions(self.precision, None, self.schedule, self.layout)
        bound = BOUNDS[self.precision]
        group = f"{self.schedule or 'w.T by rule'} {self.precision}"
        if self.dtype != "f32":
            group = f"w.T in {self.dtype}, {self.precision}"
        measure = functools.partial(special_error, bound, transposed=True)
        finite = not values
        return Case(group, product_with_transpose, (y, w), options, bound, measure, finite)


def special_rows(m: int, values: tuple[float, ...], dtype: FloatType) -> NDArray[Any]:
    """Return activations [M, N] whose last rows have one of `values` each."""
    y = random_x(m, COLUMNS).copy()
    for row, value in zip(y[m - len(values) :], values, strict=True):
        row[-1] = value
    return y.astype(numpy_dtype(dtype))


def transposed_cases(quick: bool = False) -> Iterator[Case]:
    """Yield the cases of a GPU."""
    ways = [] if quick else list(_forced_ways())
    for precision, rows in _BY_RULE.items():
        ways += [
            _TransposedWay(m, precision=precision) for m in rows if not quick or m in _QUICK_ROWS
        ]
    ways += [
        _TransposedWay(m, dtype=dtype) for dtype in present_halves() for m in _HALVES_ROWS[dtype]
    ]
    for way in ways:
        yield from way.cases()


def _forced_ways() -> Iterator[_TransposedWay]:
    for schedule, rows in _FORCED.items():
        for turn, name in enumerate(FORMATS):
            layout = (PLANAR, GGUF)[turn % 2]
            m = rows[turn % len(rows)]
            yield _TransposedWay(m, name, schedule=schedule, layout=layout)
    yield _TransposedWay(4, schedule=GEMV_TRANSPOSED, layout=GGUF)


def cpu_transposed_cases(quick: bool = False) -> Iterator[Case]:
    """Yield the cases of a CPU."""
    rows = itertools.cycle(_CPU_ROWS)
    ways = [
        _TransposedWay(m, name)
        for name in (["Q4_0"] if quick else FORMATS)
        for m in itertools.islice(rows, 2)
    ]
    ways += [_TransposedWay(m) for m in (1, 8)]
    ways += [_TransposedWay(m, precision="f16") for m in (2, 33)]
    ways += [_TransposedWay(_HALVES_ROWS[dtype][-1], dtype=dtype) for dtype in present_halves()]
    for way in ways:
        yield from way.cases()
