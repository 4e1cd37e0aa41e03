"""LLVM runs on a large stack, whatever the stack of the thread that calls."""

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q4jit import TargetError
from q4jit.compilers import stack
from q4jit.compilers.stack import on_large_stack
from tests.support import child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels run on Linux")

SMALL = 64 << 10


def in_thread(stack_bytes: int, work: Callable[[], Any]) -> Any:
    """Return `work()`, called in a thread with a stack of this size."""
    results = []
    before = threading.stack_size(stack_bytes)
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    threading.stack_size(before)
    thread.join()
    return results[0]


@pytest.mark.process
@pytest.mark.parametrize("kib", [64, 128, 256, 1024])
def test_the_first_call_in_a_thread_with_a_small_stack(kib: int) -> None:
    child.run(
        f"""
        threading.stack_size({kib} * 1024)
        f = specialize(cache=False)(lambda x, w: np.exp(-np.abs(x @ w)) / (2 + np.tanh(x @ w)))
        done = []
        def call():
            check(specialize(cache=False)(lambda x, w: x @ w))
            done.append(f(x_wide, wide))
            product.warmup(x_small, small)
            done.append(product.inspect_asm())
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert len(done) == 2
        np.testing.assert_allclose(
            done[0], np.exp(-np.abs(expected_wide)) / (2 + np.tanh(expected_wide)), 1e-3, 1e-4
        )
        """
    )


@pytest.mark.process
def test_the_main_thread_with_a_small_stack() -> None:
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_STACK)[0])\ncheck()"
    words = ["sh", "-c", 'ulimit -S -s 128 && exec "$@"', "sh", *child.command(program)]
    done = child.finish(words, child.environment(OPENBLAS_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "131072\n"


def test_the_size_of_a_stack_is_known() -> None:
    assert SMALL <= in_thread(SMALL, stack._stack_bytes) < 2 * SMALL
    assert in_thread(4 << 20, stack._stack_bytes) >= 4 << 20


def test_a_large_stack_needs_no_thread() -> None:
    assert in_thread(8 << 20, lambda: on_large_stack(threading.get_ident) == threading.get_ident())
    assert in_thread(SMALL, lambda: on_large_stack(threading.get_ident) != threading.get_ident())
    assert in_thread(SMALL, lambda: on_large_stack(stack._stack_bytes)) >= stack._ENOUGH_BYTES


def test_the_thread_has_ended_when_its_result_is_there() -> None:
    def count() -> tuple[int, int]:
        before = len(list(Path("/proc/self/task").iterdir()))
        on_large_stack(int)
        return before, len(list(Path("/proc/self/task").iterdir()))

    before, after = in_thread(SMALL, count)
    assert before == after


class _Owner:
    """Stands for an object of LLVM."""


def test_errors_are_raised_without_a_reference_to_their_frames() -> None:
    owners = []

    def fail() -> None:
        owner = _Owner()
        owners.append(weakref.ref(owner))
        raise KeyError("from the thread")

    def caught() -> str:
        try:
            on_large_stack(fail)
        except KeyError as error:
            return str(error)
        return "nothing"

    gc.disable()  # LLVM's objects must die while the lock is held, not at some collection
    try:
        assert in_thread(SMALL, caught) == "'from the thread'"
        assert owners[0]() is None
    finally:
        gc.enable()


def test_a_refused_thread_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_run_thread", lambda start: 11)

    def refused() -> BaseException | None:
        try:
            on_large_stack(int)
        except TargetError as error:
            return error
        return None

    assert "Resource temporarily unavailable" in str(in_thread(SMALL, refused))


def test_the_attributes_have_room() -> None:
    class Guarded(ctypes.Structure):
        _fields_ = (("attributes", ctypes.c_char * 128), ("guard", ctypes.c_char * 128))

    guarded = Guarded(guard=b"untouched")
    stack.threads_library().pthread_attr_init(ctypes.byref(guarded))
    assert guarded.guard == b"untouched"
