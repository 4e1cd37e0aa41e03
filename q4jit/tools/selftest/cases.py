"""The calls of a self-test: each with forced kernels and the bound of its error."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit.floats import FloatType
from q4jit.hip.kernel import ELEMENT, GEMV, GEMV_DOT, TILE_FMA, TILE_MATRIX
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, FUNCTION_BOUND, one_sign_bound
from q4jit.targets import Target
from q4jit.tools.selftest.measures import (
    Measure,
    against_values,
    contract_error,
    function_error,
    lookup_error,
    values_error,
)
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import GGUF, PLANAR, TILES16
from q4jit.weights.reference import random_weight, random_x, without_signs
from q4jit.weights.tensor import QuantizedTensor
from q4jit.weights.tiles import suits_tiles16

SHAPES: Final = ((576, 37), (256, 37), (4096, 37), (256, 300), (576, 1), (4096, 300))
LONG_SHAPE: Final = (14336, 37)
"""K and N of products whose elements all have one sign: rounding errors add up."""
EVERY_M: Final = (1, 2, 3, 8, 16, 17, 64, 100)
_ROWS: Final[dict[str, tuple[int, ...]]] = {
    ELEMENT: (1, 3, 17, 100),
    GEMV: (1, 2, 3, 8, 16),  # one kernel each
    GEMV_DOT: (1, 2, 3, 8, 16),
    TILE_FMA: (17, 64, 100),
    TILE_MATRIX: (17, 64, 100),
}
# formats and M whose schedule keeps the bound for products of one sign (docs/precision.md): not
# `tile_halves`, and on NVIDIA not `tile_matrix`
_ONE_SIGN: Final = (("Q4_0", 1), ("F16", 1), ("F16", 17))
_ONE_SIGN_ON_AMD: Final = (*_ONE_SIGN, ("Q6_K", 17))
# schedules whose results are compared with products of the values that the device decodes
_DECODED_ON_DEVICE: Final = (ELEMENT, GEMV, TILE_FMA, TILE_MATRIX)
_OFFSET_BYTES: Final = 7  # of a weight in its buffer: odd, so that no address is aligned


def product(x: Any, w: Any) -> Any:
    """Return a product."""
    return x @ w


def product_and_values(x: Any, w: Any) -> Any:
    """Return a product and the decoded weight."""
    return x @ w, w.dequantize()


def looked_up(ids: Any, w: Any) -> Any:
    """Return the columns `ids` of a weight."""
    return w.rows(ids)


def affine(x: Any, w: Any, bias: Any, residual: Any, scale: Any) -> Any:
    """Return a product with bias, scale and residual."""
    return residual + scale * (x @ w + bias)


def mlp(x: Any, gain: Any, gate: Any, up: Any, down: Any) -> Any:
    """Return RMSNorm, SwiGLU, a second product and the residual."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate
    return x + (g / (1 + np.exp(-g)) * (h @ up)) @ down


@dataclass(frozen=True, eq=False)
class Case:
    """A call with forced kernels.

    Attributes:
        group: the line of the report's table that counts the case.
        function: the traced function.
        args: NumPy arrays (floats, or ids in i64), weights and floats.
        plan_options: schedule, layout and precision of the kernels.
        bound: the largest accepted error.
        measure: returns the error of the call's results.
        must_be_finite: whether NaN and Inf among the results are wrong, whatever `measure` says.
    """

    group: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    plan_options: PlanOptions
    bound: float
    measure: Measure
    must_be_finite: bool = True

    @property
    def rows(self) -> int:
        """The number of rows M of the call."""
        return len(self.args[0])

    def __str__(self) -> str:
        weights = ", ".join(
            f"{w.format} {list(w.shape)}" for w in self.args if isinstance(w, QuantizedTensor)
        )
        words = [self.function.__name__, self.group, f"M = {self.rows}"]
        schedule = self.plan_options.schedule
        if schedule is not None and not self.group.startswith(schedule):
            words.append(schedule)
        return ", ".join([*words, weights] if weights else words)


