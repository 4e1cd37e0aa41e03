"""`Weight`: a quantised weight as a module of PyTorch."""

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from q4jit.errors import ArgumentError, expected
from q4jit.torch.layouts import layout_on
from q4jit.torch.memory import AnyWeight, Facts, Stored, weight_in
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.layouts import GGUF, pack, pack_experts
from q4jit.weights.tensor import QuantizedTensor


class Weight(nn.Module):
    """A weight [K, N], or [E, K, N] for experts, whose blocks are a buffer of a module.

    Decorated functions take it like a `QuantizedTensor` or `ExpertTensor`. It holds the blocks once,
    in the layout that kernels read on its device, and repacks them when it moves to a device of
    another kind. `state_dict` and pickles have them in GGUF's order, in an entry that is named after
    the format. It is frozen: gradients flow through products, not to the weight.

    Attributes:
        format: the name of the block format.
        K, N: its size.
        experts: E, or 0 for one matrix.
        lookup: whether it is a table for `w.rows(ids)`, which kernels read in GGUF's order.
        layout: the order of the bytes of `blocks`.
        blocks: uint8 [bytes], not persistent.
    """

    blocks: torch.Tensor

    def __init__(
        self,
        weight: QuantizedTensor | ExpertTensor,
        *,
        device: torch.device | str | None = None,
        lookup: bool = False,
    ) -> None:
        """Hold a copy of a weight on a device.

        device: None is PyTorch's default device. "meta" keeps no blocks. lookup: the weight is a
        table for `w.rows(ids)`. Raises ArgumentError for anything but a weight, and for a device
        without kernels.
        """
        super().__init__()
        if not isinstance(weight, QuantizedTensor | ExpertTensor):
            cure = 'use q4jit.quantize(w, "Q4_0") for a float matrix [K, N]'
            what = "a QuantizedTensor or ExpertTensor"
            raise ArgumentError(expected(what, type(weight).__name__, where="weight", cure=cure))
        self.format = weight.format
        self.experts, self.K, self.N = (0, *weight.shape)[-3:]
        self.lookup = lookup
        self._facts: Facts = weight.signature[-2:]
        where = torch.device(device) if device is not None else torch.get_default_device()
        self.layout = GGUF
        self.register_buffer("blocks", None, persistent=False)
        self._hold(weight, where)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), or (E, K, N) for experts."""
        return (self.experts, self.K, self.N) if self.experts else (self.K, self.N)

    @property
    def stored(self) -> Stored:
        """What `blocks` holds."""
        return Stored(self.format, self.K, self.N, self.experts, self.layout)

    def tensor(self) -> AnyWeight:
        """Return the weight that kernels read. It is valid for as long as `blocks` is."""
        return weight_in(self.blocks, self.stored, self._facts)

    def numpy(self) -> AnyWeight:
        """Return a copy of the weight, in host memory and without PyTorch."""
        raw = self.tensor().raw
        kind = ExpertTensor if self.experts else QuantizedTensor
        made: AnyWeight = kind.from_bytes(raw.copy(), shape=self.shape, format=self.format)
        return made

    def _hold(self, weight: AnyWeight, device: torch.device) -> None:
        """Keep the blocks of a weight on a device, in the layout that its kernels read."""
        self.layout = layout_on(device, self.format, self.K, self.N, self.experts, self.lookup)
        if device.type == "meta":
            self.blocks = torch.empty(self.stored.nbytes, dtype=torch.uint8, device=device)
            return
        raw = weight.raw
        if self.layout != GGUF:
            packing = pack_experts if self.experts else pack
            raw = packing(self.stored.block_format, self.layout, raw)
        blocks = torch.empty(self.stored.nbytes, dtype=torch.uint8)
        blocks.numpy()[...] = raw.reshape(-1)
        self.blocks = blocks.to(device)
        self.tensor()  # so that kernels find the facts

    # --- moving, copying, saving ------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the blocks as `to`, `cuda` and the like ask for, and repack them if necessary."""
        old = self.blocks.device
        new = fn(torch.empty(0, dtype=torch.uint8, device=old)).device
        layout = layout_on(new, self.format, self.K, self.N, self.experts, self.lookup)
        if old.type == "meta" and new.type != "meta":  # nothing to keep: `to_empty`
            self.layout = layout
            self.blocks = torch.empty(self.stored.nbytes, dtype=torch.uint8, device=new)
            return self
        if layout == self.layout or new.type == "meta":
            return super()._apply(fn, recurse)
        self._hold(self.tensor(), new)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weight":
        """Return a copy with memory of its own."""
        new = memo[id(self)] = type(self).__new__(type(self))
        state = {name: v for name, v in self.__dict__.items() if name != "_buffers"}
        new.__dict__.update(copy.deepcopy(state, memo), _buffers={"blocks": self.blocks.clone()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with blocks in GGUF's order, on their device."""
        state = dict(self.__dict__)
        raw = self.blocks if self.layout == GGUF else self._raw_blocks()
        return {**state, "layout": GGUF, "_buffers": {"blocks": raw}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, and repack the blocks for the device that they are on now."""
        super().__setstate__(state)
        layout = layout_on(
            self.blocks.device, self.format, self.K, self.N, self.experts, self.lookup
        )
        if layout != GGUF and self.blocks.device.type != "meta":
            self._hold(self.tensor(), self.blocks.device)

    def _raw_blocks(self) -> torch.Tensor:
        """Return the blocks in GGUF's order: a new tensor, uint8 [bytes], on the same device."""
        return torch.from_numpy(np.array(self.tensor().raw).reshape(-1)).to(self.blocks.device)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        rows = max(1, self.experts) * self.N
        raw = self.blocks if self.blocks.device.type == "meta" else self._raw_blocks()
        if raw.device.type == "meta":
            raw = torch.empty(
                Stored(*self.stored[:4], GGUF).nbytes, dtype=torch.uint8, device="meta"
            )
        destination[prefix + self.format] = raw.reshape(rows, -1)

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
        blocks = state_dict.get(key)
        if strict:
            mine = [name for name in state_dict if name.startswith(prefix)]
            unexpected_keys += [name for name in mine if name != key]
        if blocks is None:
            missing_keys.append(key)
            return
        try:
            held = self._from_state(blocks, key)
        except ArgumentError as error:
            error_msgs.append(str(error))
            return
        device = blocks.device if local_metadata.get("assign_to_params_buffers") else None
        old = self.blocks.device
        if device is None:
            device = old
        self._facts = held.signature[-2:]
        self._hold(held, device)

    def _from_state(self, blocks: Any, key: str) -> AnyWeight:
        """Return the weight of an entry of a state. Raises ArgumentError for a wrong one."""
        what = f"uint8 {[max(1, self.experts) * self.N, '…']} of {self.format} {list(self.shape)}"
        stored = Stored(*self.stored[:4], GGUF)
        if (
            not isinstance(blocks, torch.Tensor)
            or blocks.dtype is not torch.uint8
            or blocks.numel() != stored.nbytes
        ):
            raise ArgumentError(expected(what, str(getattr(blocks, "shape", blocks)), where=key))
        kind = ExpertTensor if self.experts else QuantizedTensor
        raw = blocks.detach().cpu().contiguous().reshape(-1).numpy()
        made: AnyWeight = kind.from_bytes(raw, shape=self.shape, format=self.format)
        return made

    def extra_repr(self) -> str:
        """Return format and size, for `print(model)`."""
        return f"{self.format} {list(self.shape)}"
