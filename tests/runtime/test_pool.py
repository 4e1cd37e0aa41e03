"""The thread pool runs every task once, also with forks, exits and too few threads."""

import ctypes
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.compilers import cache, llvm
from q4jit.runtime import pool
from q4jit.runtime.cpu import LoadedObject
from q4jit.targets import find_target, host_target
from tests.support import child
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the pool needs Linux's futex"),
    pytest.mark.serial,
]

# --- the pool itself ----------------------------------------------------------------------------

# task: counts[i] += 1 for its i; drive: `jobs` jobs, number j of 1 + j·step % most tasks
COUNTING = """
define void @task(ptr %counts, i64 %from, i64 %to) {
entry:
  br label %loop
loop:
  %i = phi i64 [ %from, %entry ], [ %next, %loop ]
  %at = getelementptr i32, ptr %counts, i64 %i
  %old = atomicrmw add ptr %at, i32 1 monotonic
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %to
  br i1 %more, label %loop, label %done
done:
  ret void
}
define void @drive(ptr %pool, ptr %counts, i64 %jobs, i64 %step, i64 %most, i64 %chunk) {
entry:
  %run = load ptr, ptr %pool
  br label %loop
loop:
  %j = phi i64 [ 0, %entry ], [ %next, %loop ]
  %k = mul i64 %j, %step
  %r = urem i64 %k, %most
  %n = add i64 %r, 1
  call void %run(ptr %pool, ptr @task, ptr %counts, i64 %n, i64 %chunk)
  %next = add i64 %j, 1
  %more = icmp slt i64 %next, %jobs
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


def worker_ids() -> list[int]:
    """Return the ids of the threads of all pools of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(t.name) for t in tasks if (t / "comm").read_text().startswith("q4jit-")]


WORKERS = """
def workers():
    tasks = [open(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    return sum(task.read().startswith("q4jit-") for task in tasks)
"""


class Counter:
    """Jobs that count how often each task is executed."""

    def __init__(self) -> None:
        target = host_target()
        text = f'target triple = "{target.triple}"\n{COUNTING}'
        object_bytes = cache.fetch(target, llvm, "counting", text).object_bytes
        self._code = LoadedObject(object_bytes, ("drive",), target)
        drive = self._code.addresses["drive"]
        self._drive = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4)(drive)

    def run(
        self, address: int, jobs: int, step: int, most: int, chunk: int
    ) -> NDArray[np.integer[Any]]:
        counts = np.zeros(most, np.int32)
        self._drive(address, counts.ctypes.data, jobs, step, most, chunk)
        return counts


def wanted(jobs: int, step: int, most: int) -> NDArray[np.integer[Any]]:
    """Return how often each task must be executed: once per job that has it."""
    sizes = np.arange(jobs) * step % most + 1
    counts: NDArray[np.integer[Any]] = (sizes[:, None] > np.arange(most)).sum(0)
    return counts


@pytest.fixture(scope="module")
def counter() -> Counter:
    return Counter()


@pytest.fixture(params=[0, 1, 2, 7])
def workers(request: pytest.FixtureRequest) -> Iterator[pool.Pool]:
    made = pool.Pool()
    made.start(request.param)
    yield made
    made.stop()


def test_every_task_is_executed_exactly_once(workers: pool.Pool, counter: Counter) -> None:
    for chunk, most, jobs in ((1, 50, 20_000), (3, 17, 10_000), (1, 1, 10_000), (64, 1000, 2_000)):
        counts = counter.run(workers.address, jobs, 7919, most, chunk)
        np.testing.assert_array_equal(counts, wanted(jobs, 7919, most))


def test_jobs_after_pauses_are_complete(workers: pool.Pool, counter: Counter) -> None:
    for pause_s in [0.0, 1e-5, 1e-4, 1e-3, 5e-3] * 12:
        time.sleep(pause_s)
        counts = counter.run(workers.address, 5, 31, 40, 1)
        np.testing.assert_array_equal(counts, wanted(5, 31, 40))


def test_sleeping_workers_are_woken() -> None:
    """Run two tasks that wait for each other: they end only if two threads run them."""
    meeting = threading.Barrier(2)
    threads = []

    def task(_args: int, _from: int, _to: int) -> None:
        meeting.wait(child.TIMEOUT_S)
        threads.append(threading.get_native_id())

    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    kept = kind(task)
    made = pool.Pool()
    made.start(1)
    run_at = ctypes.c_size_t.from_address(made.address).value
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int64)(run_at)
    for _ in range(3):
        time.sleep(0.05)
        run(made.address, ctypes.cast(kept, ctypes.c_void_p), None, 2, 1)
    (worker,) = worker_ids()
    made.stop()
    assert sorted(threads) == sorted([threading.get_native_id(), worker] * 3)


