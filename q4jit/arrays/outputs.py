"""Check the arrays of `out=` on the host."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from q4jit.arrays.arguments import plain
from q4jit.arrays.call_shapes import Result
from q4jit.conversions import is_tensor, tensor_dtype
from q4jit.errors import ArgumentError, expected
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.tensor import QuantizedTensor

_OVERLAP_WORK: Final = 10_000  # candidates to try before strided arrays count as overlapping


def check_out(
    out: object,
    results: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
    returns_tuple: bool,
    names: Sequence[str],
    args: Sequence[object],
) -> tuple[NDArray[Any], ...]:
    """Return the arrays of `out=` as a tuple. Raises ArgumentError unless they fit the results.

    results: the shape and the dtype of each. names, args: the call's arguments, which must not
    share memory with out.
    """
    given = out if isinstance(out, tuple) else (out,)
    if isinstance(out, tuple) != returns_tuple or len(given) != len(results):
        what = f"a tuple of {len(results)} arrays" if returns_tuple else "one array"
        raise ArgumentError(expected(what, type(out).__name__, where="out="))
    given = tuple(plain(array) for array in given)
    for array, (shape, dtype) in zip(given, results, strict=True):
        if (
            not isinstance(array, np.ndarray)
            or array.dtype != dtype
            or array.shape != shape
            or not array.flags.writeable
            or _overlaps_itself(array)
        ):
            what = f"a writable {dtype} {list(shape)}"
            raise ArgumentError(expected(what, _show(array), where="out="))
    _refuse_overlap(given, names, args)
    return given


def _show(array: Any) -> str:
    """Return how an error shows an array of `out=`, or another object."""
    if is_tensor(array):
        return f"a tensor {tensor_dtype(array)} {list(array.shape)} on {array.device}"
    if not isinstance(array, np.ndarray):
        return type(array).__name__
    shown = f"{'' if array.flags.writeable else 'read-only '}{array.dtype} {list(array.shape)}"
    if _overlaps_itself(array):
        shown += f" whose elements share memory (strides {list(array.strides)})"
    return shown


def _overlaps_itself(array: NDArray[Any]) -> bool:
    """Return whether elements of an array share memory, or interleave in a way that may do so."""
    if not array.size:
        return False
    end = array.itemsize  # of the elements along all axes with smaller strides
    for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1 and stride < end:
            return True
        end += (size - 1) * stride
    return False


def usable(array: NDArray[Any], result: Result) -> bool:
    """Return whether kernels can write the result to an array of out= directly."""
    flags = array.flags
    return bool(result.pick is None and flags.c_contiguous and flags.aligned)


def _refuse_overlap(
    given: Sequence[NDArray[Any]], names: Sequence[str], args: Sequence[object]
) -> None:
    for i, array in enumerate(given):
        for name, value in zip(names, args, strict=True):
            if _overlaps_argument(array, value):
                raise ArgumentError(
                    f"out= overlaps the argument {name!r}, which is read while out is written; "
                    "use separate memory"
                )
        if any(_overlap(array, other) for other in given[:i]):
            raise ArgumentError("two arrays of out= overlap; use separate memory")


def _overlaps_argument(array: NDArray[Any], value: object) -> bool:
    """Return whether an array of out= overlaps an argument, or the blocks of a weight."""
    if isinstance(value, QuantizedTensor | ExpertTensor):
        first, last = value._resident.span
        start, end = byte_bounds(array)
        return bool(array.size) and start < last and first < end
    return isinstance(value, np.ndarray) and _overlap(array, value)


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Return whether two arrays share an element; adjacent columns of one matrix do not."""
    if not np.may_share_memory(a, b):
        return False
    try:
        # NumPy's stubs allow only the special values 0 and -1
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
