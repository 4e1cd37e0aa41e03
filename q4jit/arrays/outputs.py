"""`out=`: which arrays are accepted for results, and which kernels may fill in place."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.call_shapes import Result
from q4jit.arrays.dtypes import F32
from q4jit.errors import ArgumentError
from q4jit.weights.tensor import QuantizedTensor

_OVERLAP_WORK: Final = 10_000  # candidates tried before strided arrays count as overlapping


def check_out(
    out: object,
    shapes: Sequence[tuple[int, ...]],
    returns_tuple: bool,
    names: Sequence[str],
    args: Sequence[object],
) -> tuple[NDArray[np.float32], ...]:
    """The arrays of `out=` for results of these shapes; raises ArgumentError where they do not fit.

    names, args: the call's arguments, none of which may share memory with out.
    """
    given = out if isinstance(out, tuple) else (out,)
    if isinstance(out, tuple) != returns_tuple or len(given) != len(shapes):
        expected = f"a tuple of {len(shapes)} arrays" if returns_tuple else "one array"
        raise ArgumentError(f"out= is {type(out).__name__}: accepted is {expected}")
    for array, shape in zip(given, shapes, strict=True):
        if (
            not isinstance(array, np.ndarray)
            or array.dtype != F32
            or array.shape != shape
            or not array.flags.writeable
            or (
                array.size
                and any(n > 1 and not s for n, s in zip(shape, array.strides, strict=True))
            )
        ):
            found = (
                f"{'' if array.flags.writeable else 'read-only '}{array.dtype} {list(array.shape)}"
                if isinstance(array, np.ndarray)
                else type(array).__name__
            )
            raise ArgumentError(f"out= is {found}: accepted is a writable float32 {list(shape)}")
    _refuse_overlap(given, names, args)
    return given


def usable(array: NDArray[np.float32], result: Result) -> bool:
    """Whether kernels may fill an array of out= in place."""
    flags = array.flags
    return bool(result.pick is None and flags.c_contiguous and flags.aligned)


def _refuse_overlap(
    given: Sequence[NDArray[np.float32]], names: Sequence[str], args: Sequence[object]
) -> None:
    for i, array in enumerate(given):
        for name, value in zip(names, args, strict=True):
            memory = value.raw if isinstance(value, QuantizedTensor) else value
            if isinstance(memory, np.ndarray) and _overlap(array, memory):
                raise ArgumentError(
                    f"out= overlaps the argument {name!r}, which is read while out is written: "
                    "accepted is an array of its own memory"
                )
        if any(_overlap(array, other) for other in given[:i]):
            raise ArgumentError("two arrays of out= overlap: accepted are arrays of their own")


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element; columns of one matrix beside each other do not."""
    if not np.may_share_memory(a, b):
        return False
    try:
        # NumPy's stubs know only 0 and -1, the two special values
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
