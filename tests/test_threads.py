"""The number of threads: set and read in Python, and a changed environment variable."""

from typing import Any

import numpy as np
import pytest

from q4jit import ArgumentError, get_num_threads, set_num_threads
from tests.support import child

COUNT = """
import os, warnings, q4jit

def workers():
    names = (open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task"))
    return sum(name.startswith("q4jit-") for name in names)
"""


@pytest.mark.parametrize("first", [0, 1])
def test_the_number_of_threads_is_set_before_and_between_calls(first: int) -> None:
    child.run(
        f"""
        if {first}:
            check()
        for number in (3, 1, 4, np.int64(2)):
            q4jit.set_num_threads(number)
            assert q4jit.get_num_threads() == number
            check()
            assert workers() == number - 1, (number, workers())
            uses = f"use {{number}} thread{{'' if number == 1 else 's'}}\\n"
            assert uses in product.explain(), product.explain()
        q4jit.set_num_threads(None)
        check()
        assert q4jit.get_num_threads() == 3
        assert workers() == 2
        """,
        prelude=child.PRELUDE + COUNT,
        Q4JIT_NUM_THREADS="3",
    )


def test_calls_that_run_meanwhile_are_right() -> None:
    child.run(
        """
        errors = []
        def work():
            try:
                for _ in range(30):
                    check()
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work) for _ in range(3)]
        check()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for number in (2, 1, 3):
                q4jit.set_num_threads(number)
        assert not errors, errors
        """,
        prelude=child.PRELUDE + COUNT,
    )


def test_a_changed_variable_warns_once() -> None:
    child.run(
        """
        def warned(action):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                action()
            return [str(w.message) for w in caught]
        new = lambda: specialize(lambda x, w: x @ w)(x_small, small)
        check()
        assert warned(new) == []
        for action in (q4jit.get_num_threads, product.explain, new):
            os.environ["Q4JIT_NUM_THREADS"] = str(4 + len(os.environ["Q4JIT_NUM_THREADS"]))
            os.environ["OMP_NUM_THREADS"] = os.environ["Q4JIT_NUM_THREADS"] = os.urandom(2).hex()
            os.environ["Q4JIT_NUM_THREADS"] = "5"
            (message,) = warned(action)
            assert "was set to" in message and "use q4jit.set_num_threads(...)" in message
            assert warned(action) == []
        assert q4jit.get_num_threads() == 3
        q4jit.set_num_threads(2)
        os.environ["Q4JIT_NUM_THREADS"] = "6"
        assert warned(check) == warned(q4jit.get_num_threads) == []
        """,
        prelude=child.PRELUDE + COUNT,
        Q4JIT_NUM_THREADS="3",
        OMP_NUM_THREADS=None,
    )


@pytest.mark.parametrize("number", [0, -1, 1025, True, np.True_, 2.0, "2", np.float32(2)])
def test_other_numbers_are_refused(number: Any) -> None:
    before = get_num_threads()
    with pytest.raises(ArgumentError, match="set_num_threads: expected a whole number from 1 to"):
        set_num_threads(number)
    assert get_num_threads() == before
