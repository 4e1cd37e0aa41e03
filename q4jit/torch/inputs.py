"""Errors about the tensors that modules get, with the module's sizes and a cure."""

from typing import Any, Final

import torch

from q4jit.arrays.dtypes import FLOATS, ID_NAMES
from q4jit.conversions import tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.floats import FLOAT_TYPES, FloatType

FLOAT_DTYPES: Final[dict[torch.dtype, FloatType]] = {
    getattr(torch, name): short for name, short in FLOAT_TYPES.items()
}


def check_floats(value: Any, name: str, module: Any, width: int, device: torch.device) -> None:
    """Raise ArgumentError unless a value is a tensor of floats [..., width] on a device.

    name: of the argument. module: its string is the place in errors. device: of the weights.
    """
    where = f"argument {name!r} of {module}"
    _check_tensor(value, f"a tensor [..., {width}] of floats", where)
    dtype, shape = tensor_dtype(value), list(value.shape)
    if value.layout is not torch.strided:
        got = str(value.layout).removeprefix("torch.")
        cure = f"use {name}.to_dense()"
        raise ArgumentError(expected("a dense tensor", f"a {got} one", where=where, cure=cure))
    if dtype not in FLOAT_TYPES:
        cure = f"use {name}.real.float()" if value.is_complex() else f"use {name}.float()"
        raise ArgumentError(expected(FLOATS, f"{dtype} {shape}", where=where, cure=cure))
    if not shape or shape[-1] != width:
        raise ArgumentError(expected(f"[..., {width}]", f"{dtype} {shape}", where=where))
    _check_device(value, name, where, device)


def check_ids(value: Any, name: str, module: Any, device: torch.device) -> None:
    """Raise ArgumentError unless a value is a tensor of ids on a device; arguments as above."""
    where = f"argument {name!r} of {module}"
    _check_tensor(value, "a tensor of ids", where)
    dtype = tensor_dtype(value)
    if dtype not in ID_NAMES:
        got, cure = f"{dtype} {list(value.shape)}", f"use {name}.long()"
        raise ArgumentError(expected("int32 or int64", got, where=where, cure=cure))
    _check_device(value, name, where, device)


def check_one_of(value: object, names: tuple[str, ...], where: str) -> None:
    """Raise ArgumentError unless a value is one of the names."""
    if value not in names:
        what = " or ".join(map(repr, names))
        raise ArgumentError(expected(what, repr(value), where=where))


def _check_tensor(value: Any, what: str, where: str) -> None:
    if not isinstance(value, torch.Tensor):
        cure = "use torch.as_tensor(...)"
        raise ArgumentError(expected(what, type(value).__name__, where=where, cure=cure))


def _check_device(value: torch.Tensor, name: str, where: str, device: torch.device) -> None:
    if value.device != device:
        cure = f"use {name}.to({str(device)!r}), or module.to({str(value.device)!r})"
        if device.type == "meta":
            cure = "give the module values: to_empty(device=...), then load_state_dict"
        what = f"a tensor on {device}, as the weight is"
        raise ArgumentError(expected(what, f"one on {value.device}", where=where, cure=cure))
