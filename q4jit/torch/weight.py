"""`Weight`: a quantised weight as a module of PyTorch."""

import copy
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn, Self

import torch
from torch import nn

from q4jit.conversions import has_values, tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.sizes import whole_number
from q4jit.torch.layouts import layout_on
from q4jit.torch.memory import (
    AnyWeight,
    Facts,
    Stored,
    forget,
    version_of,
    weight_in,
    weight_on,
)
from q4jit.torch.states import check_keys, checked_entry, weight_of_bytes
from q4jit.torch.waiting import shorten_waiting
from q4jit.weights.checks import tensor_shape
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import find_format
from q4jit.weights.layouts import GGUF
from q4jit.weights.tensor import QuantizedTensor

Device = torch.device | str | None


class _Frozen(nn.Module):
    """A module of data that is neither called nor trained."""

    blocks: torch.Tensor

    @property
    def device(self) -> torch.device:
        """The device of `blocks`."""
        return self.blocks.device

    @property
    def dtype(self) -> torch.dtype:
        """float32, the type of the numbers that blocks stand for."""
        return torch.float32

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return the weight. Raises ArgumentError if it is to require a gradient."""
        if requires_grad:
            cure = "train adapters beside the layer, as examples/finetune_lora.py does"
            what, got = "a frozen weight", "requires_grad_(True)"
            raise ArgumentError(expected(what, got, where=str(self), cure=cure))
        return self

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ArgumentError: functions and layers use a weight, nobody calls it."""
        cure = "call the layer that holds it, or pass it to a decorated function"
        raise ArgumentError(f"{self} is not a function; {cure}")


