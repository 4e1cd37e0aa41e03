"""Checked calls into the runtime of a GPU platform.

A call makes its device current and restores the previous one afterwards, because PyTorch and CuPy
use the same thread and, on NVIDIA, the same primary context.
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

_RELAXED: Final = 2  # hipStreamCaptureModeRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED

_LOST: Final = (
    "this kernel or an earlier one failed, and this process can no longer use the device; start a "
    "new process, with AMD_SERIALIZE_KERNEL=3 or CUDA_LAUNCH_BLOCKING=1 in its environment to see "
    "which kernel fails"
)
_WRONG_CODE: Final = "the code object is damaged or for another arch; delete its cache entry"
_CAPTURE: Final = (
    "this call cannot be captured in a graph; call the function once with the same shapes before "
    "the capture begins"
)
# error code of HIP and CUDA, which have the same numbers → cause and cure
_ADVICE: Final = {
    3: "the driver is not initialised; a forked child cannot use its parent's driver: start the "
    "process with spawn",
    4: "the process is ending",
    35: "the GPU's driver is too old for this runtime; update the driver",
    46: "another process has exclusive use of the device, or the device is being reset; check with "
    "rocm-smi or nvidia-smi",
    100: "no device is visible; check HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and "
    "CUDA_VISIBLE_DEVICES, and whether this user may open /dev/kfd or /dev/nvidia0 (on AMD, add "
    "the user to the groups render and video)",
    **dict.fromkeys((200, 209, 218, 300), _WRONG_CODE),
    214: "the device's memory is faulty (uncorrectable ECC error); reset the device",
    **dict.fromkeys((700, 702, 709, 710, *range(714, 720)), _LOST),
    803: "the versions of the GPU's driver and of this runtime do not match; update the driver, or "
    "reboot if it was just updated",
    **dict.fromkeys(range(900, 909), _CAPTURE),
}


@dataclass(frozen=True)
class Api:
    """The functions of a platform's runtime.

    Most are functions of its Python binding, which return an error code and results. `launch` and
    the fields after it are ctypes functions of the same library, which return only the error code:
    every call of a kernel uses them, and they avoid the binding's conversions.
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
    launch_early: Any = None  # NVIDIA: a launch that overlaps the previous kernel


class Calls(abc.ABC):
    """Calls into a platform's runtime; a failed call raises a DeviceError with a cure.

    The subclasses add the parts that differ between the platforms.
    """

    platform: str
    api: Api

    def __init__(self) -> None:
        """Register a hook that notices forks."""
        self.forked = False
        # neither platform's driver survives a fork: calls in the child would crash or hang
        os.register_at_fork(after_in_child=self._mark_forked)

    def _mark_forked(self) -> None:
        self.forked = True

    @abc.abstractmethod
    def current(self, device: int) -> AbstractContextManager[None]:
        """Make a device current in this thread for a `with` block."""

    @abc.abstractmethod
    def _current_handle(self, device: int) -> int:
        """Return what `api.get_current` reports while `device` is current."""

    @abc.abstractmethod
    def _describe(self, code: int) -> tuple[str, str]:
        """Return the name and the text of an error code."""

    def error(self, call: str, code: int, device: int | None) -> DeviceError:
        """Return the error of a failed call: the call, the device, the cause and the cure."""
        name, text = self._describe(code)
        advice = _ADVICE.get(code)
        return DeviceError(
            f"{call} failed on {self._name(device)}: {name} ({code}): {text}"
            + (f"; {advice}" if advice else "")
        )

    def _call(self, device: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the runtime; return its result, or a tuple if there are several."""
        code, *results = self._raw(function, *arguments)
        if code:
            raise self.error(name_of(function), code, device)
        return results[0] if len(results) == 1 else tuple(results)

    def _raw(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the runtime; return its error code and results."""
        if self.forked:
            raise self.fork_error()
        try:
            code, *results = function(*arguments)
        except RuntimeError as error:  # of both bindings: a library or a function is missing
            raise DeviceError(
                f"cannot call {name_of(function)}: {error}; install or update the GPU's driver and "
                "runtime (on AMD, set ROCM_PATH to the folder whose lib/ contains the runtime)"
            ) from error
        return int(code), *results

    def fork_error(self) -> DeviceError:
        """Return the error of a call in a forked child."""
        return DeviceError(
            f"a forked child (process {os.getpid()}) cannot use its parent's {self.platform} "
            "devices; use target='cpu' in the child, or start it with "
            "multiprocessing.get_context('spawn')"
        )

    def _name(self, device: int | None) -> str:
        return f"{self.platform} device {device}" if device is not None else self.platform

    @contextlib.contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Let this thread allocate and free memory while any thread captures a graph.

        Python may free an array at any time. In the other modes that would end the capture.
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
    """Return the name of a runtime's function, for errors."""
    name: str = function.__name__
    return name


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Name `function` for errors, and return it."""
    function.__name__ = name
    return function
