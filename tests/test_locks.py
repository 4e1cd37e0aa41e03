"""Warnings are raised when no lock is held, because they call the user's code."""

import threading
import warnings
from collections.abc import Callable

import pytest

from q4jit.locks import BUILD, warn, warnings_later
from tests.support import child

HOOK = """
import pathlib, tempfile, warnings
import q4jit
seen = []

def other_call():
    # a first call, which needs the lock
    check(specialize(lambda x, w: (x @ w) * 1))

def show(message, category, *rest):
    seen.append(category.__name__)
    thread = threading.Thread(target=other_call)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "deadlock"

warnings.simplefilter("always")
warnings.showwarning = show
"""
"""A hook that waits for another thread, as the handler of a log may."""

CASES = {
    "an unusable cache": """
        os.environ["Q4JIT_CACHE_DIR"] = "/dev/null/cache"
        check()
    """,
    "no home directory": """
        from q4jit import config
        config.cache_dir = lambda: None
        check()
    """,
    "the cache of the pool": """
        from q4jit.runtime import pool
        os.environ["Q4JIT_CACHE_DIR"] = "/dev/null/cache"
        pool.address()
    """,
    "a changed variable": """
        check()
        os.environ["Q4JIT_NUM_THREADS"] = "3"
        check(specialize(lambda x, w: x @ w))
    """,
    "damaged tunings": """
        from q4jit.hip import tunings
        os.environ["Q4JIT_CACHE_DIR"] = folder = tempfile.mkdtemp()
        tunings.path().write_text("damaged")
        assert tunings.stored() == {}
        source = pathlib.Path(folder, "more")
        source.write_text(tunings.to_text({}))
        tunings.merge_file(source)
        assert len(seen) == 2, seen
    """,
}


@pytest.mark.process
@pytest.mark.parametrize("case", CASES)
def test_a_warning_is_raised_without_the_lock(case: str) -> None:
    end = """
        assert seen, "no warning"
        """
    child.run(CASES[case] + end, prelude=child.PRELUDE + HOOK, Q4JIT_NUM_THREADS="2")


def held() -> bool:
    """Return whether another thread would have to wait for the lock."""
    free: list[bool] = []

    def take() -> None:
        free.append(BUILD.acquire(blocking=False))
        if free[0]:
            BUILD.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not free[0]


def test_warnings_wait_for_the_outermost_release(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bool]] = []

    def show(message: Warning, *_: object) -> None:
        shown.append((str(message), held()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        warn("now", UserWarning)
        with warnings_later(), BUILD:
            with warnings_later(), BUILD:
                warn("first", UserWarning)
            warn("second", UserWarning)
            assert len(shown) == 1
    assert shown == [("now", False), ("first", False), ("second", False)]


def use(body: Callable[[], None]) -> None:
    with warnings_later(), BUILD:
        warn("late", UserWarning)
        body()


def fail() -> None:
    raise ValueError("the body's own")


@pytest.mark.parametrize("body", [fail, lambda: None])
def test_a_warning_can_be_an_error(body: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="late") as caught:
            use(body)
    assert not held()
    assert isinstance(caught.value.__context__, ValueError) == (body is fail)