def cases(target: Target, quick: bool = False) -> list[Case]:
    """Return the cases of an arch, each kernel with several M if it supports them.

    They are not all combinations. Every schedule multiplies every format once, and the formats
    share out the layouts and the shapes, and, except for Q4_0, the M.
    """
    formats = ("Q4_0",) if quick else tuple(sorted(FORMATS, key=lambda name: name != "Q4_0"))
    layouts = (PLANAR,) if quick else (PLANAR, GGUF)
    selected: list[Case] = []
    for number, (schedule, precision) in enumerate(schedules(target)):
        for turn, name in enumerate(formats):
            in_turn = layouts[(number + turn) % len(layouts)]
            for layout in layouts if name == "Q4_0" else (in_turn,):
                if precision == "f16" and layout == GGUF:
                    continue  # decodes with the same text as f32
                if suits(schedule, FORMATS[name]):
                    plan_options = PlanOptions(precision, None, schedule, layout)
                    selected += _product_cases(plan_options, name, turn)
    selected += _default_cases()
    selected += _format_cases(formats)
    one_sign = _ONE_SIGN if target.hip.is_nvidia else _ONE_SIGN_ON_AMD
    selected += one_sign_cases((name, m) for name, m in one_sign if name in formats)
    selected += _lookup_cases(formats, layouts)
    selected += function_cases()
    selected += _offset_cases(layouts)
    return selected


def schedules(target: Target) -> list[tuple[str, str]]:
    """Return the schedules of an arch, each with the precisions that change its text."""
    pairs = [(ELEMENT, "f32"), (GEMV, "f32"), (GEMV_DOT, "i8"), (TILE_FMA, "f32")]
    if target.hip.matrix is not None:
        pairs += [(TILE_MATRIX, "f32"), (TILE_MATRIX, "f16")]
    return pairs


def suits(schedule: str, fmt: Format) -> bool:
    """Return whether a schedule multiplies weights of a format."""
    return fmt.float_type is None or schedule not in {GEMV_DOT, TILE_MATRIX}


def _product_cases(plan_options: PlanOptions, name: str, turn: int) -> Iterator[Case]:
    schedule, layout = str(plan_options.schedule), str(plan_options.layout)
    group = f"{schedule} {layout} {plan_options.precision}"
    # the same shape for every schedule: the kernel that only decodes is then compiled once
    k, n = shape_for(name, turn + (layout == GGUF))
    w = random_weight(name, k, n)
    bound = BOUNDS[plan_options.precision]
    for m in _rows(schedule, layout, name, turn):
        args = (random_x(m, k), w)
        if schedule in _DECODED_ON_DEVICE:
            yield Case(group, product_and_values, args, plan_options, bound, against_values)
            if schedule in {ELEMENT, GEMV}:  # other schedules share the kernel that decodes
                group_of_values = f"dequantize {layout}"
                yield Case(
                    group_of_values, product_and_values, args, plan_options, 0.0, values_error
                )
        else:
            yield Case(group, product, args, plan_options, bound, contract_error)


def shape_for(name: str, turn: int) -> tuple[int, int]:
    """Return one of the shapes that fit the blocks of a format; formats take turns."""
    block = FORMATS[name].block_elements
    fitting = [(k, n) for k, n in SHAPES if k % block == 0]
    return fitting[turn % len(fitting)]


def _rows(schedule: str, layout: str, name: str, turn: int) -> tuple[int, ...]:
    """Return the M to run.

    For Q4_0 in `planar` these are all M of the schedule. Otherwise they are one M for `gemv` and
    `gemv_dot`, which have a kernel per M, and all M > 1 for the other schedules, which have one
    kernel for them.
    """
    every = _ROWS[schedule]
    if name == "Q4_0" and layout == PLANAR:
        return every
    if schedule not in {GEMV, GEMV_DOT}:
        return tuple(m for m in every if m > 1)
    return (every[turn % len(every)],)


