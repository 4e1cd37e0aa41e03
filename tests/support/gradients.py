"""Runs the steps of gradients, and compares them with finite differences."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.frontend.programs.gradients import gradient
from q4jit.frontend.programs.program import Program
from tests.support.functions import random

Array = NDArray[Any]
Run = Callable[[Program, Sequence[Any]], Sequence[Any]]

_STEP: Final = 1e-5
_SMALL_STEP: Final = 1e-7  # seldom crosses a kink


def in_numpy(program: Program, leaves: Sequence[Any]) -> Sequence[Any]:
    return program(*leaves)


def derivatives(
    program: Program,
    leaves: Sequence[Any],
    cotangents: Mapping[int, Array],
    wanted: Collection[int],
    run: Run = in_numpy,
) -> dict[int, Array]:
    """Return the derivative by each wanted argument; run: how to run a program."""
    wholes: dict[tuple[str, int], Any] = {}
    for step in gradient(program, wanted, cotangents.keys()):
        inputs = []
        for what in step.inputs:
            if what.kind == "argument":
                inputs.append(leaves[what.number])
            elif what.kind == "product":
                inputs.append(wholes["product", what.number])
            else:
                g = cotangents[what.number]
                inputs.append(g[..., None] if what.adds_axis else g)
        for part, result in zip(step.contributions, run(step.program, inputs), strict=True):
            own = part.kind == "argument"
            rows = leaves[part.number].shape[:-1] if own else result.shape[:-1]
            value = summed_to(result, (*rows, part.width))
            behind = part.whole - part.start - part.width
            padded = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(part.start, behind)])
            key = part.kind, part.number
            wholes[key] = wholes[key] + padded if key in wholes else padded
    return {i: wholes.get(("argument", i), np.zeros_like(leaves[i])) for i in wanted}


def summed_to(value: Array, shape: tuple[int, ...]) -> Array:
    """Return the sum over the axes along which an array of `shape` was broadcast."""
    value = value.sum(tuple(range(value.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and value.shape[i] != 1)
    summed: Array = value.sum(axes, keepdims=True)
    return summed


def cotangents_of(results: Sequence[Array]) -> dict[int, Array]:
    """Return random cotangents of results, in float64."""
    return {
        j: random(*y.shape, 1, seed=j + 90)[..., 0].astype(np.float64)
        for j, y in enumerate(results)
    }


def in_float64(leaves: Sequence[Any]) -> list[Any]:
    return [
        v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind == "f" and v.ndim else v
        for v in leaves
    ]


def differences(
    program: Program, leaves: Sequence[Any], cotangents: Mapping[int, Array], wanted: int
) -> Array:
    """Return the derivative by an argument in float64, by differences of the results."""
    x = leaves[wanted]
    slopes = np.empty(x.size)
    for i in range(x.size):
        losses = []
        for step in (_STEP, -_STEP):
            moved = x.copy()
            moved.reshape(-1)[i] += step
            results = program(*leaves[:wanted], moved, *leaves[wanted + 1 :])
            losses.append(sum(np.sum(g * results[j]) for j, g in cotangents.items()))
        slopes[i] = (losses[0] - losses[1]) / (2 * _STEP)
    return slopes.reshape(x.shape)


def arrays_in(leaves: Sequence[Any]) -> list[int]:
    """Return the numbers of the arrays of floats."""
    return [
        i
        for i, v in enumerate(leaves)
        if isinstance(v, np.ndarray) and v.ndim and v.dtype.kind == "f"
    ]


def slope_along(
    program: Program,
    leaves: Sequence[Any],
    cotangents: Mapping[int, Array],
    directions: Mapping[int, Array],
) -> tuple[float, float]:
    """Return the slope of the loss in a direction, and the size of what it was computed from."""
    losses = []
    size = 0.0
    for step in (_SMALL_STEP, -_SMALL_STEP):
        moved = [v + step * directions[i] if i in directions else v for i, v in enumerate(leaves)]
        terms = [g * y for g, y in zip(cotangents.values(), program(*moved), strict=True)]
        losses.append(sum(float(np.sum(t)) for t in terms))
        size = sum(float(np.sum(np.abs(t))) for t in terms)
    return (losses[0] - losses[1]) / (2 * _SMALL_STEP), size
