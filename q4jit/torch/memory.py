"""Which weight is in the memory of a tensor: kernels run on the tensor's own bytes.

Programs of PyTorch hold the blocks of weights as tensors of bytes. Kernels need a `QuantizedTensor`
or an `ExpertTensor` for them: one is made per tensor, and forgotten when its memory is freed.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes

from q4jit.arrays.torch_tensors import torch_platform
from q4jit.errors import ArgumentError, expected
from q4jit.locks import BUILD
from q4jit.torch.guards import constant, object_at
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import CACHE_LINE_BYTES, GGUF, INTERLEAVED16, packed_bytes
from q4jit.weights.resident import device_key
from q4jit.weights.tensor import QuantizedTensor

AnyWeight = QuantizedTensor | ExpertTensor
TO_GET_VALUES: Final = 'use load_state_dict(..., assign=True), or to_empty(device="cpu") first'

Facts = tuple[bool, bool]
"""(has_finite_scales, suits_f16) of a weight."""


class Stored(NamedTuple):
    """What the bytes of a tensor are.

    Attributes:
        experts: the matrices of an `ExpertTensor`; 0 for a `QuantizedTensor`.
        layout: the order of the bytes.
    """

    format: str
    k: int
    n: int
    experts: int
    layout: str

    @property
    def block_format(self) -> Format:
        """The description of the block format."""
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return packed_bytes(self.block_format, self.layout, self.k, self.n) * max(1, self.experts)

    def __str__(self) -> str:
        experts = f"{self.experts}, " if self.experts else ""
        return f"{self.format} [{experts}{self.k}, {self.n}] in the layout {self.layout}"


@dataclass
class _Pointer:
    """Memory of PyTorch's on a device. Whoever launches kernels on it holds the tensor."""

    pointer: int


class _Known(NamedTuple):
    size: int
    version: int
    weight: Callable[[], AnyWeight | None]


# by the address of a storage's own object, that of the bytes, and what they are; removed with the
# storage
_known: dict[tuple[int, int, Stored], _Known] = {}
_storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def weight_in(blocks: torch.Tensor, stored: Stored, facts: Facts | None = None) -> AnyWeight:
    """Return the weight whose bytes a tensor holds: the same object until they change.

    blocks: uint8, contiguous, on a CPU or a GPU. facts: of the scales, if they are known; otherwise
    they are computed when a kernel depends on them. Raises ArgumentError for another dtype or
    another number of bytes.
    """
    known = _known.get((blocks.untyped_storage()._cdata, blocks.data_ptr(), stored))
    if known is not None and known.size == blocks.numel() and known.version == version_of(blocks):
        weight = known.weight()
        if weight is not None:
            return weight
    with BUILD:
        return _add(blocks, stored, facts)


def _add(blocks: torch.Tensor, stored: Stored, facts: Facts | None) -> AnyWeight:
    """Make the weight of a tensor, and remember it for as long as the tensor's memory lives."""
    check_blocks(blocks, stored)
    weight = weight_on(blocks, stored, facts)
    _remember(blocks, stored, lambda: weight)
    return weight


def _remember(blocks: torch.Tensor, stored: Stored, weight: Callable[[], AnyWeight | None]) -> None:
    storage = blocks.untyped_storage()
    owner = storage._cdata
    if owner not in _storages:
        _storages[owner] = weakref.ref(storage, lambda _: _forget(owner))
    known = _Known(blocks.numel(), version_of(blocks), weight)
    _known[owner, blocks.data_ptr(), stored] = known


def version_of(blocks: torch.Tensor) -> int:
    """Return a number that changes when a tensor is written to; -1 for inference tensors."""
    return -1 if blocks.is_inference() else blocks._version


def forget(blocks: torch.Tensor) -> None:
    """Forget the weights in a tensor's memory, which has been written to.

    Tensors of `torch.inference_mode` have no version that would say so.
    """
    _forget(blocks.untyped_storage()._cdata)


def _forget(owner: int) -> None:
    _storages.pop(owner, None)
    for key in [key for key in list(_known) if key[0] == owner]:
        _known.pop(key, None)


