"""Run a function in NumPy instead of its kernels, as Q4JIT_DISABLE_JIT asks for."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from q4jit.arrays.outputs import check_out
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError, expected
from q4jit.floats import float_type_of
from q4jit.frontend.containers import Misfit
from q4jit.frontend.structures import results_for, unflattened
from q4jit.frontend.trace import call_with, place_of_result, refuse_change

_ON_HOST: Final = "an array in host memory, because Q4JIT_DISABLE_JIT is set"


def run_in_numpy(
    function: Callable[..., Any],
    names: Sequence[str],
    keywords: tuple[str, ...],
    args: tuple[Any, ...],
    out: Any,
) -> Any:
    """Run a function in NumPy, on the flattened arguments that its kernels would take.

    names: the arguments' names. keywords: the names of the last ones, which are passed by keyword.
    Raises the errors of a compiled call that concern arguments and `out`.
    """
    for name, value in zip(names, args, strict=True):
        if isinstance(value, DeviceView):
            raise ArgumentError(expected(_ON_HOST, str(value), where=f"argument {name!r}"))
    # float64 scalars of NumPy make the result float64, Python's floats do not
    wide = (np.float16, np.float64, np.longdouble)
    args = tuple(float(v) if isinstance(v, wide) else v for v in args)
    given = unflattened(args)
    result = call_with(function, given, keywords)
    refuse_change(function, args, given, keywords)
    if out is None:
        return result
    try:
        _write_results(result, out, names, args)
    except Misfit as misfit:
        message = misfit.message(place_of_result(function, misfit.path))
        raise ArgumentError(message) from None
    return out


def _write_results(result: Any, out: Any, names: Sequence[str], args: Sequence[Any]) -> None:
    """Copy NumPy's results to `out`. Raises ArgumentError if it has the wrong kind or shape.

    Raises Misfit if the results cannot be taken apart.
    """
    values, results = results_for(result, out)
    wanted = [(np.shape(value), _kernel_dtype(value)) for value in values]
    given = out if results is None else results.arrays(args, out)
    returns_tuple = isinstance(result, tuple) or results is not None
    arrays = check_out(given, wanted, returns_tuple, names, args)
    for array, value in zip(arrays, values, strict=True):
        array[...] = value


def _kernel_dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype that kernels give to a result of NumPy's, which may be in float64."""
    dtype = np.asarray(value).dtype
    return dtype if float_type_of(dtype) else np.dtype(np.float32)
