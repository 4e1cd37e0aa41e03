"""Read and make DLPack capsules with ctypes.

The structs are those of dlpack.h 1.0: DLTensor, DLManagedTensor, DLManagedTensorVersioned. Both
kinds of capsule are read; the consumer chooses which one is made (`max_version`).
"""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from q4jit.arrays.dtypes import MOST_DIMENSIONS
from q4jit.errors import ArgumentError, expected

PLATFORMS: Final = {2: "nvidia", 13: "nvidia", 10: "amd"}  # kDLCUDA, kDLCUDAManaged, kDLROCM
_READONLY: Final = 1  # a bit of the versioned flags

# type code → the start of NumPy's name; other codes are shown by their number
_KINDS: Final = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_CODES: Final = {name: code for code, name in _KINDS.items()}
_BOOL: Final = 6


@dataclass(frozen=True)
class Tensor:
    """The tensor of a capsule.

    Attributes:
        strides: in elements; None: C-contiguous.
        dtype: NumPy's name.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device: int
    readonly: bool
    owner: object


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _VersionedManaged(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


# capsules keep the address of their name, so these must never be freed
_NAMES: Final = (
    (_VersionedManaged, b"dltensor_versioned", b"used_dltensor_versioned"),
    (_Managed, b"dltensor", b"used_dltensor"),
)

_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


def _capsule_function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_object, _address, _text = ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p
_new = _capsule_function("PyCapsule_New", _object, _address, _text, _DESTRUCTOR)
_set_name = _capsule_function("PyCapsule_SetName", ctypes.c_int, _object, _text)
# by address: a destructor gets a capsule that must not be referenced any more
_is_valid = _capsule_function("PyCapsule_IsValid", ctypes.c_int, _address, _text)
_pointer = _capsule_function("PyCapsule_GetPointer", _address, _address, _text)


# --- reading ------------------------------------------------------------------------------------


class _Loan:
    """Another library's tensor; the library's deleter runs with the last reference."""

    def __init__(self, managed: _Managed | _VersionedManaged) -> None:
        if managed.deleter:
            delete = _DELETER(managed.deleter)
            weakref.finalize(self, delete, ctypes.addressof(managed)).atexit = False


def consume(array: Any) -> Tensor:
    """Return the tensor of an object with `__dlpack__`, in place, for use on the default stream.

    Raises ArgumentError if the object cannot be exported, or if q4jit cannot read the capsule or
    its elements.
    """
    managed = _take(_capsule(array))
    loan = _Loan(managed)
    readonly = False
    if isinstance(managed, _VersionedManaged):
        if managed.major > 1:
            version = f"{managed.major}.{managed.minor}"
            raise ArgumentError(expected("version 0 or 1", version, where="DLPack"))
        readonly = bool(managed.flags & _READONLY)
    tensor = managed.tensor
    if not 0 <= tensor.ndim <= MOST_DIMENSIONS or (tensor.ndim and not tensor.shape):
        what = f"a shape of at most {MOST_DIMENSIONS} dimensions"
        raise ArgumentError(expected(what, f"{tensor.ndim} dimensions", where="DLPack"))
    if any(size < 0 for size in tensor.shape[: tensor.ndim]):
        shape = str(tensor.shape[: tensor.ndim])
        raise ArgumentError(expected("sizes from 0", shape, where="DLPack"))
    return Tensor(
        (tensor.data or 0) + tensor.byte_offset,
        tuple(tensor.shape[: tensor.ndim]),
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        _dtype(tensor),
        tensor.device_id,
        readonly,
        loan,
    )


def _capsule(array: Any) -> object:
    try:
        try:
            return array.__dlpack__(max_version=(1, 0))
        except TypeError as error:
            # libraries before DLPack 1.0 take no versions, which Python or C reports in these words
            if not any(word in str(error) for word in ("keyword", "max_version")):
                raise
            return array.__dlpack__()
    except BufferError as error:
        raise ArgumentError(f"DLPack cannot export the {type(array).__name__}: {error}") from error


def _take(capsule: object) -> _Managed | _VersionedManaged:
    """Return the content of a capsule, and mark it as taken: the caller must delete it now."""
    for kind, name, used in _NAMES:
        if _is_valid(id(capsule), name):
            managed = kind.from_address(_pointer(id(capsule), name))
            _set_name(capsule, used)
            return managed
    what = "a DLPack capsule that has not been taken"
    raise ArgumentError(expected(what, repr(capsule), where="__dlpack__"))


def _dtype(tensor: _DLTensor) -> str:
    if tensor.lanes != 1:
        raise ArgumentError(expected("1 lane", f"{tensor.lanes} lanes", where="DLPack elements"))
    if tensor.code == _BOOL:
        return "bool"
    return f"{_KINDS.get(tensor.code, f'type {tensor.code} of ')}{tensor.bits}"


# --- making -------------------------------------------------------------------------------------

_lent: dict[int, tuple[Any, ...]] = {}  # address of a managed tensor → everything that it points to


def produce(tensor: Tensor, device_type: int, *, versioned: bool) -> object:
    """Return a new capsule; `tensor` and its owner live until the consumer or the capsule ends."""
    kind, name, _ = _NAMES[0 if versioned else 1]
    managed = kind()
    if isinstance(managed, _VersionedManaged):
        managed.major, managed.minor = 1, 0
        managed.flags = _READONLY if tensor.readonly else 0
    managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)
    shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
    strides = None
    if tensor.strides is not None:
        strides = (ctypes.c_int64 * len(tensor.strides))(*tensor.strides)
    code, bits = _code_of(tensor.dtype)
    managed.tensor = _DLTensor(
        tensor.pointer, device_type, tensor.device, len(shape), code, bits, 1, shape, strides, 0
    )
    address = ctypes.addressof(managed)
    _lent[address] = (managed, shape, strides, tensor)
    return _new(address, name, _destroy)


def device_type(platform: str) -> int:
    """Return DLPack's device type of a platform."""
    return next(number for number, name in PLATFORMS.items() if name == platform)


def _code_of(dtype: str) -> tuple[int, int]:
    if dtype == "bool":
        return _BOOL, 8
    kind = dtype.rstrip("0123456789")
    return _CODES[kind], int(dtype[len(kind) :])


def _release(address: int) -> None:
    _lent.pop(address, None)


def _release_untaken(capsule: int) -> None:
    for _, name, _ in _NAMES:
        if _is_valid(capsule, name):  # a consumer renames the capsules that it takes
            _release(_pointer(capsule, name))


_delete: Final = _DELETER(_release)
_destroy: Final = _DESTRUCTOR(_release_untaken)
# consumers may call these after the module is gone, so they are never freed
for _callback in (_delete, _destroy):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))
