"""Run LLVM where the stack is large enough, whatever the stack of the calling thread.

LLVM's passes use more than 64 KiB of stack, which programs with many threads give to each of them
(`threading.stack_size`), and musl's default is 128 KiB. An overflow is no exception, but SIGSEGV.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from q4jit.errors import TargetError

_R = TypeVar("_R")

_ENOUGH_BYTES: Final = 1 << 20  # LLVM was seen to need between 64 and 128 KiB for a small kernel
_STACK_BYTES: Final = 16 << 20  # of the threads made here; pages that are not used cost nothing
_ATTRIBUTES_BYTES: Final = 128  # pthread_attr_t has 56 or 64
_START: Final = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def on_large_stack(work: Callable[[], _R]) -> _R:
    """Return `work()`, called in this thread if its stack is large, else in one made for it.

    Raises the errors of `work`, and TargetError if the system refuses the thread. The thread is
    gone when this returns. It is the system's own even where `threading` is patched, as by gevent.
    """
    if sys.platform != "linux" or _stack_bytes() >= _ENOUGH_BYTES:
        return work()
    results: list[_R] = []
    errors: list[BaseException] = []

    def run(_: int | None) -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    problem = _run_thread(_START(run))
    if problem:
        raise TargetError(
            f"cannot start a thread with a stack of {_STACK_BYTES >> 20} MiB to compile in "
            f"({os.strerror(problem)}); make the first call in a thread with a larger stack"
        )
    if errors:
        raise errors.pop()  # nothing here refers to it any more, so its frames die with it
    return results[0]


@functools.cache
def threads_library() -> Any:  # functions without annotations
    """Return the C library with the functions of POSIX threads."""
    return ctypes.CDLL(None)


@contextlib.contextmanager
def thread_attributes(stack_bytes: int) -> "Iterator[ctypes.Array[ctypes.c_char]]":
    """Make attributes (`pthread_attr_t`) of a thread with a stack of this size."""
    library = threads_library()
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    library.pthread_attr_init(attributes)
    try:
        library.pthread_attr_setstacksize(attributes, ctypes.c_size_t(stack_bytes))
        yield attributes
    finally:
        library.pthread_attr_destroy(attributes)


def _run_thread(start: Any) -> int:
    """Run a thread to its end; return the number of the error if there is no thread."""
    library, thread = threads_library(), ctypes.c_ulong()
    with thread_attributes(_STACK_BYTES) as attributes:
        problem = int(library.pthread_create(ctypes.byref(thread), attributes, start, None))
    if not problem:
        library.pthread_join(thread, None)
    return problem


def _stack_bytes() -> int:
    """Return the size of this thread's stack; a large number if it is not known."""
    if threading.get_native_id() == os.getpid():
        import resource  # late: other systems may lack it

        # glibc would read /proc/self/maps, which takes longer than a small kernel
        soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft
    library, start, size = threads_library(), ctypes.c_void_p(), ctypes.c_size_t()
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    library.pthread_self.restype = ctypes.c_ulong
    if library.pthread_getattr_np(ctypes.c_ulong(library.pthread_self()), attributes):
        return sys.maxsize
    library.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size))
    library.pthread_attr_destroy(attributes)
    return size.value