def test_concurrent_callers_each_get_all_their_tasks(workers: pool.Pool, counter: Counter) -> None:
    results: list[NDArray[np.integer[Any]]] = []

    def call() -> None:
        results.append(counter.run(workers.address, 5_000, 13, 30, 1))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == len(callers)
    for counts in results:
        np.testing.assert_array_equal(counts, wanted(5_000, 13, 30))


def test_a_stopped_pool_still_serves_its_caller(counter: Counter) -> None:
    made = pool.Pool()
    made.start(3)
    made.stop()
    np.testing.assert_array_equal(counter.run(made.address, 100, 7, 9, 1), wanted(100, 7, 9))


def test_a_stopped_pool_starts_again(counter: Counter) -> None:
    made = pool.Pool()
    for workers in (3, 1, 2):
        made.start(workers)
        assert made.workers == workers
        np.testing.assert_array_equal(counter.run(made.address, 500, 7, 90, 1), wanted(500, 7, 90))
        made.stop()
        assert made.workers == 0


def test_fewer_threads_than_asked_for(monkeypatch: pytest.MonkeyPatch, counter: Counter) -> None:
    create = pool._create_thread
    monkeypatch.setattr(
        pool, "_create_thread", lambda threads, i, *rest: i < 2 and create(threads, i, *rest)
    )
    made = pool.Pool()
    made.start(5)
    try:
        assert made.workers == 2
        np.testing.assert_array_equal(counter.run(made.address, 500, 7, 90, 1), wanted(500, 7, 90))
    finally:
        made.stop()


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() == 0, reason="no limit of threads applies to root")
def test_a_limit_of_threads() -> None:
    child.run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        check()
        """,
        Q4JIT_NUM_THREADS="4",
    )


def test_an_interrupt_while_workers_start_leaves_the_pool_usable() -> None:
    child.run(
        """
        from q4jit.runtime import pool
        create = pool._create_thread
        def interrupted(threads, i, *rest):
            create(threads, i, *rest)
            raise KeyboardInterrupt
        pool._create_thread = interrupted
        try:
            product(x_wide, wide)
            raise AssertionError("not interrupted")
        except KeyboardInterrupt:
            pass
        pool._create_thread = create
        for _ in range(200):
            check()
        """,
        Q4JIT_NUM_THREADS="4",
    )


PATCHES = {
    "gevent": "from gevent import monkey\nmonkey.patch_all()\n",
    "eventlet": "import eventlet\neventlet.monkey_patch()\n",
}


@pytest.mark.process
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("library", PATCHES)
def test_workers_are_threads_where_threading_is_patched(library: str, early: bool) -> None:
    folder = Path(pytest.importorskip(library).__file__).parents[1]  # maybe not of this environment
    patch = "import warnings\nwarnings.simplefilter('ignore')\n" + PATCHES[library]
    program = """
    check()
    assert workers() == 2
    threads = [threading.Thread(target=check) for _ in range(4)]  # greenlets
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call = product.bind(x_wide, wide)
    np.testing.assert_allclose(call(), expected_wide, rtol=1e-4, atol=1e-4)
    reap(in_child(check))
    check()
    """
    prelude = patch + child.PRELUDE if early else child.PRELUDE + patch
    prelude += WORKERS
    path = os.pathsep.join([str(ROOT), str(folder)])
    child.run(program, prelude=prelude, Q4JIT_NUM_THREADS="3", PYTHONPATH=path)


@pytest.mark.parametrize("family", ["x86-64", "aarch64"])
def test_the_pool_compiles_for_every_family(family: str) -> None:
    target = find_target(f"cpu:{family}")
    assert "pool_run" in llvm.compile_assembly(pool.text(target), target)


# --- the number of threads ------------------------------------------------------------------------

DIGEST = f"""{WORKERS}
import hashlib
digest = hashlib.sha256()
for m in (1, 2, 5, 33):
    digest.update(product(np.resize(x_wide, (m, 256)), wide).tobytes())
