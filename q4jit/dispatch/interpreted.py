"""Run a function in NumPy instead of its kernels, as Q4JIT_DISABLE_JIT asks for."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from q4jit.arrays.bfloat16_arrays import Bfloat16Array, plain, promoting
from q4jit.arrays.outputs import check_out
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError, expected
from q4jit.floats import float_type_of
from q4jit.frontend.containers import Apart, Misfit, together
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
    args = tuple(float(v) if isinstance(v, np.float64 | np.longdouble) else v for v in args)
    values = tuple(map(promoting, args))
    given = unflattened(values)
    result = call_with(function, given, keywords)
    refuse_change(function, values, given, keywords)
    if out is None:
        return _plain_results(result)
    try:
        _write_results(result, out, names, args)
    except Misfit as misfit:
        message = misfit.message(place_of_result(function, misfit.path))
        raise ArgumentError(message) from None
    return out


def _plain_results(result: Any) -> Any:
    """Return results with NumPy's own arrays in place of `Bfloat16Array`s."""
    apart = Apart()
    try:
        tree = apart.tree(result)
    except Misfit:  # nothing but NumPy takes such results
        return result
    if not any(isinstance(leaf, Bfloat16Array) for leaf in apart.leaves):
        return result
    return together(tree, map(plain, apart.leaves))


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
