"""The calls that a self-test makes: each with forced kernels, and what its error is held to."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    GEMV_DOT,
    TILE_FMA,
    TILE_MATRIX,
)
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS, FUNCTION_BOUND
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
from q4jit.weights.layouts import GGUF, PLANAR
from q4jit.weights.reference import random_weight, random_x
from q4jit.weights.tensor import QuantizedTensor

SHAPES: Final = ((576, 37), (256, 37), (4096, 37), (256, 300), (576, 1), (4096, 300))
_EVERY_M: Final = (1, 2, 3, 8, 16, 17, 64, 100)
_ROWS: Final[dict[str, tuple[int, ...]]] = {
    ELEMENT: (1, 3, 17, 100),
    GEMV: (1, 2, 3, 8, 16),  # a kernel each
    GEMV_DOT: (1, 2, 3, 8, 16),
    TILE_FMA: (17, 64, 100),
    TILE_MATRIX: (17, 64, 100),
}
# compared with what `dequantize` gives on the device
_DECODED_TOO: Final = (ELEMENT, GEMV, TILE_FMA, TILE_MATRIX)
_OFFSET_BYTES: Final = 7  # of a weight in a larger buffer: as odd as it gets


def product(x: Any, w: Any) -> Any:
    """A product alone."""
    return x @ w


def product_and_values(x: Any, w: Any) -> Any:
    """A product, and the weight's values by the kernel that only decodes."""
    return x @ w, w.dequantize()


def looked_up(ids: Any, w: Any) -> Any:
    """Rows of a weight."""
    return w.rows(ids)


def affine(x: Any, w: Any, bias: Any, residual: Any, scale: Any) -> Any:
    """Bias, a scale and a residual after a product."""
    return residual + scale * (x @ w + bias)


