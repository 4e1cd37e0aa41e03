"""`DeviceArray`: an array of our own in a GPU's memory, which other libraries take in place."""

import math
import weakref
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays import dlpack
from q4jit.arrays.dtypes import F32
from q4jit.arrays.protocols import LEGACY_STREAM
from q4jit.arrays.views import DeviceView, contiguous_strides
from q4jit.runtime.devices import driver_of
from q4jit.runtime.driver import Device, Driver


class DeviceArray:
    """A C-contiguous array in a device's memory, freed with its last reference.

    Other libraries take it in place: `torch.as_tensor(a)`, `cupy.asarray(a)`, `from_dlpack(a)`.
    `stream` is where its values are made.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: Device,
        dtype: np.dtype[Any] = F32,
        stream: int = 0,
    ) -> None:
        """New memory, not set to anything. Raises DeviceError where there is not enough."""
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.device = device
        self.stream = stream
        self._driver = driver_of(device)
        self.pointer = self._driver.allocate(device.index, self.nbytes)
        release = weakref.finalize(self, _release, self._driver, device.index, self.pointer)
        release.atexit = False  # the memory goes with the process; the driver may be gone first

    @classmethod
    def from_numpy(cls, array: NDArray[Any], device: Device, stream: int = 0) -> Self:
        """A copy of a NumPy array; complete when this returns."""
        source = np.ascontiguousarray(array)
        made = cls(array.shape, device, source.dtype, stream)
        made._driver.copy_to_device(
            device.index, made.pointer, source.ctypes.data, made.nbytes, stream
        )
        made._driver.synchronize(device.index, stream)
        return made

    def to_numpy(self) -> NDArray[Any]:
        """A copy in the host's memory, once all work on `stream` is done."""
        array = np.empty(self.shape, self.dtype)
        self._driver.copy_to_host(
            self.device.index, array.ctypes.data, self.pointer, self.nbytes, self.stream
        )
        self._driver.synchronize(self.device.index, self.stream)
        return array

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> DeviceView:
        """Itself as kernels take it."""
        return DeviceView(
            self.pointer,
            self.shape,
            None,
            self.dtype,
            self.device.platform,
            self.device.index,
            False,
            "",
            self.stream,
            self,
        )

    def __repr__(self) -> str:
        return f"DeviceArray({self.view()})"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the CUDA array interface, which ROCm's libraries use as well."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream or LEGACY_STREAM,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's type of device, and the device's index."""
        return dlpack.device_type(self.device.platform), self.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule of this memory, for a consumer that works on `stream` (-1: it waits).

        Raises BufferError for another device or a copy, as the array API standard says.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"{self!r} is exported in place alone: found copy or another device")
        theirs = 0 if stream in (None, LEGACY_STREAM) else stream
        if theirs not in (-1, self.stream):
            self._driver.synchronize(self.device.index, self.stream)
        return dlpack.produce(
            dlpack.Tensor(
                self.pointer,
                self.shape,
                contiguous_strides(self.shape),
                self.dtype.name,
                self.device.index,
                readonly=False,
                owner=self,
            ),
            dlpack.device_type(self.device.platform),
            versioned=max_version is not None and max_version[0] >= 1,
        )


def _release(driver: Driver, device: int, pointer: int) -> None:
    driver.free(device, pointer)
