"""The repacked copies of a weight that kernels read, on the host and on devices."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from q4jit.locks import BUILD
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, aligned, pack, pack_experts
from q4jit.weights.stored import GgufBlocks, StoredBlocks


class DeviceMemory(Protocol):
    """Memory on a device, freed with its last reference."""

    pointer: int


def device_key(platform: str, device: int, layout: str) -> str:
    """Return the key of a copy on a device: a string, because strings keep their hash."""
    return f"{platform} {device} {layout}"


class ResidentCopies:
    """The copies of one weight: one per layout on the host, and one per layout on each device.

    The weight owns this object, so all copies are freed with it. Launches read `addresses` and
    `uploads`, and call `address` and `upload` to make a missing copy. Threads may share the object;
    a forked child inherits the host's copies.

    Attributes:
        stored: the blocks that copies are made from.
        addresses: of the host's copies, by layout.
        uploads: the copies on devices, by `device_key`.
        span: the first address of the stored blocks on the host and the one after the last, which
            no result may overlap; zeros until `blocks` returned them.
    """

    __slots__ = ("_copies", "_fmt", "addresses", "span", "stored", "uploads")

    def __init__(self, fmt: Format, stored: StoredBlocks) -> None:
        """Start without copies.

        stored: the weight's blocks (not the weight: it owns this object). Each expert is repacked
        by itself.
        """
        self._fmt, self.stored = fmt, stored
        self._copies: dict[str, NDArray[np.uint8]] = {}
        self.addresses: dict[str, int] = {}
        self.uploads: dict[str, DeviceMemory] = {}
        self.span = (0, 0)
        if isinstance(stored, GgufBlocks):
            self._keep(GGUF)

    def blocks(self, layout: str) -> NDArray[np.uint8]:
        """Return the read-only bytes in a layout, which the first call makes and keeps.

        Those in the layout of `stored` are not copied, unless kernels need another alignment.
        Raises FormatError for an unknown layout.
        """
        packed = self._copies.get(layout)
        if packed is None:
            with BUILD:
                packed = self._copies.get(layout)
                if packed is None:
                    packed = self._keep(layout)
        return packed

    def address(self, layout: str) -> int:
        """Return the address of the host's copy in a layout, and keep it in `addresses`."""
        address = self.addresses[layout] = int(self.blocks(layout).ctypes.data)
        return address

    def upload(
        self, key: str, layout: str, copy: Callable[[NDArray[Any]], DeviceMemory]
    ) -> DeviceMemory:
        """Return the copy on a device, and keep it in `uploads` under `key`, its `device_key`.

        copy: uploads the blocks in that layout; the host does not keep them.
        """
        memory = self.uploads.get(key)
        if memory is None:
            with BUILD:
                memory = self.uploads.get(key)
                if memory is None:
                    memory = self.uploads[key] = copy(self.made(layout))
        return memory

    def made(self, layout: str, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the bytes in a layout, which are not kept; the experts one after the other.

        Repacking gives the pages of a mapped file back. out: contiguous uint8 [bytes], to which the
        bytes are written and which is returned. Raises FormatError for an unknown layout.
        """
        is_own = layout == self.stored.layout
        if out is None and is_own:
            return self.stored.packed()
        if out is None and layout == GGUF:
            return self.stored.columns()
        if out is not None and is_own and layout != GGUF:
            out[...] = self.stored.packed()
            return out
        with self.stored.drained() as columns:
            make = pack if len(columns.shape) == 2 else pack_experts
            return make(self._fmt, layout, columns, out)

    def _keep(self, layout: str) -> NDArray[np.uint8]:
        """Make the copy in a layout, keep it, and return it."""
        packed = self.made(layout)
        if layout != GGUF:
            packed = aligned(packed)
        if layout == self.stored.layout:
            start = int(packed.ctypes.data)
            self.span = start, start + packed.nbytes
        self._copies[layout] = packed
        return packed
