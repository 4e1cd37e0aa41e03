"""Checked calls into the runtime of a GPU platform.

A call makes its device current for itself, and leaves what was current as it was: PyTorch and CuPy
share the thread, and on NVIDIA the primary context.
"""

import abc
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from q4jit.errors import DeviceError

_RELAXED: Final = 2  # of the three modes of stream capture

# HIP's codes are CUDA's numbers
_LOST: Final = (
    "a kernel failed, this one or an earlier one, and this process can no longer use the device: "
    "start a new process; AMD_SERIALIZE_KERNEL=3 or CUDA_LAUNCH_BLOCKING=1 in its environment "
    "shows which kernel it was"
)
_WRONG_CODE: Final = "the code object is damaged or made for another arch: delete its cache entry"
_CAPTURE: Final = (
    "a stream is being captured, and this cannot be part of a graph: call the function once with "
    "the same shapes before the capture begins"
)
_ADVICE: Final = {
    3: "the driver is not initialised; a forked child cannot use its parent's: start it by spawn",
    4: "the process is ending",
    35: "the GPU's driver is older than this runtime needs: update it",
    46: "another process holds the device alone, or it is being reset: see rocm-smi or nvidia-smi",
    100: "no device is visible: see HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and "
    "CUDA_VISIBLE_DEVICES, and whether this user may open /dev/kfd or /dev/nvidia0 (on AMD: the "
    "groups render and video)",
    **dict.fromkeys((200, 209, 218, 300), _WRONG_CODE),
    214: "the device's memory is faulty (an uncorrectable ECC error): reset the device",
    **dict.fromkeys((700, 702, 709, 710, *range(714, 720)), _LOST),
    803: "the GPU's driver does not fit this runtime: update it, and reboot if it was updated",
    **dict.fromkeys(range(900, 909), _CAPTURE),
}


@dataclass(frozen=True)
class Api:
    """A platform's runtime: functions of its binding, which return an error code and results.

    The last four are ctypes functions of the same library, which return the error code alone: the
    hot path spares the bindings' conversions.
    """

    allocate: Callable[..., Any]
    free: Callable[..., Any]
    upload: Callable[..., Any]
    download: Callable[..., Any]
    copy: Callable[..., Any]
    fill: Callable[..., Any]
    memory_info: Callable[..., Any]
    synchronize: Callable[..., Any]
    stream_create: Callable[..., Any]
    stream_destroy: Callable[..., Any]
    capture_begin: Callable[..., Any]
    capture_end: Callable[..., Any]
    graph_instantiate: Callable[..., Any]
    graph_launch: Callable[..., Any]
    graph_destroy: Callable[..., Any]
    graph_instance_destroy: Callable[..., Any]
    event_create: Callable[..., Any]
    event_record: Callable[..., Any]
    event_synchronize: Callable[..., Any]
    event_elapsed_ms: Callable[..., Any]
    event_destroy: Callable[..., Any]
    module_load: Callable[..., Any]
    module_function: Callable[..., Any]
    module_unload: Callable[..., Any]
    launch: Any
    get_current: Any
    is_capturing: Any
    exchange_capture_mode: Any
    launch_early: Any = None  # where kernels can overlap


class Calls(abc.ABC):
    """Calls a platform's runtime; what fails is a DeviceError that says what to do about it.

    The subclasses supply what the two platforms do not share.
    """

    platform: str
    api: Api

    def __init__(self) -> None:
        """Watch for forks."""
        self.forked = False
        # neither platform's driver survives a fork: a call in the child would crash or hang
        os.register_at_fork(after_in_child=self._mark_forked)

    def _mark_forked(self) -> None:
        self.forked = True

    @abc.abstractmethod
    def current(self, device: int) -> AbstractContextManager[None]:
        """Make a device this thread's current one for a `with` block."""

    @abc.abstractmethod
    def _current_handle(self, device: int) -> int:
        """What `api.get_current` finds while `device` is current."""

    @abc.abstractmethod
    def _describe(self, code: int) -> tuple[str, str]:
        """Name and text of an error code."""

    def error(self, call: str, code: int, device: int | None) -> DeviceError:
        """The error of a call that gave `code`: what failed, where, and what to do about it."""
        name, text = self._describe(code)
        advice = _ADVICE.get(code)
        return DeviceError(
            f"{call} failed on {self._name(device)}: {name} ({code}): {text}"
            + (f"; {advice}" if advice else "")
        )

    def _call(self, device: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call into the platform's runtime (a tuple, where it has several)."""
        code, *results = self._raw(function, *arguments)
        if code:
            raise self.error(name_of(function), code, device)
        return results[0] if len(results) == 1 else tuple(results)

    def _raw(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        """Error code and results of a call into the platform's runtime."""
        if self.forked:
            raise self.fork_error()
        try:
            code, *results = function(*arguments)
        except RuntimeError as error:  # both bindings: a library or one of its functions is missing
            raise DeviceError(
                f"{name_of(function)} cannot be called: {error}; install or update the GPU's "
                "driver and runtime (on AMD, ROCM_PATH names the folder whose lib/ holds the "
                "runtime)"
            ) from error
        return int(code), *results

    def fork_error(self) -> DeviceError:
        """Return the error of a call in a forked child."""
        return DeviceError(
            f"a forked child (process {os.getpid()}) cannot use its parent's {self.platform} "
            "devices: use target='cpu' in it, or start it by spawn "
            "(multiprocessing.get_context('spawn'))"
        )

    def _name(self, device: int | None) -> str:
        return f"{self.platform} device {device}" if device is not None else self.platform

    @contextlib.contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Let this thread allocate and free while any thread captures a graph.

        Garbage is freed at any time; in the other modes that would end the capture.
        """
        mode = ctypes.c_int(_RELAXED)
        self._exchange_mode(mode)
        try:
            yield
        finally:
            self._exchange_mode(mode)

    def _exchange_mode(self, mode: ctypes.c_int) -> None:
        code = self.api.exchange_capture_mode(ctypes.byref(mode))
        if code:
            raise self.error(self.api.exchange_capture_mode.__name__, code, None)


def name_of(function: Callable[..., Any]) -> str:
    """Return what errors call a function of a runtime."""
    name: str = function.__name__
    return name


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which errors call `name`."""
    function.__name__ = name
    return function
