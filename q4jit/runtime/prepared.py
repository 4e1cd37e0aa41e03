"""Prepared launches: the arguments of a kernel, laid out once and filled in by every launch."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from q4jit.runtime.calls import Calls

Launch = Callable[..., None]
"""A prepared launch: call it with the stream and its values."""

# a parameter's kind → how struct writes its slot of 8 bytes
_SLOTS: Final = {"P": "Q", "i": "i4x", "q": "q", "f": "f4x"}

Arguments = tuple[Any, ctypes.c_void_p, ctypes.c_uint64, Any, tuple[Any, ...]]
"""Slots, stream, room for what is current, its address, and what the launch is called with."""


def launcher(
    calls: Calls,
    device: int,
    handle: int,
    launch_kernel: Any,
    new_arguments: Callable[[], Arguments],
    values: str,
    what: str,
) -> Launch:
    """Return a launch that puts its values into arguments and hands these to `launch_kernel`.

    handle: what is current while `device` is. values: a letter for each, as for `Driver.prepare`.
    what: names the launch in errors.
    """
    get_current = calls.api.get_current
    pack = struct.Struct("<" + "".join(_SLOTS[kind] for kind in values)).pack_into
    # Each belongs to one call at a time: the launch copies slots and stream, but lets other
    # threads run before. A list's pop and append are a third of a lock's price.
    idle = [new_arguments()]

    def launch(stream: int, *numbers: float) -> None:
        if calls.forked:
            raise calls.fork_error()
        try:
            own = idle.pop()
        except IndexError:  # other threads are in this launch
            own = new_arguments()
        slots, where, found, found_at, handed_over = own
        pack(slots, 0, *numbers)
        where.value = stream
        code = get_current(found_at)
        if not code and found.value == handle:
            code = launch_kernel(*handed_over)
        else:
            with calls.current(device):
                code = launch_kernel(*handed_over)
        idle.append(own)
        if code:
            raise calls.error(f"{launch_kernel.__name__} of {what}", code, device)

    return launch


def arguments(
    function: int, shape: tuple[int, ...], values: tuple[int, ...], order: Sequence[int]
) -> Arguments:
    """What one launch at a time hands over: slots, stream, room for what is current, arguments.

    `shape` has grid, block and LDS bytes. What `from_param` and `byref` give was converted once:
    ctypes takes it as it is, in two thirds of the time of its own values.
    """
    slots = (ctypes.c_uint64 * len(values))(*values)
    first = ctypes.addressof(slots)
    pointers = (ctypes.c_void_p * len(order))(*[first + 8 * place for place in order])
    stream, current = ctypes.c_void_p(), ctypes.c_uint64()
    handed_over = (
        ctypes.c_void_p.from_param(function),
        *map(ctypes.c_uint.from_param, shape),
        stream,
        ctypes.byref(pointers),
        None,
    )
    return slots, stream, current, ctypes.byref(current), handed_over


class _Attribute(ctypes.Structure):
    """CUDA's CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _LaunchConfig(ctypes.Structure):
    """CUDA's CUlaunchConfig; shape: grid, block and LDS bytes."""

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
    """The same for a launch that does not wait for the kernel before."""
    slots, _, current, current_at, (handle, *_, pointers, _) = arguments(
        function, shape, values, order
    )
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,))
    launch = _LaunchConfig((ctypes.c_uint * 7)(*shape), None, ctypes.pointer(attribute), 1)
    stream = ctypes.c_void_p.from_buffer(launch, _LaunchConfig.stream.offset)
    return slots, stream, current, current_at, (ctypes.byref(launch), handle, pointers, None)