check()
print(digest.hexdigest(), workers())
"""


def test_results_are_the_same_for_any_number_of_threads() -> None:
    outputs = {n: child.run(DIGEST, Q4JIT_NUM_THREADS=str(n)).split() for n in (1, 2, 3, 8)}
    assert {n: int(workers) for n, (_, workers) in outputs.items()} == {1: 0, 2: 1, 3: 2, 8: 7}
    assert len({digest for digest, _ in outputs.values()}) == 1


def test_omp_num_threads_and_affinity_limit_the_threads() -> None:
    ours = None  # Q4JIT_NUM_THREADS overrides the others
    assert child.run(DIGEST, Q4JIT_NUM_THREADS=ours, OMP_NUM_THREADS="1").split()[1] == "0"
    assert child.run(DIGEST, Q4JIT_NUM_THREADS="3", OMP_NUM_THREADS="1").split()[1] == "2"
    bound = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + child.PRELUDE
    output = child.run(DIGEST, prelude=bound, Q4JIT_NUM_THREADS=ours, OMP_NUM_THREADS=None)
    assert output.split()[1] == "0"


def test_the_import_starts_no_thread_and_loads_no_compiler() -> None:
    child.run(
        """
        import os, sys, threading
        import numpy
        before = len(os.listdir("/proc/self/task"))
        import q4jit
        q4jit.specialize(lambda x, w: x @ w)
        assert len(os.listdir("/proc/self/task")) == before
        assert threading.active_count() == 1
        assert "llvmlite" not in sys.modules
        """,
        prelude="",
        Q4JIT_NUM_THREADS="4",
    )


def test_idle_workers_sleep() -> None:
    spent = child.run(
        """
        check()
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - before)
        """,
        Q4JIT_NUM_THREADS="4",
    )
    assert float(spent) < 0.05


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_fork_before_the_first_call() -> None:
    child.run("reap(in_child(check)); check()", Q4JIT_NUM_THREADS="3")


@pytest.mark.process
def test_children_and_grandchildren_forked_after_calls() -> None:
    child.run(
        """
        check()
        def generation():
            check()
            assert workers() == 2
            reap(in_child(check))
            check(specialize(lambda x, w: x @ w * 2 / 2))
        for _ in range(5):
            reap(in_child(generation))
            check()
        """,
        prelude=child.PRELUDE + WORKERS,
        Q4JIT_NUM_THREADS="3",
    )


BUSY = """
stop = False
failures = []

def forever(work):
    def loop():
        try:
            while not stop:
                work()
        except BaseException as error:
            failures.append(error)
    thread = threading.Thread(target=loop)
    thread.start()
    return thread

def fork_beside(work, child, rounds):
    global stop
    threads = [forever(work) for _ in range(2)]
    try:
        for i in range(rounds):
            time.sleep(0.003 * (i % 5))
            reap(in_child(child))
    finally:
        stop = True
        for thread in threads:
            thread.join()
    assert not failures, failures
"""

BESIDE = {
    "kernels": "fork_beside(lambda: product(x_wide, wide), check, 25)",
    "compilations": """
        import itertools
        numbers = itertools.count()
        def compile_one():
            c = next(numbers)
            specialize(lambda x, w: x @ w + c, cache=False)(x_small, small)
        def compile_here():
            check()
            product2 = specialize(lambda x, w: x @ w + 0.5, cache=False)
            product2(x_small, small)
        fork_beside(compile_one, compile_here, 8)
        """,
    "repacking": """
        raw, shape = wide.raw.tobytes(), wide.shape
        from q4jit import QuantizedTensor
        def repack():
            product(x_wide, QuantizedTensor.from_bytes(raw, shape=shape, format="Q4_0"))
        def repack_here():
            repack()
            check()
        fork_beside(repack, repack_here, 25)
        """,
    "releases": """
        from q4jit.runtime.cpu import LoadedObject
        from q4jit.compilers import cache
        from q4jit.compilers import llvm
        from q4jit.targets import find_target, host_target
        text = "define void @f() { ret void }"
        loaded = []
        object_bytes = llvm.compile_object(text, host_target())
        def load():
            loaded.append(LoadedObject(object_bytes, ("f",), host_target()))
        def release():
            if loaded:
                loaded.pop()
            else:
                time.sleep(1e-4)
        for _ in range(600):
            load()
        def compile_here():
            specialize(lambda x, w: x @ w + 0.5, cache=False)(x_small, small)
        fork_beside(release, compile_here, 6)
        """,
}


@pytest.mark.process
@pytest.mark.parametrize("work", BESIDE)
def test_a_fork_while_other_threads_are_at_work(work: str) -> None:
    program = "check()\n" + textwrap.dedent(BESIDE[work])
    child.run(program, prelude=child.PRELUDE + BUSY, Q4JIT_NUM_THREADS="3")


@pytest.mark.process
def test_a_bound_call_in_a_forked_child_has_its_threads() -> None:
    child.run(
        """
        call = product.bind(x_wide, wide)
        def work():
            np.testing.assert_allclose(call(), expected_wide, rtol=1e-4, atol=1e-4)
            assert workers() == 2
        work()
        reap(in_child(work))
        """,
        prelude=child.PRELUDE + WORKERS,
        Q4JIT_NUM_THREADS="3",
    )


@pytest.mark.process
def test_no_thread_runs_at_a_fork_and_the_next_call_starts_them() -> None:
    """Count as Python does from 3.12 on, after the fork and before `after_in_parent` ends."""
    child.run(
        """
        import os
        counts = []
        os.register_at_fork(
            after_in_parent=lambda: counts.append(len(os.listdir("/proc/self/task")))
        )
        """
        + textwrap.indent(child.PRELUDE, " " * 8)
        + """
        call = product.bind(x_wide, wide)
        for _ in range(30):
            check()
            call()
            assert len(os.listdir("/proc/self/task")) == 4
            reap(in_child(lambda: None))
        assert counts == [1] * 30, counts
        """,
        prelude="",
        Q4JIT_NUM_THREADS="4",
        OPENBLAS_NUM_THREADS="1",
    )


@pytest.mark.process
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    # the program is a file, because worker processes import its functions
    main = tmp_path / "program.py"
    main.write_text(
        child.PRELUDE
        + f"""
