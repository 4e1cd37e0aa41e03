"""Checks that the cure in an error's message works."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit import Q4JitError


def check_cure(
    call: Callable[[Any], object], value: object, name: str, cure: str, **names: object
) -> None:
    """Check that a call refuses `value`, which it calls `name`, and accepts what the cure gives.

    names: what the expression `cure` uses besides `name` and NumPy.
    """
    with pytest.raises(Q4JitError) as caught:
        call(value)
    message = str(caught.value)
    assert name in message
    assert cure in message
    # the cures are written in this file's callers, and the test has just read them in a message
    call(eval(cure, {"np": np, name: value, **names}))
