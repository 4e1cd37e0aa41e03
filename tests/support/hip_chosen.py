"""Cases by what the schedules choose: functions, shapes, formats and rows that models have."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from q4jit.frontend.specs import WeightSpec
from q4jit.weights.formats import FORMATS
from tests.support.hip_cases import (
    Case,
    case,
    layer_norm,
    product,
    residual,
    rms_norm,
    softmax,
    swiglu,
    zeros,
)
from tests.support.pairs import covering

FAMILIES: Final = (("gfx90a", "gfx942"), ("gfx1100", "gfx1201"), ("gfx1030", "gfx906"))
"""Archs with the same matrix units, or none: they share the cases."""

M: Final = (1, 2, 4, 8, 16, 64, 512)
SHAPES: Final = (  # K and N
    ((288, 288), (32, 64)),  # few units of a column: loops of one turn, lanes without work
    ((576, 1536), (1536, 576)),  # SmolLM2-135M
    ((4096, 14336), (14336, 4096)),  # Llama of 8B
    ((8192, 28672), (28672, 8192)),  # Llama of 70B
)
FORMATS_AND_PRECISIONS: Final = {
    "F32": ("f32", "f32"),
    "F16": ("f32", "f32"),
    "Q4_0": ("f32", "f16"),
    "Q4_1": ("f32", "i8"),
    "Q8_0": ("f32", "i8"),
    "Q6_K": ("f32", "i8"),
    "Q4_K": ("f32", "f16"),
    "Q2_K": ("f32", "f16"),
}

# each with its arguments for M and a weight
FUNCTIONS: Final[Sequence[tuple[Callable[..., Any], Callable[[int, WeightSpec], list[Any]]]]] = (
    (product, lambda m, w: [zeros(m, w.k), w]),
    (rms_norm, lambda m, w: [zeros(m, w.k), zeros(w.k), w]),
    (swiglu, lambda m, w: [zeros(m, w.k), zeros(w.k), w, w]),
    (softmax, lambda m, w: [zeros(m, w.k), w]),
    (layer_norm, lambda m, w: [zeros(m, w.k), zeros(w.k), zeros(w.k), w]),
    (residual, lambda m, w: [zeros(m, w.k), w, zeros(m, w.n)]),
)


class Choice(NamedTuple):
    """The values that a case is made from; `place` is that of its arch in each family."""

    place: int
    format: str
    precision: str
    m: int
    shape: tuple[int, int]
    function: int

    def case(self) -> Case:
        """Return the case. K is rounded up to whole blocks."""
        block = FORMATS[self.format].block_elements
        weight = WeightSpec(self.format, -(-self.shape[0] // block) * block, self.shape[1])
        function, arguments = FUNCTIONS[self.function]
        name = f"{function.__name__} {weight} M={self.m} {self.precision}"
        return case(name, function, *arguments(self.m, weight), precision=self.precision)


@functools.cache
def choices() -> Sequence[Choice]:
    """Return choices in which every pair of values of two kinds occurs.

    `test_every_pair_of_values_is_chosen` checks it.
    """
    return covering(_choices())


def _choices() -> Iterator[Choice]:
    """Yield every format with every M and four shapes; the other values take turns."""
    for i, (name, precisions) in enumerate(FORMATS_AND_PRECISIONS.items()):
        for j, m in enumerate(M):
            for line, shapes in enumerate(SHAPES):
                yield Choice(
                    place=(i // 2 + j + line) % 2,
                    format=name,
                    precision=precisions[(i + j // 2 + line // 2) % 2],
                    m=m,
                    shape=shapes[(i + j) % 2],
                    function=(i + j + line + j // 2) % len(FUNCTIONS),
                )
