"""Arguments by name for traced functions, and the parts of what a refusal shows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from q4jit import TraceError, specialize
from tests.support.functions import F32, random, weight

M, K, N = 3, 32, 48
ARGUMENTS: dict[str, object] = {
    "x": random(M, K),
    "w": weight(K, N),
    "v": weight(K, N, seed=7),
    "narrow": weight(K, 1),
    "down": weight(N, K),
    "gain": random(K, seed=2),
    "bias": random(N, seed=3),
    "residual": random(M, N, seed=4),
    "s": 1.5,
}
"""Arguments by the name of the parameter that they are for."""

TABLE = np.ones(N, F32)
CAPTURED = weight(K, N)


def arguments(function: Callable[..., object]) -> list[object]:
    return [ARGUMENTS[name] for name in inspect.signature(function).parameters]


@dataclass
class Refusal:
    """The parts of a TraceError's message."""

    reason: str
    place: str
    line: str
    marked: str

    def __init__(self, message: str) -> None:
        self.reason, place = message.split("\n\n")
        self.place, *shown = place.split("\n")
        self.line = self.marked = ""
        if shown:
            self.line = shown[0]
        if len(shown) > 1:
            carets = shown[1]
            assert set(carets.strip()) == {"^"}
            self.marked = self.line[carets.index("^") : len(carets)]


def refusal(function: Callable[..., object], *args: object) -> Refusal:
    with pytest.raises(TraceError) as caught:
        specialize(function)(*(args or arguments(function)))
    return Refusal(str(caught.value))
