"""The memory that a device has left, for errors before minutes are spent on loading."""

from pathlib import Path
from typing import Final

import torch

from q4jit.errors import DeviceError, expected

_MEMINFO: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")  # of a container, in version 2


def check_room(needed_bytes: int, device: torch.device, what: str) -> None:
    """Raise DeviceError if a device has less memory left than is needed.

    what: needs it, for the message. Nothing is checked where the system does not say what is left.
    """
    left = available_bytes(device)
    if left is not None and needed_bytes > left:
        where, cure = f"memory for {what} on {device}", "free memory, or take a smaller file"
        amount, got = f"{needed_bytes / 1e9:.2f} GB", f"{left / 1e9:.2f} GB that are available"
        raise DeviceError(expected(amount, got, where=where, cure=cure))


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a device; None if the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    known = [left for left in (_available_to_machine(), _left_to_group()) if left is not None]
    return min(known, default=None)


def _available_to_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def _left_to_group() -> int | None:
    """Return what the container's limit leaves; pages of files can be freed, and do not count."""
    try:
        most = (_GROUP / "memory.max").read_text().strip()
        used = int((_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(stat.get("file", 0))
