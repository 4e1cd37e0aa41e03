"""The operator `q4jit::call`, which runs every decorated function in programs of PyTorch.

    call(Tensor[] arrays, Tensor[] weights, float[] numbers, str text) -> Tensor[]

`calls.py` says what the text holds. A text is read once; from then on the operator finds the
function that it describes, and runs its kernels on the tensors' own memory.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from q4jit.arrays.host_tensors import host_tensor
from q4jit.conversions import tensor_dtype
from q4jit.dispatcher import Specialized
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_NAMES
from q4jit.frontend.programs.arguments import AnyArgument, ArrayArgument, NumberArgument
from q4jit.frontend.shapes import ONE, LeadingAxis, Shape
from q4jit.torch.calls import CallText
from q4jit.torch.memory import weight_in

_MOST_TEXTS: Final = 1 << 12
library: Final = torch.library.Library("q4jit", "DEF")
_SCHEMA: Final = "call(Tensor[] arrays, Tensor[] weights, float[] numbers, str text) -> Tensor[]"
library.define(_SCHEMA)


class PreparedCall:
    """The function of a text, ready to be called.

    Attributes:
        text: the text.
        function: the function, specialised.
    """

    def __init__(self, text: str) -> None:
        """Read a text. Raises ArgumentError for one that is damaged."""
        self.text = CallText.parse(text)
        self.function: Specialized[Any, Any] = Specialized(self.text.program, self.text.options)
        inputs = self.text.inputs
        self._counts = tuple(map(inputs.count, "awn"))
        stored = iter(self.text.weights)
        # of each argument: its letter, its number in the list of that letter, and what it is
        self._arguments: list[tuple[str, int, Any]] = [
            (
                letter,
                inputs[:i].count(letter),
                next(stored) if letter == "w" else isinstance(argument, NumberArgument),
            )
            for i, (letter, argument) in enumerate(
                zip(inputs, self.text.program.arguments, strict=True)
            )
        ]

    def check(
        self, arrays: Sequence[Tensor], weights: Sequence[Tensor], numbers: Sequence[float]
    ) -> None:
        """Raise ArgumentError unless there are as many inputs as the text says."""
        counts = len(arrays), len(weights), len(numbers)
        if counts != self._counts:
            what, got = _counted(self._counts), _counted(counts)
            raise ArgumentError(expected(what, got, where="q4jit::call"))

    def run(
        self, arrays: Sequence[Tensor], weights: Sequence[Tensor], numbers: Sequence[float]
    ) -> list[Tensor]:
        """Run the kernels on tensors, and return the results."""
        self.check(arrays, weights, numbers)
        args: list[Any] = []
        for letter, i, more in self._arguments:
            if letter == "w":
                args.append(weight_in(weights[i], more))
            elif letter == "n":
                args.append(numbers[i])
            elif more and arrays[i].dtype is torch.float64:
                args.append(arrays[i].item())  # a float that changes from call to call
            else:
                args.append(arrays[i].contiguous())
        results = self.function._run(tuple(args), None)
        return [host_tensor(r) if type(r) is np.ndarray else r for r in results]

    def like_results(self, arrays: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors of the results' shapes and dtypes, whose lengths may be symbols."""
        values = iter(arrays)
        pairs = zip(self.text.inputs, self.text.program.arguments, strict=True)
        leads = [_lead(a, next(values)) if letter == "a" else () for letter, a in pairs]
        specs = zip(self.text.program.arguments, leads, strict=True)
        signature = tuple(argument.spec(_axes(lead)) for argument, lead in specs)
        graph, _ = self.function._specializer.tracer.graph(signature)
        lead = _broadcast(leads)
        like = arrays[0] if arrays else weights[0]
        made = []
        for node, float_type in zip(graph.outputs, graph.result_types, strict=True):
            shape = [lead[-d.axis] if isinstance(d, LeadingAxis) else int(d) for d in node.shape]
            made.append(like.new_empty(shape, dtype=getattr(torch, FLOAT_NAMES[float_type])))
        return made


def _counted(counts: tuple[int, ...]) -> str:
    names = zip(("arrays", "weights", "numbers"), counts, strict=True)
    return ", ".join(f"{count} {name}" for name, count in names)


def _lead(argument: AnyArgument, array: Tensor) -> tuple[Any, ...]:
    """Return the leading dimensions of an array, which may be symbols of PyTorch's.

    Raises ArgumentError for an array that does not fit.
    """
    shape, dtype = tuple(array.shape), tensor_dtype(array)
    fixed = getattr(argument, "fixed", ())
    lead = shape[: len(shape) - len(fixed)]
    fits = len(lead) == getattr(argument, "leading", 0) and shape[len(lead) :] == fixed
    if isinstance(argument, ArrayArgument):
        fits &= dtype == FLOAT_NAMES[argument.float_type]
    if not fits:
        got, where = f"{dtype} {list(shape)}", f"argument {argument.name!r}"
        raise ArgumentError(expected(str(argument), got, where=where))
    return lead


def _axes(lead: tuple[Any, ...]) -> Shape:
    # a symbol is not compared with 1, because that would fix its value
    return tuple(
        ONE if isinstance(length, int) and length == 1 else LeadingAxis(axis)
        for axis, length in zip(range(len(lead), 0, -1), lead, strict=True)
    )


def _broadcast(leads: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the common leading dimensions; the launch checks that they broadcast."""
    common = []
    for axis in range(max(map(len, leads), default=0), 0, -1):
        lengths = [lead[-axis] for lead in leads if len(lead) >= axis]
        open_ = (length for length in lengths if not (isinstance(length, int) and length == 1))
        common.append(next(open_, 1))
    return tuple(common)


prepared_call: Final = functools.lru_cache(maxsize=_MOST_TEXTS)(PreparedCall)
"""Return the prepared call of a text: the same one for the same text."""


def _run(
    arrays: list[Tensor], weights: list[Tensor], numbers: list[float], text: str
) -> list[Tensor]:
    return prepared_call(text).run(arrays, weights, numbers)


def _fake(
    arrays: list[Tensor], weights: list[Tensor], numbers: list[float], text: str
) -> list[Tensor]:
    prepared = prepared_call(text)
    prepared.check(arrays, weights, numbers)
    return prepared.like_results(arrays, weights)


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    arrays: list[Tensor],
    weights: list[Tensor],
    numbers: list[float],
    text: str,
) -> tuple[list[Tensor], list[int]]:
    """Run one call after the other: leading axes serve a batch better than `torch.vmap`."""
    if any(dim is not None for dim in in_dims[1]):
        raise ArgumentError("torch.vmap cannot map over weights; use an ExpertTensor and ids")

    def one(i: int) -> list[Tensor]:
        pairs = zip(arrays, in_dims[0], strict=True)
        given = [a if dim is None else a.select(dim, i) for a, dim in pairs]
        results: list[Tensor] = call(given, weights, numbers, text)
        return results

    if info.batch_size:
        results = zip(*map(one, range(info.batch_size)), strict=True)
        stacked = [torch.stack(parts) for parts in results]
    else:
        pairs = zip(arrays, in_dims[0], strict=True)
        like = [a if dim is None else a.sum(dim, dtype=a.dtype) for a, dim in pairs]
        stacked = [r.new_empty((0, *r.shape)) for r in call(like, weights, numbers, text)]
    return stacked, [0] * len(stacked)


for _key in ("CPU", "CUDA"):
    library.impl("call", _run, _key)
torch.library.register_fake("q4jit::call", _fake, lib=library)
torch.library.register_vmap("q4jit::call", _vmap, lib=library)
call: Final = torch.ops.q4jit.call.default
