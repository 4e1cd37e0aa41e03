"""Make a process believe in the GPUs of the fake runtime that `fake_gpu` built.

For child processes alone: what a process has loaded as its GPU's driver stays loaded. They start
often, so nothing is imported here that takes long.
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
    """The fake runtime of a process: its counters, and failures on request."""

    def __init__(self, folder: str, platform: str, node: str = "/dev/null") -> None:
        from q4jit.runtime import devices

        self.platform = platform
        self.library = ctypes.CDLL(str(Path(folder) / "lib" / LIBRARIES[platform]))
        other = {"amd": "nvidia", "nvidia": "amd"}[platform]
        devices._NODES.update({platform: (node,), other: ()})
        if platform == "amd":
            self._describe_devices()

    def __getitem__(self, name: str) -> int:
        """A counter: `launches` is fake_launches."""
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def __setitem__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def shape(self) -> list[int]:
        """Grid, block and LDS bytes of the last launch."""
        return list((ctypes.c_uint * 7).in_dll(self.library, "fake_launch_shape"))

    def values(self) -> bytes:
        """The parameters of the last launch."""
        return bytes((ctypes.c_uint64 * 16).in_dll(self.library, "fake_launch_values"))

    def stream(self) -> int:
        """The stream of the last launch."""
        return ctypes.c_uint64.in_dll(self.library, "fake_launch_stream").value

    def allocations(self) -> int:
        """How many allocations are not freed."""
        count: int = self.library.fake_allocations()
        return count

    def fail(self, amd: str, nvidia: str, code: int) -> str:
        """Let the next call of this name fail; its name is returned."""
        name = {"amd": amd, "nvidia": nvidia}[self.platform]
        self.library.fake_fail(name.encode(), code)
        return name

    def code(self, device: int = 0) -> bytes:
        """The head of a code object for a device."""
        if self.platform == "nvidia":
            return b"\x7fELF\2\1\1" + bytes(57)
        mach = _MACHS[ARCHS["amd"][device]]
        head = struct.pack("<HHIQQQIHHHHHH", 3, _EM_AMDGPU, 1, 0, 0, 0, mach, 64, 0, 0, 0, 0, 0)
        return b"\x7fELF\2\1\1".ljust(16, b"\0") + head

    def _describe_devices(self) -> None:
        """Fill in what hipGetDeviceProperties gives, as the binding lays it out."""
        hip: Any = importlib.import_module("rocm.bindings.hip")
        size_bytes = hip.hipDeviceProp_t().c_sizeof()
        self["properties_bytes"] = size_bytes
        for index, arch in enumerate(ARCHS["amd"]):
            data = bytearray(size_bytes)
            for name, text in (("name", f"Fake {index}"), ("gcnArchName", f"{arch}:xnack-")):
                at = _offset(hip, name)
                data[at : at + len(text)] = text.encode()
            found = hip.hipDeviceProp_t()
            ctypes.memmove(int(found.as_c_void_p().value), bytes(data), size_bytes)
            found.totalGlobalMem = 1 << 20
            found.sharedMemPerBlock = 64 << 10
            found.maxThreadsPerBlock = 1024
            found.multiProcessorCount = 96 - index
            found.warpSize = 32
            found.l2CacheSize = 6 << 20
            found.clockRate = 2_500_000
            found.integrated = index
            found.pciBusID = 3 + index
            target = (ctypes.c_char * 4096 * len(ARCHS["amd"])).in_dll(
                self.library, "fake_properties"
            )
            ctypes.memmove(target[index], int(found.as_c_void_p().value), size_bytes)


def _offset(hip: Any, field: str) -> int:
    """Where a text stands in hipDeviceProp_t: read from memory in which every word is numbered."""
    found = hip.hipDeviceProp_t()
    size_bytes = found.c_sizeof()
    numbered = b"".join(b"%03x\0" % word for word in range(size_bytes // 4))
    ctypes.memmove(int(found.as_c_void_p().value), numbered, len(numbered))
    text = getattr(found, field)
    return 4 * int(text if isinstance(text, str) else text.split(b"\0")[0], 16)


@contextmanager
def refused(kind: type[Exception], *parts: str) -> Iterator[None]:
    """A block that must raise `kind` with all `parts` in its message."""
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
