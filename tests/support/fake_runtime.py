"""Give a process the GPUs of the fake runtime that `fake_gpu` built.

Only for child processes, since a loaded driver stays loaded. Tests start many of them, so nothing
is imported here that takes long.
"""

import ctypes
import importlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

LIBRARIES: Final = {"amd": "libamdhip64.so", "nvidia": "libcuda.so.1"}
ARCHS: Final = {"amd": ("gfx1100", "gfx1036"), "nvidia": ("sm_90", "sm_80")}
_MACHS: Final = {"gfx1100": 0x41, "gfx1036": 0x45}  # EF_AMDGPU_MACH of LLVM's AMDGPUUsage
_EM_AMDGPU: Final = 224


class Fake:
    """The fake runtime of a process, with its counters and failures on request."""

    def __init__(self, folder: str, platform: str, node: str = "/dev/null") -> None:
        from q4jit.runtime import devices

        self.platform = platform
        self.library = ctypes.CDLL(str(Path(folder) / "lib" / LIBRARIES[platform]))
        other = {"amd": "nvidia", "nvidia": "amd"}[platform]
        devices._NODES.update({platform: (node,), other: ()})
        if platform == "amd":
            self._describe_devices()

    def __getitem__(self, name: str) -> int:
        """Return a counter: `launches` is fake_launches."""
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def __setitem__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def shape(self) -> list[int]:
        """Return grid, block and LDS bytes of the last launch."""
        return list((ctypes.c_uint * 7).in_dll(self.library, "fake_launch_shape"))

    def values(self) -> bytes:
        """Return the arguments of the last launch."""
        return bytes((ctypes.c_uint64 * 16).in_dll(self.library, "fake_launch_values"))

    def stream(self) -> int:
        """Return the stream of the last launch."""
        return ctypes.c_uint64.in_dll(self.library, "fake_launch_stream").value

    def allocations(self) -> int:
        """Return the number of allocations that are not freed."""
        count: int = self.library.fake_allocations()
        return count

    def fail(self, amd: str, nvidia: str, code: int) -> str:
        """Make the next call of a function fail, and return the function's name."""
        name = {"amd": amd, "nvidia": nvidia}[self.platform]
        self.library.fake_fail(name.encode(), code)
        return name

    def code(self, device: int = 0) -> bytes:
        """Return the header of a code object for a device."""
        if self.platform == "nvidia":
            return b"\x7fELF\2\1\1" + bytes(57)
        mach = _MACHS[ARCHS["amd"][device]]
        head = struct.pack("<HHIQQQIHHHHHH", 3, _EM_AMDGPU, 1, 0, 0, 0, mach, 64, 0, 0, 0, 0, 0)
        return b"\x7fELF\2\1\1".ljust(16, b"\0") + head

    def _describe_devices(self) -> None:
        """Write the results of hipGetDeviceProperties in the binding's struct."""
        hip: Any = importlib.import_module("rocm.bindings.hip")
        size_bytes = hip.hipDeviceProp_t().c_sizeof()
        self["properties_bytes"] = size_bytes
        for index, arch in enumerate(ARCHS["amd"]):
            data = bytearray(size_bytes)
            for name, text in (("name", f"Fake {index}"), ("gcnArchName", f"{arch}:xnack-")):
                at = _offset(hip, name)
                data[at : at + len(text)] = text.encode()
            properties = hip.hipDeviceProp_t()
            ctypes.memmove(int(properties.as_c_void_p().value), bytes(data), size_bytes)
            properties.totalGlobalMem = 1 << 20
            properties.sharedMemPerBlock = 64 << 10
            properties.maxThreadsPerBlock = 1024
            properties.multiProcessorCount = 96 - index
            properties.warpSize = 32
            properties.l2CacheSize = 6 << 20
            properties.clockRate = 2_500_000
            properties.integrated = index
            properties.pciBusID = 3 + index
            target = (ctypes.c_char * 4096 * len(ARCHS["amd"])).in_dll(
                self.library, "fake_properties"
            )
            ctypes.memmove(target[index], int(properties.as_c_void_p().value), size_bytes)


def _offset(hip: Any, field: str) -> int:
    """Return the position of a text in hipDeviceProp_t, read from a struct of numbered words."""
    properties = hip.hipDeviceProp_t()
    size_bytes = properties.c_sizeof()
    numbered = b"".join(b"%03x\0" % word for word in range(size_bytes // 4))
    ctypes.memmove(int(properties.as_c_void_p().value), numbered, len(numbered))
    text = getattr(properties, field)
    return 4 * int(text if isinstance(text, str) else text.split(b"\0")[0], 16)


@contextmanager
def refused(kind: type[Exception], *parts: str) -> Iterator[None]:
    """Check that the block raises `kind` with all `parts` in its message."""
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