def _default_cases() -> Iterator[Case]:
    """Yield cases of Q4_0 without a forced schedule: every M in each precision, every shape."""
    calls = [(precision, m, SHAPES[0]) for precision in BOUNDS for m in EVERY_M]
    calls += [("f32", m, shape) for m in (1, 17) for shape in SHAPES[1:]]
    for precision, m, (k, n) in calls:
        args = (random_x(m, k), random_weight("Q4_0", k, n))
        group = f"default schedule {precision}"
        yield Case(group, product, args, PlanOptions(precision), BOUNDS[precision], contract_error)


def _format_cases(formats: Sequence[str]) -> Iterator[Case]:
    """Yield cases of the other formats without a forced schedule, few rows and many."""
    for turn, name in enumerate(formats[1:]):
        w = random_weight(name, *shape_for(name, turn))
        few, more = EVERY_M[turn % 5], EVERY_M[5 + turn % 3]
        for precision, m in (("f32", 1), ("f32", few), ("f32", more), ("f16", more)):
            group, args = f"default schedule {precision}", (random_x(m, w.shape[0]), w)
            plan_options, bound = PlanOptions(precision), BOUNDS[precision]
            yield Case(group, product, args, plan_options, bound, contract_error)


def one_sign_cases(calls: Iterable[tuple[str, int]]) -> Iterator[Case]:
    """Yield a product without negative elements for each format and M."""
    k, n = LONG_SHAPE
    for name, m in calls:
        args = (np.abs(random_x(m, k)), without_signs(random_weight(name, k, n)))
        bound = one_sign_bound(k)
        yield Case("products of one sign", product, args, PlanOptions(), bound, contract_error)


def _lookup_cases(formats: Sequence[str], layouts: Sequence[str]) -> Iterator[Case]:
    for turn, name in enumerate(formats):
        w = random_weight(name, *shape_for(name, 3))
        ids = np.random.default_rng(1).integers(0, w.shape[1], 17)
        ids[:2] = 0, w.shape[1] - 1
        own = [layouts[turn % len(layouts)], *([TILES16] if suits_tiles16(FORMATS[name]) else [])]
        for layout in own:
            plan_options = PlanOptions("f32", None, None, layout)
            yield Case(f"lookup {layout}", looked_up, (ids, w), plan_options, 0.0, lookup_error)


def function_cases(dtype: FloatType = "f32", every_m: Sequence[int] = (1, 8, 64)) -> Iterator[Case]:
    """Yield functions with operations before, between and after their products."""
    k, hidden, n = 576, 256, 37
    gain, bias = random_x(1, k, dtype)[0], random_x(1, n, dtype)[0]
    group = "functions f32" if dtype == "f32" else f"functions in {dtype}"
    w = random_weight("Q4_0", k, n)
    gate, up = random_weight("Q4_0", k, hidden), random_weight("Q4_0", k, hidden, seed=1)
    down = random_weight("Q4_0", hidden, k)
    for m in every_m:
        x = random_x(m, k, dtype)
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (affine, (x, w, bias, random_x(m, n, dtype), 0.75)),
            (mlp, (x, gain, gate, up, down)),
        ]
        for function, args in calls:
            measure = functools.partial(function_error, function)
            yield Case(group, function, args, PlanOptions(), FUNCTION_BOUND, measure)


def unaligned_weight() -> QuantizedTensor:
    """Return a weight at an odd address."""
    k, n = SHAPES[0]
    inside = random_weight("Q4_0", k, n).raw.tobytes()
    buffer = memoryview(bytes(_OFFSET_BYTES) + inside + bytes(_OFFSET_BYTES))
    raw = buffer[_OFFSET_BYTES : _OFFSET_BYTES + len(inside)]
    return QuantizedTensor.from_bytes(raw, shape=(k, n), format="Q4_0")


def _offset_cases(layouts: Sequence[str]) -> Iterator[Case]:
    w = unaligned_weight()
    for layout in layouts:
        for m in (1, 17):
            plan_options = PlanOptions("f32", None, None, layout)
            args = (random_x(m, w.shape[0]), w)
            group = "unaligned weights"
            yield Case(group, product, args, plan_options, BOUNDS["f32"], contract_error)
