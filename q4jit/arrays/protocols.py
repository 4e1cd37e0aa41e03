"""Views of other libraries' arrays by the CUDA array interface and DLPack."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from q4jit.arrays import dlpack
from q4jit.arrays.dtypes import MOST_DIMENSIONS
from q4jit.arrays.views import DeviceView, significant_strides
from q4jit.errors import ArgumentError, DeviceError, expected, short_name
from q4jit.runtime.devices import drivers, why_none

_DEFAULT_STREAM: Final = 0
_MOST_BYTES: Final = (1 << 64) - 1  # of an address; also bounds the sizes of arrays
LEGACY_STREAM: Final = 1  # the interface's number of stream 0


def interface_view(interface: object, owner: object) -> DeviceView:
    """Return the view of an object with the CUDA array interface, version 2 or 3.

    Raises ArgumentError, which names the entry, unless the interface describes an array.
    """
    kind = type(owner).__name__
    if not isinstance(interface, Mapping):
        raise _bad_interface(kind, "a dict", interface)
    if interface.get("mask") is not None:
        raise ArgumentError(expected("an array without a mask", f"a masked {kind}"))
    missing = {"typestr", "shape", "data"} - interface.keys()
    if missing:
        got = f"one without {', '.join(sorted(missing))}"
        versions = "__cuda_array_interface__ of version 2 or 3"
        raise ArgumentError(expected(versions, got, where=kind))
    dtype = _dtype(kind, interface["typestr"])
    shape = _sizes(kind, "shape", interface["shape"], 0)
    strides = interface.get("strides")
    if strides is not None:
        strides = _sizes(kind, "strides", strides, -_MOST_BYTES)
        # the stride of a dimension of 1 has no meaning
        pairs = zip(strides, shape, strict=False)
        odd = any(stride % dtype.itemsize for stride, size in pairs if size > 1)
        if len(strides) != len(shape) or odd:
            what = f"a multiple of {dtype.itemsize} for each of {len(shape)} dimensions"
            raise _bad_interface(f"{kind}, strides", what, strides)
        strides = tuple(stride // dtype.itemsize for stride in strides)
    pointer, readonly = _data(kind, interface["data"])
    stream = interface.get("stream")
    if stream is not None and not _is_whole(stream, 0):
        raise _bad_interface(f"{kind}, stream", "a number or None", stream)
    platform, device = _device_of(pointer)
    return DeviceView(
        pointer,
        shape,
        significant_strides(shape, strides),
        dtype.name if dtype.isnative else dtype.str,
        platform,
        device,
        readonly,
        "",
        _DEFAULT_STREAM if stream == LEGACY_STREAM else stream,
        owner,
    )


def _dtype(kind: str, typestr: object) -> np.dtype[Any]:
    try:
        dtype = np.dtype(typestr) if isinstance(typestr, str) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not dtype.itemsize:
        raise _bad_interface(f"{kind}, typestr", "the name of a NumPy dtype", typestr)
    return dtype


def _sizes(kind: str, entry: str, value: object, least: int) -> tuple[int, ...]:
    """Return a shape or strides. least: the smallest number that is accepted."""
    whole = isinstance(value, tuple | list) and all(_is_whole(size, least) for size in value)
    sizes = tuple(map(int, value)) if whole else None  # type: ignore[call-overload]  # just tested
    if (
        sizes is None
        or len(sizes) > MOST_DIMENSIONS
        or (least == 0 and math.prod(sizes) > _MOST_BYTES)
    ):
        numbers = f"at most {MOST_DIMENSIONS} whole numbers"
        raise _bad_interface(f"{kind}, {entry}", f"a tuple of {numbers}", value)
    return sizes


def _data(kind: str, value: object) -> tuple[int, bool]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not _is_whole(value[0], 0):
        raise _bad_interface(f"{kind}, data", "an address and a flag", value)
    return int(value[0]), bool(value[1])


def _is_whole(value: Any, least: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and least <= int(value) <= _MOST_BYTES


def _bad_interface(where: str, what: str, value: object) -> ArgumentError:
    where = f"__cuda_array_interface__ of {where}"
    return ArgumentError(expected(what, short_name(value), where=where))


def _device_of(pointer: int) -> tuple[str, int]:
    """Return platform and index of a pointer's device, which the interface does not tell."""
    for platform, driver in drivers().items():
        device = driver.device_of(pointer) if pointer else 0  # 0: an empty array
        if device is not None:
            return platform, device
    reason = why_none()
    raise DeviceError(
        f"no GPU of this machine holds the array at {pointer:#x}"
        + (f": {reason}" if reason else "")
    )


def dlpack_view(array: Any, name: str) -> DeviceView | None:
    """Return the view of an object with DLPack's methods; None if it is not on a GPU."""
    try:
        pair = array.__dlpack_device__()
    except Exception as error:  # other libraries raise anything
        raise ArgumentError(
            f"argument {name!r}: __dlpack_device__ of the {type(array).__name__} failed: {error!r}"
        ) from error
    numbers = isinstance(pair, tuple) and len(pair) == 2
    if not numbers or not all(isinstance(v, int | np.integer) for v in pair):
        what, where = "a device type and a number", f"argument {name!r}: __dlpack_device__"
        raise ArgumentError(expected(what, short_name(pair), where=where))
    kind = int(pair[0])
    if kind not in dlpack.PLATFORMS:
        return None
    tensor = dlpack.consume(array)
    return DeviceView(
        tensor.pointer,
        tensor.shape,
        significant_strides(tensor.shape, tensor.strides),
        tensor.dtype,
        dlpack.PLATFORMS[kind],
        tensor.device,
        tensor.readonly,
        "",
        None,
        tensor,
    )
