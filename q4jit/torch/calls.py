"""What the operator `q4jit::call` gets of a decorated function: lists of tensors, and a text.

    f(x, gate, up, 0.5)  ──▶  call([x], [blocks of gate, of up], [0.5], text)  ──▶  [y]

The text is two JSON objects: the function's options and what the blocks are, then the `Program` of
its graph. It depends on dtypes, on lengths of last axes, and on the values of ints, bools and
strings, but on no number of rows. A saved program of PyTorch may hold it, so it is checked.
"""

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from q4jit.arrays.dtypes import FLOATS, ID_NAMES
from q4jit.arrays.specs import spec_of
from q4jit.checked_json import ANYTHING, Rules, check_fields, shown
from q4jit.dispatch.options import Options
from q4jit.dispatcher import Specialized
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_TYPES
from q4jit.frontend.containers import together
from q4jit.frontend.graph import Graph
from q4jit.frontend.programs.arguments import AnyArgument, NumberArgument, WeightArgument
from q4jit.frontend.programs.program import Program
from q4jit.frontend.specs import (
    ScalarSpec,
    Signature,
    Spec,
    StructureSpec,
    WeightSpec,
    array_spec,
    ids_spec,
    with_inner_axes,
)
from q4jit.frontend.structures import Results, Structure, flattened, names_of
from q4jit.torch.leaves import ARRAY, CHANGING_NUMBER, CONTAINER, NUMBER, STATIC, WEIGHT, Key
from q4jit.torch.memory import Stored
from q4jit.torch.weight import Weight
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import LAYOUTS

_NUMBERS: Final = ID_NAMES | FLOAT_TYPES.keys()
_LENGTH: Final = 2  # stands for every leading axis: any length but 1, which broadcasts
_MOST_CALLS: Final = 1 << 10  # of one function, whose texts are kept


class Call(NamedTuple):
    """A decorated function, traced for arguments with these keys.

    Attributes:
        text: the text for the operator.
        results: the containers of its results, or whether they are a tuple of arrays.
    """

    signature: Signature
    graph: Graph
    text: str
    results: Results | bool


class _Leaf:
    """Stands for an array, a weight or a number of a call. It is no dataclass: not a container."""

    def __init__(self, key: Key) -> None:
        self.key = key


_calls: weakref.WeakKeyDictionary[Specialized[Any, Any], dict[Any, Call]] = (
    weakref.WeakKeyDictionary()
)


def call_of(function: Specialized[Any, Any], keys: tuple[Key, ...], inner: Any) -> Call:
    """Return the call of a decorated function with arguments of these keys.

    keys: of the arguments, from `Leaves.key`. inner: from `Leaves.inner_axis`. Raises the errors of
    a call that concern arguments and the function.
    """
    if function._unchanged is not None and not function._unchanged():
        function._renew()
    known = _calls.setdefault(function, {})
    kept = known.get((keys, inner))
    graphs = function._specializer.kept.graphs
    if kept is not None and graphs.find(kept.signature) is kept.graph:
        return kept
    if len(known) >= _MOST_CALLS:
        known.clear()
    call = known[keys, inner] = _new_call(function, keys, inner)
    return call


def is_text_of(
    function: Specialized[Any, Any], keys: tuple[Key, ...], inner: Any, text: str
) -> bool:
    """Return whether a call, with globals and closures as they are now, has this text."""
    try:
        return call_of(function, keys, inner).text == text
    except Exception:  # noqa: BLE001 - the next trace raises it again
        return False


def _new_call(function: Specialized[Any, Any], keys: tuple[Key, ...], inner: Any) -> Call:
    leaves = flattened(tuple(map(_stand_in, keys)), function._parameters)
    names = names_of(leaves, function._parameters)
    refuse_devices(leaves, names)
    signature = tuple(_spec(leaf, name) for leaf, name in zip(leaves, names, strict=True))
    if inner is not None:
        signature = with_inner_axes(signature, _shapes(leaves, *inner))
    tracer = function._specializer.tracer
    graph, _ = tracer.graph(signature)
    function._unchanged = tracer.unchanged
    weights = [v.key[1:-1] for v in leaves if isinstance(v, _Leaf) and v.key[0] == WEIGHT]
    inputs = "".join(_input(v) for v in leaves)
    text = CallText(function.options, inputs, tuple(Stored(*w) for w in weights), Program.of(graph))
    results = graph.returns_tuple if graph.results is None else graph.results
    return Call(signature, graph, str(text), results)


