"""The GPUs of this machine: found once, by name, with the driver of each."""

from pathlib import Path
from typing import Final

from q4jit.errors import DeviceError, TargetError
from q4jit.locks import BUILD
from q4jit.runtime.driver import Device, Driver
from q4jit.targets import HIP_ARCHS, Target

# Without one of these there is no such GPU, and no binding is imported to look for one.
# /dev/dxg is Windows' own device in WSL, for either platform.
_NODES: Final[dict[str, tuple[str, ...]]] = {
    "amd": ("/dev/kfd", "/dev/dxg"),
    "nvidia": ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"),
}
_NAMES: Final = {"amd": "AMD", "nvidia": "NVIDIA"}
_EXTRAS: Final = {"amd": "rocm", "nvidia": "nvidia"}


def find_devices() -> tuple[Device, ...]:
    """All GPUs that can be used: AMD's, then NVIDIA's, each in its driver's order.

    HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES are obeyed by the drivers.
    `why_none` says why a GPU that is there was not found.
    """
    return tuple(device for driver in _search()[0].values() for device in driver.devices)


def why_none() -> str:
    """Why there is no device, or none of a platform whose device file is there; else empty."""
    drivers, reasons = _search()
    if not drivers and not reasons:
        nodes = ", ".join(dict.fromkeys(node for nodes in _NODES.values() for node in nodes))
        return f"no GPU is here: none of {nodes} exists"
    return "; ".join(reasons)


def driver_of(device: Device) -> Driver:
    """The driver of a device that `find_devices` gave."""
    return drivers()[device.platform]


def drivers() -> dict[str, Driver]:
    """The driver of each platform that has devices."""
    return _search()[0]


def find_device(name: str) -> Device:
    """The device called `name`.

    `hip` is the first one, `hip:1` the second in the order of `find_devices`, `hip:gfx1100` or
    `hip:sm_90` the first of an arch. `cuda`, `cuda:1` and `cuda:sm_90` count NVIDIA's alone. Raises
    DeviceError for any other name, listing the devices.
    """
    found = find_devices()
    prefix, colon, which = name.partition(":")
    if prefix == "cuda":
        found = tuple(device for device in found if device.platform == "nvidia")
    if prefix in {"hip", "cuda"}:
        if not colon:
            matches = found
        elif which.isascii() and which.isdigit():
            matches = found[int(which) : int(which) + 1]
        else:
            matches = tuple(device for device in found if device.arch == which)
        if matches:
            return matches[0]
    known = ", ".join(f"hip:{place} is {device}" for place, device in enumerate(find_devices()))
    if not known and prefix in {"hip", "cuda"}:
        raise DeviceError(f"no device {name!r}: {why_none()}")
    raise DeviceError(
        f"no device {name!r}: accepted are hip, hip:NUMBER, hip:ARCH, and the same with cuda for "
        f"NVIDIA's; here, {known or 'there is none'}"
    )


def target_of(device: Device) -> Target:
    """The target of a device's own arch. Raises TargetError for one that q4jit has no facts of."""
    if device.arch not in HIP_ARCHS:
        raise TargetError(f"found {device}: known archs are {', '.join(HIP_ARCHS)}")
    return Target("hip", device.arch)


_Found = tuple[dict[str, Driver], tuple[str, ...]]
_found: _Found | None = None  # of the finished search: read without the lock at every call


def _search() -> _Found:
    global _found  # noqa: PLW0603 - one search of the process, as its devices are
    if _found is None:
        with BUILD:  # one driver of each platform, also where two threads come first
            if _found is None:
                _found = _search_once()
    return _found


def _search_once() -> _Found:
    """Platform → driver, and why a platform with a device file has none."""
    found: dict[str, Driver] = {}
    reasons = []
    for platform, start in (("amd", _start_amd), ("nvidia", _start_nvidia)):
        node = next((node for node in _NODES[platform] if Path(node).exists()), None)
        if node is None:
            continue
        try:
            found[platform] = start()
        except ModuleNotFoundError as error:
            reasons.append(
                f"an {_NAMES[platform]} GPU seems to be here ({node}), but its Python binding is "
                f"not ({error}): pip install 'q4jit[{_EXTRAS[platform]}]'"
            )
        except DeviceError as error:
            reasons.append(f"{node} is here, but {error}")
        except (ImportError, OSError, RuntimeError) as error:  # how an installed binding is broken
            reasons.append(
                f"{node} is here, but the Python binding of {_NAMES[platform]} GPUs cannot be used "
                f"({error!r}): pip install --force-reinstall 'q4jit[{_EXTRAS[platform]}]', or "
                "repair the driver and runtime that it loads"
            )
    return found, tuple(reasons)


def _start_amd() -> Driver:
    from q4jit.runtime.hip import HipDriver  # late: with its compilers

    return HipDriver()


def _start_nvidia() -> Driver:
    from q4jit.runtime.cuda import CudaDriver  # late, as AMD's

    return CudaDriver()