def mlp(x: Any, gain: Any, gate: Any, up: Any, down: Any) -> Any:
    """RMSNorm, SwiGLU, a second product and the residual."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate
    return x + (g / (1 + np.exp(-g)) * (h @ up)) @ down


@dataclass(frozen=True, eq=False)
class Case:
    """A call of `function` with kernels by `plan_options`; `measure` gives its error.

    group: the line of the table that it counts in. args: NumPy arrays (f32, or ids in i64),
    weights and floats.
    """

    group: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    plan_options: PlanOptions
    bound: float
    measure: Measure

    @property
    def rows(self) -> int:
        """M."""
        return len(self.args[0])

    def __str__(self) -> str:
        weights = ", ".join(
            f"{w.format} {list(w.shape)}" for w in self.args if isinstance(w, QuantizedTensor)
        )
        return f"{self.function.__name__}, {self.group}, M = {self.rows}, {weights}"


def cases(target: Target, quick: bool = False) -> list[Case]:
    """What is run on an arch: some 120 kernels, each for several M where it serves them.

    Not every combination: the shapes and, but for Q4_0, the classes of M take turns.
    """
    formats = ("Q4_0",) if quick else tuple(sorted(FORMATS, key=lambda name: name != "Q4_0"))
    layouts = (PLANAR,) if quick else (PLANAR, GGUF)
    found: list[Case] = []
    for schedule, precision in schedules(target):
        for layout in layouts:
            if precision == "f16" and layout == GGUF:
                continue  # the text that decodes is that of f32
            for turn, name in enumerate(formats):
                if _suits(schedule, FORMATS[name]):
                    plan_options = PlanOptions(precision, None, schedule, layout)
                    found += _product_cases(plan_options, name, turn)
    found += _chosen_cases()
    found += _lookup_cases(formats, layouts)
    found += _function_cases()
    found += _offset_cases(layouts)
    return found


def schedules(target: Target) -> list[tuple[str, str]]:
    """The schedules that an arch has, each with the precisions that change its text."""
    found = [(ELEMENT, "f32"), (GEMV, "f32"), (GEMV_DOT, "i8"), (TILE_FMA, "f32")]
    if target.hip.matrix is not None:
        found += [(TILE_MATRIX, "f32"), (TILE_MATRIX, "f16")]
    return found


def _suits(schedule: str, fmt: Format) -> bool:
    return fmt.float_dtype is None or schedule not in {GEMV_DOT, TILE_MATRIX}


def _product_cases(plan_options: PlanOptions, name: str, turn: int) -> Iterator[Case]:
    schedule, layout = str(plan_options.schedule), str(plan_options.layout)
    group = f"{schedule} {layout} {plan_options.precision}"
    # the same for every schedule: what decodes alone is then compiled once
    k, n = _shape(name, turn + (layout == GGUF))
    w = random_weight(name, k, n)
    bound = BOUNDS[plan_options.precision]
    for m in _rows(schedule, layout, name, turn):
        args = (random_x(m, k), w)
        if schedule in _DECODED_TOO:
            yield Case(group, product_and_values, args, plan_options, bound, against_values)
            if schedule in {ELEMENT, GEMV}:  # the kernel that decodes is the others' too
                group_of_values = f"dequantize {layout}"
                yield Case(
                    group_of_values, product_and_values, args, plan_options, 0.0, values_error
                )
        else:
            yield Case(group, product, args, plan_options, bound, contract_error)


def _shape(name: str, turn: int) -> tuple[int, int]:
    block = FORMATS[name].block_elements
    fitting = [(k, n) for k, n in SHAPES if k % block == 0]
    return fitting[turn % len(fitting)]


def _rows(schedule: str, layout: str, name: str, turn: int) -> tuple[int, ...]:
    """Which M: all for Q4_0 and where they share a kernel, which one row alone does not."""
    every = _ROWS[schedule]
    if name == "Q4_0" and layout == PLANAR:
        return every
    if schedule not in {GEMV, GEMV_DOT}:
        return tuple(m for m in every if m > 1)
    turning = every[1 + turn % (len(every) - 1)]
    return (every[0], turning) if layout == PLANAR else (turning,)


def _chosen_cases() -> Iterator[Case]:
    """Q4_0 with the schedule left to choose: every M in each precision, and every shape."""
    calls = [(precision, m, SHAPES[0]) for precision in BOUNDS for m in _EVERY_M]
    calls += [("f32", m, shape) for m in (1, 17) for shape in SHAPES[1:]]
    for precision, m, (k, n) in calls:
        args = (random_x(m, k), random_weight("Q4_0", k, n))
        group = f"as chosen {precision}"
        yield Case(group, product, args, PlanOptions(precision), BOUNDS[precision], contract_error)


def _lookup_cases(formats: Sequence[str], layouts: Sequence[str]) -> Iterator[Case]:
    for turn, name in enumerate(formats):
        w = random_weight(name, *_shape(name, 3))
        ids = np.random.default_rng(1).integers(0, w.shape[1], 17)
        ids[:2] = 0, w.shape[1] - 1
        layout = layouts[turn % len(layouts)]
        plan_options = PlanOptions("f32", None, None, layout)
        yield Case(f"look-up {layout}", looked_up, (ids, w), plan_options, 0.0, lookup_error)


def _function_cases() -> Iterator[Case]:
    k, hidden, n = 576, 256, 37
    gain, bias = random_x(1, k)[0], random_x(1, n)[0]
    w = random_weight("Q4_0", k, n)
    gate, up = random_weight("Q4_0", k, hidden), random_weight("Q4_0", k, hidden, seed=1)
    down = random_weight("Q4_0", hidden, k)
    for m in (1, 8, 64):
        x = random_x(m, k)
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (affine, (x, w, bias, random_x(m, n), 0.75)),
            (mlp, (x, gain, gate, up, down)),
        ]
        for function, args in calls:
            measure = functools.partial(function_error, function)
            yield Case("functions f32", function, args, PlanOptions(), FUNCTION_BOUND, measure)


def _offset_cases(layouts: Sequence[str]) -> Iterator[Case]:
    k, n = SHAPES[0]
    inside = random_weight("Q4_0", k, n).raw.tobytes()
    buffer = memoryview(bytes(_OFFSET_BYTES) + inside + bytes(_OFFSET_BYTES))
    raw = buffer[_OFFSET_BYTES : _OFFSET_BYTES + len(inside)]
    w = QuantizedTensor.from_bytes(raw, shape=(k, n), format="Q4_0")
    for layout in layouts:
        for m in (1, 17):
            plan_options = PlanOptions("f32", None, None, layout)
            args = (random_x(m, k), w)
            group = "weights at an offset"
            yield Case(group, product, args, plan_options, BOUNDS["f32"], contract_error)
