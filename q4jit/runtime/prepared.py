"""Prepared launches: a kernel's arguments are laid out once, and every launch fills in values."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from q4jit.runtime.calls import Calls

PreparedLaunch = Callable[..., None]
"""A prepared launch: a function of the stream and the values."""

# kind of a value → struct's format of its 8-byte slot
_SLOTS: Final = {"P": "Q", "i": "i4x", "q": "q", "f": "f4x"}

Arguments = tuple[Any, ctypes.c_void_p, ctypes.c_uint64, Any, tuple[Any, ...]]
"""Slots, stream, a cell for the current device, the cell's address, and the launch's arguments."""


def launcher(
    calls: Calls,
    device: int,
    handle: int,
    launch_kernel: Any,
    new_arguments: Callable[[], Arguments],
    values: str,
    what: str,
) -> PreparedLaunch:
    """Return a launch that writes its values into arguments and passes them to `launch_kernel`.

    Args:
        calls: the runtime.
        device: the device of the kernel.
        handle: what `api.get_current` reports while `device` is current.
        launch_kernel: the runtime's function.
        new_arguments: makes arguments.
        values: one letter per value, as for `Driver.prepare`.
        what: names the launch in errors.
    """
    get_current = calls.api.get_current
    pack = struct.Struct("<" + "".join(_SLOTS[kind] for kind in values)).pack_into
    # The runtime copies slots and stream, but other threads may run before it does, so only one
    # call at a time uses a set of arguments. A list's pop and append cost a third of a lock.
    idle = [new_arguments()]

    def launch(stream: int, *numbers: float) -> None:
        if calls.forked:
            raise calls.fork_error()
        try:
            own = idle.pop()
        except IndexError:  # other threads are in this launch
            own = new_arguments()
        slots, stream_cell, current, current_at, passed = own
        pack(slots, 0, *numbers)
        stream_cell.value = stream
        code = get_current(current_at)
        if not code and current.value == handle:
            code = launch_kernel(*passed)
        else:
            with calls.current(device):
                code = launch_kernel(*passed)
        idle.append(own)
        if code:
            raise calls.error(f"{launch_kernel.__name__} of {what}", code, device)

    return launch


def arguments(
    function: int, shape: tuple[int, ...], values: tuple[int, ...], order: Sequence[int]
) -> Arguments:
    """Return the arguments of a launch, for one call at a time.

    shape: grid, block and bytes of shared memory. `from_param` and `byref` convert the values once;
    ctypes passes them on in two thirds of the time that Python's own values take.
    """
    slots = (ctypes.c_uint64 * len(values))(*values)
    first = ctypes.addressof(slots)
    pointers = (ctypes.c_void_p * len(order))(*[first + 8 * index for index in order])
    stream, current = ctypes.c_void_p(), ctypes.c_uint64()
    passed = (
        ctypes.c_void_p.from_param(function),
        *map(ctypes.c_uint.from_param, shape),
        stream,
        ctypes.byref(pointers),
        None,
    )
    return slots, stream, current, ctypes.byref(current), passed


class _Attribute(ctypes.Structure):
    """CUDA's CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _LaunchConfig(ctypes.Structure):
    """CUDA's CUlaunchConfig; shape: grid, block and bytes of shared memory."""

    _fields_ = (
        ("shape", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6


def early_arguments(
    function: int, shape: tuple[int, ...], values: tuple[int, ...], order: Sequence[int]
) -> Arguments:
    """Return the arguments of a launch that does not wait for the previous kernel."""
    slots, _, current, current_at, (handle, *_, pointers, _) = arguments(
        function, shape, values, order
    )
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,))
    launch = _LaunchConfig((ctypes.c_uint * 7)(*shape), None, ctypes.pointer(attribute), 1)
    stream = ctypes.c_void_p.from_buffer(launch, _LaunchConfig.stream.offset)
    return slots, stream, current, current_at, (ctypes.byref(launch), handle, pointers, None)
