"""Arrays in a GPU's memory: other libraries' seen in place, and one of our own.

PyTorch, CuPy, `__cuda_array_interface__` and DLPack are understood without importing any of their
libraries: an array of a library exists only where that library is imported already.
"""

import functools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays import dlpack
from q4jit.errors import ArgumentError, DeviceError
from q4jit.runtime.devices import driver_of, drivers, why_none
from q4jit.runtime.driver import Device, Driver
from q4jit.weights.tensor import QuantizedTensor

F32: Final = np.dtype(np.float32)
_NUMBERS: Final = frozenset({float, np.float32, np.float64})
_STATIC: Final = frozenset({bool, int, str, type(None)})  # arguments that kernels are made for
_DEFAULT_STREAM: Final = 0
_LEGACY_STREAM: Final = 1  # how the array interface spells stream 0

# library → how its users convert an array, and make it contiguous
_CONVERSIONS: Final = {
    "torch": ("{}.float()", "{}.contiguous()"),
    "cupy": ("{}.astype(cupy.float32)", "cupy.ascontiguousarray({})"),
    "": ("an array of float32", "a C-contiguous copy"),
}


class DeviceView(NamedTuple):
    """An array in a device's memory, whoever owns it.

    `strides` count elements and are None where the array is C-contiguous; `device` is the index
    that the `platform`'s driver uses; `library` is torch, cupy or empty; `stream` is where, as the
    owner says, its values are made (None: it does not say); `owner` keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    platform: str
    device: int
    readonly: bool
    library: str
    stream: int | None
    owner: object

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} on {self.platform} device {self.device}"


def as_device_array(array: object, name: str = "the array") -> DeviceView | None:
    """`array` as it lies in a device's memory, without a copy; None if it is no device array.

    Raises ArgumentError, which calls the array `name`, where it tracks gradients or has elements
    that NumPy does not know, and DeviceError where its device's driver is missing.
    """
    if type(array) is np.ndarray:
        return None
    if isinstance(array, DeviceArray):
        return array.view()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return _torch_view(torch, array, name)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return _cupy_view(cupy, array)
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _interface_view(interface, array)
    if hasattr(array, "__dlpack_device__"):
        return _dlpack_view(array, name)
    return None


def current_stream(view: DeviceView) -> int:
    """The stream on which the library of `view` works now, on its device; 0 is the default one."""
    if view.library == "torch":
        return _torch_stream(sys.modules["torch"])(view.device)
    if view.library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(view.device).ptr)
    return view.stream or 0


def empty_like_kind(view: DeviceView, shape: tuple[int, ...]) -> Any:
    """A new f32 array of `shape` on the device of `view`, of its library, or a DeviceArray."""
    if view.library == "torch":
        return new_tensor(view.owner, shape)
    if view.library == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(view.device):
            return cupy.empty(shape, dtype=F32)
    return DeviceArray(shape, device_of(view), stream=view.stream or 0)


def new_tensor(like: Any, shape: tuple[int, ...]) -> Any:
    """A new f32 tensor of `shape` where PyTorch's tensor `like` is."""
    return like.new_empty(shape, dtype=sys.modules["torch"].float32)


def device_of(view: DeviceView) -> Device:
    """The device that holds `view`. Raises DeviceError where its driver cannot be used here."""
    driver = drivers().get(view.platform)
    if driver is None:
        raise DeviceError(f"found an array on {view.platform} device {view.device}: {why_none()}")
    return driver.devices[view.device]


def require_f32(view: DeviceView, name: str) -> None:
    """Raise ArgumentError unless the elements are f32, with the way to convert them."""
    if view.dtype != F32:
        convert = _CONVERSIONS[view.library][0].format(name)
        raise ArgumentError(f"found {name}, {view}: accepted is float32, as {convert} gives")