import multiprocessing

def work(scale):
    check()
    return float(product(x_wide * np.float32(scale), wide).sum())

if __name__ == "__main__":
    check()
    with multiprocessing.get_context({method!r}).Pool(2) as workers:
        results = workers.map(work, [1, 2, 3, 4])
    assert results == [work(scale) for scale in [1, 2, 3, 4]]
""",
        encoding="utf-8",
    )
    done = child.finish([sys.executable, str(main)], child.environment(Q4JIT_NUM_THREADS="3"))
    assert done.returncode == 0, done.stderr


def test_python_threads_call_at_the_same_time() -> None:
    child.run(
        """
        failures = []
        def work():
            try:
                for _ in range(300):
                    check()
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failures, failures
        assert product.stats.compiles + product.stats.hits > 0
        assert product.stats.misses == 2
        """,
        Q4JIT_NUM_THREADS="3",
    )


# --- exits ----------------------------------------------------------------------------------------

EXITS = {
    "end of the program": ("check()", 0),
    "sys.exit": ("check(); sys.exit(3)", 3),
    "sys.exit in a thread": (
        """
        check()
        thread = threading.Thread(target=lambda: (check(), sys.exit(3)))
        thread.start()
        thread.join()
        """,
        0,
    ),
    "os._exit": ("check(); os._exit(4)", 4),
    "an exception": ("check(); raise ValueError('on purpose')", 1),
    "calls of an exit handler": (
        "import atexit; atexit.register(check); check()",
        0,
    ),
    "a first call in an exit handler": ("import atexit; atexit.register(check)", 0),
    "a daemon thread that calls kernels": (
        """
        check()
        big = quantize(rng.standard_normal((512, 16384)).astype(np.float32), "Q4_0")
        x_big = rng.standard_normal((64, 512)).astype(np.float32)
        def forever():
            while True:
                product(x_big, big)
        for _ in range(2):
            threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.25 + 0.05 * rng.random())
        """,
        0,
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("exit_by", EXITS)
def test_no_exit_crashes_or_hangs(exit_by: str) -> None:
    program, status = EXITS[exit_by]
    for _ in range(3 if "daemon" in exit_by else 1):
        done = child.finish(child.command(program), child.environment(Q4JIT_NUM_THREADS="4"))
        assert done.returncode == status, done.stderr
        assert ("on purpose" in done.stderr) == (exit_by == "an exception"), done.stderr


@pytest.mark.process
def test_exit_handlers_registered_before_the_import_can_call() -> None:
    tasks = "import os\ndef tasks(): return len(os.listdir('/proc/self/task'))\n"
    early = tasks + "import atexit\natexit.register(lambda: (check(), print(tasks())))\n"
    for program in ("", "check()"):
        output = child.run(
            program,
            prelude=early + child.PRELUDE,
            Q4JIT_NUM_THREADS="4",
            OPENBLAS_NUM_THREADS="1",
        )
        assert output.split() == ["1"]  # the workers have ended, and no others are started
