"""DLPack capsules, read and made with ctypes.

Layout: dlpack.h of DLPack 1.0 (DLTensor, DLManagedTensor, DLManagedTensorVersioned). Both kinds of
capsule are read; which one is made is the consumer's choice (`max_version`).
"""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import ArgumentError

PLATFORMS: Final = {2: "nvidia", 13: "nvidia", 10: "amd"}  # kDLCUDA, kDLCUDAManaged, kDLROCM
_READONLY: Final = 1  # a bit of the versioned flags

# type code → NumPy's name of the kind; the others (bfloat16, complex, …) are passed by their number
_KINDS: Final = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_CODES: Final = {name: code for code, name in _KINDS.items()}
_BOOL: Final = 6


@dataclass(frozen=True)
class Tensor:
    """What a capsule holds: strides count elements (None: C-contiguous), `dtype` is NumPy's name.

    The memory is alive as long as `owner` is.
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


# capsules keep the address of their name: these live as long as the process
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
# by address: a destructor's capsule is no object any more that Python may hold
_is_valid = _capsule_function("PyCapsule_IsValid", ctypes.c_int, _address, _text)
_pointer = _capsule_function("PyCapsule_GetPointer", _address, _address, _text)


# --- reading ------------------------------------------------------------------------------------


class _Loan:
    """Another library's tensor; the library is told when the last reference goes."""

    def __init__(self, managed: _Managed | _VersionedManaged) -> None:
        if managed.deleter:
            delete = _DELETER(managed.deleter)
            weakref.finalize(self, delete, ctypes.addressof(managed)).atexit = False


def consume(array: Any) -> Tensor:
    """The tensor of an object that has `__dlpack__`, in place, for use on the default stream.

    Raises ArgumentError for a capsule or elements that cannot be read, and for an object that
    cannot be exported.
    """
    managed = _take(_capsule(array))
    loan = _Loan(managed)
    readonly = False
    if isinstance(managed, _VersionedManaged):
        if managed.major > 1:
            raise ArgumentError(
                f"found DLPack version {managed.major}.{managed.minor}: accepted are 0 and 1"
            )
        readonly = bool(managed.flags & _READONLY)
    tensor = managed.tensor
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
            # made before DLPack 1.0: it knows no versions, and Python or C says so in these words
            if not any(word in str(error) for word in ("keyword", "max_version")):
                raise
            return array.__dlpack__()
    except BufferError as error:
        raise ArgumentError(
            f"found a {type(array).__name__} that cannot be exported by DLPack: {error}"
        ) from error


def _take(capsule: object) -> _Managed | _VersionedManaged:
    """What a capsule holds, which from now on is the taker's to delete."""
    for kind, name, used in _NAMES:
        if _is_valid(id(capsule), name):
            managed = kind.from_address(_pointer(id(capsule), name))
            _set_name(capsule, used)
            return managed
    raise ArgumentError(
        f"found {capsule!r} from __dlpack__: accepted is a DLPack capsule that nobody has taken"
    )


def _dtype(tensor: _DLTensor) -> str:
    if tensor.lanes != 1:
        raise ArgumentError(f"found elements of {tensor.lanes} lanes: accepted is 1 lane")
    if tensor.code == _BOOL:
        return "bool"
    return f"{_KINDS.get(tensor.code, f'type {tensor.code} of ')}{tensor.bits}"


# --- making -------------------------------------------------------------------------------------

_lent: dict[int, tuple[Any, ...]] = {}  # address of a managed tensor → all that it points to


def produce(tensor: Tensor, device_type: int, *, versioned: bool) -> object:
    """A new capsule; `tensor` and its owner live until the consumer, or the capsule, lets go."""
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
    """DLPack's number of a platform's memory."""
    return next(number for number, name in PLATFORMS.items() if name == platform)


def _code_of(dtype: str) -> tuple[int, int]:
    if dtype == "bool":
        return _BOOL, 8
    kind = dtype.rstrip("0123456789")
    return _CODES[kind], int(dtype[len(kind) :])


def _let_go(address: int) -> None:
    _lent.pop(address, None)


def _let_go_untaken(capsule: int) -> None:
    for _, name, _ in _NAMES:
        if _is_valid(capsule, name):  # a taken one has another name
            _let_go(_pointer(capsule, name))


_delete: Final = _DELETER(_let_go)
_destroy: Final = _DESTRUCTOR(_let_go_untaken)
# consumers may let go after this module's names are gone: the callbacks outlive them
for _callback in (_delete, _destroy):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))
