"""Cases with arrays in f16 and bf16: every schedule and format once with each, and every number."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, numpy_dtype
from q4jit.hip.kernel import ELEMENT, GEMV, GEMV_DOT, TILE_FMA, TILE_MATRIX
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.targets import Target
from q4jit.tools.selftest.cases import Case, function_cases, product, schedules, suits
from q4jit.tools.selftest.findings import CaseOutcome
from q4jit.tools.selftest.measures import contract_error, rounding_error, special_error
from q4jit.weights.formats import FORMATS
from q4jit.weights.reference import random_weight, random_x

HALVES: Final[tuple[FloatType, ...]] = ("f16", "bf16")
SHAPE: Final = (256, 37)
"""K and N of the products. Every format has them, and rows of the result are not aligned."""
_ROWS: Final = {ELEMENT: 5, GEMV: 8, GEMV_DOT: 8, TILE_FMA: 17, TILE_MATRIX: 17}
# precisions and M whose default schedules no other case forces
_DEFAULT_WAYS: Final = (("f32", 1), ("f32", 4), ("f32", 64), ("f16", 8))
_CPU_WAYS: Final = (("f32", 8), ("i8", 17), ("f16", 8), ("i8", 8))
# the scale of rows whose results are partly denormal numbers of a type
_SMALL: Final[dict[FloatType, float]] = {"f16": 2.0**-16, "bf16": 2.0**-124}
# |x| of rows whose results are partly beyond the range of f16; in bf16 sums would leave that of f32
_LARGE: Final = 65504.0


@dataclass(frozen=True)
class _Way:
    """How a product is computed; no schedule: as in a call."""

    schedule: str | None
    precision: str
    rows: int
    format: str

    def cases(self, dtype: FloatType) -> Iterator[Case]:
        """Yield a product of ordinary numbers and, if it has the rows, one of special numbers."""
        k, w = SHAPE[0], random_weight(self.format, *SHAPE)
        options = PlanOptions(self.precision, None, self.schedule)
        bound = BOUNDS[self.precision]
        args = (random_x(self.rows, k, dtype), w)
        group = f"products in {dtype}, {self.precision}"
        yield Case(group, product, args, options, bound, contract_error)
        if self.rows >= len(_SPECIAL_ROWS):
            args = (special_x(self.rows, k, dtype), w)
            group = f"special {dtype}, {self.precision}"
            measure = functools.partial(special_error, bound)
            yield Case(group, product, args, options, bound, measure, must_be_finite=False)


def half_cases(target: Target, quick: bool = False) -> Iterator[Case]:
    """Yield the cases of an arch of GPU."""
    for dtype in present_halves():
        for way in _gpu_ways(target, dtype):
            if way.format == "Q4_0" or not quick:
                yield from way.cases(dtype)
        yield from conversion_cases(dtype)
        if not quick:
            yield from function_cases(dtype, (8,))


def cpu_half_cases(quick: bool = False) -> Iterator[Case]:
    """Yield the cases of a CPU."""
    for turn, dtype in enumerate(present_halves()):
        for i, name in enumerate(["Q4_0"] if quick else FORMATS):
            precision, rows = _CPU_WAYS[(i + turn) % len(_CPU_WAYS)]
            yield from _Way(None, precision, rows, name).cases(dtype)
        yield from conversion_cases(dtype)
        if not quick:
            yield from function_cases(dtype, (8,))


def missing_types() -> Iterator[CaseOutcome]:
    """Yield an outcome for each float type that has no cases here, because NumPy lacks it."""
    for dtype in HALVES:
        if dtype not in present_halves():
            what, reason = f"arrays in {dtype}", "needs ml_dtypes; run pip install ml_dtypes"
            yield CaseOutcome(what, what, 0, None, 0.0, None, f"not run: {reason}")


def present_halves() -> Sequence[FloatType]:
    """Return f16 and, if NumPy has it here, bf16."""
    return HALVES if importlib.util.find_spec("ml_dtypes") else HALVES[:1]


def _gpu_ways(target: Target, dtype: FloatType) -> Iterator[_Way]:
    """Yield every schedule and every format of an arch once."""
    # floats first: they suit fewer schedules; for each dtype another format begins
    turn = 2 if dtype == "bf16" else 0  # tiles take two formats, one after the other
    floats = [name for name, fmt in FORMATS.items() if fmt.float_type is not None]
    blocks = [name for name in FORMATS if name not in floats]
    waiting = [*floats[turn:], *floats[:turn], *blocks[turn:], *blocks[:turn]]
    used = set()
    for schedule, precision in schedules(target):
        name = next(name for name in waiting if suits(schedule, FORMATS[name]))
        waiting.remove(name)
        waiting.append(name)
        used.add(name)
        yield _Way(schedule, precision, _ROWS[schedule], name)
    for name in FORMATS:
        if name not in used:
            yield _Way(None, "f32", 8, name)
    for precision, rows in _DEFAULT_WAYS:
        yield _Way(None, precision, rows, "Q4_0")


# --- special numbers ------------------------------------------------------------------------------


def special_x(m: int, k: int, dtype: FloatType) -> NDArray[Any]:
    """Return activations [M, K] whose rows take turns with the kinds of `_SPECIAL_ROWS`."""
    x = random_x(m, k)
    rows = [_SPECIAL_ROWS[i % len(_SPECIAL_ROWS)](row, dtype) for i, row in enumerate(x)]
    return np.stack(rows).astype(numpy_dtype(dtype))


def _small(row: NDArray[Any], dtype: FloatType) -> NDArray[Any]:
    return row * np.float32(_SMALL[dtype])


def _large(row: NDArray[Any], dtype: FloatType) -> NDArray[Any]:
    return np.copysign(np.float32(_LARGE), row) if dtype == "f16" else row


def _with(value: float, row: NDArray[Any], dtype: FloatType) -> NDArray[Any]:
    return np.concatenate([row[:-1], np.array([value], row.dtype)])


_SPECIAL_ROWS: Final = (
    _small,
    _large,
    functools.partial(_with, np.inf),
    functools.partial(_with, np.nan),
)


# --- conversions ----------------------------------------------------------------------------------


def widened(x: Any) -> Any:
    """Return x in f32."""
    return x.astype(np.float32)


def in_f16(x: Any) -> Any:
    """Return x in f16."""
    return x.astype(numpy_dtype("f16"))


def in_bf16(x: Any) -> Any:
    """Return x in bf16."""
    return x.astype(numpy_dtype("bf16"))


def conversion_cases(dtype: FloatType) -> Iterator[Case]:
    """Yield a load of every number of a type, and a store of those and of the ties between them."""
    every = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(64, -1)
    narrowed = in_f16 if dtype == "f16" else in_bf16
    calls = (
        (f"loads of {dtype}", widened, every),
        (f"stores of {dtype}", narrowed, between(dtype)),
    )
    for group, function, x in calls:
        measure = functools.partial(rounding_error, function)
        yield Case(group, function, (x,), PlanOptions(), 0.0, measure, must_be_finite=False)


def between(dtype: FloatType) -> NDArray[np.float32]:
    """Return every number of a type, every tie of two, and the neighbours of ties, in f32."""
    every = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(dtype)).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)]).astype(np.float64)
    beyond = 2 * finite[-1] - finite[-2]  # the next number, if the range were larger
    steps = np.array([-beyond, *finite, beyond])
    ties = ((steps[:-1] + steps[1:]) / 2).astype(np.float32)
    directions = (np.float32(-np.inf), np.float32(np.inf))
    values = np.concatenate([every, ties, *(np.nextafter(ties, to) for to in directions)])
    return np.resize(values, (64, -(-len(values) // 64)))