def check_blocks(blocks: torch.Tensor, stored: Stored, name: str = "blocks") -> None:
    """Raise ArgumentError unless a tensor may hold the bytes of a weight."""
    if blocks.device.type == "meta":
        got = f"{stored} on meta"
        raise ArgumentError(expected("a weight with values", got, cure=TO_GET_VALUES))
    what = f"uint8, contiguous, {stored.nbytes} bytes for {stored}"
    if (
        blocks.dtype is not torch.uint8
        or blocks.numel() != stored.nbytes
        or not blocks.is_contiguous()
    ):
        strides = "" if blocks.is_contiguous() else ", strided"
        got = f"{str(blocks.dtype).removeprefix('torch.')} {list(blocks.shape)}{strides}"
        raise ArgumentError(expected(what, got, where=name))


def weight_on(blocks: torch.Tensor, stored: Stored, facts: Facts | None = None) -> AnyWeight:
    """Return a new weight on a tensor's memory, which it does not keep alive.

    blocks, facts: as in `weight_in`, checked.
    """
    fmt, read = stored.block_format, _reader(blocks)
    if stored.experts:
        weight: AnyWeight = ExpertTensor.of_packed(
            fmt, stored.experts, stored.k, stored.n, stored.layout, read, facts
        )
    else:
        weight = QuantizedTensor.of_packed(fmt, stored.k, stored.n, stored.layout, read, facts)
    pointer = blocks.data_ptr()
    if blocks.device.type == "cpu":
        if pointer % (CACHE_LINE_BYTES if stored.layout == INTERLEAVED16 else 1) == 0:
            weight._resident.addresses[stored.layout] = pointer
            weight._resident.span = pointer, pointer + blocks.numel()
    else:
        key = device_key(torch_platform(torch), blocks.get_device(), stored.layout)
        weight._resident.uploads[key] = _Pointer(pointer)
    return weight


def _reader(blocks: torch.Tensor) -> Callable[[], NDArray[np.uint8]]:
    """Return a function that returns a tensor's bytes on the host, as long as they exist."""
    storage = weakref.ref(blocks.untyped_storage())
    device, start, size = blocks.device, blocks.storage_offset(), blocks.numel()

    def read() -> NDArray[np.uint8]:
        owner = storage()
        assert owner is not None, "a weight is used only while its tensor exists"
        with torch.no_grad():
            whole = torch.empty(0, dtype=torch.uint8, device=device)
            array: NDArray[np.uint8] = whole.set_(owner, start, (size,), (1,)).cpu().numpy()
        return array

    return read


# --- tensors of weights that are not PyTorch's ----------------------------------------------------


def blocks_of(weight: AnyWeight) -> torch.Tensor:
    """Return a tensor that shares the memory of a weight in GGUF's order: always the same one.

    PyTorch's compiler reads the attribute, so it guards that it is that of the same weight.
    """
    _prepare(id(weight))
    blocks: torch.Tensor = weight._tensor
    return blocks


@constant
def _prepare(identity: int) -> None:
    """Give a weight its tensor, if it has none yet. identity: the weight's."""
    weight: AnyWeight = object_at(identity)
    if weight._tensor is not None:
        return
    # It outlives the modes that are active now, in which it would be without values or gradients.
    modes = _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False)
    with BUILD, warnings.catch_warnings(), modes[0], modes[1], modes[2]:
        # nothing writes to it: it is passed to operators that only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        blocks = torch.from_numpy(weight.raw.reshape(-1))
        _remember(blocks, Stored(*stored_of(identity)), weakref.ref(weight))
        weight._tensor = blocks


@constant
def stored_of(identity: int) -> tuple[str, int, int, int, str]:
    """Return what `blocks_of` a weight are: format, K, N, experts and layout.

    identity: the weight's.
    """
    weight: AnyWeight = object_at(identity)
    experts, k, n = (0, *weight.shape)[-3:]
    return weight.format, k, n, experts, GGUF
