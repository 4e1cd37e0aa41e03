"""Arguments by name for traced functions, and the parts of a TraceError's message."""

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
"""Arguments by parameter name."""

TABLE = np.ones(N, F32)
CAPTURED = weight(K, N)


def arguments(function: Callable[..., object]) -> list[object]:
    return [ARGUMENTS[name] for name in inspect.signature(function).parameters]


@dataclass
class Refusal:
    """The parts of a TraceError's message.

    Attributes:
        origin: file, line and function.
        line: the user's line.
        marked: the part of the line above the carets.
    """

    reason: str
    origin: str
    line: str
    marked: str

    def __init__(self, message: str) -> None:
        self.reason, excerpt = message.split("\n\n")
        self.origin, *shown = excerpt.split("\n")
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
