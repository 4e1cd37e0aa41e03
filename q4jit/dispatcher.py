"""`@specialize`: from a call's arguments to compiled kernels.

A call with known shapes takes one dictionary look-up and runs its kernels. For new shapes the
`specializer` finds kernels or compiles them. An error of any stage is raised; nothing falls back
silently.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, ParamSpec, TypeVar, overload

import numpy as np

from q4jit import config
from q4jit.arrays.dtypes import F32
from q4jit.arrays.host_tensors import are_on_host, arrays_of, is_host_tensor, tensors_of
from q4jit.arrays.libraries import with_views
from q4jit.arrays.specs import shape_key, stand_in
from q4jit.arrays.torch_tensors import arrays_sharing, tensor_facts
from q4jit.dispatch import pytorch
from q4jit.dispatch.inspected import Inspected
from q4jit.dispatch.nested import hold_symbols, leaves_to_prepare, trace_through
from q4jit.dispatch.options import Options, unknown_arguments
from q4jit.dispatch.pickling import PickledAsFunction
from q4jit.dispatch.policy import runs_kernels
from q4jit.dispatch.specializer import Specializer
from q4jit.errors import ArgumentError, expected
from q4jit.frontend.containers import LEAVES
from q4jit.frontend.structures import flattened, names_of, unflattened
from q4jit.locks import BUILD, warnings_later
from q4jit.pipeline import DeviceLaunch, Launch
from q4jit.runtime.pool import warn_of_changed_variables
from q4jit.weights.tensor import QuantizedTensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

# types of arguments that are never on a device
_PLAIN: Final = LEAVES | {np.float32, np.float64}


class Specialized(PickledAsFunction, Inspected, Generic[_P, _R]):
    """A function that runs as compiled kernels. `specialize` makes it.

    Arguments of a call are those of the function:
        - float arrays: x [..., K], biases [N], residuals [..., N]; leading dimensions broadcast.
        - int32 or int64 arrays of ids, for `w.rows(ids)` and `np.vecmat(x, w[ids])`.
        - weights: `QuantizedTensor` [K, N], or `ExpertTensor` [E, K, N].
        - floats, whose value may change from call to call.
        - int, bool, str and None. Each value is traced, and compiled if it changes the kernels.
        - lists, tuples, dicts, dataclasses and NamedTuples of these.

    Attributes:
        py_func: the undecorated function, which computes the same in NumPy.
        options: the options of `specialize`.
    """

    def __init__(self, function: Callable[_P, _R], options: Options) -> None:
        functools.update_wrapper(self, function)  # first, because it may set the names below
        self.py_func = function
        self.options = options
        self._name = getattr(function, "__name__", type(function).__name__)
        self._python_signature = inspect.signature(function)
        self._parameters, self._keywords = _parameters(self._python_signature, self._name)
        given = self._python_signature.parameters.items()
        self._defaults = {name: p.default for name, p in given if p.default is not p.empty}
        self._disabled = config.jit_disabled()
        self._hits = self._misses = 0
        self._unchanged: Callable[[], bool] | None = None  # whether globals are, if it reads any
        self._specializer = Specializer(function, options, self._parameters, self._keywords)
        kept = self._specializer.kept
        self._launches, self._on_tensors = kept.launches, kept.on_tensors
        self._make_picklable()

    _start = __init__

    def __repr__(self) -> str:
        return f"<specialized {self._name}({', '.join(self._parameters)})>"

    # --- calls ----------------------------------------------------------------------------------

    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...

    @overload
    def __call__(self, *args: Any, out: Any, **kwargs: Any) -> _R: ...

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the function's kernels and return its results, in the containers that it returns.

        Results are arrays of the same library as the arguments: NumPy, PyTorch, CuPy or another
        with DLPack. Numbers and weights that it passes on come back as they are. out: an
        array, or arrays in the same containers, in the results' shapes; it is returned.

        Raises:
            ArgumentError: the kind, dtype, shape or device of an argument or of `out` is wrong.
            TraceError: the function cannot be compiled; the message shows the line.
            CompileError: a compiler failed.
            TargetError: the target cannot run on this machine.
            DeviceError: a GPU or its driver failed.
        """
        bridge = pytorch.bridge
        if bridge is not None and bridge.is_traced():
            return bridge.call(self, args, kwargs, out)
        if kwargs or len(args) != len(self._parameters):
            args = positional(self, args, kwargs)
        if self._unchanged is not None and not self._unchanged():
            self._renew()
        key: list[object] = []
        for value in args:  # inlined: a function call per argument would double the time
            kind = type(value)
            if kind is np.ndarray and value.dtype is F32:
                key.append(value.shape)
            elif kind is QuantizedTensor:
                key.append(value.signature)
            elif kind in _PLAIN:
                key.append(shape_key(value))
            else:
                return self._call(args, out)
        launch = self._launches.get(tuple(key))
        if launch is None:
            return self._call(args, out)
        self._hits += 1
        return launch(args, out)

    def _call(self, args: tuple[Any, ...], out: Any) -> Any:
        """Run a call whose shapes are new or whose arguments may be on a device."""
        if not _PLAIN.issuperset(map(type, args)):
            bridge = pytorch.bridge
            if bridge is not None:
                if bridge.needs_operator(args):
                    return bridge.call(self, args, {}, out)
                given, args = args, bridge.with_weights(args, self._parameters)
                if args is not given:
                    return bridge.with_modules(self._run(args, out), given, args)
        return self._run(args, out)

    def _run(self, args: tuple[Any, ...], out: Any) -> Any:
        """Run a call on the memory of its arguments."""
        if out is None and (arrays := arrays_sharing(args)) is not None:
            launch = self._launches.get(tuple([shape_key(value) for value in arrays]))
            if launch is not None:
                self._hits += 1
                return tensors_of(launch(arrays))
        facts, on_host = None, False
        if not _PLAIN.issuperset(map(type, args)):
            facts = tensor_facts(args, out)
            if facts is None:
                given, args = args, flattened(args, self._parameters)
                if hold_symbols(args):
                    return trace_through(self, given, args, out)
                facts = None if args is given else tensor_facts(args, out)
            if facts is not None:
                known, pointers, stream = facts
                on_device = self._on_tensors.get(known)
                if on_device is not None:
                    self._hits += 1
                    return on_device.on_tensors(args, out, pointers, stream)
            values, args = args, with_views(args, names_of(args, self._parameters))
            on_host = are_on_host(values, args)
        if on_host:
            result = self._run(unflattened(args), None if out is None else arrays_of(out))
            return tensors_of(result) if out is None else out
        key = tuple([shape_key(value) for value in args])
        launch = self._launches.get(key)
        if launch is None:
            if self._disabled:
                return self._specializer.run_python(args, out)
            launch = self._specialise(args, key)
        else:
            self._hits += 1
        result = launch(args, out)
        if facts is not None and isinstance(launch, DeviceLaunch):
            self._specializer.kept.add_on_tensors(facts[0], launch)
        return result

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind like a function, so that `self` is an argument in a class."""
        return self if instance is None else types.MethodType(self, instance)

    # --- specialising -----------------------------------------------------------------------------

    def _specialise(self, args: Sequence[Any], key: tuple[object, ...]) -> Launch:
        request = self._specializer.request(args)
        if self.options.tune:
            self._specializer.search(request)
        warn_of_changed_variables()
        with warnings_later(), BUILD:
            if (launch := self._launches.get(key)) is not None:  # made by another thread meanwhile
                self._hits += 1
                return launch
            self._misses += 1
            launch = self._specializer.launch(request)
            self._unchanged = self._specializer.tracer.unchanged
            if self._specializer.is_current(request):
                self._launches[key] = launch
            return launch

    def _renew(self) -> None:
        """Forget the launches if a global or a closure value has changed."""
        self._specializer.tracer.renew()
        with BUILD:
            self._unchanged = self._specializer.tracer.unchanged

    # --- preparing calls --------------------------------------------------------------------------

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Compile for arguments like these, and repack their weights, without running a kernel.

        Pass the arguments of a call, or a tuple of ints in place of a float32 array of that shape:
        `f.warmup((1, 576), w)`. Only types and shapes of arrays matter. Elsewhere than on Linux,
        prepare only `inspect_source`. Raises the errors of a call.
        """
        shaped = {name: stand_in(value) for name, value in kwargs.items()}
        given = self._with_weights(positional(self, tuple(map(stand_in, args)), shaped))
        prepare = self._prepared if runs_kernels() else self._specializer.plan
        prepare(leaves_to_prepare(self, given)[0])

    def bind(self, *args: Any, out: Any = None, **kwargs: Any) -> Callable[[], _R]:
        """Return a function without parameters that calls with these arguments.

        On the CPU, `bind` checks the arguments once; each call then reruns the kernels on the
        arrays' current contents, at little more than the kernels' own time. The arrays must keep
        their memory and shape. Without `out=`, all calls may return the same array with new
        contents. On a GPU, and with tensors, every call checks its arguments like a direct call.

        Example: `step = f.bind(x, w, out=y); x[...] = token; step()`. Raises the errors of a call.
        """
        values = positional(self, args, kwargs)
        held = self._with_weights(values)
        args, given = leaves_to_prepare(self, held)
        launch = self._prepared(args)
        if launch is None:
            return functools.partial(self._specializer.run_python, args, out)
        if held is not values:  # a module may move its weight
            return functools.partial(self, *values, out=out)
        on_host = any(map(is_host_tensor, flattened(given, self._parameters)))
        if isinstance(launch, DeviceLaunch) or on_host:
            return functools.partial(self, *given, out=out)
        call = launch.bind(args, out)
        unchanged = self._unchanged
        return call if unchanged is None else _BoundAgain(self, given, out, call, unchanged)

    def _with_weights(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments with a tensor of q4jit in place of each module that holds one."""
        bridge = pytorch.bridge
        return args if bridge is None else bridge.with_weights(args, self._parameters)

    def _prepared(self, args: tuple[Any, ...]) -> Launch | None:
        """Return the launch for arguments, its weights repacked; None if the JIT is disabled."""
        if self._disabled:
            self._specializer.signature_of(args)
            return None
        self._renew()
        key = tuple(shape_key(value) for value in args)
        launch = self._launches.get(key) or self._specialise(args, key)
        launch.prepare(args)
        return launch


class _BoundAgain:
    """A bound call of a function that reads globals: it is bound again if one has changed."""

    def __init__(
        self,
        function: Specialized[Any, Any],
        args: tuple[Any, ...],
        out: Any,
        call: Callable[[], Any],
        unchanged: Callable[[], bool],
    ) -> None:
        self._function, self._args, self._out = function, args, out
        self._call, self._unchanged = call, unchanged

    def __call__(self) -> Any:
        """Run the kernels."""
        if not self._unchanged():
            again: Any = self._function.bind(*self._args, out=self._out)
            if not isinstance(again, _BoundAgain):
                return again()
            self._call, self._unchanged = again._call, again._unchanged
        return self._call()


# --- arguments --------------------------------------------------------------------------------


def _parameters(signature: inspect.Signature, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all parameters, and of the keyword-only ones.

    Raises ArgumentError for *args, **kwargs and a parameter named `out`.
    """
    for parameter in signature.parameters.values():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            kind = "list" if parameter.kind is parameter.VAR_POSITIONAL else "dict"
            what, cure = "parameters that each have a name", f"use one parameter for a {kind}"
            raise ArgumentError(expected(what, str(parameter), where=f"{name}()", cure=cure))
        if parameter.name == "out":
            raise ArgumentError(
                f"{name}(): a parameter cannot be named 'out', because calls take out="
            )
    keywords = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(signature.parameters), tuple(keywords)


def positional(
    f: Specialized[_P, _R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of a call in the order of f's parameters. Raises ArgumentError."""
    try:
        bound = f._python_signature.bind(*args, **kwargs)
    except TypeError as error:
        problem = unknown_arguments(kwargs.keys() - set(f._parameters)) or str(error)
        raise ArgumentError(
            f"{f._name}(): {problem}; its arguments are {f._python_signature}"
        ) from None
    bound.apply_defaults()
    return tuple(bound.arguments[name] for name in f._parameters)


# --- the decorator ------------------------------------------------------------------------------


@overload
def specialize(function: Callable[_P, _R], /) -> Specialized[_P, _R]: ...


@overload
def specialize(
    function: Callable[_P, _R],
    /,
    *,
    K: int | None = None,
    N: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    precision: str = "f32",
    cache: bool = True,
    tune: bool = False,
) -> Specialized[_P, _R]: ...


@overload
def specialize(
    *,
    K: int | None = None,
    N: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    precision: str = "f32",
    cache: bool = True,
    tune: bool = False,
) -> Callable[[Callable[_P, _R]], Specialized[_P, _R]]: ...


def specialize(
    function: Any = None,
    /,
    *,
    K: int | None = None,
    N: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    precision: str = "f32",
    cache: bool = True,
    tune: bool = False,
    **unknown: object,
) -> Any:
    """Compile a NumPy function around quantised matrix products into fused kernels.

    The first call with new shapes compiles; later ones only run the kernels. Use it as
    `@specialize`, `@specialize(**options)` or `specialize(f, **options)`:

        @specialize
        def swiglu(x, gate, up):
            g = x @ gate
            return g / (1 + np.exp(-g)) * (x @ up)

        y = swiglu(x, gate, up)  # x: float32 [M, 576]; gate, up: Q4_0 [576, 1536]

    The function may use @, arithmetic, comparisons, slices of the last axis, and NumPy's where,
    exp, log, tanh, sqrt, abs, square, reciprocal, maximum, minimum, clip, sum, mean, max, min, var,
    std and linalg.norm. Globals and closures are read when the function is traced; a call after one
    has changed traces it again.

    Args:
        function: the function; None to give only options.
        K: the last dimension of x. A call with another one raises ArgumentError.
        N: the last dimension of the results, checked in the same way.
        block_size: threads per block on a GPU; overrides tuned values.
        target: where calls run: "cpu", "cpu:x86-64-v3", "hip" (any GPU), "hip:1" (the second
            GPU), "hip:gfx1100" (one of that architecture), "cuda:0". None: on the arrays'
            device; NumPy arrays go to the GPU if there is one and the work outweighs the transfer.
        precision: the largest error, as rms relative to √Σ(xw)²: "f32" (2e-6), "f16" (5e-4) or
            "i8" (2e-2). Kernels may be more exact.
        cache: keep compiled kernels on disk.
        tune: search for the fastest kernels at the first call of each class of M on a GPU. It
            takes seconds to minutes, reports on standard error, and keeps its results on disk.
            The CPU has nothing to search for.
        **unknown: refused with the names of the options.

    Returns:
        A `Specialized`, or a decorator that makes one if only options are given.

    Raises:
        ArgumentError: an option or the function is unsuitable.
        TargetError: the target is unknown, or cannot do what the options ask for.
    """
    if unknown:
        known, got = ", ".join(Options.__dataclass_fields__), ", ".join(sorted(unknown))
        raise ArgumentError(expected(f"options {known}", got, where="specialize"))
    chosen = Options(K, N, block_size, target, precision, cache, tune)
    if function is None:
        return functools.partial(_decorate, options=chosen)
    return _decorate(function, chosen)


def _decorate(function: Callable[_P, _R], options: Options) -> Specialized[_P, _R]:
    if isinstance(function, Specialized):
        raise ArgumentError("cannot specialise a function twice; decorate it once")
    if not callable(function):
        raise ArgumentError(
            expected(
                "a function",
                type(function).__name__,
                where="specialize",
                cure="pass options by name",
            )
        )
    return Specialized(function, options)
