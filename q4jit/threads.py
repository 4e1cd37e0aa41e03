"""The number of threads of CPU kernels, as users set and read it."""

from q4jit import config
from q4jit.errors import ArgumentError, expected
from q4jit.runtime import pool
from q4jit.sizes import whole_number


def set_num_threads(number: int | None) -> None:
    """Set the number of threads of CPU kernels in this process, from the next call on.

    number: from 1 to 1024; it overrides Q4JIT_NUM_THREADS and OMP_NUM_THREADS. None: follow them
    again. Raises ArgumentError for anything else.
    """
    chosen = None
    if number is not None:
        try:
            chosen = whole_number(number)
        except TypeError:
            chosen = None
        if chosen is None or not 1 <= chosen <= config.MOST_THREADS:
            what = f"a whole number from 1 to {config.MOST_THREADS}, or None"
            raise ArgumentError(expected(what, repr(number), where="set_num_threads"))
    config.choose_threads(chosen)
    pool.resize()


def get_num_threads() -> int:
    """Return the number of threads of CPU kernels: the caller and its workers.

    Warns if an environment variable was changed after the first call, because that has no effect.
    Raises ConfigError if the variable has a value that q4jit cannot use.
    """
    return pool.threads_in_use()
