"""Whole numbers that users pass as sizes and counts."""

import operator
from typing import Any

import numpy as np


def whole_number(value: Any) -> int:
    """Return a whole number of Python, NumPy or another library as an int.

    Raises TypeError for other values and for truth values, with which old releases of NumPy count.
    """
    if isinstance(value, bool | np.bool_):
        raise TypeError("a truth value")
    return operator.index(value)
