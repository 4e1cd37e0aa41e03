"""`DeviceArray`: q4jit's own array in a GPU's memory, which other libraries use in place."""

import math
import weakref
from typing import Any, NoReturn, Self

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

    Other libraries use it in place: `torch.as_tensor(a)`, `cupy.asarray(a)`, `from_dlpack(a)`.

    Attributes:
        stream: the stream that writes its values.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: Device,
        dtype: np.dtype[Any] = F32,
        stream: int = 0,
    ) -> None:
        """Allocate uninitialised memory. Raises DeviceError if there is not enough."""
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.device = device
        self.stream = stream
        self._driver = driver_of(device)
        self.pointer = self._driver.allocate(device.index, self.nbytes)
        release = weakref.finalize(self, _release, self._driver, device.index, self.pointer)
        release.atexit = False  # the process frees the memory, and the driver may be gone by then

    @classmethod
    def from_numpy(cls, array: NDArray[Any], device: Device, stream: int = 0) -> Self:
        """Copy a NumPy array to a device, and wait for the copy."""
        source = np.ascontiguousarray(array)
        copy = cls(array.shape, device, source.dtype, stream)
        copy._driver.copy_to_device(
            device.index, copy.pointer, source.ctypes.data, copy.nbytes, stream
        )
        copy._driver.synchronize(device.index, stream)
        return copy

    def to_numpy(self) -> NDArray[Any]:
        """Copy the array to the host when all work on `stream` is done."""
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
        """Return the view of this array."""
        return DeviceView(
            self.pointer,
            self.shape,
            None,
            self.dtype.name,
            self.device.platform,
            self.device.index,
            False,
            "",
            self.stream,
            self,
        )

    def __repr__(self) -> str:
        return f"DeviceArray({self.view()})"

    def __reduce__(self) -> NoReturn:
        """Raise TypeError: a copy would use the memory after this array has freed it."""
        raise TypeError("a DeviceArray cannot be pickled or copied; use a.to_numpy()")

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
        """Return DLPack's device type and the device's index."""
        return dlpack.device_type(self.device.platform), self.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Return a DLPack capsule for a consumer on `stream` (-1: the consumer synchronises).

        Raises BufferError for a copy or another device, as the array API standard requires.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"{self!r} can be exported in place only, without a copy")
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
