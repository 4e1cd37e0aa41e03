"""Load compiled objects for the CPU into this process."""

import ctypes
import functools
import itertools
import mmap
import os
import struct
import weakref
from typing import Any, Final

import numpy as np

from q4jit.compilers.stack import on_large_stack
from q4jit.errors import CompileError, TargetError
from q4jit.locks import BUILD, keep_at_exit
from q4jit.targets import Target, host_target, runs_here

# generated code may call these; any other symbol is a helper of the compiler that q4jit lacks
_ALLOWED_SYMBOLS: Final = frozenset(
    {"memcpy", "memmove", "memset", "syscall", "sched_yield", "_GLOBAL_OFFSET_TABLE_"}
)
_ELF_MAGIC: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_SHT_SYMTAB: Final = 2

_numbers = itertools.count()
_unowned: list[Any] = []  # libraries whose LoadedObject is gone


_REFUSED: Final = (
    "this process may not make memory executable, which kernels need. SELinux (deny_execmem), "
    "systemd (MemoryDenyWriteExecute=), PR_SET_MDWE or a seccomp filter can forbid it; allow it "
    "there, or set Q4JIT_DISABLE_JIT=1 to run functions as plain NumPy"
)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check_executable_memory() -> None:
    """Raise TargetError if this process cannot make memory executable.

    LLVM would print its own line on standard error, and raise an error that does not name the
    cause. The policy may change at any time, and a check takes some microseconds. It asks for
    memory as LLVM does: write first, execute afterwards.
    """
    if os.name != "posix":
        return
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, flags=private) as page:
            start = ctypes.addressof(ctypes.c_char.from_buffer(page))
            read_execute = mmap.PROT_READ | mmap.PROT_EXEC
            if _libc().mprotect(ctypes.c_void_p(start), ctypes.c_size_t(len(page)), read_execute):
                problem = ctypes.get_errno()
                raise OSError(problem, os.strerror(problem))
    except PermissionError as error:
        raise TargetError(f"{_REFUSED} ({error.strerror})") from None
    except OSError as error:
        raise TargetError(_no_memory(error.strerror)) from None


def _no_memory(problem: object) -> str:
    return (
        f"cannot put a kernel into memory: {problem}; free memory, or raise the limits RLIMIT_AS "
        "and vm.max_map_count"
    )


@functools.cache
def _jit() -> Any:  # llvmlite has no annotations
    import llvmlite.binding as llvm  # late: importing q4jit does not load LLVM

    llvm.initialize_native_target()  # to initialise all targets takes a millisecond longer
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


class LoadedObject:
    """An object file in executable memory, which is freed with this instance.

    Every call into LLVM holds `locks.BUILD`, which a fork waits for. Otherwise a child could
    inherit LLVM's own lock from a thread that does not exist in the child. If another thread
    holds BUILD, the next load or release frees the memory.
    """

    def __init__(self, object_bytes: bytes, symbols: tuple[str, ...], target: Target) -> None:
        """Load `symbols` of an object for use in this process.

        Raises TargetError if this machine cannot run code for `target` or refuses executable
        memory, and CompileError if the object is damaged or needs other symbols.
        """
        if not runs_here(target):
            raise TargetError(
                f"this machine ({host_target()}) cannot run code for {target}; use a target that "
                "it can run, or only inspect_source and inspect_asm"
            )
        outside = undefined_symbols(object_bytes) - _ALLOWED_SYMBOLS
        if outside:
            missing = ", ".join(sorted(outside))
            raise CompileError("llvmlite", (), f"the object needs unknown symbols: {missing}", "")
        with BUILD:
            _unowned.clear()
            _check_executable_memory()
            try:
                linked = on_large_stack(lambda: _link(object_bytes, symbols))
            except RuntimeError as error:
                raise TargetError(_no_memory(error)) from error
            self.addresses = {symbol: int(linked[symbol]) for symbol in symbols}
            weakref.finalize(self, _release, [linked]).atexit = False
            del linked  # now only the finalizer's list refers to it


def _link(object_bytes: bytes, symbols: tuple[str, ...]) -> Any:
    import llvmlite.binding as llvm  # late: importing q4jit does not load LLVM

    library = llvm.JITLibraryBuilder().add_object_img(object_bytes)
    library.add_current_process()
    for symbol in symbols:
        library.export_symbol(symbol)
    return keep_at_exit(library.link(_jit(), f"q4jit{next(_numbers)}"))


def _release(owned: list[Any]) -> None:  # the garbage collector calls it: it must not wait
    _unowned.append(owned.pop())
    if BUILD.acquire(blocking=False):
        try:
            _unowned.clear()
        finally:
            BUILD.release()


def undefined_symbols(object_bytes: bytes) -> frozenset[str]:
    """Return the symbols that an ELF object needs. Raises CompileError for other bytes.

    Layout: the ELF-64 object file format (Elf64_Ehdr, Elf64_Shdr, Elf64_Sym).
    """
    try:
        if not object_bytes.startswith(_ELF_MAGIC):
            raise ValueError("not a 64-bit little-endian ELF file")
        (sections_at,) = struct.unpack_from("<Q", object_bytes, 0x28)
        entry_bytes, count = struct.unpack_from("<HH", object_bytes, 0x3A)
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", object_bytes, sections_at + i * entry_bytes)
            for i in range(count)
        ]
        names: set[str] = set()
        for header in headers:
            if header[1] == _SHT_SYMTAB:
                strings_at = headers[header[6]][4]
                names |= _undefined_in(object_bytes, header[4], header[5], strings_at)
        return frozenset(names)
    except (struct.error, ValueError, IndexError) as error:
        raise CompileError("llvmlite", (), f"damaged object: {error}", "") from error


def _undefined_in(data: bytes, start: int, size_bytes: int, strings_at: int) -> set[str]:
    names = set()
    for at in range(start, start + size_bytes, 24):
        name, _info, _other, section = struct.unpack_from("<IBBH", data, at)
        if section == 0 and name:
            end = data.index(b"\0", strings_at + name)
            names.add(data[strings_at + name : end].decode(errors="replace"))
    return names


def function(address: int, *argument_types: Any) -> Any:
    """Return a loaded symbol as a ctypes function without a result; calls release the GIL."""
    return ctypes.CFUNCTYPE(None, *argument_types)(address)


# In NumPy's public `PyArrayObject_fields`, the pointer to the elements is the first field after the
# object header. Reading it takes 0.15 µs, `ndarray.ctypes.data` 1 µs.
_DATA_OFFSET_BYTES: Final = object.__basicsize__
_pointer_at = ctypes.c_size_t.from_address


def data_pointer(array: np.ndarray[Any, Any]) -> int:
    """Return the address of an array's first element."""
    return _pointer_at(id(array) + _DATA_OFFSET_BYTES).value


_probe = np.arange(3, dtype=np.float32)[1:]
if data_pointer(_probe) != _probe.ctypes.data:  # pragma: no cover - another Python or NumPy

    def data_pointer(array: np.ndarray[Any, Any]) -> int:
        """Return the address of an array's first element."""
        return int(array.ctypes.data)