class Weight(_Frozen):
    """A weight [K, N], or [E, K, N] for experts, whose blocks are a buffer of a module.

    Decorated functions take it like a `QuantizedTensor` or `ExpertTensor`. It holds the blocks
    once, in the layout that kernels read on its device, and repacks them when it moves to a device
    of another kind. `state_dict` and pickles have them in GGUF's order, in an entry that is named
    after the format. It is frozen: gradients flow through products, not to the weight.

    Attributes:
        format: the name of the block format.
        K, N: its size.
        experts: E, or 0 for one matrix.
        lookup: whether it is only a table for `w.rows(ids)`, and so in GGUF's order.
        layout: the order of the bytes of `blocks`.
        blocks: uint8 [bytes], not persistent.
    """

    def __init__(self, weight: AnyWeight, *, device: Device = None, lookup: bool = False) -> None:
        """Hold a copy of a weight on a device.

        device: None is PyTorch's default device. "meta" keeps no blocks. lookup: the weight is only
        a table for `w.rows(ids)`, and keeps GGUF's order; look-ups read others in the layout of
        products. Raises ArgumentError for anything but a weight, and for a device without kernels.
        """
        super().__init__()
        given: object = weight
        if not isinstance(given, QuantizedTensor | ExpertTensor):
            cure = 'use q4jit.quantize(w, "Q4_0") for a float matrix [K, N]'
            what = "a QuantizedTensor or ExpertTensor"
            raise ArgumentError(expected(what, type(given).__name__, where="weight", cure=cure))
        self._describe(weight.format, weight.shape, lookup)
        self._hold(weight, indexed(device))

    @classmethod
    def empty(
        cls,
        format: str,  # noqa: A002 - the attribute's name
        shape: tuple[int, ...],
        *,
        device: Device = None,
        lookup: bool = False,
    ) -> Self:
        """Make a weight without values, for `load_state_dict`.

        shape: (K, N), or (E, K, N) for experts. device, lookup: as in `Weight`. Raises FormatError
        for another format or shape, and unless K is whole blocks.
        """
        fmt = find_format(format)
        sizes = tensor_shape(shape, "(E, K, N)" if len(shape) == 3 else "(K, N)")
        fmt.column_bytes(sizes[-2])  # checks K
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._describe(fmt.name, sizes, lookup)
        new._allocate(indexed(device))
        return new

    def _describe(self, name: str, shape: tuple[int, ...], lookup: bool) -> None:
        self.format, self.lookup = name, lookup
        self.experts, self.K, self.N = map(whole_number, (0, *shape)[-3:])
        self.layout = GGUF
        self._last: _Last | None = None
        self.register_buffer("blocks", None, persistent=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), or (E, K, N) for experts."""
        return (self.experts, self.K, self.N) if self.experts else (self.K, self.N)

    @property
    def stored(self) -> Stored:
        """What `blocks` holds."""
        return Stored(self.format, self.K, self.N, self.experts, self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of `blocks`."""
        return self.stored.nbytes

    def tensor(self) -> AnyWeight:
        """Return the weight that kernels read. It is valid for as long as `blocks` is.

        Raises ArgumentError for a weight on "meta".
        """
        blocks: torch.Tensor = self._buffers["blocks"]  # type: ignore[assignment]  # never None
        version = version_of(blocks)
        last = self._last
        # a fraction of the time that `weight_in` takes, because this is in every call
        if (
            last is not None
            and last[0] is blocks
            and last[1] == blocks.data_ptr()
            and last[2] == version
        ):
            return last[3]
        # the same blocks may have moved to shared memory
        is_same = last is not None and last[0] is blocks and last[2] == version
        return self._read(last[3]._scale_facts if last is not None and is_same else None)

    def _read(self, facts: Facts | None) -> AnyWeight:
        """Return the weight in the blocks, and keep it for `tensor`. facts: if they are known."""
        blocks = self.blocks
        if blocks.device.type == "cpu":
            shorten_waiting()
        weight = weight_in(blocks, self.stored, facts)
        self._last = blocks, blocks.data_ptr(), version_of(blocks), weight
        return weight

    def _facts(self) -> Facts | None:
        """Return the facts of the blocks, if they are known."""
        return self.tensor()._scale_facts if is_real(self.blocks) else None

    def numpy(self) -> AnyWeight:
        """Return a copy of the weight, in host memory and without PyTorch."""
        return weight_of_bytes(self.tensor().raw, self.shape, self.format)

    def extra_repr(self) -> str:
        """Return format and size, for `print(model)`."""
        return f"{self.format} {list(self.shape)}"

    # --- moving, copying --------------------------------------------------------------------------

    def _layout_on(self, device: torch.device) -> str:
        """Return the layout that kernels of a device read."""
        return layout_on(device, self.format, self.K, self.N, self.experts, self.lookup)

    def _adopt(self, facts: Facts | None) -> None:
        """Read the blocks, whose facts may be known, unless they have no values."""
        if is_real(self.blocks):
            self._read(facts)

    def _allocate(self, device: torch.device) -> None:
        """Make blocks without values on a device."""
        self._last = None
        self.layout = self._layout_on(device)
        self.blocks = torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def _hold(self, weight: AnyWeight, device: torch.device, *, in_place: bool = False) -> None:
        """Keep the blocks of a weight on a device, in the layout that its kernels read.

        in_place: write them to the memory of `blocks`, which is on that device. Under
        `FakeTensorMode`, as on "meta", there are no values to keep.
        """
        layout = self._layout_on(device)
        if not is_real(torch.empty(0, dtype=torch.uint8, device=device)):
            return self._allocate(device)
        self._last, self.layout = None, layout
        blocks = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        weight._resident.made(layout, blocks.numpy())
        if in_place:
            self.blocks.copy_(blocks)
            forget(self.blocks)
        else:
            self.blocks = blocks.to(device)
        # now, so that operators, which get only the blocks, know the facts
        self._read(weight._scales)
        return None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the blocks as `to`, `cuda` and the like ask for, and repack them if necessary.

        Raises ArgumentError for `type`, which casts integers as well.
        """
        old = self.blocks.device
        probe = fn(torch.zeros(1, dtype=torch.uint8, device=old))
        if probe.dtype is not torch.uint8:
            cure = "use float(), half(), bfloat16() or to(dtype), which leave blocks as they are"
            got = f"a cast to {tensor_dtype(probe)}"
            raise ArgumentError(expected("uint8 blocks", got, where=str(self), cure=cure))
        new = probe.device
        if new.type == "meta" or old.type == "meta":
            if new != old:
                self._allocate(new)
            return self
        layout = self._layout_on(new)
        if layout == self.layout:
            facts = self._facts()
            self._last = None  # it holds the old blocks
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch's
            self._adopt(facts)
        else:
            self._hold(self.tensor(), new)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weight":
        """Return a copy with memory of its own."""
        new = memo[id(self)] = type(self).__new__(type(self))
        state = {name: v for name, v in self.__dict__.items() if name not in {"_buffers", "_last"}}
        new.__dict__.update(copy.deepcopy(state, memo), _last=None)
        new.__dict__["_buffers"] = {"blocks": self.blocks.clone()}
        new._adopt(self._facts())
        return new

    # --- saving, loading --------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with blocks in GGUF's order, on their device."""
        blocks = _raw_blocks(self).reshape(-1)
        changed = {"facts": self._facts(), "layout": GGUF, "_buffers": {"blocks": blocks}}
        return {**self.__dict__, "_last": None, **changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, and repack the blocks for the device that they are on now."""
        facts = state["facts"]
        own = {name: value for name, value in state.items() if name != "facts"}
        super().__setstate__(own)  # type: ignore[no-untyped-call]  # PyTorch's
        self._adopt(facts)
        device = self.blocks.device
        layout = self._layout_on(device)
        if not is_real(self.blocks):
            self._allocate(device)
        elif layout != self.layout:
            self._hold(self.tensor(), device)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + self.format] = _raw_blocks(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + self.format
        check_keys(self, state_dict, prefix, strict, missing_keys, unexpected_keys, error_msgs)
        if key not in state_dict:
            return
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        try:
            self._load(checked_entry(self, state_dict[key], key, assign), assign)
        except ArgumentError as error:
            error_msgs.append(str(error))

    def _load(self, entry: torch.Tensor, assign: bool) -> None:
        """Take the blocks of a state. assign: stay on their device, in new memory."""
        old = self.blocks
        device = entry.device if assign else old.device
        if device.type == "meta":
            return self._allocate(device)
        host = entry.detach().cpu().contiguous().reshape(-1)
        weight = weight_on(host, Stored(*self.stored[:-1], GGUF))
        in_place = not assign and (torch.is_inference_mode_enabled() or not old.is_inference())
        self._hold(weight, device, in_place=in_place)
        return None


def _raw_blocks(weight: Weight) -> torch.Tensor:
    """Return the blocks in GGUF's order and on their device: uint8 [N, column_bytes], or [E, N, …].

    They share memory with `blocks` if that is its layout.
    """
    shape = (*weight.shape[:-2], weight.N, -1)
    if weight.layout == GGUF:
        return weight.blocks.detach().reshape(shape)
    if not is_real(weight.blocks):
        size = Stored(*weight.stored[:-1], GGUF).nbytes
        return weight.blocks.new_empty(size).reshape(shape)
    raw = weight.tensor().raw
    blocks = torch.empty(raw.shape, dtype=torch.uint8, device="cpu")
    blocks.numpy()[...] = raw
    return blocks.to(weight.blocks.device)


def _reduced(weight: Weight) -> tuple[Any, ...]:
    """Pickle a weight for another process of this program, which shares the blocks as they are."""
    state = {**weight.__dict__, "_last": None, "facts": weight._facts()}
    return _restored, (type(weight), state)


def _restored(kind: type[Weight], state: dict[str, Any]) -> Weight:
    new = kind.__new__(kind)
    new.__setstate__(state)
    return new


ForkingPickler.register(Weight, _reduced)


def is_real(blocks: torch.Tensor) -> bool:
    """Return whether a tensor has values: it is neither on "meta" nor one of `FakeTensorMode`."""
    return has_values(blocks) and type(blocks) in {torch.Tensor, nn.Parameter}


_Last = tuple[torch.Tensor, int, int, AnyWeight]
"""Blocks, their address and version, and the weight in them."""


def indexed(device: Device) -> torch.device:
    """Return a device as tensors name it, a GPU with its number; None is PyTorch's default."""
    given = torch.get_default_device() if device is None else torch.device(device)
    if given.type == "cuda":
        return torch.empty(0, device=given).device
    return torch.device(given.type) if given.type == "cpu" else given
