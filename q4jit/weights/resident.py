"""The copies of a weight's blocks that kernels read, in this process and on devices."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from q4jit.locks import BUILD
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, pack


class DeviceMemory(Protocol):
    """Memory on a device, freed with its last reference."""

    pointer: int


def device_key(platform: str, device: int, layout: str) -> str:
    """Name a copy on a device. A string remembers its hash, and every launch looks one up."""
    return f"{platform} {device} {layout}"


class ResidentCopies:
    """Where kernels find the blocks of one weight: a copy per layout and place, made once each.

    The weight owns this object, so all copies are freed with it. Launches look into `addresses` (by
    layout, in this process) and `uploads` (by `device_key`), and call `address` and `upload` for a
    copy that is not there yet. Threads may share it; a forked child has the host's copies too.
    """

    __slots__ = ("_fmt", "_packed", "_raw", "addresses", "uploads")

    def __init__(self, fmt: Format, raw: NDArray[np.uint8]) -> None:
        """Start without copies. raw: the weight's GGUF rows, not the weight, which owns this."""
        self._fmt, self._raw = fmt, raw
        self._packed: dict[str, NDArray[np.uint8]] = {}
        self.addresses: dict[str, int] = {}
        self.uploads: dict[str, DeviceMemory] = {}

    def blocks(self, layout: str) -> NDArray[np.uint8]:
        """Return the blocks in the byte order of a layout: read-only, packed once.

        Raises what `layouts.pack` raises for an unknown layout.
        """
        if layout == GGUF:
            return self._raw
        packed = self._packed.get(layout)
        if packed is None:
            with BUILD:
                packed = self._packed.get(layout)
                if packed is None:
                    packed = self._packed[layout] = pack(self._fmt, layout, self._raw)
        return packed

    def address(self, layout: str) -> int:
        """Return where the blocks of a layout begin, and note it in `addresses`."""
        address = self.addresses[layout] = int(self.blocks(layout).ctypes.data)
        return address

    def upload(
        self, key: str, layout: str, copy: Callable[[NDArray[Any]], DeviceMemory]
    ) -> DeviceMemory:
        """Return the copy on a device, and note it in `uploads` under its `device_key`.

        copy: makes the memory there from the blocks, which are packed for it and then forgotten.
        """
        memory = self.uploads.get(key)
        if memory is None:
            with BUILD:
                memory = self.uploads.get(key)
                if memory is None:
                    raw = self._raw
                    packed = raw if layout == GGUF else pack(self._fmt, layout, raw)
                    memory = self.uploads[key] = copy(packed)
        return memory
