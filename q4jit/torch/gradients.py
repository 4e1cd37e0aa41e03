"""The gradient of the operator `q4jit::call`: calls of the same operator with other texts."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from q4jit.errors import TraceError
from q4jit.frontend.programs.gradients import BackwardStep, Contribution, gradient
from q4jit.torch.calls import CallText
from q4jit.torch.operator import call, library, prepared_call

_MOST_GRADIENTS: Final = 1 << 10


class _Step(NamedTuple):
    """A step of a gradient, with the text of its call."""

    step: BackwardStep
    text: CallText
    written: str


@functools.lru_cache(maxsize=_MOST_GRADIENTS)
def _steps(text: str, wanted: tuple[int, ...], given: tuple[int, ...]) -> list[_Step]:
    """Return the steps that compute the derivatives by arguments of the program of a text.

    wanted, given: as in `gradient`. Raises TraceError if an operation has no formula.
    """
    forward = prepared_call(text).text
    numbers = [i for i in wanted if forward.inputs[i] == "a" and not _is_array(forward, i)]
    if numbers:
        name = forward.program.arguments[numbers[0]].name
        raise TraceError(
            f"cannot differentiate {forward.program.name} by the number {name!r}; pass "
            f"{name}.detach(), or an array"
        )
    stored = iter(forward.weights)
    weights = {i: next(stored) for i, letter in enumerate(forward.inputs) if letter == "w"}
    options = replace(forward.options, K=None, N=None)
    steps = []
    for step in gradient(forward.program, wanted, given):
        own = [i.number if i.kind == "argument" else None for i in step.inputs]
        inputs = "".join("a" if number is None else forward.inputs[number] for number in own)
        used = tuple(weights[number] for number in own if number in weights)
        made = CallText(options, inputs, used, step.program)
        steps.append(_Step(step, made, str(made)))
    return steps


def _is_array(text: CallText, number: int) -> bool:
    return hasattr(text.program.arguments[number], "fixed")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    arrays, weights, numbers, text = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arrays, *weights)
    ctx.count, ctx.numbers, ctx.text = len(arrays), list(numbers), text


def _backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients by the operator's inputs: those by weights and numbers are None."""
    saved = ctx.saved_tensors
    arrays, weights = saved[: ctx.count], saved[ctx.count :]
    positions = [i for i, letter in enumerate(prepared_call(ctx.text).text.inputs) if letter == "a"]
    wanted = tuple(
        i for i, needed in zip(positions, ctx.needs_input_grad[0], strict=True) if needed
    )
    given = tuple(j for j, cotangent in enumerate(cotangents) if cotangent is not None)
    lists = {"a": iter(arrays), "w": iter(weights), "n": iter(ctx.numbers)}
    values = [next(lists[letter]) for letter in prepared_call(ctx.text).text.inputs]
    totals = _totals(_steps(ctx.text, wanted, given), values, cotangents)
    made = [_gradient(totals, i, values[i]) if i in wanted else None for i in positions]
    # PyTorch takes an empty list for one of tensors, and every other list of floats for one value
    return made, [None] * len(weights), None if ctx.numbers else [], None


def _totals(
    steps: Sequence[_Step], values: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> dict[tuple[str, int], Tensor]:
    """Return the derivatives by arguments and products, by kind and number.

    values: the arguments of the program.
    """
    totals: dict[tuple[str, int], Tensor] = {}
    for step, text, written in steps:
        inputs: dict[str, list[Any]] = {"a": [], "w": [], "n": []}
        for what, letter in zip(step.inputs, text.inputs, strict=True):
            if what.kind == "argument":
                value = values[what.number]
            elif what.kind == "product":
                value = totals["product", what.number]
            else:
                value = cotangents[what.number]
                assert value is not None, "it is one of those that the steps were made for"
                value = value.unsqueeze(-1) if what.adds_axis else value
            inputs[letter].append(value)
        results = call(inputs["a"], inputs["w"], inputs["n"], written)
        for part, result in zip(step.contributions, results, strict=True):
            own = _own_columns(part, result, values)
            key = part.kind, part.number
            totals[key] = totals[key] + own if key in totals else own
    return totals


def _own_columns(part: Contribution, result: Tensor, values: Sequence[Any]) -> Tensor:
    """Return a contribution as wide as what it belongs to, with zeros in the other columns."""
    if part.kind == "argument":  # the rows of a result may share rows of the argument
        result = result.sum_to_size((*values[part.number].shape[:-1], part.width))
    if part.width == part.whole:
        return result
    after = part.whole - part.start - part.width
    return torch.nn.functional.pad(result, (part.start, after))


def _gradient(totals: dict[tuple[str, int], Tensor], number: int, array: Tensor) -> Tensor:
    total = totals.get(("argument", number))
    return torch.zeros_like(array) if total is None else total


torch.library.register_autograd("q4jit::call", _backward, setup_context=_setup_context, lib=library)
