"""The thread pool of CPU kernels: workers that live in generated code, without the GIL.

A worker is a Python thread parked in one call of `pool_worker`. It spins for some microseconds
after a job, because the next kernel of a model usually follows at once, and then sleeps on a futex.
A job is a range of tasks that caller and workers take chunk by chunk. One job runs at a time: a
second caller finds the pool locked and works alone. A forked child has no workers; it forgets the
pool and makes its own when it needs one. Outside of Linux there is no futex and no pool.
"""

import atexit
import ctypes
import os
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, Final

from q4jit import config
from q4jit.compilers import cache
from q4jit.locks import BUILD
from q4jit.runtime.cpu import LoadedObject, function
from q4jit.targets import Target, host_target

# times a pause of 10 to 40 ns: what passes between two kernels of a model (attention, 30 to 50 µs)
_SPIN_ROUNDS: Final = 6000
_YIELD_AFTER: Final = 4096  # rounds of waiting for a worker that was probably descheduled
_FUTEX: Final = {"x86-64": 202, "aarch64": 98}  # Linux system call numbers
_PAUSE: Final = {
    "x86-64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}
_SHARES_AT: Final = 48  # in the pool's state
_SYMBOLS: Final = ("pool", "pool_worker", "pool_stop")


def source(target: Target) -> str:
    """The LLVM IR of the pool."""
    declare_pause, pause = _PAUSE[target.family]
    futex = _FUTEX[target.family]
    return f"""\
; The thread pool of q4jit. Its state is 512 bytes that live as long as this code:
;     0 address of pool_run          8 i32 lock: 1 while a job runs     12 i32 stop
;    16 task   24 args   32 n   40 chunk                                of the running job
;    48 i64 shares: what is left is divided by that many, twice the threads
;   128 i32 generation (a futex): counts jobs     132 i32 sleeping workers
;   256 i64 next task
;   384 i32 open: workers may join               388 i32 workers inside the job

target triple = "{target.triple}"

@pool = global {{ ptr, [504 x i8] }} {{ ptr @pool_run, [504 x i8] zeroinitializer }}, align 128

; Take tasks until none is left: a share of what is left, which shrinks, but never less than a
; chunk. A long run of neighbouring tasks reads memory in one stream; a late thread gets little.
define internal void @work(ptr %pool) #0 {{
entry:
  %task.at = getelementptr i8, ptr %pool, i64 16
  %task = load ptr, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  %args = load ptr, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  %n = load i64, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  %chunk = load i64, ptr %chunk.at
  %shares.at = getelementptr i8, ptr %pool, i64 48
  %shares = load i64, ptr %shares.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  br label %look
look:
  %now = load atomic i64, ptr %next.at monotonic, align 8
  br label %take
take:
  %from = phi i64 [ %now, %look ], [ %seen, %try ]
  %more = icmp slt i64 %from, %n
  br i1 %more, label %try, label %done
try:
  %left = sub i64 %n, %from
  %share = udiv i64 %left, %shares
  %small = icmp slt i64 %share, %chunk
  %size = select i1 %small, i64 %chunk, i64 %share
  %end = add i64 %from, %size
  %beyond = icmp sgt i64 %end, %n
  %to = select i1 %beyond, i64 %n, i64 %end
  %taken = cmpxchg ptr %next.at, i64 %from, i64 %to monotonic monotonic
  %seen = extractvalue {{ i64, i1 }} %taken, 0
  %mine = extractvalue {{ i64, i1 }} %taken, 1
  br i1 %mine, label %run, label %take
run:
  call void %task(ptr %args, i64 %from, i64 %to)
  br label %look
done:
  ret void
}}

; task(args, from, to) over 0 … n by all threads; returns when every task is done.
define void @pool_run(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0 {{
entry:
  %lock = getelementptr i8, ptr %pool, i64 8
  %was = cmpxchg ptr %lock, i32 0, i32 1 seq_cst seq_cst
  %free = extractvalue {{ i32, i1 }} %was, 1
  br i1 %free, label %publish, label %alone
alone:
  ; another thread's job is running
  call void %task(ptr %args, i64 0, i64 %n)
  ret void
publish:
  %task.at = getelementptr i8, ptr %pool, i64 16
  store ptr %task, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  store ptr %args, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  store i64 %n, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  store i64 %chunk, ptr %chunk.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  store i64 0, ptr %next.at
  %open = getelementptr i8, ptr %pool, i64 384
  store atomic i32 1, ptr %open seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %sleeping.at = getelementptr i8, ptr %pool, i64 132
  %sleeping = load atomic i32, ptr %sleeping.at seq_cst, align 4
  %none = icmp eq i32 %sleeping, 0
  br i1 %none, label %join, label %wake
wake:
  ; FUTEX_WAKE | FUTEX_PRIVATE_FLAG
  %woken = call i64 (i64, ...) @syscall(i64 {futex}, ptr %generation, i64 129, i64 2147483647)
  br label %join
join:
  call void @work(ptr %pool)
  ; A worker that comes now finds the job closed; one that is inside is waited for. Both sides
  ; write first and read then, in one total order, so one of them always sees the other.
  store atomic i32 0, ptr %open seq_cst, align 4
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %wait
wait:
  %round = phi i32 [ 0, %join ], [ %round.next, %again ]
  %count = load atomic i32, ptr %inside seq_cst, align 4
  %finished = icmp eq i32 %count, 0
  br i1 %finished, label %unlock, label %linger
linger:
  {pause}
  %round.next = add i32 %round, 1
  %long = icmp ugt i32 %round.next, {_YIELD_AFTER}
  br i1 %long, label %yield, label %again
yield:
  %yielded = call i32 @sched_yield()
  br label %again
again:
  br label %wait
unlock:
  store atomic i32 0, ptr %lock release, align 4
  ret void
}}

; The life of a worker; returns after pool_stop.
define void @pool_worker(ptr %pool) #0 {{
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  %generation = getelementptr i8, ptr %pool, i64 128
  %sleeping = getelementptr i8, ptr %pool, i64 132
  %open.at = getelementptr i8, ptr %pool, i64 384
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %leave ]
  br label %poll
poll:
  %round = phi i32 [ 0, %idle ], [ %round.next, %spin ], [ 0, %slept ]
  %now = load atomic i32, ptr %generation seq_cst, align 4
  %changed = icmp ne i32 %now, %seen
  br i1 %changed, label %job, label %unchanged
unchanged:
  %tired = icmp uge i32 %round, {_SPIN_ROUNDS}
  br i1 %tired, label %sleep, label %spin
spin:
  {pause}
  %round.next = add i32 %round, 1
  br label %poll
sleep:
  %s0 = atomicrmw add ptr %sleeping, i32 1 seq_cst
  ; FUTEX_WAIT | FUTEX_PRIVATE_FLAG: returns at once where the generation has moved on
  %w = call i64 (i64, ...) @syscall(i64 {futex}, ptr %generation, i64 128, i32 %seen, ptr null)
  br label %slept
slept:
  %s1 = atomicrmw sub ptr %sleeping, i32 1 seq_cst
  br label %poll
job:
  %stop = load atomic i32, ptr %stop.at seq_cst, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %end, label %enter
enter:
  %i0 = atomicrmw add ptr %inside, i32 1 seq_cst
  %open = load atomic i32, ptr %open.at seq_cst, align 4
  %closed = icmp eq i32 %open, 0
  br i1 %closed, label %leave, label %help
help:
  call void @work(ptr %pool)
  br label %leave
leave:
  %i1 = atomicrmw sub ptr %inside, i32 1 seq_cst
  br label %idle
end:
  ret void
}}

; Let the workers return.
define void @pool_stop(ptr %pool) #0 {{
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  store atomic i32 1, ptr %stop.at seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 {futex}, ptr %generation, i64 129, i64 2147483647)
  ret void
}}

declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
{declare_pause}

attributes #0 = {{ nounwind }}
"""


class Pool:
    """Workers beside the calling thread; `address` is what kernels take."""

    def __init__(self) -> None:
        """Compile (or fetch) the pool's code; no thread is started yet."""
        from q4jit.compilers import llvm as compiler  # late, as everywhere

        target = host_target()
        object_bytes = cache.fetch(target, compiler, "q4jit_pool", source(target)).object_bytes
        self._code = LoadedObject(object_bytes, _SYMBOLS, target)
        self.address = self._code.addresses["pool"]
        self._threads: list[threading.Thread] = []

    def start(self, workers: int) -> None:
        """Have `workers` threads, or as many as the system gives."""
        ctypes.c_int64.from_address(self.address + _SHARES_AT).value = 2 * (workers + 1)
        worker = self._entry("pool_worker")
        while len(self._threads) < workers:
            name = f"q4jit-{len(self._threads)}"
            thread = threading.Thread(target=worker, args=(self.address,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit of the system: the caller and these do all the work
                return
            self._threads.append(thread)

    def _entry(self, symbol: str) -> Any:  # a ctypes function
        return function(self._code.addresses[symbol], ctypes.c_void_p)

    def stop(self) -> None:
        """End the workers; a caller that is inside, or comes later, works alone."""
        self._entry("pool_stop")(self.address)
        for thread in self._threads:
            thread.join()


@dataclass
class _Process:
    """This process's pool. address: None while undecided, 0 where kernels run in their caller.

    A pool's code is never released: a daemon thread may be inside it when the interpreter ends, and
    in a forked child the release would enter LLVM, whose lock a thread of the parent may hold.
    """

    pool: Pool | None = None
    address: int | None = None
    inherited: list[Pool] = field(default_factory=list)


_process = _Process()


def address() -> int:
    """The address of this process's pool, started at the first call; 0 for one thread."""
    known = _process.address
    return _start() if known is None else known


def _start() -> int:
    with BUILD:
        if _process.address is None:
            threads = config.num_threads()
            if threads > 1 and sys.platform == "linux":
                # kept before a thread runs: an interrupt must not release code under workers
                _process.pool = _process.pool or Pool()
                _process.pool.start(threads - 1)
                _process.address = _process.pool.address
            else:
                _process.address = 0
        return _process.address


def _forget_in_child() -> None:
    """A forked child has none of its parent's threads."""
    if _process.pool is not None:
        _process.inherited.append(_process.pool)
    _process.pool, _process.address = None, None


def _stop_at_exit() -> None:
    # workers must not run code that the interpreter's end unmaps
    _process.address = 0
    if _process.pool is not None:
        _process.pool.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_stop_at_exit)