def require_contiguous(view: DeviceView, name: str) -> None:
    """Raise ArgumentError unless the array is C-contiguous, with the way to make it so."""
    if view.strides is not None:
        copy = _CONVERSIONS[view.library][1].format(name)
        raise ArgumentError(
            f"found {name}, {view}, with strides of {list(view.strides)} elements: accepted is a "
            f"C-contiguous array, as {copy} gives"
        )


def common_device(views: Sequence[DeviceView | None], names: Sequence[str]) -> tuple[str, int]:
    """Platform and index of the one device that holds all arrays; a view of None is on the host.

    Raises ArgumentError, which names two of them, where they are not on one device.
    """
    places: dict[tuple[str, int] | None, str] = {}
    for view, name in zip(views, names, strict=True):
        places.setdefault(None if view is None else (view.platform, view.device), name)
    if len(places) == 1:
        (place,) = places
        if place is not None:
            return place
    found = " and ".join(
        f"{name} " + ("in the host's memory" if place is None else "on {} device {}".format(*place))
        for place, name in places.items()
    )
    raise ArgumentError(
        f"found {found or 'no array'}: accepted are arrays that are all on one device, or that are "
        "all NumPy's"
    )


# --- PyTorch's tensors, in a hurry ---------------------------------------------------------------


class _PyTorch(NamedTuple):
    """What every call needs of PyTorch, found once."""

    module: Any
    tensor: type  # other subclasses than a parameter may answer otherwise than they lie in memory
    parameter: type
    tracks_gradients: Callable[[], bool]
    current_stream: Callable[[int], int]


_pytorch: _PyTorch | None = None  # None until a first tensor was seen


def _note_pytorch(torch: Any) -> None:
    global _pytorch  # noqa: PLW0603 - a process has one PyTorch, as it has one sys.modules
    if _pytorch is None or _pytorch.module is not torch:
        kinds = torch.Tensor, torch.nn.Parameter
        _pytorch = _PyTorch(torch, *kinds, torch.is_grad_enabled, _torch_stream(torch))


def tensor_facts(args: Sequence[Any], out: Any) -> tuple[tuple[object, ...], list[int], int] | None:
    """All that decides how a call on PyTorch's tensors is served, where they lie, and the stream.

    The facts are a key: what one call was served with, any other of the same key may be, but for
    tensors that overlap. None where an argument or `out` needs a closer look (`as_device_array`).
    Each question to a tensor costs 50 to 100 ns, more than all else here: none is asked twice.
    """
    if _pytorch is None:
        return None
    _, tensor, parameter, tracks_gradients, current_stream = _pytorch
    values = args if out is None else (*args, *out) if type(out) is tuple else (*args, out)
    key: list[object] = [type(out)]
    pointers = []
    device = 0
    try:
        for value in values:
            kind = type(value)
            if kind is tensor or kind is parameter:
                if (
                    not value.is_cuda
                    or not value.is_contiguous()
                    or value.is_neg()
                    or (value.requires_grad and tracks_gradients())
                ):
                    return None
                device = value.get_device()
                key += (value.shape, value.dtype, device)  # no complex dtype is ever served
                pointers.append(value.data_ptr())
            elif kind is QuantizedTensor:
                key.append(value.signature)
            elif kind in _NUMBERS:
                key.append(float)
            elif kind in _STATIC:
                key += (kind, value)
            else:
                return None
    except RuntimeError:  # what sparse tensors answer, and others without memory of their own
        return None
    return tuple(key), pointers, current_stream(device)


# --- other libraries' arrays --------------------------------------------------------------------


def _torch_view(torch: Any, tensor: Any, name: str) -> DeviceView | None:
    _note_pytorch(torch)
    device = tensor.device
    if device.type != "cuda":  # what PyTorch calls AMD's too
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"found {name}, a tensor that requires a gradient: accepted are tensors without, as "
            f"{name}.detach() gives, or a call under torch.no_grad()"
        )
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise ArgumentError(
            f"found {name}, a tensor that is sparse or to be negated or conjugated when read: "
            f"accepted are dense tensors, as {name}.to_dense(), .resolve_neg() and .resolve_conj() "
            "give"
        )
    return DeviceView(
        tensor.data_ptr(),
        tuple(tensor.shape),
        None if tensor.is_contiguous() else tensor.stride(),
        _torch_dtype(tensor.dtype),
        _torch_platform(torch),
        device.index,
        False,
        "torch",
        None,
        tensor,
    )


