"""Find the GPUs of this machine and their drivers, once per process."""

from pathlib import Path
from typing import Final

from q4jit.errors import DeviceError, TargetError
from q4jit.locks import BUILD
from q4jit.runtime.driver import Device, Driver
from q4jit.targets import HIP_ARCHS, Target

# A binding is imported only if one of its platform's device files exists.
# /dev/dxg is the GPU of WSL, of either platform.
_NODES: Final[dict[str, tuple[str, ...]]] = {
    "amd": ("/dev/kfd", "/dev/dxg"),
    "nvidia": ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"),
}
_NAMES: Final = {"amd": "AMD", "nvidia": "NVIDIA"}
_EXTRAS: Final = {"amd": "rocm", "nvidia": "nvidia"}


def find_devices() -> tuple[Device, ...]:
    """Return all usable GPUs: AMD's, then NVIDIA's, each in its driver's order.

    The drivers obey HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES.
    `why_none` returns why a GPU is missing.
    """
    return tuple(device for driver in _search()[0].values() for device in driver.devices)


def why_none() -> str:
    """Return why there is no GPU, or why a platform with a device file has none; else empty."""
    drivers, reasons = _search()
    if not drivers and not reasons:
        nodes = ", ".join(dict.fromkeys(node for nodes in _NODES.values() for node in nodes))
        return f"no GPU, or no driver for it (none of {nodes} exists)"
    return "; ".join(reasons)


def device_files() -> dict[str, tuple[str, ...]]:
    """Return the device files of each platform; its loaded driver makes at least one."""
    return dict(_NODES)


def driver_of(device: Device) -> Driver:
    """Return the driver of a device from `find_devices`."""
    return drivers()[device.platform]


def drivers() -> dict[str, Driver]:
    """Return the driver of each platform that has devices."""
    return _search()[0]


def find_device(name: str, without: str = "use the target 'cpu'") -> Device:
    """Return the device with a name.

    `hip` is the first device and `hip:1` the second, in the order of `find_devices`; `hip:gfx1100`
    or `hip:sm_90` is the first device of an arch. `cuda`, `cuda:1` and `cuda:sm_90` count only
    NVIDIA's. Raises DeviceError for any other name; the message lists the devices.
    """
    devices = find_devices()
    prefix, colon, which = name.partition(":")
    if prefix == "cuda":
        devices = tuple(device for device in devices if device.platform == "nvidia")
    if prefix in {"hip", "cuda"}:
        if not colon:
            matches = devices
        elif which.isascii() and which.isdigit():
            matches = devices[int(which) : int(which) + 1]
        else:
            matches = tuple(device for device in devices if device.arch == which)
        if matches:
            return matches[0]
    known = ", ".join(f"hip:{index} = {device}" for index, device in enumerate(find_devices()))
    if not known and prefix in {"hip", "cuda"}:
        raise DeviceError(f"no device {name!r}: {why_none()}; {without}")
    raise DeviceError(
        f"no device {name!r}; expected hip, hip:NUMBER or hip:ARCH, or the same with cuda for "
        f"NVIDIA's GPUs. The GPUs of this machine: {known or 'none'}"
    )


def target_of(device: Device) -> Target:
    """Return the target of a device's arch. Raises TargetError for an arch that q4jit lacks."""
    if device.arch not in HIP_ARCHS:
        archs = ", ".join(HIP_ARCHS)
        raise TargetError(f"q4jit has no code for {device}; known archs are {archs}")
    return Target("hip", device.arch)


_Result = tuple[dict[str, Driver], tuple[str, ...]]
_result: _Result | None = None  # of the finished search; every call reads it without the lock


def _search() -> _Result:
    global _result  # noqa: PLW0603 - a process searches once
    if _result is None:
        with BUILD:  # two threads must not both start a driver
            if _result is None:
                _result = _search_once()
    return _result


def _search_once() -> _Result:
    """Return the driver of each platform, and why a platform with a device file has none."""
    started: dict[str, Driver] = {}
    reasons = []
    for platform, start in (("amd", _start_amd), ("nvidia", _start_nvidia)):
        node = next((node for node in _NODES[platform] if Path(node).exists()), None)
        if node is None:
            continue
        try:
            started[platform] = start()
        except ModuleNotFoundError as error:
            reasons.append(
                f"{node} exists, but the Python binding for {_NAMES[platform]} GPUs is not "
                f"installed ({error}); pip install 'q4jit[{_EXTRAS[platform]}]'"
            )
        except DeviceError as error:
            reasons.append(f"{node} exists, but {error}")
        except (ImportError, OSError, RuntimeError) as error:  # a broken installation of a binding
            reasons.append(
                f"{node} exists, but the Python binding for {_NAMES[platform]} GPUs does not load "
                f"({error!r}); pip install --force-reinstall 'q4jit[{_EXTRAS[platform]}]', or "
                "repair the driver and runtime that it loads"
            )
    return started, tuple(reasons)


def _start_amd() -> Driver:
    from q4jit.runtime.hip import HipDriver  # late: it imports the compilers

    return HipDriver()


def _start_nvidia() -> Driver:
    from q4jit.runtime.cuda import CudaDriver  # late: other machines do not need it

    return CudaDriver()
