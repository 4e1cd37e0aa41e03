"""Take the arguments of a call apart, in code that PyTorch's compiler can trace.

A *key* says what a leaf is; it consists of Python's own constants. Lengths of leading axes are not
in it, so that one compiled graph serves any number of rows.
"""

import dataclasses
from typing import Any, Final

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar, has_static_value

from q4jit.conversions import AS_LEAVES
from q4jit.errors import ArgumentError, expected
from q4jit.torch.guards import constant
from q4jit.torch.memory import blocks_of, stored_of
from q4jit.torch.weight import Weight
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

ARRAY: Final = "array"
WEIGHT: Final = "weight"
NUMBER: Final = "number"
CHANGING_NUMBER: Final = "changing number"
STATIC: Final = "static"
CONTAINER: Final = "container"

# tuples, because PyTorch's compiler cannot trace `list | tuple`
_SEQUENCES: Final = (list, tuple)
_CONTAINERS: Final = (dict, *_SEQUENCES)
TENSORS: Final = (QuantizedTensor, ExpertTensor)
_WEIGHTS: Final = (Weight, *TENSORS)
_PLAIN: Final = (torch.Tensor, np.ndarray, *_WEIGHTS, bool, int, float, str, type(None))

Key = tuple[Any, ...]


class Leaves:
    """The leaves of a call, in their order.

    Attributes:
        all: all leaves.
        arrays: tensors of floats and of ids.
        weights: the blocks of weights.
        numbers: floats.
    """

    def __init__(self, autocast: bool) -> None:
        """Start without leaves. autocast: cast arrays as PyTorch's autocasting does."""
        self._autocast = autocast
        self.all: list[Any] = []
        self.arrays: list[Any] = []
        self.weights: list[Any] = []
        self.numbers: list[float] = []
        self._has_experts = False

    def key(self, name: str, value: Any) -> Key:
        """Return the key of an argument, and keep its leaves. Raises ArgumentError."""
        if _is_container(value):
            return self._container(name, value)
        self.all.append(value)
        if isinstance(value, torch.Tensor):
            if self._autocast:
                value = _autocast(value)
            self.arrays.append(value)
            # the last axis of ids is one of rows
            has_columns = value.dim() > 0 and value.is_floating_point()
            width = guard_scalar(int(value.shape[-1])) if has_columns else 0
            return ARRAY, value.dim(), value.dtype, width, value.device
        if isinstance(value, Weight):
            self.weights.append(value.blocks)
            self._has_experts |= value.experts > 0
            facts = value.format, value.K, value.N, value.experts, value.layout
            return WEIGHT, *facts, value.blocks.device
        if isinstance(value, TENSORS):
            # the compiler guards the identity, so that no other weight gets this one's blocks
            self.weights.append(blocks_of(value))
            stored = stored_of(id(value))
            self._has_experts |= stored[3] > 0
            return WEIGHT, *stored, None  # it is uploaded
        if isinstance(value, np.generic) and not isinstance(value, (np.integer, np.bool_)):
            self.numbers.append(float(value.real))
            return NUMBER, type(value)
        if isinstance(value, (float, torch.SymFloat)):
            if has_static_value(value):
                self.numbers.append(value)  # type: ignore[arg-type]  # it has a value
                return NUMBER, float
            # A float that changes from call to call. As an operator's number, the compiler would
            # compile again for every value; it only keeps those open that are multiplied or added.
            self.arrays.append(torch.ones((), dtype=torch.float64, device="cpu") * value)
            return CHANGING_NUMBER, float
        if isinstance(value, (int, torch.SymInt, torch.SymBool)):
            number = guard_scalar(value)
            return STATIC, type(number), number  # 1 and True are equal
        if value is not None and not isinstance(value, (str, np.generic)):
            _refuse(name, type(value).__name__)
        return STATIC, type(value), value

    def _container(self, name: str, value: Any) -> Key:
        kind = type(value)
        if isinstance(value, dict):
            names, entries = tuple(value.keys()), list(value.values())
        elif isinstance(value, _SEQUENCES):
            names, entries = (), list(value)
        else:
            names = tuple([field.name for field in dataclasses.fields(value)])
            entries = [getattr(value, name) for name in names]
        return CONTAINER, kind, names, tuple([self.key(name, entry) for entry in entries])

    def inner_axis(self) -> tuple[int, tuple[bool, ...]] | None:
        """Return the number of experts that are chosen per row, if it has to be known.

        Then it is the length of an inner axis (`frontend.specs.with_inner_axes`): the second value
        says which arrays have an inner axis of 1 instead.
        """
        if not self._has_experts:
            return None
        ids = [a for a in self.arrays if not a.is_floating_point()]
        rank = max([a.dim() for a in ids], default=0)
        if not rank:
            return None
        chosen = next(a for a in ids if a.dim() == rank).shape[-1]
        floats = [a for a in self.arrays if a.is_floating_point()]
        ones = tuple([a.dim() == rank + 1 and bool(a.shape[-2] == 1) for a in self.arrays])
        several = rank > 1 and any(a.dim() == rank for a in floats)
        if several or (bool(chosen != 1) and any(ones)):
            return int(guard_scalar(chosen)), ones
        return None


@constant
def _refuse(name: str, kind: str) -> None:
    """Raise ArgumentError for an argument of a class; PyTorch's compiler shows the message."""
    what = (
        "a tensor, Weight, QuantizedTensor, ExpertTensor, number, bool, str or None, or a list, "
        "tuple, dict, dataclass or NamedTuple of these"
    )
    cure = f"use torch.as_tensor({name}).float()" if kind == "ndarray" else AS_LEAVES
    raise ArgumentError(expected(what, kind, where=f"argument {name!r}", cure=cure))


def holds_weight(value: Any) -> bool:
    """Return whether a value is a weight or a container with one."""
    if isinstance(value, dict):
        return any(holds_weight(entry) for entry in value.values())
    if isinstance(value, _SEQUENCES):
        return any(holds_weight(entry) for entry in value)
    if _is_container(value):
        names = [field.name for field in dataclasses.fields(value)]
        return any(holds_weight(getattr(value, name)) for name in names)
    return isinstance(value, _WEIGHTS)


def _is_container(value: Any) -> bool:
    if isinstance(value, _CONTAINERS):
        return True
    # the compiler cannot trace `dataclasses.is_dataclass` of a constant
    return not isinstance(value, _PLAIN) and dataclasses.is_dataclass(value)


def _autocast(array: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the dtype that autocasting prescribes for products on its device."""
    kind = array.device.type
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
    if is_cast and array.dim() and array.is_floating_point():
        return array.to(torch.get_autocast_dtype(kind))
    return array