@functools.cache
def _torch_dtype(dtype: object) -> np.dtype[Any]:
    """NumPy's dtype of the same name: `torch.float32`."""
    return _named_dtype(str(dtype).removeprefix("torch."), "a tensor")


@functools.cache
def _torch_platform(torch: Any) -> str:
    return "amd" if torch.version.hip else "nvidia"


@functools.cache
def _torch_stream(torch: Any) -> Callable[[int], int]:
    """How PyTorch's current stream is asked for.

    The private function is what Triton uses; the public one makes two objects on its way.
    """
    private: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return private or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


def _cupy_view(cupy: Any, array: Any) -> DeviceView:
    memory, dtype = array.data, array.dtype
    strides = None
    if not array.flags.c_contiguous:
        strides = tuple(stride // dtype.itemsize for stride in array.strides)
    platform = "amd" if cupy.cuda.runtime.is_hip else "nvidia"
    return DeviceView(
        memory.ptr,
        array.shape,
        strides,
        dtype,
        platform,
        memory.device_id,
        False,
        "cupy",
        None,
        array,
    )


def _interface_view(interface: dict[str, Any], owner: object) -> DeviceView:
    """An object of the CUDA array interface, versions 2 and 3."""
    if interface.get("mask") is not None:
        raise ArgumentError(
            f"found a masked {type(owner).__name__}: accepted are arrays without a mask"
        )
    missing = {"typestr", "shape", "data"} - interface.keys()
    if missing:
        raise ArgumentError(
            f"found a {type(owner).__name__} whose __cuda_array_interface__ lacks "
            f"{', '.join(sorted(missing))}: accepted are versions 2 and 3 of it"
        )
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)
    pointer, readonly = interface["data"]
    platform, device = _place_of(pointer)
    return DeviceView(
        pointer,
        shape,
        _significant(shape, strides),
        dtype,
        platform,
        device,
        bool(readonly),
        "",
        _DEFAULT_STREAM if interface.get("stream") == _LEGACY_STREAM else interface.get("stream"),
        owner,
    )


def _place_of(pointer: int) -> tuple[str, int]:
    """Platform and index of the device that holds `pointer`: the interface does not say."""
    for platform, driver in drivers().items():
        device = driver.device_of(pointer) if pointer else 0  # 0: an array without elements
        if device is not None:
            return platform, device
    raise DeviceError(
        f"found a device array at {pointer:#x} that no device here knows"
        + (f": {reason}" if (reason := why_none()) else "")
    )


def _dlpack_view(array: Any, name: str) -> DeviceView | None:
    kind, _ = array.__dlpack_device__()
    if int(kind) not in dlpack.PLATFORMS:
        return None
    tensor = dlpack.consume(array)
    dtype = _named_dtype(tensor.dtype, name)
    return DeviceView(
        tensor.pointer,
        tensor.shape,
        _significant(tensor.shape, tensor.strides),
        dtype,
        dlpack.PLATFORMS[int(kind)],
        tensor.device,
        tensor.readonly,
        "",
        None,
        tensor,
    )


def _named_dtype(dtype: str, name: str) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(
            f"found {name} of {dtype}: accepted is float32; convert it first (in PyTorch by "
            ".float())"
        ) from error


def _significant(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Strides in elements, or None where they are those of a C-contiguous array."""
    if strides is None or 0 in shape:
        return None
    expected = contiguous_strides(shape)
    same = all(d == 1 or s == e for d, s, e in zip(shape, strides, expected, strict=True))
    return None if same else strides


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- our own --------------------------------------------------------------------------------------


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
            "stream": self.stream or _LEGACY_STREAM,
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
        theirs = 0 if stream in (None, _LEGACY_STREAM) else stream
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
