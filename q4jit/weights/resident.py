"""The repacked copies of a weight that kernels read, on the host and on devices."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from q4jit.locks import BUILD
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF, pack, pack_experts


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
        addresses: of the host's copies, by layout.
        uploads: the copies on devices, by `device_key`.
    """

    __slots__ = ("_fmt", "_packed", "_raw", "addresses", "uploads")

    def __init__(self, fmt: Format, raw: NDArray[np.uint8]) -> None:
        """Start without copies.

        raw: the weight's columns (not the weight: it owns this object), uint8 [N, column_bytes], or
        [E, N, column_bytes] for experts. Each expert is repacked by itself.
        """
        self._fmt, self._raw = fmt, raw
        self._packed: dict[str, NDArray[np.uint8]] = {}
        self.addresses: dict[str, int] = {}
        self.uploads: dict[str, DeviceMemory] = {}

    def blocks(self, layout: str) -> NDArray[np.uint8]:
        """Return the read-only copy in a layout, made by the first call.

        Raises FormatError for an unknown layout.
        """
        if layout == GGUF:
            return self._raw
        packed = self._packed.get(layout)
        if packed is None:
            with BUILD:
                packed = self._packed.get(layout)
                if packed is None:
                    packed = self._packed[layout] = self._pack(layout)
        return packed

    def address(self, layout: str) -> int:
        """Return the address of the host's copy in a layout, and keep it in `addresses`."""
        address = self.addresses[layout] = int(self.blocks(layout).ctypes.data)
        return address

    def upload(
        self, key: str, layout: str, copy: Callable[[NDArray[Any]], DeviceMemory]
    ) -> DeviceMemory:
        """Return the copy on a device, and keep it in `uploads` under `key`, its `device_key`.

        copy: uploads the repacked blocks; the host does not keep them.
        """
        memory = self.uploads.get(key)
        if memory is None:
            with BUILD:
                memory = self.uploads.get(key)
                if memory is None:
                    packed = self._raw if layout == GGUF else self._pack(layout)
                    memory = self.uploads[key] = copy(packed)
        return memory

    def _pack(self, layout: str) -> NDArray[np.uint8]:
        """Return a new copy in a layout, the experts one after the other."""
        if self._raw.ndim == 2:
            return pack(self._fmt, layout, self._raw)
        return pack_experts(self._fmt, layout, self._raw)
