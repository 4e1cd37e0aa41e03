"""Objects of Python's as constants of PyTorch's compiler.

The compiler calls a function with `assume_constant_result` while it traces, and keeps the result.
PyTorch 2.11 passes only numbers, strings and tuples to it: so these functions get the `id` of an
object, which the compiler guards, and look the object up.
"""

import ctypes
from typing import Any


def object_of(identity: int) -> Any:
    """Return the object with an `id`, which the caller keeps alive."""
    return ctypes.cast(identity, ctypes.py_object).value
