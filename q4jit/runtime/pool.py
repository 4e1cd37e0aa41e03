"""The thread pool of CPU kernels. Its workers run generated code (`pool.ll`) without the GIL.

A worker is a thread of the operating system that runs `pool_worker`; Python does not know of it.
Python's own would be greenlets where gevent or eventlet has patched `threading`. After a job it
spins for some microseconds, because the next kernel of a model usually follows at once; then it
sleeps on a futex. A job is a range of tasks, which the caller and the workers take chunk by chunk.
Only one job runs at a time: a second caller sees that the pool is locked and works alone.

The workers end before a fork, and the next call starts them again: from 3.12 on, Python warns of
forks while threads run. A forked child discards the pool, which a job of another thread may have
locked, and starts a new one when it needs it. Only Linux has futexes: other systems have no pool.
"""

import atexit
import contextlib
import ctypes
import os
import sys
import warnings
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Final

from q4jit import config
from q4jit.compilers import cache
from q4jit.compilers.stack import thread_attributes, threads_library
from q4jit.locks import BUILD, is_exiting, warnings_later
from q4jit.runtime.cpu import LoadedObject, function
from q4jit.targets import Target, host_target

# A round pauses 10 to 40 ns. All rounds together last longer than the code between two kernels of a
# model: 30 to 50 µs of NumPy, or 100 to 200 µs of PyTorch. Waking a worker takes 60 µs. SmolLM2
# decoded 45 tokens/s with 6000 rounds and 60 with 24000 (PyTorch, two cores of an Intel Xeon).
_SPIN_ROUNDS: Final = 24000
_YIELD_AFTER: Final = 4096  # rounds; a worker that takes longer was probably descheduled
_FUTEX: Final = {"x86-64": 202, "aarch64": 98}  # Linux system call numbers
_PAUSE: Final = {
    "x86-64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}
_STOP_AT, _SHARES_AT = 12, 48  # byte offsets in the pool's state
_STACK_BYTES: Final = 2 << 20  # of a worker; musl's default is 128 KiB
_MOST_POLLS: Final = 200
_SYMBOLS: Final = ("pool", "pool_worker", "pool_stop")


def text(target: Target) -> str:
    """Return the LLVM IR of the pool: `pool.ll` for `target`."""
    template = (resources.files(__package__) / "pool.ll").read_text(encoding="utf-8")
    declare_pause, pause = _PAUSE[target.family]
    # not Jinja, as for GPU kernels: importing it would add tens of ms to the CPU's first call
    return Template(template).substitute(
        triple=target.triple,
        futex=_FUTEX[target.family],
        declare_pause=declare_pause,
        pause=pause,
        spin_rounds=_SPIN_ROUNDS,
        yield_after=_YIELD_AFTER,
    )


class Pool:
    """The worker threads; `address` is the pool's address, which kernels take."""

    def __init__(self) -> None:
        """Compile (or fetch) the pool's code, without starting a thread."""
        from q4jit.compilers import llvm as compiler  # late: importing q4jit does not load LLVM

        target = host_target()
        object_bytes = cache.fetch(
            target, compiler, "q4jit_pool", text(target), cause="kernels on the CPU need threads"
        ).object_bytes
        self._code = LoadedObject(object_bytes, _SYMBOLS, target)
        self.address = self._code.addresses["pool"]
        # zero where there is no thread; pthread_create itself writes here, so that an interrupt
        # after it does not lose the thread
        self._threads = (ctypes.c_ulong * config.MOST_THREADS)()

    @property
    def workers(self) -> int:
        """The number of threads."""
        return sum(map(bool, self._threads))

    def start(self, workers: int) -> None:
        """Start threads until there are `workers`, or until the system refuses one."""
        ctypes.c_int64.from_address(self.address + _SHARES_AT).value = 2 * (workers + 1)
        worker = self._code.addresses["pool_worker"]
        for i in range(workers):
            if self._threads[i]:
                continue
            ctypes.c_int32.from_address(self.address + _STOP_AT).value = 0
            if not _create_thread(self._threads, i, worker, self.address):
                return  # a limit of the system; the threads so far share the work

    def _entry(self, symbol: str) -> Any:  # a ctypes function
        return function(self._code.addresses[symbol], ctypes.c_void_p)

    def stop(self) -> None:
        """End the workers. A caller inside the pool, or a later one, works alone."""
        self._entry("pool_stop")(self.address)
        for i, thread in enumerate(self._threads):
            if thread:
                threads_library().pthread_join(ctypes.c_ulong(thread), None)
                self._threads[i] = 0


def _create_thread(
    threads: "ctypes.Array[ctypes.c_ulong]", i: int, start: int, argument: int
) -> bool:
    """Start thread `i`; return whether the system allowed it."""
    library = threads_library()
    handle = ctypes.byref(threads, i * ctypes.sizeof(ctypes.c_ulong))
    with thread_attributes(_STACK_BYTES) as attributes:
        pointers = ctypes.c_void_p(start), ctypes.c_void_p(argument)
        if library.pthread_create(handle, attributes, *pointers):
            threads[i] = 0
            return False
    library.pthread_setname_np(ctypes.c_ulong(threads[i]), f"q4jit-{i}".encode())
    return True


@dataclass
class _Process:
    """This process's pool.

    A pool's code is never freed: a thread may be inside it when the interpreter ends. In a forked
    child, freeing would wait for LLVM's lock, which a thread of the parent may have held.

    Attributes:
        pool: the pool, if there is one.
        address: the pool's address; 0 if kernels run in their caller; None until the first call.
        inherited: pools of the parent, and stopped pools.
        threads: the number of threads that kernels use; None until the first call.
        variables: the environment variables that were read for this number.
    """

    pool: Pool | None = None
    address: int | None = None
    inherited: list[Pool] = field(default_factory=list)
    threads: int | None = None
    variables: dict[str, str | None] = field(default_factory=dict)


_process = _Process()


def address() -> int:
    """Return the address of this process's pool; 0 for one thread. The first call starts it."""
    known = _process.address
    return _start() if known is None else known


def _start() -> int:
    with warnings_later(), BUILD:
        if _process.address is None:
            if is_exiting():  # nobody would stop the workers before their code is unmapped
                return 0
            threads = config.num_threads()
            if threads > 1 and sys.platform == "linux":
                # stored before a thread runs: after an interrupt, workers still need the code
                _process.pool = _process.pool or Pool()
                _process.pool.start(threads - 1)
                _process.address = _process.pool.address
            else:
                _process.address = 0
            _process.threads, _process.variables = threads, config.thread_variables()
        return _process.address


def _end_before_fork() -> None:
    """End the workers; the next call starts them again."""
    BUILD.acquire()  # until the fork is over: no other thread may start them meanwhile
    pool = _process.pool
    if pool is not None and (workers := pool.workers):
        # a thread that has been joined is counted for some microseconds more
        others = _count_threads() - workers
        _process.address = None
        pool.stop()
        for _ in range(_MOST_POLLS):
            if _count_threads() <= others:
                break
            os.sched_yield()


def _count_threads() -> int:
    """Return the number of this process's threads, as Python counts them; 0 if not known."""
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    return 0


def _continue_in_child() -> None:
    """Discard the pool: a thread of the parent may have been inside it."""
    if _process.pool is not None:
        _process.inherited.append(_process.pool)
    _process.pool = _process.address = _process.threads = None
    BUILD.release()


def threads_in_use() -> int:
    """Return the number of threads of kernels: that of the running pool, or of the next one.

    Warns once if an environment variable was changed after the pool had started.
    """
    warn_of_changed_variables()
    return config.num_threads() if _process.threads is None else _process.threads


def resize() -> None:
    """Let the next call start a pool with the number of threads that `config` has now.

    Calls that are running finish alone.
    """
    with BUILD:
        pool, _process.pool = _process.pool, None
        _process.address = _process.threads = None
        if pool is not None:
            _process.inherited.append(pool)
            pool.stop()


def warn_of_changed_variables() -> None:
    """Warn if a variable that the running pool was started with has another value now."""
    if _process.threads is None or config.chosen_threads() is not None:
        return
    now = config.thread_variables()
    for name, value in now.items():
        if _process.variables[name] != value:
            _process.variables = now  # warn once per change
            change = "unset" if value is None else f"set to {value!r}"
            warnings.warn(
                f"{name} was {change} after the first call, which started "
                f"{_process.threads} threads; use q4jit.set_num_threads(...) to change that",
                RuntimeWarning,
                stacklevel=4,
            )
            return


def _stop_at_exit() -> None:
    # the interpreter unmaps the code at its end, so workers must have left it by then
    _process.address = 0
    if _process.pool is not None:
        _process.pool.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_end_before_fork, after_in_parent=BUILD.release, after_in_child=_continue_in_child
    )
atexit.register(_stop_at_exit)