def refuse_devices(leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raise ArgumentError for tensors and weights of PyTorch's that are on several devices.

    Tensors without axes are numbers, and may be anywhere.
    """
    first: Any = None
    for leaf, name in zip(leaves, names, strict=False):
        device, axes = _device(leaf)
        if device is None or not axes:
            continue
        if first is None:
            first = device, name
        elif device != first[0]:
            what, cure = f"{first[0]}, as {first[1]!r} is", f"use {name}.to({str(first[0])!r})"
            raise ArgumentError(expected(what, str(device), where=f"argument {name!r}", cure=cure))


def _device(leaf: Any) -> tuple[Any, int]:
    """Return the device of a tensor or weight, and its axes."""
    if isinstance(leaf, _Leaf):
        key = leaf.key
        return (key[-1], key[1]) if key[0] == ARRAY else (key[-1] if key[0] == WEIGHT else None, 2)
    if isinstance(leaf, torch.Tensor):
        return leaf.device, leaf.ndim
    return (leaf.blocks.device, 2) if isinstance(leaf, Weight) else (None, 0)


def _stand_in(key: Key) -> Any:
    """Return an argument with this key: its containers, with a `_Leaf` in each place."""
    if key[0] == STATIC:
        return key[2]
    if key[0] != CONTAINER:
        return _Leaf(key)
    _, kind, names, entries = key
    return together((kind, names, (None,) * len(entries)), map(_stand_in, entries))


def _spec(leaf: Any, name: str) -> Spec:
    """Return the spec of an argument. Raises ArgumentError for one that no kernel takes."""
    if isinstance(leaf, Structure):
        return StructureSpec(leaf)
    if not isinstance(leaf, _Leaf):
        return spec_of(name, leaf)
    kind, *facts = leaf.key
    if kind in {NUMBER, CHANGING_NUMBER}:
        return spec_of(name, facts[0](0))
    if kind == WEIGHT:
        fmt, k, n, experts, *_ = facts
        return WeightSpec(fmt, k, n, experts=experts)
    rank, dtype, width, _ = facts
    name_of_dtype = str(dtype).removeprefix("torch.")
    if name_of_dtype in ID_NAMES and rank:
        return ids_spec((_LENGTH,) * rank)
    float_type = FLOAT_TYPES.get(name_of_dtype)
    if not rank and name_of_dtype in _NUMBERS:
        return ScalarSpec(np.ndarray, float_type)
    if float_type is None:
        got = f"{name_of_dtype} of {rank} axes"
        cure = f"use {name}{'.real' if dtype.is_complex else ''}.float()"
        raise ArgumentError(expected(FLOATS, got, where=f"argument {name!r}", cure=cure))
    return array_spec((*(_LENGTH,) * (rank - 1), width), float_type=float_type)


def _shapes(leaves: Sequence[Any], chosen: int, ones: Sequence[bool]) -> list[tuple[int, ...]]:
    """Return shapes that stand for those of arguments, in which rows have several experts.

    chosen: how many. ones: of each array, whether it has an inner axis of 1.
    """
    keys = [v.key if _input(v) == "a" else None for v in leaves]
    ids_rank = max(k[1] for k in keys if k and k[0] == ARRAY and not k[2].is_floating_point)
    is_one = iter(ones)
    shapes: list[tuple[int, ...]] = []
    for key in keys:
        inner = 1 if key is not None and next(is_one) else chosen
        if key is None or key[0] != ARRAY or not key[1]:  # no array, or a number
            shapes.append(())
            continue
        rank, dtype, width = key[1:4]
        columns = (width,) if dtype.is_floating_point else ()
        lengths = [_LENGTH] * (rank - len(columns))
        if lengths and rank == ids_rank + len(columns):
            lengths[-1] = inner
        shapes.append((*lengths, *columns))
    return shapes


def _input(leaf: Any) -> str:
    """Return the letter of a leaf in `CallText.inputs`; none for a part of the program."""
    letters = {ARRAY: "a", WEIGHT: "w", NUMBER: "n", CHANGING_NUMBER: "a"}
    return letters[leaf.key[0]] if isinstance(leaf, _Leaf) else ""


# --- the text -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallText:
    """What the operator's text says.

    Attributes:
        options: of the decorated function.
        inputs: of each argument of the program, a letter: `a` for the next of the arrays, `w` for
            the next of the weights, `n` for the next of the numbers.
        weights: what the blocks of weights are.
        program: what is computed.
    """

    options: Options
    inputs: str
    weights: tuple[Stored, ...]
    program: Program

    def __str__(self) -> str:
        head = {**asdict(self.options), "inputs": self.inputs, "weights": self.weights}
        # one line, because PyTorch's compiler writes it into comments
        return f"{json.dumps(head)} {self.program.text}"

    @classmethod
    def parse(cls, text: str) -> "CallText":
        """Return the content of a text. Raises ArgumentError for one that is damaged."""
        try:
            head, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(expected("JSON", str(error), where=_WHERE)) from None
        check_fields(head, _WHERE, _RULES, error=ArgumentError)
        inputs, stored = head.pop("inputs"), tuple(Stored(*w) for w in head.pop("weights"))
        program = Program.parse(text[end:])
        own = [a.facts for a in program.arguments if isinstance(a, WeightArgument)]
        if [w[:-1] for w in stored] != own:
            got = shown([str(w) for w in stored])
            raise ArgumentError(expected(f"the weights of {program.name}", got, where=_WHERE))
        kinds = "".join(_letters(argument) for argument in program.arguments)
        if len(inputs) != len(program.arguments) or any(
            letter not in _letters(argument)
            for letter, argument in zip(inputs, program.arguments, strict=True)
        ):
            raise ArgumentError(expected(kinds, shown(inputs), where=f"{_WHERE}.inputs"))
        return cls(Options(**head), inputs, stored, program)


def _letters(argument: AnyArgument) -> str:
    """Return the letters that an argument of a program may have in `CallText.inputs`."""
    if isinstance(argument, WeightArgument):
        return "w"
    return "na" if isinstance(argument, NumberArgument) else "a"


def _is_stored(value: Any) -> bool:
    kinds = [str, int, int, int, str]
    return (
        isinstance(value, list)
        and list(map(type, value)) == kinds
        and value[0] in FORMATS
        and value[-1] in LAYOUTS
    )


_WHERE: Final = "the text of q4jit::call"
_RULES: Final[Rules] = {
    **dict.fromkeys(Options.__dataclass_fields__, ANYTHING),  # Options checks them
    "inputs": (lambda v: isinstance(v, str), "a text"),
    "weights": (
        lambda v: isinstance(v, list) and all(map(_is_stored, v)),
        "a list of [format, K, N, experts, layout]",
    ),
}
